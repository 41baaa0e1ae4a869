//! Attention: arguments become kernel parameters.
//!
//! ```text
//! forward:   one launch over query tiles
//! backward:  with atomics:    dq = 0 (unless it is added to); one launch over key tiles writes dk, dv and adds dq
//!                             (in f32 scratch where dq is narrower, rounded to it afterwards)
//!            otherwise:       one launch over key tiles for dk, dv, one over query tiles for dq
//! ```

use longspan_hal::{
    Accumulate, Attention, Backward, DType, Error, Extras, Forward, Gradient, Prepare, Result, Seed, Slices, Spec,
    Stage, Store, Strided, View, ViewMut,
};
use longspan_kernels::Specialization;
use longspan_kernels::params::{
    AccumulateParams, BackwardParams, ForwardParams, MAX_TERMS, MappedBackwardParams, MappedForwardParams, OUT_ROWS,
    PrepareParams, Problem, RoundParams, Tensor, TensorMap, width,
};
use longspan_kernels::tiling::MAX_ROWS;

use crate::copy;
use crate::device::GpuDevice;
use crate::driver::Address;
use crate::launch::Grid;
use crate::plan::{GpuPlan, Kernels, Tiles};
use crate::stream::GpuStream;

/// The attention kernels of one device.
#[derive(Clone, Debug)]
pub struct GpuAttention {
    device: GpuDevice,
}

/// Rows of one block of `prepare_delta`: eight lanes a row.
const PREPARE_LANES: usize = 8;

impl GpuAttention {
    /// The kernels of `device`.
    pub(crate) fn new(device: &GpuDevice) -> Self {
        Self { device: device.clone() }
    }

    fn kernels(&self, spec: &Spec, views: &[&Strided]) -> Result<Kernels> {
        // `View::of` takes a last extent of 1 for row statistics; a head of one element is none.
        let whole = spec.head_dim.is_multiple_of(8) && spec.head_dim_v.is_multiple_of(8);
        let longspan_kernels::View { aligned, mapped } = longspan_kernels::View::of(views.iter().copied());
        let view = longspan_kernels::View { aligned: whole && aligned, mapped: whole && mapped };
        Kernels::of(&self.device, spec, view)
    }

    /// Maps of tensors, each with the rows of its boxes.
    fn maps<const N: usize>(&self, of: [(Address, &Strided, u32); N]) -> Result<[TensorMap; N]> {
        let context = self.device.context();
        let encoder = context.machine.tensor_maps()?;
        let mut maps = [TensorMap::default(); N];
        for (map, (address, at, rows)) in maps.iter_mut().zip(of) {
            let (encoded, returned) = encoder.encode(address, at, rows)?;
            context.check(returned)?;
            *map = encoded;
        }
        Ok(maps)
    }

    /// A forward by a kernel whose resident blocks take tiles by themselves.
    fn forward_mapped(&self, on: &GpuStream, plan: &GpuPlan, of: &Specialization, call: Call<'_>) -> Result<()> {
        let Call { params, q, k, v, out } = call;
        let context = self.device.context();
        let boxes = [(params.q.ptr, q, of.rows), (params.k.ptr, k, of.box_rows), (params.v.ptr, v, of.box_rows)];
        let [q, k, v] = self.maps(boxes)?;
        let [out] = out.map_or(Ok([TensorMap::default()]), |at| self.maps([(params.out.ptr, at, OUT_ROWS)]))?;
        let blocks = (params.problem.tile_count as usize * plan.spec.heads).min(context.figures.units as usize);
        let params = MappedForwardParams {
            maps: [q, k, v, out],
            call: params,
            counter: plan.counter(on)?,
            ..MappedForwardParams::default()
        };
        context.kernel(of)?.launch(on, 0, Grid { x: blocks, y: 1 }, &params)
    }

    /// The main kernel of a backward; `dq` is the f32 memory that it adds to, if it does.
    fn backward_main(
        &self,
        on: &GpuStream,
        (plan, of): (&GpuPlan, &Specialization),
        args: &Backward<'_, GpuDevice>,
        params: &BackwardParams,
        dq: Option<&Strided>,
    ) -> Result<()> {
        let tiles = params.problem.tile_count as usize * params.problem.kv_heads as usize;
        if of.box_rows == 0 {
            return self.launch_backward(on, (of, 0, tiles), args, params, (dq, 0));
        }
        // Resident blocks take tiles by themselves.
        let blocks = tiles.min(self.device.context().figures.units as usize);
        self.launch_backward(on, (of, 0, blocks), args, params, (dq, plan.counter(on)?))
    }

    /// Entry `entry` of a backward kernel with so many blocks; `dq` is to be mapped, `counter` is its tiles'.
    fn launch_backward(
        &self,
        on: &GpuStream,
        (of, entry, blocks): (&Specialization, usize, usize),
        args: &Backward<'_, GpuDevice>,
        params: &BackwardParams,
        (dq, counter): (Option<&Strided>, Address),
    ) -> Result<()> {
        let (kernel, grid) = (self.device.context().kernel(of)?, Grid { x: blocks, y: 1 });
        if of.box_rows == 0 {
            return kernel.launch(on, entry, grid, params);
        }
        // Tiles of the main kernel are rows of keys, those of the dq kernel rows of queries.
        let main = of.entries[entry] == "attention_backward";
        let [queries, keys] = if main { [of.box_rows, of.rows] } else { [of.rows, of.box_rows] };
        let [q, k, v, dout] = self.maps([
            (params.q.ptr, args.q.at(), queries),
            (params.k.ptr, args.k.at(), keys),
            (params.v.ptr, args.v.at(), keys),
            (params.dout.ptr, args.dout.at(), queries),
        ])?;
        let [dq] = dq.map_or(Ok([TensorMap::default()]), |at| self.maps([(params.dq.ptr, at, of.box_rows)]))?;
        let params = MappedBackwardParams {
            maps: [q, k, v, dout, dq],
            call: *params,
            counter,
            ..MappedBackwardParams::default()
        };
        kernel.launch(on, entry, grid, &params)
    }

    fn add(&self, on: &GpuStream, into: (Address, &Strided), terms: &[Tensor]) -> Result<()> {
        let (address, at) = into;
        let kernel = self.device.context().kernel(&Specialization::accumulate(at.dtype()))?;
        let extent = extent(at)?;
        let tensor = tensor(address, at);
        let mut list = [Tensor::default(); MAX_TERMS];
        list[..terms.len()].copy_from_slice(terms);
        let width = width(terms.iter().chain([&tensor]), extent);
        let params = AccumulateParams { into: tensor, terms: list, extent, count: terms.len() as u32, width };
        kernel.launch(on, 0, self.passing(kernel.threads, at, width), &params)
    }

    /// Whether f32 sums of dq of `spec` are those of [`Specialization::sums_dq`], whichever kernel a call takes.
    fn sums_dq(&self, spec: &Spec) -> Result<bool> {
        Ok(self.kernels(spec, &[])?.backward.sums_dq())
    }

    /// dq of such sums.
    fn round_dq(&self, on: &GpuStream, spec: &Spec, into: (Address, &Strided), sums: Tensor) -> Result<()> {
        let (address, at) = into;
        let (into, extent) = (tensor(address, at), extent(at)?);
        let flags = if width([&into, &sums], extent) == 4 { RoundParams::ALIGNED } else { 0 };
        self.pass_dq(on, 0, (spec, at), RoundParams { into, sums, extent, scale: spec.scale, flags })
    }

    /// f32 dq in place of such sums, or the reverse.
    fn reorder_dq(&self, on: &GpuStream, spec: &Spec, (sums, at): (Tensor, &Strided), flags: u32) -> Result<()> {
        let (into, extent) = (Tensor::default(), extent(at)?);
        self.pass_dq(on, 1, (spec, at), RoundParams { into, sums, extent, scale: spec.scale, flags })
    }

    fn pass_dq(&self, on: &GpuStream, entry: usize, of: (&Spec, &Strided), params: RoundParams) -> Result<()> {
        let kernel = self.device.context().kernel(&self.kernels(of.0, &[])?.backward.round_dq(of.0))?;
        kernel.launch(on, entry, self.passing(kernel.threads, of.1, 4), &params)
    }

    /// The grid of a pass over memory whose threads take four units of `width` elements at a time: enough blocks to fill the
    /// device, not more.
    fn passing(&self, threads: u32, at: &Strided, width: u32) -> Grid {
        let most = 16 * self.device.context().figures.units.max(1) as usize;
        Grid { x: at.elements().div_ceil(4 * threads as usize * width as usize).min(most), y: 1 }
    }

    /// Where dq is added by atomics: the memory, zeroed unless it is added to.
    fn atomic_dq(&self, on: &GpuStream, spec: &Spec, args: &Backward<'_, GpuDevice>) -> Result<(Address, Strided)> {
        let dq = &args.dq;
        if dq.into.dtype() == DType::F32 {
            let address = address_mut(on, &dq.into)?;
            if dq.store == Store::Write {
                copy::fill(on, 0.0, address, dq.into.at())?;
            }
            return Ok((address, *dq.into.at()));
        }
        let at = dq_scratch(spec);
        if at.is_empty() {
            return Ok((0, at));
        }
        let scratch = args.scratch.filter(|s| s.bytes() >= at.bytes());
        let scratch = scratch
            .ok_or_else(|| Error::invalid("scratch", format!("the backward needs {} bytes of it", at.bytes())))?;
        scratch.used_on(on)?;
        copy::fill(on, 0.0, scratch.address(), &at)?;
        Ok((scratch.address(), at))
    }
}

/// A forward's parameters, and its inputs as tensors.
struct Call<'a> {
    params: ForwardParams,
    q: &'a Strided,
    k: &'a Strided,
    v: &'a Strided,
    out: Option<&'a Strided>,
}

/// f32 sums of dq.
fn dq_scratch(spec: &Spec) -> Strided {
    Strided::dense(DType::F32, [spec.batch, spec.q_rows, spec.heads, spec.head_dim])
}

impl Attention<GpuDevice> for GpuAttention {
    type Plan = GpuPlan;

    fn supports(&self, spec: &Spec) -> Result<()> {
        for (what, rows) in [("query", spec.q_rows), ("key", spec.k_rows)] {
            if rows >= MAX_ROWS {
                return Err(Error::Unsupported {
                    backend: self.device.context().machine.facts().name,
                    what: format!("{rows} {what} rows on one device"),
                    instead: format!("fewer than {MAX_ROWS} are"),
                });
            }
        }
        self.kernels(spec, &[]).map(drop)
    }

    fn plan(&self, on: &GpuStream, spec: &Spec, slices: &Slices) -> Result<GpuPlan> {
        self.supports(spec)?;
        let _bound = self.device.context().bind()?;
        GpuPlan::new(&self.device, on, spec, slices)
    }

    fn scratch_bytes(&self, plan: &GpuPlan) -> usize {
        let narrow = plan.adds_dq && !plan.spec.accumulate;
        if narrow { dq_scratch(&plan.spec).bytes().next_multiple_of(256) } else { 0 }
    }

    fn plan_bytes(&self, plan: &GpuPlan) -> usize {
        plan.bytes()
    }

    fn kernels(&self, plan: &GpuPlan, backward: bool) -> Vec<String> {
        let Ok(kernels) = self.kernels(&plan.spec, &[]) else { return Vec::new() };
        let used = match backward {
            false => vec![kernels.forward],
            true if kernels.backward.adds_dq() => vec![kernels.backward],
            true => vec![kernels.backward, kernels.dq],
        };
        used.iter().map(Specialization::name).collect()
    }

    fn forward(&self, on: &GpuStream, plan: &GpuPlan, args: &Forward<'_, GpuDevice>) -> Result<()> {
        let _bound = self.device.context().bind()?;
        plan.read_on(on)?;
        let spec = &plan.spec;
        let mut views = vec![args.q.at(), args.k.at(), args.v.at()];
        let mut params = ForwardParams {
            q: read(on, &args.q)?,
            k: read(on, &args.k)?,
            v: read(on, &args.v)?,
            sinks: args.extras.sinks.as_ref().map_or(Ok(Tensor::default()), |s| read(on, s))?,
            ..ForwardParams::default()
        };
        let (partial, results) = match &args.stage {
            Stage::All { out, lse } => (None, Some((out, lse))),
            Stage::Start(partial) => (Some((partial, ForwardParams::STORE)), None),
            Stage::Continue(partial) => (Some((partial, ForwardParams::LOAD | ForwardParams::STORE)), None),
            Stage::Finish { partial, out, lse } => (Some((partial, ForwardParams::LOAD)), Some((out, lse))),
        };
        if let Some((partial, stage)) = partial {
            params.stage = stage;
            params.acc = write(on, &partial.acc)?;
            params.m = write(on, &partial.m)?;
            params.l = write(on, &partial.l)?;
            views.push(partial.acc.at());
        }
        if let Some((out, lse)) = results {
            params.out = write(on, out)?;
            params.lse = write(on, lse)?;
            views.push(out.at());
        }
        let kernel = self.kernels(spec, &views)?.forward;
        let tiles = plan.forward.of(kernel.rows)?;
        params.problem = problem(on, spec, tiles, &args.extras)?;
        if kernel.box_rows > 0 {
            let out = results.map(|(out, _)| out.at());
            let call = Call { params, q: args.q.at(), k: args.k.at(), v: args.v.at(), out };
            return self.forward_mapped(on, plan, &kernel, call);
        }
        let grid = Grid { x: tiles.count as usize * spec.heads, y: 1 };
        self.device.context().kernel(&kernel)?.launch(on, 0, grid, &params)
    }

    fn backward_prepare(&self, on: &GpuStream, spec: &Spec, args: &Prepare<'_, GpuDevice>) -> Result<()> {
        let _bound = self.device.context().bind()?;
        let kernel = self.device.context().kernel(&Specialization::prepare(spec.dtype))?;
        let mut params = PrepareParams {
            out: read(on, &args.out)?,
            dout: read(on, &args.dout)?,
            lse: read(on, &args.lse)?,
            dlse: args.dlse.as_ref().map_or(Ok(Tensor::default()), |d| read(on, d))?,
            delta: write(on, &args.delta)?,
            batch: narrow("batch", spec.batch)?,
            rows: narrow("q_rows", spec.q_rows)?,
            heads: narrow("heads", spec.heads)?,
            head_dim_v: narrow("head_dim_v", spec.head_dim_v)?,
            head_first: narrow("head_first", spec.head_first)?,
            ..PrepareParams::default()
        };
        if let Some((logits, dsinks)) = &args.sinks {
            params.sinks = read(on, logits)?;
            params.dsinks = write(on, dsinks)?;
        }
        let rows = spec.batch * spec.q_rows * spec.heads;
        let blocks = rows.div_ceil(kernel.threads as usize / PREPARE_LANES);
        kernel.launch(on, 0, Grid { x: blocks, y: 1 }, &params)?;
        if args.sinks.is_some() {
            kernel.launch(on, 1, Grid { x: spec.heads, y: 1 }, &params)?;
        }
        Ok(())
    }

    fn backward(&self, on: &GpuStream, plan: &GpuPlan, args: &Backward<'_, GpuDevice>) -> Result<()> {
        let context = self.device.context();
        let _bound = context.bind()?;
        plan.read_on(on)?;
        let spec = &plan.spec;
        let flag = |g: &Gradient<'_, GpuDevice>, flag| if g.store == Store::Add { flag } else { 0 };
        let mut params = BackwardParams {
            q: read(on, &args.q)?,
            k: read(on, &args.k)?,
            v: read(on, &args.v)?,
            dout: read(on, &args.dout)?,
            lse: read(on, &args.lse)?,
            delta: read(on, &args.delta)?,
            dk: write(on, &args.dk.into)?,
            dv: write(on, &args.dv.into)?,
            add: flag(&args.dk, BackwardParams::ADD_DK) | flag(&args.dv, BackwardParams::ADD_DV),
            ..BackwardParams::default()
        };
        let inputs = [args.q.at(), args.k.at(), args.v.at(), args.dout.at(), args.dk.into.at(), args.dv.into.at()];
        let with = |dq| self.kernels(spec, &[&inputs[..], &[dq]].concat());
        let main = self.kernels(spec, &inputs)?.backward;
        if !main.adds_dq() {
            params.problem = problem(on, spec, plan.backward.of(main.rows)?, &args.extras)?;
            self.backward_main(on, (plan, &main), args, &params, None)?;
            let of_dq = with(args.dq.into.at())?.dq;
            let tiles = plan.dq.of(of_dq.rows)?;
            params.problem = problem(on, spec, tiles, &args.extras)?;
            params.dq = write(on, &args.dq.into)?;
            params.add = flag(&args.dq, BackwardParams::ADD_DQ);
            let entry = of_dq.entries.iter().position(|e| *e == "attention_backward_dq").unwrap_or(0);
            let blocks = tiles.count as usize * spec.heads;
            return self.launch_backward(on, (&of_dq, entry, blocks), args, &params, (None, 0));
        }
        let (address, at) = self.atomic_dq(on, spec, args)?;
        params.dq = tensor(address, &at);
        let kernel = with(&at)?.backward;
        params.problem = problem(on, spec, plan.backward.of(kernel.rows)?, &args.extras)?;
        if args.dq.into.dtype() != DType::F32 {
            self.backward_main(on, (plan, &kernel), args, &params, Some(&at))?;
            let into = (address_mut(on, &args.dq.into)?, args.dq.into.at());
            return if kernel.sums_dq() {
                self.round_dq(on, spec, into, params.dq)
            } else {
                self.add(on, into, &[params.dq])
            };
        }
        // Views that the kernels of other calls don't take: what those left is dq for this one.
        let foreign = !kernel.sums_dq() && self.sums_dq(spec)?;
        if foreign && args.dq.store == Store::Add {
            self.reorder_dq(on, spec, (params.dq, &at), 0)?;
        }
        self.backward_main(on, (plan, &kernel), args, &params, Some(&at))?;
        if foreign { self.reorder_dq(on, spec, (params.dq, &at), RoundParams::TO_SUMS) } else { Ok(()) }
    }

    fn finish_dq(
        &self,
        on: &GpuStream,
        spec: &Spec,
        into: ViewMut<'_, GpuDevice>,
        sums: View<'_, GpuDevice>,
    ) -> Result<()> {
        let terms = [sums];
        let args = Accumulate::new(into, &terms)?;
        if !self.sums_dq(spec)? {
            return self.accumulate(on, &args);
        }
        let _bound = self.device.context().bind()?;
        let (address, from) = (address_mut(on, &into)?, read(on, &sums)?);
        self.round_dq(on, spec, (address, into.at()), from)
    }

    fn accumulate(&self, on: &GpuStream, args: &Accumulate<'_, GpuDevice>) -> Result<()> {
        let _bound = self.device.context().bind()?;
        let into = (address_mut(on, &args.into)?, args.into.at());
        let terms = args.terms.iter().map(|t| read(on, t)).collect::<Result<Vec<_>>>()?;
        let first = terms.len().min(MAX_TERMS);
        let rest = &terms[first..];
        let sum = tensor(into.0, into.1);
        // More terms than one launch takes go through the f32 sum itself, in the same order.
        if !rest.is_empty() && (args.into.dtype() != DType::F32 || rest.iter().any(|t| t.ptr == sum.ptr)) {
            return Err(Error::Unsupported {
                backend: self.device.context().machine.facts().name,
                what: format!("a sum of {} terms in {} or in place of a late term", terms.len(), args.into.dtype()),
                instead: format!("up to {MAX_TERMS} terms are, and more into f32 memory of its own"),
            });
        }
        self.add(on, into, &terms[..first])?;
        rest.chunks(MAX_TERMS - 1).try_for_each(|more| self.add(on, into, &[&[sum], more].concat()))
    }
}

/// The problem as kernels take it; notes that the stream reads the options' inputs.
fn problem(on: &GpuStream, spec: &Spec, tiles: &Tiles, extras: &Extras<'_, GpuDevice>) -> Result<Problem> {
    let (seed_ptr, seed) = match extras.seed {
        Some(Seed::Device(buffer)) => {
            buffer.used_on(on)?;
            (buffer.address(), 0)
        }
        Some(Seed::Host(seed)) => (0, seed),
        None => (0, 0),
    };
    Ok(Problem {
        tiles: tiles.tiles,
        pieces: tiles.pieces,
        slopes: extras.alibi_slopes.as_ref().map_or(Ok(Tensor::default()), |s| read(on, s))?,
        seed_ptr,
        seed,
        tile_count: tiles.count,
        heads: narrow("heads", spec.heads)?,
        kv_heads: narrow("kv_heads", spec.kv_heads)?,
        section: tiles.section,
        head_first: narrow("head_first", spec.head_first)?,
        group: narrow("group", spec.group)?,
        kv_first: narrow("kv_first", spec.kv_first)?,
        batch_first: narrow("batch_first", spec.batch_first)?,
        head_dim: narrow("head_dim", spec.head_dim)?,
        head_dim_v: narrow("head_dim_v", spec.head_dim_v)?,
        scale: spec.scale,
        softcap: spec.softcap.unwrap_or(1.0),
        keep_scale: 1.0 / (1.0 - spec.dropout.unwrap_or(0.0)),
        drop_below: spec.dropout_threshold(),
    })
}

/// A view as kernels take it; notes that the stream reads it.
fn read(on: &GpuStream, view: &View<'_, GpuDevice>) -> Result<Tensor> {
    view.buffer().used_on(on)?;
    Ok(tensor(view.buffer().address_of(view.at()), view.at()))
}

/// A view as kernels take it; notes that the stream writes it.
fn write(on: &GpuStream, view: &ViewMut<'_, GpuDevice>) -> Result<Tensor> {
    Ok(tensor(address_mut(on, view)?, view.at()))
}

fn address_mut(on: &GpuStream, view: &ViewMut<'_, GpuDevice>) -> Result<Address> {
    view.buffer().used_on(on)?;
    Ok(view.buffer().address_of(view.at()))
}

fn tensor(ptr: Address, at: &Strided) -> Tensor {
    let [batch, row, head, _] = at.strides().map(|s| s as i64);
    Tensor { ptr, batch, row, head }
}

fn extent(at: &Strided) -> Result<[u32; 4]> {
    let [b, s, h, d] = at.extent();
    Ok([narrow("batch", b)?, narrow("rows", s)?, narrow("heads", h)?, narrow("dim", d)?])
}

fn narrow(what: &'static str, n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::invalid(what, format!("{n} is too many for a GPU")))
}
