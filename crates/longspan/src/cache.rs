//! Compiled kernels on disk, of every backend that keeps some. No device is needed.

use std::path::PathBuf;

use longspan_hal::Result;

/// The kernels that one backend keeps, or kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KernelCache {
    /// Whose they are.
    pub backend: &'static str,
    /// Where; `None` where no folder can be had.
    pub folder: Option<PathBuf>,
    /// Number of files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The kernels of every backend that was compiled in and keeps some.
pub fn kernel_caches() -> Vec<KernelCache> {
    Vec::from([
        #[cfg(feature = "cuda")]
        of(&cuda(), cuda().figures()),
    ])
}

/// Removes them; says what was removed.
///
/// # Errors
/// [`longspan_hal::Error::Invalid`] naming the first file that can't be removed.
pub fn clear_kernel_caches() -> Result<Vec<KernelCache>> {
    Ok(Vec::from([
        #[cfg(feature = "cuda")]
        of(&cuda(), cuda().clear()?),
    ]))
}

#[cfg(feature = "cuda")]
fn cuda() -> longspan_cuda::Cache {
    longspan_cuda::Cache::open(<longspan_cuda::Cuda as longspan_hal::Backend>::NAME)
}

#[cfg(feature = "cuda")]
fn of(cache: &longspan_cuda::Cache, figures: longspan_cuda::CacheFigures) -> KernelCache {
    let backend = <longspan_cuda::Cuda as longspan_hal::Backend>::NAME;
    let folder = cache.folder().map(std::path::Path::to_owned);
    KernelCache { backend, folder, files: figures.files, bytes: figures.bytes }
}
