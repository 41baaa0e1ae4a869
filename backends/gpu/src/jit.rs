//! Kernels on demand: text to machine code for the device at hand, once per process and, with the cache, once per machine.
//!
//! ```text
//! kernel(s):  loaded already                                  -> it
//!             machine code in the cache on disk               -> load it
//!             otherwise compile, put it in the cache, load it
//! ```
//!
//! Threads that want the same kernel wait for the one that makes it; others are not held up.

use std::collections::HashMap;
use std::ffi::CString;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use longspan_hal::{Error, Result};
use longspan_kernels::Specialization;

use crate::cache::{Cache, Key};
use crate::context::Context;
use crate::driver::Handle;
use crate::launch::Kernel;
use crate::sync::lock;

/// The kernels of one device, by source file and macros: hashing the text took 60 us a launch.
#[derive(Debug, Default)]
pub(crate) struct Jit(Mutex<HashMap<(&'static str, Vec<String>), Slot>>);

type Slot = Arc<Mutex<Option<Arc<Kernel>>>>;

impl Context {
    /// The kernel of a specialization, compiled and loaded by the first call. The context is bound.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a compiler, [`Error::Driver`].
    pub(crate) fn kernel(&'static self, of: &Specialization) -> Result<Arc<Kernel>> {
        let slot = Arc::clone(lock(&self.jit.0).entry((of.source.file, of.defines.clone())).or_default());
        let mut slot = lock(&slot);
        if let Some(kernel) = &*slot {
            return Ok(Arc::clone(kernel));
        }
        let code = self.code(of)?;
        let kernel = Arc::new(self.load(of, &code)?);
        *slot = Some(Arc::clone(&kernel));
        Ok(kernel)
    }

    /// Machine code, from the cache if it is there.
    fn code(&self, of: &Specialization) -> Result<Vec<u8>> {
        let (facts, arch) = (self.machine.facts(), &self.figures.arch);
        let compiler = self.machine.compiler()?;
        let mut options = vec![format!("{}{arch}", facts.arch_flag)];
        options.extend(facts.flags.iter().map(|flag| (*flag).to_owned()));
        options.extend(of.defines.iter().map(|define| format!("-D{define}")));
        let source = of.source.text(facts.prelude);
        let version = compiler.version();
        let key = Key::of([source.as_str(), &options.join(" "), &version, arch]);
        let cache = Cache::open(facts.name);
        if let Some(code) = cache.get(key) {
            return Ok(code);
        }
        let start = Instant::now();
        let code = compiler.compile(&source, of.source.file, &options)?;
        say(&format!("compiled {} for {arch} in {:.1} s", of.name(), start.elapsed().as_secs_f64()));
        cache.put(key, &code);
        Ok(code)
    }

    fn load(&self, of: &Specialization, code: &[u8]) -> Result<Kernel> {
        let mut module: Handle = 0;
        // SAFETY: `module` is written; `code` is an image that the vendor's compiler made.
        self.check(unsafe { self.driver.module_load(&mut module, code.as_ptr().cast()) })?;
        let mut functions = Vec::with_capacity(of.entries.len());
        for entry in of.entries {
            let name = CString::new(*entry).map_err(|_| Error::invalid("kernel", "its name holds a zero byte"))?;
            let mut function: Handle = 0;
            // SAFETY: `function` is written; the module is never unloaded.
            self.check(unsafe { self.driver.module_function(&mut function, module, name.as_ptr()) })?;
            if of.shared_bytes > 0 {
                // SAFETY: the function is the module's.
                let told = unsafe { self.driver.allow_shared(function, of.shared_bytes) };
                told.map_or(Ok(()), |told| self.check(told))?;
            }
            functions.push(function);
        }
        Ok(Kernel { functions, threads: of.threads, shared_bytes: of.shared_bytes })
    }
}

/// A line to the user, unless `LONGSPAN_QUIET` is set.
pub(crate) fn say(line: &str) {
    if std::env::var_os("LONGSPAN_QUIET").is_none() {
        // Where stderr can't be written, there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "longspan: {line}");
    }
}
