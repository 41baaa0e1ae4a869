//! Finding the vendor's libraries.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::OnceLock;

use longspan_dylib::{Library, Search};
use longspan_hal::{Error, Result};

use crate::{Aclnn, Hccl, Operators, Runtime};

const HOW: &str = "install Huawei's CANN toolkit with its kernels and source its set_env.sh, or set LONGSPAN_ASCEND_LIBRARY to \
                   the emulator's shared object";

/// All tables, from the libraries of this machine.
#[derive(Debug)]
pub struct Ascend {
    /// The runtime.
    pub runtime: Runtime,
    /// Communicators.
    pub hccl: Hccl,
    /// Tensors and scalars.
    pub aclnn: Aclnn,
    /// Operators.
    pub operators: Operators,
    /// Where they came from.
    pub paths: Vec<OsString>,
}

/// Libraries that are searched for symbols in order.
#[derive(Debug)]
pub struct Libraries {
    what: &'static str,
    list: Vec<Library>,
}

impl Ascend {
    /// The libraries of this machine, loaded once.
    ///
    /// # Errors
    /// [`Error::Unavailable`] naming the library or symbol that is missing, and how to get it.
    pub fn get() -> Result<&'static Self> {
        static LOADED: OnceLock<Result<Ascend>> = OnceLock::new();
        LOADED.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self> {
        let runtime = Libraries::open("AscendCL", &[&["libascendcl.so", "libacl_rt.so"]])?;
        let hccl = Libraries::open("HCCL", &[&["libhccl.so"], &["libhcomm.so"]])?;
        let aclnn = Libraries::open("aclnn objects (libnnopbase)", &[&["libnnopbase.so"]])?;
        let groups: [&[&str]; 4] =
            [&["libopapi.so"], &["libopapi_math.so"], &["libopapi_nn.so"], &["libopapi_transformer.so"]];
        let operators = Libraries::open("aclnn operators (libopapi)", &groups)?;
        let all = [&runtime, &hccl, &aclnn, &operators];
        let mut paths: Vec<OsString> = all.iter().flat_map(|l| l.list.iter().map(|l| l.path().clone())).collect();
        paths.dedup();
        Ok(Self {
            runtime: Runtime::load(&runtime)?,
            hccl: Hccl::load(&hccl)?,
            aclnn: Aclnn::load(&aclnn)?,
            operators: Operators::load(&operators)?,
            paths,
        })
    }
}

impl Libraries {
    /// Opens one library of each group of alternatives; at least one group must be there.
    fn open(what: &'static str, groups: &[&[&str]]) -> Result<Self> {
        let only = std::env::var_os("LONGSPAN_ASCEND_LIBRARY");
        let search = |names: &[&str]| Search {
            what,
            candidates: match &only {
                Some(path) => vec![path.clone()],
                None => names.iter().flat_map(|name| candidates(OsStr::new(name))).collect(),
            },
            beside: &[],
            how_to_get_it: HOW,
        };
        let (mut list, mut first_error) = (Vec::new(), None);
        for names in groups.iter().take(if only.is_some() { 1 } else { groups.len() }) {
            match Library::open(&search(names)) {
                Ok(library) => list.push(library),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        match first_error {
            Some(error) if list.is_empty() => Err(error),
            _ => Ok(Self { what, list }),
        }
    }

    /// A function of the first library that has it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] naming the symbol and the libraries that lack it.
    ///
    /// # Safety
    /// `F` is a function pointer type with the symbol's own C signature.
    pub unsafe fn symbol<F: Copy + 'static>(&self, name: &'static str) -> Result<F> {
        // SAFETY: the caller guarantees the type.
        let found = self.list.iter().find_map(|library| unsafe { library.symbol(name) }.ok());
        found.ok_or_else(|| {
            let paths: Vec<_> = self.list.iter().map(|l| l.path().to_string_lossy()).collect();
            Error::Unavailable {
                library: self.what.to_owned(),
                why: format!("no symbol {name} in {}, it is probably too old", paths.join(", ")),
                how_to_get_it: HOW.to_owned(),
            }
        })
    }
}

/// Places of a library, in order of preference.
fn candidates(name: &OsStr) -> Vec<OsString> {
    let homes = ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"].into_iter().filter_map(std::env::var_os);
    let inside = homes.map(|home| PathBuf::from(home).join("lib64").join(name).into_os_string());
    inside.chain([name.to_owned()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_symbol_is_named_with_the_libraries_that_lack_it() {
        let search = Search { what: "libc", candidates: vec!["libc.so.6".into()], beside: &[], how_to_get_it: "" };
        let libraries = Libraries { what: "libc", list: vec![Library::open(&search).expect("a C library")] };
        // SAFETY: the symbol does not exist, so nothing is called.
        let missing = unsafe { libraries.symbol::<unsafe extern "C" fn()>("aclrtNoSuchThing") };
        let text = missing.expect_err("libc has no such symbol").to_string();
        assert!(text.contains("aclrtNoSuchThing") && text.contains("libc.so.6"), "{text}");
    }

    #[test]
    fn toolkit_folders_come_before_the_loader() {
        let list = candidates(OsStr::new("libhccl.so"));
        assert_eq!(list.last().map(OsString::as_os_str), Some(OsStr::new("libhccl.so")));
    }
}
