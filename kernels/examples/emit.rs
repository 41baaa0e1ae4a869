//! Writes specializations and work lists as files, for scripts that compile or launch kernels without Rust: `ci/compile.py`
//! and `bench/attention.py`.
//!
//! ```text
//! emit OUT ARCH every         every specialization that CI compiles; ARCH is such as 90 or gfx942
//! emit OUT ARCH < cases       those of the cases on standard input, with tiles and pieces
//! ```
//!
//! A case is a line `case NAME key=value ...` (keys below) and lines `slice batch q0 q1 k0 k1 lo hi q_pos k_pos q_step k_step`.
//! Standard output has a line a kernel: `CASE KIND KEY SHARED_BYTES THREADS ROWS BOX_ROWS TILES SECTION ENTRIES DEFINES`. Sources are
//! `OUT/KEY.cu`, work lists `OUT/CASE.KIND.tiles` and `.pieces`, little endian as the device reads them.

use std::collections::HashMap;
use std::error::Error;
use std::io::Read;
use std::path::{Path, PathBuf};

use longspan_hal::{DType, Slice, Slices, Spec};
use longspan_kernels::specialize::sections;
use longspan_kernels::{Prelude, Specialization, Target, View, WorkList};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [out, arch, rest @ ..] = args.as_slice() else {
        return Err("usage: emit OUT ARCH [every] < cases".into());
    };
    std::fs::create_dir_all(out)?;
    let amd = Target::amd(arch, LDS_BYTES, LDS_BYTES);
    let emit = match amd {
        Some(target) => Emit { out: PathBuf::from(out), target, prelude: Prelude::Hip },
        None => Emit { out: PathBuf::from(out), target: Target::nvidia(arch.parse()?), prelude: Prelude::Cuda },
    };
    if rest.first().is_some_and(|a| a == "every") {
        return emit.every();
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let mut slices = Vec::new();
        while let Some(s) = lines.next_if(|l| l.starts_with("slice ")) {
            slices.push(slice(s)?);
        }
        emit.case(line, slices)?;
    }
    Ok(())
}

/// Shared memory of a workgroup, and of a compute unit, on AMD GPUs.
const LDS_BYTES: u32 = 64 << 10;

struct Emit {
    out: PathBuf,
    target: Target,
    prelude: Prelude,
}

impl Emit {
    fn case(&self, line: &str, slices: Vec<Slice>) -> Outcome<()> {
        let (name, spec, aligned) = case(line)?;
        let word = |key: &str| line.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('='));
        let flash3 = self.target.flash3 && word("kernel") != Some("flash2");
        let target = Target { flash3, ..self.target };
        let (view, slices) = (View { aligned, mapped: aligned }, Slices::new(&spec, slices)?);
        let [forward, backward] = sections(&spec, (50 << 20) / 8 * 5, 132);
        let tall = |kernel: &Specialization| word("rows").map_or(kernel.rows, |w| w.parse().unwrap_or(kernel.rows));
        let kernel = Specialization::forward("emit", &spec, target, view)?;
        self.with_list(
            &name,
            "forward",
            &kernel,
            &WorkList::by_queries(&spec, &slices, tall(&kernel), forward.batches)?,
            forward.heads,
        )?;
        let kernel = Specialization::backward("emit", &spec, target, view)?;
        self.with_list(
            &name,
            "backward",
            &kernel,
            &WorkList::by_keys(&spec, &slices, kernel.rows, backward.batches)?,
            backward.heads,
        )?;
        if kernel.sums_dq() {
            self.kernel(&name, "round", &kernel.round_dq(&spec), 0, 0)?;
        }
        if !kernel.adds_dq() {
            let kernel = Specialization::backward_dq("emit", &spec, target, view)?;
            self.with_list(
                &name,
                "dq",
                &kernel,
                &WorkList::by_queries(&spec, &slices, kernel.rows, forward.batches)?,
                forward.heads,
            )?;
        }
        self.kernel(&name, "prepare", &Specialization::prepare(spec.dtype), 0, 0)?;
        self.kernel(&name, "accumulate", &Specialization::accumulate(spec.dtype), 0, 0)?;
        self.kernel(&name, "fill", &Specialization::fill(spec.dtype), 0, 0)?;
        self.kernel(&name, "copy", &Specialization::copy(spec.dtype.size() as u32), 0, 0)
    }

    fn with_list(&self, case: &str, kind: &str, kernel: &Specialization, list: &WorkList, section: u32) -> Outcome<()> {
        write(&self.out.join(format!("{case}.{kind}.tiles")), &tile_bytes(list))?;
        write(&self.out.join(format!("{case}.{kind}.pieces")), &piece_bytes(list))?;
        self.kernel(case, kind, kernel, list.tiles.len(), section)
    }

    fn kernel(&self, case: &str, kind: &str, kernel: &Specialization, tiles: usize, section: u32) -> Outcome<()> {
        let key = format!("{:032x}", kernel.key());
        write(&self.out.join(format!("{key}.cu")), kernel.source.text(self.prelude).as_bytes())?;
        println!(
            "{case} {kind} {key} {} {} {} {} {tiles} {section} {} {}",
            kernel.shared_bytes,
            kernel.threads,
            kernel.rows,
            kernel.box_rows,
            kernel.entries.join(","),
            kernel.defines.join(" ")
        );
        Ok(())
    }

    /// Head sizes x options, as they are likely; every multiple of 16 in the plain form.
    fn every(&self) -> Outcome<()> {
        let sizes = (1..=16).map(|n| (16 * n, 16 * n)).chain([(192, 128), (40, 40), (72, 72), (7, 33), (128, 256)]);
        for (d, dv) in sizes {
            let plain = |dtype| Spec::new(dtype, 1, [256, 256], [4, 2], d).with_head_dim_v(dv);
            let bf16 = plain(DType::Bf16);
            let common = d != dv || [64, 96, 128, 192, 256].contains(&d);
            let mut specs = vec![bf16.clone(), bf16.clone().with_deterministic(true)];
            if d == dv && [64, 128, 256].contains(&d) {
                // Sums of dq not in lines.
                specs.push(Spec::new(DType::Bf16, 1, [255, 256], [4, 2], d));
            }
            if common {
                specs.extend([
                    plain(DType::F16).with_accumulate(true).with_partial(true),
                    bf16.clone().with_partial(true),
                    bf16.clone().with_softcap(Some(30.0)),
                    bf16.clone().with_softcap(Some(30.0)).with_deterministic(true),
                    bf16.clone().with_alibi(true).with_partial(true),
                    bf16.clone().with_dropout(Some(0.1)).with_partial(true),
                    bf16.clone().with_dropout(Some(0.1)).with_alibi(true).with_softcap(Some(30.0)).with_partial(true),
                    bf16.with_dropout(Some(0.1)).with_alibi(true).with_softcap(Some(30.0)).with_deterministic(true),
                ]);
            }
            if common || d <= 32 {
                specs.extend([
                    plain(DType::F32),
                    plain(DType::F32)
                        .with_dropout(Some(0.1))
                        .with_alibi(true)
                        .with_softcap(Some(30.0))
                        .with_partial(true),
                ]);
            }
            for (i, spec) in specs.iter().enumerate() {
                self.spec(&format!("{d}x{dv}-{i}"), spec, d % 8 == 0 && dv % 8 == 0)?;
            }
        }
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            self.kernel(dtype.name(), "prepare", &Specialization::prepare(dtype), 0, 0)?;
            self.kernel(dtype.name(), "accumulate", &Specialization::accumulate(dtype), 0, 0)?;
            self.kernel(dtype.name(), "fill", &Specialization::fill(dtype), 0, 0)?;
        }
        for unit in [2, 4, 8, 16] {
            self.kernel(&unit.to_string(), "copy", &Specialization::copy(unit), 0, 0)?;
        }
        Ok(())
    }

    /// Kernels of the target's own class, and of head sizes in common use those that `--kernel flash2` chooses there.
    fn spec(&self, name: &str, spec: &Spec, aligned: bool) -> Outcome<()> {
        let view = View { aligned, mapped: aligned };
        let mut targets = vec![self.target];
        if self.target.flash3 && [64, 128, 256].contains(&spec.head_dim) {
            targets.push(Target { flash3: false, ..self.target });
        }
        for target in targets {
            self.kernel(name, "forward", &Specialization::forward("emit", spec, target, view)?, 0, 0)?;
            let backward = Specialization::backward("emit", spec, target, view)?;
            self.kernel(name, "backward", &backward, 0, 0)?;
            if backward.sums_dq() {
                self.kernel(name, "round", &backward.round_dq(spec), 0, 0)?;
            }
            if !backward.adds_dq() {
                self.kernel(name, "dq", &Specialization::backward_dq("emit", spec, target, view)?, 0, 0)?;
            }
        }
        Ok(())
    }
}

fn write(path: &Path, bytes: &[u8]) -> Outcome<()> {
    std::fs::write(path, bytes).map_err(|e| format!("{}: {e}", path.display()).into())
}

fn case(line: &str) -> Outcome<(String, Spec, bool)> {
    let mut words = line.split_whitespace();
    let (Some("case"), Some(name)) = (words.next(), words.next()) else {
        return Err(format!("not a case: {line}").into());
    };
    let values: HashMap<&str, &str> = words.filter_map(|w| w.split_once('=')).collect();
    let number = |key: &str, or: usize| values.get(key).map_or(Ok(or), |v| v.parse());
    let optional = |key: &str| values.get(key).map(|v| v.parse::<f32>()).transpose();
    let dtype = match values.get("dtype").copied() {
        Some("bf16") => DType::Bf16,
        Some("f16") => DType::F16,
        _ => DType::F32,
    };
    let (heads, kv_heads) = (number("heads", 1)?, number("kv_heads", 1)?);
    let mut spec = Spec::new(
        dtype,
        number("batch", 1)?,
        [number("q_rows", 0)?, number("k_rows", 0)?],
        [heads, kv_heads],
        number("head_dim", 64)?,
    );
    spec.head_dim_v = number("head_dim_v", spec.head_dim)?;
    if let Some(scale) = optional("scale")? {
        spec.scale = scale;
    }
    if values.contains_key("heads_total") {
        spec = spec.with_head_cut(number("head_first", 0)?, heads, number("heads_total", heads)?, number("group", 1)?);
    }
    let spec = spec
        .with_softcap(optional("softcap")?)
        .with_dropout(optional("dropout")?)
        .with_alibi(number("alibi", 0)? == 1)
        .with_sinks(number("sinks", 0)? == 1)
        .with_deterministic(number("deterministic", 0)? == 1)
        .with_partial(number("partial", 0)? == 1)
        .with_accumulate(number("accumulate", 0)? == 1);
    Ok((name.to_owned(), spec, number("aligned", 1)? == 1))
}

fn slice(line: &str) -> Outcome<Slice> {
    let n: Vec<i64> = line.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    let [batch, q0, q1, k0, k1, lo, hi, q_pos, k_pos, q_step, k_step] = n.as_slice() else {
        return Err(format!("not a slice: {line}").into());
    };
    let rows = |from: i64, to: i64| Ok::<_, Box<dyn Error>>(u32::try_from(from)?..u32::try_from(to)?);
    Ok(Slice {
        batch: u32::try_from(*batch)?,
        q: rows(*q0, *q1)?,
        k: rows(*k0, *k1)?,
        lo: *lo,
        hi: *hi,
        q_pos: *q_pos,
        k_pos: *k_pos,
        q_step: *q_step,
        k_step: *k_step,
    })
}

fn tile_bytes(list: &WorkList) -> Vec<u8> {
    let fields = list.tiles.iter().flat_map(|t| [t.batch, t.row0, t.rows, t.first, t.count, t.rank]);
    fields.flat_map(u32::to_le_bytes).collect()
}

fn piece_bytes(list: &WorkList) -> Vec<u8> {
    let mut bytes = Vec::new();
    for p in &list.pieces {
        bytes.extend([p.q0, p.q1, p.k0, p.k1, p.lo, p.hi].iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend([p.q_pos, p.k_pos].iter().flat_map(|x| x.to_le_bytes()));
        bytes.extend([p.q_step, p.k_step, p.q_end, p.k_end].iter().flat_map(|x| x.to_le_bytes()));
    }
    bytes
}
