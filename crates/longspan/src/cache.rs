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

/// The cache of one GPU vendor: `figures` or `clear`.
#[cfg(any(feature = "cuda", feature = "rocm"))]
macro_rules! of {
    ($Backend:ty, $Cache:ty, $figures:expr) => {{
        let backend = <$Backend as longspan_hal::Backend>::NAME;
        let cache = <$Cache>::open(backend);
        let figures = $figures(&cache);
        let folder = cache.folder().map(std::path::Path::to_owned);
        (KernelCache { backend, folder, files: 0, bytes: 0 }, figures)
    }};
}

/// The kernels of every backend that was compiled in and keeps some.
pub fn kernel_caches() -> Vec<KernelCache> {
    Vec::from([
        #[cfg(feature = "cuda")]
        {
            let (cache, figures) = of!(longspan_cuda::Cuda, longspan_cuda::Cache, longspan_cuda::Cache::figures);
            KernelCache { files: figures.files, bytes: figures.bytes, ..cache }
        },
        #[cfg(feature = "rocm")]
        {
            let (cache, figures) = of!(longspan_rocm::Rocm, longspan_rocm::Cache, longspan_rocm::Cache::figures);
            KernelCache { files: figures.files, bytes: figures.bytes, ..cache }
        },
    ])
}

/// Removes them; says what was removed.
///
/// # Errors
/// [`longspan_hal::Error::Invalid`] naming the first file that can't be removed.
pub fn clear_kernel_caches() -> Result<Vec<KernelCache>> {
    Ok(Vec::from([
        #[cfg(feature = "cuda")]
        {
            let (cache, figures) = of!(longspan_cuda::Cuda, longspan_cuda::Cache, longspan_cuda::Cache::clear);
            let figures = figures?;
            KernelCache { files: figures.files, bytes: figures.bytes, ..cache }
        },
        #[cfg(feature = "rocm")]
        {
            let (cache, figures) = of!(longspan_rocm::Rocm, longspan_rocm::Cache, longspan_rocm::Cache::clear);
            let figures = figures?;
            KernelCache { files: figures.files, bytes: figures.bytes, ..cache }
        },
    ]))
}
