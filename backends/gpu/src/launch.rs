//! Kernels that are loaded, and their launches.

use std::ffi::c_void;

use longspan_hal::{Error, Result};

use crate::driver::Handle;
use crate::stream::GpuStream;

/// A kernel file's functions, loaded on a device for the life of the process.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// In the order of the specialization's entries.
    pub functions: Vec<Handle>,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// Blocks of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// Up to 2^31 - 1.
    pub x: usize,
    /// Up to 65535.
    pub y: usize,
}

impl Kernel {
    /// Queues entry `entry` with its one parameter. An empty grid is no launch. The context is bound.
    ///
    /// # Errors
    /// [`Error::Invalid`] for more blocks than a grid has; [`Error::Driver`].
    pub(crate) fn launch<P: Copy>(&self, on: &GpuStream, entry: usize, grid: Grid, params: &P) -> Result<()> {
        if grid.x == 0 || grid.y == 0 {
            return Ok(());
        }
        let (Ok(x), Ok(y)) = (i32::try_from(grid.x), u16::try_from(grid.y)) else {
            return Err(Error::invalid("grid", format!("{} x {} blocks are too many", grid.x, grid.y)));
        };
        let function = self.functions.get(entry).copied();
        let function = function.ok_or_else(|| Error::invalid("kernel", format!("it has no entry {entry}")))?;
        let context = on.context();
        let mut parameters = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the kernel takes one parameter of type `P` by value, which the call copies; what its addresses name was
        // checked where arguments were made, and stays alive until the work ran.
        context.check(unsafe {
            context.driver.launch(
                function,
                x.unsigned_abs(),
                u32::from(y),
                1,
                self.threads,
                1,
                1,
                self.shared_bytes,
                on.raw(),
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }
}
