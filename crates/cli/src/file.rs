//! Tensors in from a safetensors file, checked before anything runs.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `q` | bf16, f16 or f32 | `[batch, seq, heads, head_dim]` |
//! | `k` | as `q` | `[batch, k_seq, kv_heads, head_dim]` |
//! | `v` | as `q` | `[batch, k_seq, kv_heads, head_dim_v]` |
//! | `dout` (optional) | as `q` | `[batch, seq, heads, head_dim_v]` |
//! | `sinks`, `alibi_slopes` (optional) | f32 | `[heads]` |
//! | `cu_seqlens` (optional) | i32 | `[documents + 1]`, from 0 to `seq`, never decreasing |
//!
//! A tensor of any other name is refused: a misspelled option must not be dropped.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use longspan::{DType, Extent, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::failure::{Failure, Result};

/// Largest header that is read, as other readers of the format have it.
const HEADER_LIMIT: u64 = 100_000_000;

const KNOWN: [&str; 7] = ["q", "k", "v", "dout", "sinks", "alibi_slopes", "cu_seqlens"];

/// What a file holds, checked: the tensors fit each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// Queries, `[batch, seq, heads, head_dim]`.
    pub q: Tensor,
    /// Keys, `[batch, k_seq, kv_heads, head_dim]`.
    pub k: Tensor,
    /// Values, `[batch, k_seq, kv_heads, head_dim_v]`.
    pub v: Tensor,
    /// Gradient of the output, `[batch, seq, heads, head_dim_v]`.
    pub dout: Option<Tensor>,
    /// Sink logits, one per head.
    pub sinks: Option<Vec<f32>>,
    /// ALiBi slopes, one per head.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Starts of the packed documents, and the end of the last.
    pub cu_seqlens: Option<Vec<i32>>,
}

/// Reads and checks `path`.
///
/// # Errors
/// [`Failure::Input`] if the file is missing, truncated or no safetensors file, lacks a tensor, has one that is not known,
/// or one whose dtype or shape does not fit.
pub fn read(path: &Path) -> Result<Input> {
    let mut source = Source::open(path)?;
    source.check_names()?;
    let q = source.activation("q", ["batch", "seq", "heads", "head_dim"])?;
    let k = source.activation("k", ["batch", "k_seq", "kv_heads", "head_dim"])?;
    let v = source.activation("v", ["batch", "k_seq", "kv_heads", "head_dim_v"])?;
    check_shapes(path, &q, &k, &v)?;
    let [batch, seq, heads, _] = q.extent();
    let dout = match source.has("dout") {
        true => Some(source.activation("dout", ["batch", "seq", "heads", "head_dim_v"])?),
        false => None,
    };
    if let Some(dout) = &dout {
        source.agree("dout", dout, &q, [batch, seq, heads, v.extent()[3]])?;
    }
    Ok(Input {
        sinks: source.per_head("sinks", heads)?,
        alibi_slopes: source.per_head("alibi_slopes", heads)?,
        cu_seqlens: source.cu_seqlens(seq)?,
        q,
        k,
        v,
        dout,
    })
}

fn check_shapes(path: &Path, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
    let bad = |why: String| Err(Failure::input(path.display(), why));
    let ([qb, _, h, qd], [kb, ks, hk, kd], [vb, vs, vh, _]) = (q.extent(), k.extent(), v.extent());
    if q.dtype() != k.dtype() || q.dtype() != v.dtype() {
        return bad(format!("q, k and v are {}, {} and {}; they must have one dtype", q.dtype(), k.dtype(), v.dtype()));
    }
    if qb != kb || qb != vb {
        return bad(format!("q, k and v have {qb}, {kb} and {vb} batch rows; they must have the same"));
    }
    if (ks, hk) != (vs, vh) {
        return bad(format!(
            "k is {:?} and v {:?}; they must have the same seq (axis 1) and kv_heads (axis 2)",
            k.extent(),
            v.extent()
        ));
    }
    if qd != kd {
        return bad(format!("q has a head_dim of {qd} and k of {kd}; they must have the same"));
    }
    if h % hk != 0 {
        return bad(format!("H % HK != 0: {h} query heads (q) are not a multiple of {hk} kv heads (k, v)"));
    }
    Ok(())
}

/// An open file with its checked header.
struct Source {
    path: PathBuf,
    file: File,
    header: Metadata,
    data_start: u64,
}

impl Source {
    fn open(path: &Path) -> Result<Self> {
        let bad = |why: String| Failure::input(path.display(), why);
        // Before it is opened: to open a pipe is to wait for its writer.
        let meta = std::fs::metadata(path).map_err(|e| bad(format!("cannot be opened: {e}")))?;
        if !meta.is_file() {
            return Err(bad("is not a regular file".into()));
        }
        let mut file = File::open(path).map_err(|e| bad(format!("cannot be opened: {e}")))?;
        let (header, header_len) = read_header(&mut file, meta.len()).map_err(bad)?;
        let wanted = 8 + header_len + header.data_len() as u64;
        if wanted != meta.len() {
            let how = if wanted > meta.len() { "truncated" } else { "followed by bytes that no tensor owns" };
            return Err(bad(format!("{how}: the header describes {wanted} bytes, the file has {}", meta.len())));
        }
        Ok(Self { path: path.to_owned(), file, header, data_start: 8 + header_len })
    }

    fn bad(&self, what: &str, why: impl std::fmt::Display) -> Failure {
        Failure::input(self.path.display(), format!("tensor `{what}` {why}"))
    }

    fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    fn check_names(&self) -> Result<()> {
        let mut names = self.header.offset_keys();
        names.sort();
        match names.iter().find(|name| !KNOWN.contains(&name.as_str())) {
            Some(name) => Err(self.bad(name, format!("is not one of {}", KNOWN.join(", ")))),
            None => Ok(()),
        }
    }

    /// A tensor of rank 4 in a floating-point dtype, without empty axes.
    fn activation(&mut self, name: &str, axes: [&str; 4]) -> Result<Tensor> {
        let info = self.info(name)?;
        let dtype = match info.dtype {
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            Dtype::F32 => DType::F32,
            other => return Err(self.bad(name, format!("is {other:?}; bf16, f16 or f32 wanted"))),
        };
        let wanted = axes.join(", ");
        let extent: Extent = match info.shape.as_slice().try_into() {
            Ok(extent) => extent,
            Err(_) => {
                let (rank, shape) = (info.shape.len(), info.shape);
                return Err(self.bad(name, format!("has rank {rank} ({shape:?}); rank 4, [{wanted}], wanted")));
            }
        };
        if extent.contains(&0) {
            return Err(self.bad(name, format!("is empty: [{wanted}] is {extent:?}")));
        }
        Ok(Tensor::new(dtype, extent, self.bytes(name)?)?)
    }

    fn agree(&self, name: &str, tensor: &Tensor, q: &Tensor, extent: Extent) -> Result<()> {
        if tensor.dtype() != q.dtype() || tensor.extent() != extent {
            let (have, at) = (tensor.dtype(), tensor.extent());
            return Err(self.bad(name, format!("is {have} {at:?}; {} {extent:?} wanted", q.dtype())));
        }
        Ok(())
    }

    fn per_head(&mut self, name: &str, heads: usize) -> Result<Option<Vec<f32>>> {
        if !self.has(name) {
            return Ok(None);
        }
        let info = self.info(name)?;
        if info.dtype != Dtype::F32 || info.shape != [heads] {
            return Err(self.bad(name, format!("is {:?} {:?}; F32 [{heads}] wanted", info.dtype, info.shape)));
        }
        Ok(Some(Tensor::new(DType::F32, [1, 1, heads, 1], self.bytes(name)?)?.to_f32()))
    }

    fn cu_seqlens(&mut self, seq: usize) -> Result<Option<Vec<i32>>> {
        let name = "cu_seqlens";
        if !self.has(name) {
            return Ok(None);
        }
        let info = self.info(name)?;
        if info.dtype != Dtype::I32 || info.shape.len() != 1 {
            return Err(self.bad(name, format!("is {:?} {:?}; I32 [documents + 1] wanted", info.dtype, info.shape)));
        }
        let bytes = self.bytes(name)?;
        let cu: Vec<i32> = bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        if cu.first() != Some(&0) {
            return Err(self.bad(name, format!("must start at 0, it starts with {:?}", cu.first())));
        }
        if let Some(i) = cu.windows(2).position(|w| w[0] > w[1]) {
            return Err(self.bad(name, format!("decreases from {} to {} at entry {}", cu[i], cu[i + 1], i + 1)));
        }
        match cu.last() {
            Some(&end) if usize::try_from(end) == Ok(seq) => Ok(Some(cu)),
            end => Err(self.bad(name, format!("must end at seq = {seq}, it ends at {}", end.copied().unwrap_or(0)))),
        }
    }

    fn info(&self, name: &str) -> Result<TensorInfo> {
        self.header.info(name).cloned().ok_or_else(|| self.bad(name, "is missing"))
    }

    fn bytes(&mut self, name: &str) -> Result<Vec<u8>> {
        let (start, end) = self.info(name)?.data_offsets;
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(end - start)
            .map_err(|_| Failure::Run(format!("no memory for the {} bytes of tensor `{name}`", end - start)))?;
        let read = self
            .file
            .seek(SeekFrom::Start(self.data_start + start as u64))
            .and_then(|_| (&mut self.file).take((end - start) as u64).read_to_end(&mut bytes));
        match read {
            Ok(count) if count == end - start => Ok(bytes),
            Ok(count) => Err(self.bad(name, format!("is cut off after {count} of {} bytes", end - start))),
            Err(e) => Err(self.bad(name, format!("cannot be read: {e}"))),
        }
    }
}

/// The header and its length in bytes. The length is checked before anything is allocated for it.
fn read_header(file: &mut File, file_len: u64) -> Result<(Metadata, u64), String> {
    let mut length = [0u8; 8];
    file.read_exact(&mut length).map_err(|_| {
        format!("truncated: {file_len} bytes; a safetensors file starts with 8 bytes that say how long its header is")
    })?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_LIMIT {
        return Err(format!(
            "the header claims {length} bytes, more than the limit of {HEADER_LIMIT}: is this a safetensors file?"
        ));
    }
    if length > file_len - 8 {
        return Err(format!("truncated: the header claims {length} bytes, {} follow", file_len - 8));
    }
    let mut text = vec![0u8; length as usize];
    file.read_exact(&mut text).map_err(|e| format!("the header cannot be read: {e}"))?;
    let header = serde_json::from_slice(&text).map_err(|e| format!("the header is not valid: {e}"))?;
    Ok((header, length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::tensor::{TensorView, serialize};

    use super::*;

    fn file() -> Vec<u8> {
        let (q, cu) = ([0u8; 2 * 4 * 2 * 4], [0i32, 2, 4].map(i32::to_le_bytes).concat());
        let view =
            |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).expect("that many bytes");
        let mut tensors = ["q", "k", "v"].map(|name| (name, view(Dtype::F16, &[1, 4, 2, 4], &q))).to_vec();
        tensors.push(("cu_seqlens", view(Dtype::I32, &[3], &cu)));
        serialize(tensors, None).expect("valid")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever the bytes are, the answer is tensors that fit each other or an [`Failure::Input`]; never a panic.
        #[test]
        fn damaged_files_are_read_or_refused(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bytes = file();
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(cut.map_or(bytes.len(), |at| at.index(bytes.len())));
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("damaged");
            std::fs::write(&path, &bytes).expect("writable");
            match read(&path) {
                Ok(input) => prop_assert_eq!(input.q.extent()[2] % input.k.extent()[2], 0),
                Err(failure) => prop_assert!(matches!(failure, Failure::Input(_)), "{}", failure),
            }
        }
    }

    #[test]
    fn the_undamaged_file_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("whole");
        std::fs::write(&path, file()).expect("writable");
        let input = read(&path).expect("valid");
        assert_eq!((input.q.extent(), input.cu_seqlens), ([1, 4, 2, 4], Some(vec![0, 2, 4])));
    }
}
