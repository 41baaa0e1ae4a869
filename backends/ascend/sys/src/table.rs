//! The one macro of this crate: C signatures become a struct of function pointers, and a list that the ABI gate reads.

/// One function as it was declared: what the ABI gate compares with the vendor's headers.
#[derive(Clone, Copy, Debug)]
pub struct Prototype {
    /// The symbol.
    pub name: &'static str,
    /// Rust types of the arguments, as text.
    pub arguments: &'static [&'static str],
    /// Rust type of the result, as text.
    pub result: &'static str,
}

/// Size and offsets of a C type as declared here.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The C type.
    pub name: &'static str,
    /// Size in bytes.
    pub size: usize,
    /// Members and their byte offsets.
    pub offsets: &'static [(&'static str, usize)],
}

/// Declares a table of C functions. `load` takes each from the first library of a [`crate::Libraries`] that has it.
macro_rules! functions {
    (
        $(#[$doc:meta])*
        pub struct $Table:ident {
            $( $(#[$about:meta])* fn $name:ident ( $($arg:ident : $type:ty),* $(,)? ) -> $out:ty; )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $Table {
            $( $(#[$about])* pub $name: unsafe extern "C" fn($($type),*) -> $out, )*
        }

        impl $Table {
            /// What is declared here, for the ABI gate.
            pub const PROTOTYPES: &'static [$crate::Prototype] = &[
                $( $crate::Prototype {
                    name: stringify!($name),
                    arguments: &[$(stringify!($type)),*],
                    result: stringify!($out),
                }, )*
            ];

            /// Takes every function from `libraries`.
            ///
            /// # Errors
            /// `Unavailable` naming the first symbol that is missing.
            pub fn load(libraries: &$crate::Libraries) -> ::longspan_hal::Result<Self> {
                Ok(Self {
                    // SAFETY: the signatures are declared after the vendor's headers, and the ABI gate compares them.
                    $( $name: unsafe { libraries.symbol(stringify!($name))? }, )*
                })
            }
        }
    };
}

pub(crate) use functions;

/// Declares a C enum as a newtype with constants: values that are not listed can appear.
macro_rules! codes {
    ($(#[$doc:meta])* $Name:ident: $repr:ty { $( $(#[$about:meta])* $value:ident = $number:literal, )* }) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub struct $Name(pub $repr);

        impl $Name {
            $( $(#[$about])* pub const $value: Self = Self($number); )*

            /// Names of the vendor's constants with the numbers that are declared here, for the ABI gate.
            pub const VALUES: &'static [(&'static str, i64)] = &[$((stringify!($value), $number)),*];
        }
    };
}

pub(crate) use codes;
