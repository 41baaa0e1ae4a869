//! The two phases of every operator.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use crate::memory::span;
use crate::objects::{ARRAYS, EXECUTORS, SCALARS, Scalar, TENSORS};
use crate::runtime::stream;
use crate::state::{code, count, lock, misuse};
use crate::tensor::{Ready, Tensor};

/// Workspaces are never empty.
const WORKSPACE: u64 = 512;

type Body = Box<dyn FnOnce(&[Ready]) -> Result<(), i32> + Send>;

/// An operator between its phases.
pub(crate) struct Executor {
    name: &'static str,
    /// Tensors by handle: they must live until phase 2.
    handles: Vec<usize>,
    tensors: Vec<Tensor>,
    workspace: u64,
    body: Mutex<Option<Body>>,
}

/// What phase 1 made of the arguments: tensors that the body gets in the same order.
pub(crate) struct Operator {
    handles: Vec<usize>,
    tensors: Vec<Arc<Tensor>>,
    body: Option<Body>,
}

impl Operator {
    pub fn new() -> Self {
        Self { handles: Vec::new(), tensors: Vec::new(), body: None }
    }

    /// A tensor argument.
    pub fn tensor(&mut self, handle: *const c_void) -> Result<Arc<Tensor>, i32> {
        let tensor = TENSORS.get(handle).ok_or_else(|| misuse(code::NN_NULL, "a tensor that does not live"))?;
        self.handles.push(handle as usize);
        self.tensors.push(Arc::clone(&tensor));
        Ok(tensor)
    }

    /// What runs, unless some tensor that `empty_means_nothing` names is empty.
    pub fn run(mut self, body: impl FnOnce(&[Ready]) -> Result<(), i32> + Send + 'static) -> Result<Self, i32> {
        self.body = Some(Box::new(body));
        Ok(self)
    }
}

/// A scalar argument.
pub(crate) fn scalar(handle: *const c_void) -> Result<Scalar, i32> {
    SCALARS.get(handle).map(|s| *s).ok_or_else(|| misuse(code::NN_NULL, "a scalar that does not live"))
}

/// An integer list argument.
pub(crate) fn array(handle: *const c_void) -> Result<Vec<i64>, i32> {
    ARRAYS.get(handle).map(|a| a.to_vec()).ok_or_else(|| misuse(code::NN_NULL, "an int array that does not live"))
}

/// Refuses wrong arguments.
pub(crate) fn require(ok: bool, text: impl Into<String>) -> Result<(), i32> {
    if ok { Ok(()) } else { Err(misuse(code::NN_INVALID, text)) }
}

/// Phase 1.
///
/// # Safety
/// `size` and `executor` are null or valid for writes.
pub(crate) unsafe fn plan(
    name: &'static str,
    size: *mut u64,
    executor: *mut *mut c_void,
    make: impl FnOnce() -> Result<Operator, i32>,
) -> i32 {
    if size.is_null() || executor.is_null() {
        return misuse(code::NN_NULL, format!("{name}: no place for workspace size or executor"));
    }
    match make() {
        Ok(operator) => {
            let bytes: usize = operator.tensors.iter().map(|t| t.dims.iter().product::<usize>()).max().unwrap_or(0);
            let workspace = WORKSPACE + (bytes as u64 / 4).min(4096);
            let executor_of = Executor {
                name,
                handles: operator.handles,
                tensors: operator.tensors.iter().map(|t| Tensor::clone(t)).collect(),
                workspace,
                body: Mutex::new(operator.body),
            };
            // SAFETY: by the caller.
            unsafe {
                size.write(workspace);
                executor.write(EXECUTORS.add(executor_of));
            }
            code::OK
        }
        Err(code) => misuse(code, format!("{name} was refused")),
    }
}

/// Phase 2.
pub(crate) fn launch(
    name: &'static str,
    workspace: *mut c_void,
    size: u64,
    executor: *mut c_void,
    on: *mut c_void,
) -> i32 {
    launch_checked(name, workspace, size, executor, on).err().unwrap_or(code::OK)
}

fn launch_checked(
    name: &'static str,
    workspace: *mut c_void,
    size: u64,
    executor: *mut c_void,
    on: *mut c_void,
) -> Result<(), i32> {
    let stream = stream(on)?;
    let Some(executor) = EXECUTORS.remove(executor) else {
        return Err(misuse(code::NN_INVALID, format!("{name}: the executor does not live (run twice?)")));
    };
    let same = executor.name == name;
    require(same, format!("{name}: the executor is of {}", executor.name))?;
    let live = executor.handles.iter().all(|&h| TENSORS.get(h as *const c_void).is_some());
    require(live, format!("{name}: a tensor was destroyed before phase 2"))?;
    require(size >= executor.workspace, format!("{name}: the workspace of {size} bytes is too small"))?;
    let Some(workspace) = span(workspace, size as usize) else {
        return Err(misuse(code::NN_INVALID, format!("{name}: the workspace is not device memory of its size")));
    };
    let Some(body) = lock(&executor.body).take() else { return Err(code::NN_INVALID) };
    count("launch operator", 1);
    count(&format!("launch {name}"), 1);
    let tensors = executor.tensors.clone();
    stream.push(move |_| {
        workspace.poison()?;
        let ready = tensors.iter().map(Tensor::ready).collect::<Result<Vec<_>, _>>()?;
        body(&ready)
    });
    Ok(())
}

/// Declares both phases of an operator: `operator!(phase1, phase2, (arguments) |op| body)`.
macro_rules! operator {
    ($phase1:ident, $phase2:ident, ($($arg:ident: $type:ty),* $(,)?) $make:expr) => {
        /// Phase 1.
        ///
        /// # Safety
        /// As in the vendor's document.
        #[unsafe(no_mangle)]
        #[allow(clippy::too_many_arguments)] // the vendor's signature
        pub unsafe extern "C" fn $phase1($($arg: $type,)* size: *mut u64, executor: *mut *mut ::std::ffi::c_void) -> i32 {
            let make = || $make($($arg),*);
            // SAFETY: by the caller.
            unsafe { $crate::operator::plan(stringify!($phase2), size, executor, make) }
        }

        /// Phase 2.
        #[unsafe(no_mangle)]
        pub extern "C" fn $phase2(
            workspace: *mut ::std::ffi::c_void,
            size: u64,
            executor: *mut ::std::ffi::c_void,
            stream: *mut ::std::ffi::c_void,
        ) -> i32 {
            $crate::operator::launch(stringify!($phase2), workspace, size, executor, stream)
        }
    };
}

pub(crate) use operator;
