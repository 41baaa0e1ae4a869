//! Tables of C functions that are loaded at run time.
//!
//! [`table!`] turns C signatures into a struct whose functions come from a shared library, found when the program runs. So
//! `cargo build` needs no vendor's SDK, and a library or symbol that is missing is an
//! [`Error::Unavailable`] with the way to get it, never a panic.
//!
//! A function may have a symbol per *flavor* of the library: vendors that export the same functions under other names share
//! one table, and the flavor chooses the column.
//!
//! ```
//! use longspan_dylib::{Library, Search, table};
//!
//! table! {
//!     /// Mathematics.
//!     pub struct Math {
//!         /// Cosine of an angle in radians.
//!         fn cosine["cos"](x: f64) -> f64;
//!     }
//! }
//!
//! # #[cfg(target_os = "linux")]
//! # fn main() -> longspan_hal::Result<()> {
//! let search = Search {
//!     what: "libm",
//!     candidates: vec!["libm.so.6".into()],
//!     beside: &[],
//!     how_to_get_it: "install a C library",
//! };
//! let math = Math::load(Library::open(&search)?, 0)?;
//! // SAFETY: the signature is that of C's `cos`.
//! let one = unsafe { math.cosine(0.0) };
//! assert_eq!((one.call, one.value), ("cos", 1.0));
//! # Ok(())
//! # }
//! # #[cfg(not(target_os = "linux"))]
//! # fn main() {}
//! ```

use std::ffi::OsString;
use std::fmt::{Debug, Formatter};
use std::path::{Path, PathBuf};

use longspan_hal::{Error, Result};

/// What a function of a [`table!`] returned, with the symbol that was called: errors name it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub struct Returned<T> {
    /// The symbol.
    pub call: &'static str,
    /// The function's own value.
    pub value: T,
}

/// Where a library may be.
#[derive(Clone, Debug)]
pub struct Search {
    /// What is looked for, as messages name it.
    pub what: &'static str,
    /// Paths, or file names that the loader looks up, in order of preference.
    pub candidates: Vec<OsString>,
    /// Starts of the names of files that the library itself loads by name: where a candidate has a folder, they are loaded
    /// from it first, since the loader would not look there.
    pub beside: &'static [&'static str],
    /// What the user can do if none is found.
    pub how_to_get_it: &'static str,
}

/// A loaded library. It stays loaded for the life of the process: vendors' libraries start threads of their own.
#[derive(Clone)]
pub struct Library {
    inner: &'static libloading::Library,
    /// What was found where.
    what: &'static str,
    path: OsString,
    how_to_get_it: &'static str,
}

impl Search {
    /// Loads what lies beside the library. What is missing there shows when the library misses it.
    fn open_beside(&self, candidate: &Path) {
        let Some(Ok(folder)) = candidate.parent().filter(|_| !self.beside.is_empty()).map(std::fs::read_dir) else {
            return;
        };
        let wanted = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            self.beside.iter().any(|start| name.starts_with(start))
        };
        for path in folder.flatten().map(|entry| entry.path()).filter(wanted) {
            // SAFETY: a part of a vendor's library, whose initialisers are sound to run.
            if let Ok(library) = unsafe { libloading::Library::new(path) } {
                // It stays loaded, as the library that needs it does.
                std::mem::forget(library);
            }
        }
    }
}

impl Debug for Library {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library").field("what", &self.what).field("path", &self.path).finish_non_exhaustive()
    }
}

impl Library {
    /// Opens the first candidate that can be loaded.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with every candidate and why it could not be loaded.
    pub fn open(search: &Search) -> Result<Self> {
        let mut failures = Vec::new();
        for candidate in &search.candidates {
            search.open_beside(Path::new(candidate));
            // SAFETY: candidates are vendors' libraries, whose initialisers are sound to run.
            match unsafe { libloading::Library::new(candidate) } {
                Ok(library) => {
                    let inner = Box::leak(Box::new(library));
                    let Search { what, how_to_get_it, .. } = *search;
                    return Ok(Self { inner, what, path: candidate.clone(), how_to_get_it });
                }
                Err(error) => failures.push(chain(&error)),
            }
        }
        Err(Error::Unavailable {
            library: search.what.to_owned(),
            why: if failures.is_empty() { "there is no place to look for it".to_owned() } else { failures.join("; ") },
            how_to_get_it: search.how_to_get_it.to_owned(),
        })
    }

    /// The path or name that was loaded.
    pub fn path(&self) -> &OsString {
        &self.path
    }

    /// A symbol of the library, as the function pointer type `F`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] naming the library and the symbol.
    ///
    /// # Safety
    /// `F` is a function pointer type with the symbol's own C signature.
    pub unsafe fn symbol<F: Copy + 'static>(&self, name: &'static str) -> Result<F> {
        // SAFETY: the caller guarantees the type; the library is never unloaded.
        match unsafe { self.inner.get::<F>(name.as_bytes()) } {
            Ok(symbol) => Ok(*symbol),
            Err(_) => Err(Error::Unavailable {
                library: self.what.to_owned(),
                why: format!("{} has no symbol {name}, it is probably too old", self.path.to_string_lossy()),
                how_to_get_it: self.how_to_get_it.to_owned(),
            }),
        }
    }
}

/// The error with what caused it: the loader's own text is in the cause.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

/// Declares a struct of C functions; see the [crate's page](crate).
///
/// `load(library, flavor)` takes every symbol or fails with [`longspan_hal::Error::Unavailable`]. Each function is an
/// `unsafe` method that returns [`Returned`].
#[macro_export]
macro_rules! table {
    (
        $(#[$doc:meta])*
        $vis:vis struct $Table:ident {
            $(
                $(#[$about:meta])*
                fn $name:ident [ $($symbol:literal),+ $(,)? ] ( $($arg:ident : $type:ty),* $(,)? ) -> $out:ty;
            )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        $vis struct $Table {
            library: $crate::Library,
            $( $name: (&'static str, unsafe extern "C" fn($($type),*) -> $out), )*
        }

        impl $Table {
            /// Takes every symbol of `flavor` (a column of the table) from `library`.
            ///
            /// # Errors
            /// `Unavailable` naming the library and the first symbol that is missing.
            $vis fn load(library: $crate::Library, flavor: usize) -> ::longspan_hal::Result<Self> {
                Ok(Self {
                    $( $name: {
                        let symbols: &[&'static str] = &[$($symbol),+];
                        let symbol = symbols.get(flavor).copied().unwrap_or(symbols[0]);
                        // SAFETY: the signature is declared after the library's own header.
                        (symbol, unsafe { library.symbol(symbol)? })
                    }, )*
                    library,
                })
            }

            /// The library that the functions are from.
            #[allow(dead_code)] // not every table's owner asks
            $vis fn library(&self) -> &$crate::Library {
                &self.library
            }

            $(
                $(#[$about])*
                ///
                /// # Safety
                /// That of the C function: pointers are valid for what it does with them.
                #[allow(clippy::too_many_arguments)] // the C function's own
                $vis unsafe fn $name(&self, $($arg: $type),*) -> $crate::Returned<$out> {
                    let (call, function) = self.$name;
                    // SAFETY: by the caller.
                    $crate::Returned { call, value: unsafe { function($($arg),*) } }
                }
            )*
        }
    };
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    table! {
        /// Two flavors; the second has a symbol that no libm has.
        struct Math {
            /// Cosine.
            fn cosine["cos", "longspan_cos"](x: f64) -> f64;
            /// Power.
            fn power["pow"](x: f64, y: f64) -> f64;
        }
    }

    fn search(candidates: &[&str]) -> Search {
        let candidates = candidates.iter().map(OsString::from).collect();
        Search { what: "libm", candidates, beside: &["libm-nothing"], how_to_get_it: "install it" }
    }

    #[test]
    fn calls_through_the_table_name_their_symbol() {
        let library = Library::open(&search(&["/nowhere/libm.so.6", "libm.so.6"])).expect("libm is part of the system");
        assert_eq!(library.path(), "libm.so.6");
        let math = Math::load(library, 0).expect("both symbols are there");
        // SAFETY: the signatures are libm's.
        let (cosine, power) = unsafe { (math.cosine(0.0), math.power(2.0, 10.0)) };
        assert_eq!(cosine, Returned { call: "cos", value: 1.0 });
        assert_eq!(power, Returned { call: "pow", value: 1024.0 });
        assert_eq!(math.library().path(), "libm.so.6");
    }

    #[test]
    fn a_missing_library_says_where_it_was_looked_for_and_how_to_get_it() {
        let error = Library::open(&search(&["/nowhere/liba.so", "libnowhere-b.so"])).expect_err("neither exists");
        let text = error.to_string();
        assert!(matches!(error, Error::Unavailable { .. }));
        for part in ["libm is not available", "/nowhere/liba.so", "libnowhere-b.so", "install it"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(Library::open(&search(&[])).expect_err("no candidate").to_string().contains("no place"));
    }

    #[test]
    fn a_missing_symbol_is_named() {
        let library = Library::open(&search(&["libm.so.6"])).expect("libm is part of the system");
        let text = Math::load(library, 1).expect_err("no libm has it").to_string();
        assert!(text.contains("longspan_cos") && text.contains("libm.so.6") && text.contains("install it"), "{text}");
    }
}
