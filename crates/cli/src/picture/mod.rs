//! Pictures as SVG files: layouts and masks, and what a run did when.
//!
//! A file is complete in itself: no scripts, no fonts, no network. It has light and dark colours (`prefers-color-scheme`),
//! which people with any kind of colour vision tell apart (Okabe and Ito, "Color Universal Design"), and nothing is said by
//! colour alone.

pub mod layout;
pub mod svg;
pub mod timeline;
