//! `longspan cache`: the kernels that were compiled on this machine and kept on disk. Needs no GPU.

use longspan::KernelCache;

use crate::args::CacheArgs;
use crate::failure::Result;
use crate::report::{Table, bytes, say};

/// Shows the caches of all backends in this build, or clears them.
///
/// # Errors
/// [`crate::failure::Failure::Input`] naming a file that can't be removed.
pub fn cache(args: &CacheArgs) -> Result<()> {
    let caches = if args.clear { longspan::clear_kernel_caches()? } else { longspan::kernel_caches() };
    say(&text(&caches, args.clear))
}

fn text(caches: &[KernelCache], cleared: bool) -> String {
    if caches.is_empty() {
        return "No backend in this build keeps compiled kernels; those of GPUs do (cargo feature `cuda`)\n".to_owned();
    }
    let mut table = Table::new(&["backend", "kernels", "bytes", "folder"]);
    for cache in caches {
        let folder = cache.folder.as_ref().map_or_else(
            || "none: set HOME or LONGSPAN_CACHE, or every process compiles its kernels again".to_owned(),
            |folder| folder.display().to_string(),
        );
        table.row([cache.backend.to_owned(), cache.files.to_string(), bytes(cache.bytes), folder]);
    }
    if cleared { format!("Removed\n{}", table.render()) } else { table.render() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_is_shown_with_its_folder_and_a_missing_folder_with_the_way_to_one() {
        let one = |folder: Option<&str>| KernelCache {
            backend: "gpu",
            folder: folder.map(Into::into),
            files: 3,
            bytes: 2048,
        };
        let shown = text(&[one(Some("/c/gpu"))], false);
        assert!(shown.contains("/c/gpu") && shown.contains("2.00 KiB"), "{shown}");
        assert!(text(&[one(None)], false).contains("LONGSPAN_CACHE"));
        assert!(text(&[one(None)], true).starts_with("Removed"));
        assert!(text(&[], false).contains("`cuda`"));
    }
}
