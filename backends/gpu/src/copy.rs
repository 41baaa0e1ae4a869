//! Strided copies: which shape a copy between two views has, and who does it.
//!
//! ```text
//! form(from, to):  grow the run of bytes that is contiguous on both sides by every axis that continues it;
//!                  merge axes that continue each other on both sides
//! no axis left     -> one plain copy
//! few axes         -> rows with a pitch, by a copy engine (to another device, to and from the host)
//! otherwise        -> the `copy_strided` kernel, in units of up to 16 bytes
//! ```
//!
//! On one device a kernel copies rows: drivers use one of theirs there, not an engine.

use longspan_hal::{Error, Result, Strided};
use longspan_kernels::Specialization;
use longspan_kernels::params::{CopyParams, FillParams, MAX_REGIONS, Region, Tensor, width};

use crate::driver::{Address, Rows};
use crate::launch::Grid;
use crate::stream::GpuStream;

/// A copy in bytes: runs of `run` bytes along up to three axes, sorted by the stride in the destination.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Form {
    run: usize,
    axes: Vec<Axis>,
}

/// `count` steps of so many bytes on each side.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Axis {
    count: usize,
    from: usize,
    to: usize,
}

/// Shortest rows that a copy engine is given: statistics of two heads.
const ENGINE_ROW: usize = 8;
/// The most 2D copies that one strided copy is cut into.
const ENGINE_PIECES: usize = 16;
/// The most bytes of one region of the kernel, whose units have two at least.
const KERNEL_BYTES: usize = 1 << 32;
/// The largest pitch that drivers take.
const ENGINE_PITCH: usize = i32::MAX as usize;

impl Form {
    /// The form of a copy between tensors of equal dtype and extent; `None` for empty ones.
    pub(crate) fn of(from: &Strided, to: &Strided) -> Option<Self> {
        if from.is_empty() {
            return None;
        }
        let size = from.dtype().size();
        let (a, b) = (from.strides(), to.strides());
        let mut axes: Vec<Axis> = (0..4)
            .map(|i| Axis { count: from.extent()[i], from: a[i] * size, to: b[i] * size })
            .filter(|axis| axis.count > 1)
            .collect();
        axes.sort_by_key(|axis| (axis.to, axis.from));
        let mut form = Self { run: size, axes: Vec::new() };
        for axis in axes {
            form.take(axis);
        }
        Some(form)
    }

    /// Adds the next axis, sorted by destination.
    fn take(&mut self, axis: Axis) {
        if self.axes.is_empty() && axis.from == self.run && axis.to == self.run {
            self.run *= axis.count;
            return;
        }
        match self.axes.last_mut() {
            Some(last) if axis.from == last.from * last.count && axis.to == last.to * last.count => {
                last.count *= axis.count;
            }
            _ => self.axes.push(axis),
        }
    }

    /// Whether it is one plain copy.
    pub(crate) fn is_plain(&self) -> bool {
        self.axes.is_empty()
    }

    /// Whether rows with a pitch serve it well.
    pub(crate) fn suits_engine(&self) -> bool {
        let (rows, pieces) = self.pieces();
        let pitch = self.axes.get(rows).map_or(0, |axis| axis.from.max(axis.to));
        self.is_plain() || (self.run >= ENGINE_ROW && pieces <= ENGINE_PIECES && pitch <= ENGINE_PITCH)
    }

    /// The axis of the rows of a 2D copy, and how many such copies are needed.
    fn pieces(&self) -> (usize, usize) {
        let longest = (0..self.axes.len()).max_by_key(|&i| self.axes[i].count).unwrap_or(0);
        let others = self.axes.iter().enumerate().filter(|(i, _)| *i != longest);
        (longest, others.map(|(_, axis)| axis.count).product())
    }

    /// The 2D copies: offsets in bytes on both sides, for all of the same rows.
    fn offsets(&self) -> (Option<Axis>, Vec<(usize, usize)>) {
        let (longest, _) = self.pieces();
        let mut offsets = vec![(0, 0)];
        for (_, axis) in self.axes.iter().enumerate().filter(|(i, _)| *i != longest) {
            let step = |(a, b): &(usize, usize)| {
                let (a, b) = (*a, *b);
                (0..axis.count).map(move |i| (a + i * axis.from, b + i * axis.to))
            };
            offsets = offsets.iter().flat_map(step).collect();
        }
        (self.axes.get(longest).copied(), offsets)
    }

    /// The region for the kernel, and its unit in bytes.
    fn region(&self, from: Address, to: Address) -> Result<(u32, Region)> {
        let fits = |unit: usize| {
            let strides = self.axes.iter().all(|x| x.from.is_multiple_of(unit) && x.to.is_multiple_of(unit));
            let unit64 = unit as Address;
            strides && self.run.is_multiple_of(unit) && from.is_multiple_of(unit64) && to.is_multiple_of(unit64)
        };
        let unit = [16, 8, 4].into_iter().find(|unit| fits(*unit)).unwrap_or(2);
        let axis = |i: usize| self.axes.get(i).copied().unwrap_or(Axis { count: 1, from: 0, to: 0 });
        let [head, row, batch] = [axis(0), axis(1), axis(2)];
        let side = |ptr, of: fn(&Axis) -> usize| {
            let stride = |axis: &Axis| (of(axis) / unit) as i64;
            Tensor { ptr, batch: stride(&batch), row: stride(&row), head: stride(&head) }
        };
        let narrow = |n: usize| u32::try_from(n).map_err(|_| Error::invalid("copy", format!("an axis of {n} steps")));
        let extent = [narrow(batch.count)?, narrow(row.count)?, narrow(head.count)?, narrow(self.run / unit)?];
        Ok((unit as u32, Region { from: side(from, |x| x.from), to: side(to, |x| x.to), extent }))
    }
}

/// One copy: its form and both addresses.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// The form.
    pub form: Form,
    /// Read.
    pub from: Address,
    /// Written.
    pub to: Address,
}

impl Job {
    /// A copy between tensors at addresses; `None` for empty ones.
    pub(crate) fn new((from, at_from): (Address, &Strided), (to, at_to): (Address, &Strided)) -> Option<Self> {
        Form::of(at_from, at_to).map(|form| Self { form, from, to })
    }

    /// Halves, until each has so few units that the kernel can count them.
    fn countable(&self) -> Vec<Self> {
        let axes = &self.form.axes;
        let longest = (0..axes.len()).max_by_key(|&i| axes[i].count);
        let bytes = axes.iter().fold(self.form.run, |bytes, axis| bytes * axis.count);
        let Some(longest) = longest.filter(|&i| bytes > KERNEL_BYTES && axes[i].count > 1) else {
            return vec![self.clone()];
        };
        let axis = axes[longest];
        let half = axis.count / 2;
        let part = |first: usize, count: usize| {
            let mut part = self.clone();
            part.form.axes[longest].count = count;
            part.from += (first * axis.from) as Address;
            part.to += (first * axis.to) as Address;
            part.countable()
        };
        [part(0, half), part(half, axis.count - half)].concat()
    }
}

/// Queues copies within the stream's device. The context is bound.
///
/// # Errors
/// [`Error::Driver`]; [`Error::Unavailable`] without a compiler for the kernel.
pub(crate) fn local(on: &GpuStream, jobs: impl IntoIterator<Item = Job>) -> Result<()> {
    let mut strided = Vec::new();
    for job in jobs {
        if job.form.is_plain() { plain(on, &job)? } else { strided.push(job) }
    }
    by_kernel(on, &strided)
}

/// Queues copies to another device, or between device and pinned host memory. The context is bound.
///
/// # Errors
/// As [`local`].
pub(crate) fn remote(on: &GpuStream, jobs: impl IntoIterator<Item = Job>) -> Result<()> {
    let mut strided = Vec::new();
    for job in jobs {
        if job.form.is_plain() {
            plain(on, &job)?;
        } else if job.form.suits_engine() {
            by_engine(on, &job)?;
        } else {
            strided.push(job);
        }
    }
    by_kernel(on, &strided)
}

fn plain(on: &GpuStream, job: &Job) -> Result<()> {
    let context = on.context();
    // SAFETY: views were checked against their buffers, which stay alive until the work ran.
    context.check(unsafe { context.driver.copy(job.to, job.from, job.form.run, on.raw()) })
}

fn by_engine(on: &GpuStream, job: &Job) -> Result<()> {
    let context = on.context();
    let (rows, offsets) = job.form.offsets();
    let Some(rows) = rows else { return plain(on, job) };
    for (from, to) in offsets {
        let copy = Rows {
            to: job.to + to as Address,
            to_pitch: rows.to,
            from: job.from + from as Address,
            from_pitch: rows.from,
            width: job.form.run,
            height: rows.count,
        };
        // SAFETY: memory as in `plain`.
        context.check(unsafe { context.driver.copy_2d(&copy, on.raw()) })?;
    }
    Ok(())
}

fn by_kernel(on: &GpuStream, jobs: &[Job]) -> Result<()> {
    let jobs = jobs.iter().flat_map(Job::countable);
    let regions = jobs.map(|job| job.form.region(job.from, job.to)).collect::<Result<Vec<_>>>()?;
    for unit in [2, 4, 8, 16] {
        let same: Vec<Region> = regions.iter().filter(|(u, _)| *u == unit).map(|(_, region)| *region).collect();
        for batch in same.chunks(MAX_REGIONS) {
            launch_copy(on, unit, batch)?;
        }
    }
    Ok(())
}

fn launch_copy(on: &GpuStream, unit: u32, batch: &[Region]) -> Result<()> {
    let kernel = on.context().kernel(&Specialization::copy(unit))?;
    let mut params = CopyParams::default();
    params.regions[..batch.len()].copy_from_slice(batch);
    let units = |region: &Region| region.extent.iter().map(|n| *n as usize).product::<usize>();
    let most = batch.iter().map(units).max().unwrap_or(0);
    // Four units a thread; enough blocks to fill the device, not more.
    let blocks = most.div_ceil(kernel.threads as usize * 4).clamp(1, 16 * on.context().figures.units.max(1) as usize);
    kernel.launch(on, 0, Grid { x: blocks, y: batch.len() }, &params)
}

/// Queues a write of `value` to every element of the tensor at `address`. The context is bound.
///
/// # Errors
/// As [`local`].
pub(crate) fn fill(on: &GpuStream, value: f32, address: Address, at: &Strided) -> Result<()> {
    let Some(form) = Form::of(at, at) else { return Ok(()) };
    let (context, size) = (on.context(), at.dtype().size());
    if form.is_plain() {
        let count = form.run / size;
        let bits = bits(value, at.dtype());
        // SAFETY: the view was checked against its buffer, which stays alive until the work ran.
        return context.check(unsafe {
            match size {
                2 => context.driver.fill_16(address, bits as u16, count, on.raw()),
                _ => context.driver.fill_32(address, bits, count, on.raw()),
            }
        });
    }
    let kernel = context.kernel(&Specialization::fill(at.dtype()))?;
    let strides = at.strides().map(|s| s as i64);
    let narrow = |n: usize| u32::try_from(n).map_err(|_| Error::invalid("fill", format!("an axis of {n} steps")));
    let [b, s, h, d] = at.extent();
    let to = Tensor { ptr: address, batch: strides[0], row: strides[1], head: strides[2] };
    let extent = [narrow(b)?, narrow(s)?, narrow(h)?, narrow(d)?];
    let params = FillParams { to, extent, value, width: width([&to], extent) };
    let blocks = at.elements().div_ceil(kernel.threads as usize * 4);
    let blocks = blocks.clamp(1, 16 * context.figures.units.max(1) as usize);
    kernel.launch(on, 0, Grid { x: blocks, y: 1 }, &params)
}

/// `value` rounded to `dtype`, as its bits.
fn bits(value: f32, dtype: longspan_hal::DType) -> u32 {
    match dtype {
        longspan_hal::DType::Bf16 => u32::from(half::bf16::from_f32(value).to_bits()),
        longspan_hal::DType::F16 => u32::from(half::f16::from_f32(value).to_bits()),
        _ => value.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use longspan_hal::DType;
    use proptest::prelude::*;

    use super::*;

    /// A strided view of `extent`, with its axes in any order and gaps between.
    fn strided(extent: [usize; 4], offset: usize, gaps: [usize; 3], order: [usize; 3], dtype: DType) -> Strided {
        let mut strides = [0, 0, 0, 1];
        let mut span = extent[3];
        for (axis, gap) in order.into_iter().zip(gaps) {
            strides[axis] = span + gap;
            span += (extent[axis] - 1) * strides[axis];
        }
        Strided::new(dtype, offset, extent, strides).expect("nested by construction")
    }

    type Pair = (Strided, Strided);

    fn pair() -> impl Strategy<Value = Pair> {
        let axis = 1usize..5;
        let side = || {
            (0usize..9, [0usize..3, 0usize..3, 0usize..3], Just([0usize, 1, 2]).prop_shuffle())
                .prop_map(|(offset, gaps, order)| (offset * 4, gaps.map(|g| g * 4 * (g % 2)), order))
        };
        let dim = prop_oneof![Just(1usize), Just(8), 1usize..20];
        let extent = ([axis.clone(), axis.clone(), axis], dim).prop_map(|([b, s, h], d)| [b, s, h, d]);
        let dtype = prop_oneof![Just(DType::Bf16), Just(DType::F32)];
        (extent, side(), side(), dtype).prop_map(|(extent, a, b, dtype)| {
            (strided(extent, a.0, a.1, a.2, dtype), strided(extent, b.0, b.1, b.2, dtype))
        })
    }

    /// (from, to) of every byte, by the views.
    fn expected((from, to): &Pair) -> Vec<(usize, usize)> {
        let ([b, s, h, d], size) = (from.extent(), from.dtype().size());
        let mut all = Vec::new();
        for i in 0..b * s * h * d * size {
            let (e, byte) = (i / size, i % size);
            let at = [e / d / h / s, e / d / h % s, e / d % h, e % d];
            all.push((from.offset_of(at) * size + byte, to.offset_of(at) * size + byte));
        }
        all.sort_unstable();
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn pieces_of_a_copy_move_every_byte_once(pair in pair()) {
            let form = Form::of(&pair.0, &pair.1).expect("not empty");
            let size = pair.0.dtype().size();
            let (starts, (rows, offsets)) = ((pair.0.offset() * size, pair.1.offset() * size), form.offsets());
            let rows = rows.unwrap_or(Axis { count: 1, from: 0, to: 0 });
            let mut moved = Vec::new();
            for (a, b) in offsets {
                for r in 0..rows.count {
                    let at = (starts.0 + a + r * rows.from, starts.1 + b + r * rows.to);
                    moved.extend((0..form.run).map(|i| (at.0 + i, at.1 + i)));
                }
            }
            moved.sort_unstable();
            prop_assert_eq!(&moved, &expected(&pair));
        }

        #[test]
        fn a_region_moves_every_byte_once_in_aligned_units(pair in pair(), base in 0u64..3) {
            let form = Form::of(&pair.0, &pair.1).expect("not empty");
            let size = pair.0.dtype().size();
            let starts = [&pair.0, &pair.1].map(|at| base * 16 + (at.offset() * size) as u64);
            let (unit, region) = form.region(starts[0], starts[1]).expect("small");
            let [b, r, h, d] = region.extent.map(i64::from);
            let mut moved = Vec::new();
            for i in 0..b * r * h * d {
                let at = [i / d / h / r, i / d / h % r, i / d % h, i % d];
                let address = |t: &Tensor| {
                    let elements = at[0] * t.batch + at[1] * t.row + at[2] * t.head + at[3];
                    t.ptr as usize + (elements * i64::from(unit)) as usize
                };
                let (from, to) = (address(&region.from), address(&region.to));
                prop_assert!(from % unit as usize == 0 && to % unit as usize == 0);
                moved.extend((0..unit as usize).map(|i| (from - base as usize * 16 + i, to - base as usize * 16 + i)));
            }
            moved.sort_unstable();
            prop_assert_eq!(moved, expected(&pair));
        }
    }

    #[test]
    fn dense_copies_are_plain_and_a_head_cut_is_rows() {
        let dense = Strided::dense(DType::Bf16, [2, 64, 8, 64]);
        assert_eq!(Form::of(&dense, &dense), Some(Form { run: 2 * 64 * 8 * 64 * 2, axes: Vec::new() }));
        let cut = dense.narrow(2, 2..4).expect("inside");
        let form = Form::of(&cut, &Strided::dense(DType::Bf16, cut.extent())).expect("not empty");
        assert_eq!(form, Form { run: 256, axes: vec![Axis { count: 128, from: 1024, to: 256 }] });
        assert!(form.suits_engine() && !form.is_plain());
    }

    #[test]
    fn what_the_kernel_cannot_count_is_halved() {
        let form =
            Form { run: 6, axes: vec![Axis { count: 5, from: 16, to: 8 }, Axis { count: 1 << 29, from: 80, to: 40 }] };
        let parts = Job { form, from: 4, to: 2 }.countable();
        let bytes = |job: &Job| job.form.axes.iter().fold(job.form.run, |n, axis| n * axis.count);
        assert!(parts.len() > 1 && parts.iter().all(|part| bytes(part) <= KERNEL_BYTES));
        assert_eq!(parts.iter().map(bytes).sum::<usize>(), 30 << 29);
        let mut rows = 0;
        for part in &parts {
            assert_eq!((part.from - 4, part.to - 2), (80 * rows, 40 * rows), "each goes on where the last ended");
            rows += part.form.axes[1].count as Address;
        }
    }

    #[test]
    fn values_are_rounded_to_nearest() {
        assert_eq!(bits(1.0, DType::Bf16), 0x3F80);
        assert_eq!(bits(1.0 + 1.0 / 256.0, DType::Bf16), 0x3F80);
        assert_eq!(bits(1.0 + 3.0 / 256.0, DType::Bf16), 0x3F82);
        assert_eq!(bits(65520.0, DType::F16), 0x7C00);
        assert_eq!(bits(-2.5, DType::F32), (-2.5f32).to_bits());
    }
}
