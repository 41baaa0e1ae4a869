//! How ranks that may be processes of several hosts meet, agree and notice who is lost: a TCP star beside the data.
//!
//! The messages of an exchange travel on the vendor's library; its errors name no rank and its waits may never end. So every
//! group keeps a [`Board`] in one process and a [`Member`] in each:
//!
//! | concept | file |
//! |---|---|
//! | where a board is, and the word that opens it | `place.rs` |
//! | the server: who came, who left, what all said | `board.rs` |
//! | a rank's side: join, agree, gather, give up, what ended the group | `member.rs` |
//! | frames of the connections | `wire.rs` |
//! | do the messages of all ranks fit each other? | `matching.rs` |
#![forbid(unsafe_code)]

mod board;
mod matching;
mod member;
mod place;
#[cfg(test)]
mod tests;
mod wire;

pub use board::{Board, Lost};
pub use matching::{Message, judge, offer};
pub use member::Member;
pub use place::{Place, Reach};
pub use wire::{Fields, Reader};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; what a panicked thread left behind is still consistent, since every change is one step.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
