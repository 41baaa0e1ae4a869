//! [`Engine`]: one rank with its backend erased, working on host tensors. The only dyn trait of the workspace.

use std::fmt::Debug;
use std::ops::Range;
use std::time::Duration;

use longspan_hal::{
    Backend, Caps, Collective, DType, Device, Error, Extras, Memory, Peak, Priority, Result, Seed, Step, Strided, View,
    ViewMut,
};
use longspan_seqpar::{
    Bytes, Gradients as DeviceGradients, Inputs, Layout, Mask, Member, OutputRows, Outputs, Plan, Problem, Span, Trace,
    Usp, Work,
};

use crate::resident::{Pass, Resident};
use crate::{Tensor, room};

/// Time for a group to name who is missing.
const NAMING: Duration = Duration::from_secs(2);

/// Inputs that options bring; each is given exactly where the problem has the option.
#[derive(Clone, Debug, Default)]
pub struct Extra {
    /// ALiBi slopes, one per head.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Sink logits, one per head.
    pub sinks: Option<Vec<f32>>,
    /// Dropout seed.
    pub seed: Option<u64>,
    /// Joint q, k and v, the same on every rank.
    pub joint: Option<[Tensor; 3]>,
}

/// Results of a forward.
#[derive(Clone, Debug)]
pub struct Forwarded {
    /// Output of the shard, `[batch, local rows, heads, head_dim_v]`.
    pub out: Tensor,
    /// Natural-log sums of the shard, f32 `[batch, local rows, heads, 1]`.
    pub lse: Tensor,
    /// Joint out and lse.
    pub joint: Option<[Tensor; 2]>,
}

/// Results of a backward.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Of the shard's queries.
    pub dq: Tensor,
    /// Of the shard's keys.
    pub dk: Tensor,
    /// Of the shard's values.
    pub dv: Tensor,
    /// Of the joint q, k and v.
    pub joint: Option<[Tensor; 3]>,
    /// Of the sinks, one per head.
    pub dsinks: Option<Vec<f32>>,
}

/// One stretch of work of the last run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SpanReport {
    /// What it did, and so on which stream.
    pub work: Work,
    /// Which step.
    pub step: Step,
    /// Whether it belongs to the backward.
    pub backward: bool,
    /// From the rank's first event.
    pub start: Duration,
    /// From the rank's first event.
    pub end: Duration,
    /// Bytes sent to other ranks.
    pub bytes_sent: u64,
}

/// Time, bytes and memory of one rank.
#[derive(Clone, Debug)]
pub struct DeviceReport {
    /// Spans of the last forward and, if it followed, backward.
    pub spans: Vec<SpanReport>,
    /// The barriers of [`Engine::meet`] before that forward, each from entering to leaving; what makes times of ranks
    /// comparable (see [`crate::align`]).
    pub meetings: Vec<Range<Duration>>,
    /// Memory figures of the device.
    pub memory: Memory,
    /// Bytes of the tensors that the engine put on the device for the caller.
    pub tensor_bytes: u64,
}

impl DeviceReport {
    /// Time spent in `work`, and bytes sent.
    pub fn total(&self, work: Work) -> (Duration, u64) {
        let of = self.spans.iter().filter(|s| s.work == work);
        of.fold((Duration::ZERO, 0), |(t, b), s| (t + (s.end - s.start), b + s.bytes_sent))
    }
}

/// One rank of a group, whatever its backend.
pub trait Engine: Debug {
    /// Name of the backend.
    fn backend(&self) -> &'static str;

    /// What the device says of itself.
    fn caps(&self) -> &Caps;

    /// This rank, from 0.
    fn rank(&self) -> u32;

    /// Number of ranks.
    fn size(&self) -> u32;

    /// Collective: plans this rank of the layouts' mesh (`[queries, keys]`) and takes its memory, whose exact bytes it
    /// returns.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Invalid`], [`Error::PeerLost`]; [`Error::OutOfMemory`] if memory and the tensors of a
    /// forward (and backward) do not fit the device, of all its ranks together: then nothing stays taken.
    fn prepare(&mut self, problem: &Problem, layouts: [&Layout; 2], mask: &Mask) -> Result<Bytes>;

    /// The plan of the last [`Engine::prepare`].
    fn plan(&self) -> Option<&Plan>;

    /// Collective: queues a few barriers and remembers when this rank entered and left each, so that [`crate::align`] can put
    /// the times of all ranks on one clock. To be called right before a forward.
    ///
    /// # Errors
    /// [`Error::PeerLost`]; the device's own.
    fn meet(&mut self) -> Result<()>;

    /// Attention of this rank's shards `[q, k, v]`, each `[batch, local rows, heads, dim]` in the problem's dtype. Keeps
    /// inputs and results on the device for a backward.
    ///
    /// # Errors
    /// [`Error::Invalid`] without a prepare or for shards that do not fit; the device's own.
    fn forward(&mut self, shards: [&Tensor; 3], extra: &Extra) -> Result<Forwarded>;

    /// Gradients for `dout` (and `dlse`, f32 `[batch, local rows, heads, 1]`) of the last forward; with joint tokens
    /// [`Engine::backward_joint`] is the one to call.
    ///
    /// # Errors
    /// [`Error::Invalid`] without a forward, or for gradients that do not fit it, which may be given again; the device's own.
    fn backward(&mut self, dout: &Tensor, dlse: Option<&Tensor>) -> Result<Gradients> {
        self.backward_joint(dout, dlse, None)
    }

    /// As [`Engine::backward`], with the gradients of the joint out and, if there is one, of the joint lse.
    ///
    /// # Errors
    /// As [`Engine::backward`]; [`Error::Invalid`] if they are not given exactly where the problem has joint tokens.
    fn backward_joint(
        &mut self,
        dout: &Tensor,
        dlse: Option<&Tensor>,
        joint: Option<(&Tensor, Option<&Tensor>)>,
    ) -> Result<Gradients>;

    /// Collective. Puts seeded normal numbers where this rank's q, k and v would be (and dout, if the problem has a backward),
    /// to stay on the device for [`Engine::repeat`], and runs once what will be repeated. With `packed`, q, k and v are heads
    /// of one `[batch, rows, heads + 2 * kv_heads, head_dim]`, and so are their gradients. `extra` brings the inputs of options.
    ///
    /// # Errors
    /// [`Error::Invalid`] without a prepare, with joint tokens, or `packed` with unequal head sizes; the device's own.
    fn reside(&mut self, packed: bool, extra: &Extra) -> Result<()>;

    /// Collective. Runs `pass` on what [`Engine::reside`] put there, after a barrier of all ranks: once uncounted and `times`
    /// more without a break, so that the device doesn't wait for its host. The time of each on this rank's device.
    ///
    /// # Errors
    /// [`Error::Invalid`] without a reside, or for a backward that was not prepared; the device's own.
    fn repeat(&mut self, pass: Pass, times: u32) -> Result<Vec<Duration>>;

    /// Collective. Runs `pass` once on what [`Engine::reside`] put there, after a barrier of all ranks, with events around all its
    /// work: [`Engine::report`] has the spans.
    ///
    /// # Errors
    /// As [`Engine::repeat`].
    fn trace(&mut self, pass: Pass) -> Result<()>;

    /// The most that this rank's device computes, measured now.
    ///
    /// # Errors
    /// As [`Backend::peak`].
    fn peak(&self, dtype: DType) -> Result<Peak>;

    /// Names of the kernels that a forward (or backward) of the last [`Engine::prepare`] runs.
    fn kernels(&self, backward: bool) -> Vec<String>;

    /// Time, bytes and memory of the last run.
    ///
    /// # Errors
    /// The device's own.
    fn report(&self) -> Result<DeviceReport>;

    /// Gives the group up: every wait of every rank ends with [`Error::PeerLost`] naming this rank.
    fn abort(&self);
}

/// [`Engine`] of one backend.
#[derive(Debug)]
pub(crate) struct EngineOf<B: Backend> {
    pub(crate) member: Member<B>,
    /// Ranks on this rank's device, this one too.
    beside: Vec<u32>,
    /// Of waits of the host.
    pub(crate) limit: Duration,
    pub(crate) stream: <B::Device as Device>::Stream,
    pub(crate) usp: Option<Usp<B>>,
    pub(crate) kept: Option<Kept<B::Device>>,
    pub(crate) resident: Option<Resident<B::Device>>,
    pub(crate) traces: Vec<Trace<B::Device>>,
    pub(crate) meetings: Vec<[Event<B>; 2]>,
    pub(crate) tensor_bytes: u64,
}

/// An event of a backend's device.
type Event<B> = <<B as Backend>::Device as Device>::Event;

/// Barriers of one meeting. The first bring the ranks together; the shortest of all says how well clocks agree.
const BARRIERS: usize = 8;

/// A tensor on the device.
#[derive(Debug)]
pub(crate) struct OnDevice<D: Device> {
    pub buffer: D::Buffer,
    pub at: Strided,
}

impl<D: Device> OnDevice<D> {
    pub(crate) fn view(&self) -> Result<View<'_, D>> {
        View::new(&self.buffer, self.at)
    }

    pub(crate) fn view_mut(&self) -> Result<ViewMut<'_, D>> {
        ViewMut::new(&self.buffer, self.at)
    }
}

/// What a forward leaves for its backward.
#[derive(Debug)]
pub(crate) struct Kept<D: Device> {
    pub shards: [OnDevice<D>; 3],
    pub joint: Option<[OnDevice<D>; 3]>,
    pub slopes: Option<OnDevice<D>>,
    pub sinks: Option<OnDevice<D>>,
    pub seed: Option<u64>,
    pub results: [OnDevice<D>; 2],
    pub joint_results: Option<[OnDevice<D>; 2]>,
}

impl<D: Device> Kept<D> {
    pub(crate) fn inputs(&self) -> Result<Inputs<'_, D>> {
        Ok(Inputs {
            q: self.shards[0].view()?,
            k: self.shards[1].view()?,
            v: self.shards[2].view()?,
            joint: match &self.joint {
                Some([q, k, v]) => Some([q.view()?, k.view()?, v.view()?]),
                None => None,
            },
            extras: Extras {
                alibi_slopes: self.slopes.as_ref().map(OnDevice::view).transpose()?,
                sinks: self.sinks.as_ref().map(OnDevice::view).transpose()?,
                seed: self.seed.map(Seed::Host),
            },
        })
    }
}

impl<B: Backend> EngineOf<B> {
    /// An engine for `member`, whose group waits for a peer for `limit`; `beside` are the ranks on its device, this one too.
    ///
    /// The host waits for more than twice that: work before an exchange, then the peer, whom the group names.
    pub fn new(member: Member<B>, beside: Vec<u32>, limit: Duration) -> Result<Self> {
        let stream = member.device.stream(Priority::Normal)?;
        Ok(Self {
            member,
            beside,
            limit: limit.saturating_mul(2).saturating_add(NAMING),
            stream,
            usp: None,
            kept: None,
            resident: None,
            traces: Vec::new(),
            meetings: Vec::new(),
            tensor_bytes: 0,
        })
    }

    pub(crate) fn empty(&mut self, dtype: DType, extent: [usize; 4]) -> Result<OnDevice<B::Device>> {
        let at = Strided::dense(dtype, extent);
        let buffer = self.member.device.alloc(at.bytes())?;
        self.tensor_bytes += at.bytes() as u64;
        Ok(OnDevice { buffer, at })
    }

    fn upload(&mut self, tensor: &Tensor) -> Result<OnDevice<B::Device>> {
        let on_device = self.empty(tensor.dtype(), tensor.extent())?;
        self.member.device.upload(&self.stream, tensor.bytes(), on_device.view_mut()?)?;
        Ok(on_device)
    }

    fn upload_all<const N: usize>(&mut self, tensors: [&Tensor; N]) -> Result<[OnDevice<B::Device>; N]> {
        let list = tensors.into_iter().map(|t| self.upload(t)).collect::<Result<Vec<_>>>()?;
        list.try_into().map_err(|_| Error::invalid("tensors", "their number changed"))
    }

    pub(crate) fn per_head(&mut self, values: Option<&Vec<f32>>) -> Result<Option<OnDevice<B::Device>>> {
        let Some(values) = values else {
            return Ok(None);
        };
        let tensor = Tensor::from_f32(DType::F32, [1, 1, values.len(), 1], values)?;
        self.upload(&tensor).map(Some)
    }

    pub(crate) fn download(&self, from: &OnDevice<B::Device>) -> Result<Tensor> {
        let mut tensor = Tensor::zeros(from.at.dtype(), from.at.extent());
        self.member.device.download(&self.stream, from.view()?, tensor.bytes_mut(), self.limit)?;
        Ok(tensor)
    }

    pub(crate) fn planned(&self) -> Result<(Problem, [usize; 2])> {
        let usp = self.usp.as_ref().ok_or_else(|| Error::invalid("engine", "call prepare first"))?;
        Ok((usp.plan().problem().clone(), usp.plan().local_rows()))
    }

    /// [`Engine::backward_joint`] of the forward that left `kept`.
    fn gradients(
        &mut self,
        kept: &Kept<B::Device>,
        dout: &Tensor,
        dlse: Option<&Tensor>,
        joint: Option<(&Tensor, Option<&Tensor>)>,
    ) -> Result<Gradients> {
        let (problem, [q_rows, k_rows]) = self.planned()?;
        if joint.is_some() && problem.joint == 0 {
            return Err(Error::invalid("joint dout", "the problem has no joint tokens"));
        }
        let dout = self.upload(dout)?;
        let dlse = dlse.map(|t| self.upload(t)).transpose()?;
        let joint_dout = joint.map(|(dout, _)| self.upload(dout)).transpose()?;
        let joint_dlse = joint.and_then(|(_, dlse)| dlse).map(|t| self.upload(t)).transpose()?;
        let (h, hk, d, dv) = (problem.heads, problem.kv_heads, problem.head_dim, problem.head_dim_v);
        let mut triple = |q: usize, k: usize| -> Result<[OnDevice<B::Device>; 3]> {
            let b = problem.batch;
            Ok([
                self.empty(problem.dtype, [b, q, h, d])?,
                self.empty(problem.dtype, [b, k, hk, d])?,
                self.empty(problem.dtype, [b, k, hk, dv])?,
            ])
        };
        let of_shards = triple(q_rows, k_rows)?;
        let of_joint = if problem.joint > 0 { Some(triple(problem.joint, problem.joint)?) } else { None };
        let dsinks = if problem.sinks { Some(self.empty(DType::F32, [1, 1, h, 1])?) } else { None };
        let gradients = DeviceGradients {
            dq: of_shards[0].view_mut()?,
            dk: of_shards[1].view_mut()?,
            dv: of_shards[2].view_mut()?,
            joint: match &of_joint {
                Some([q, k, v]) => Some([q.view_mut()?, k.view_mut()?, v.view_mut()?]),
                None => None,
            },
            dsinks: dsinks.as_ref().map(OnDevice::view_mut).transpose()?,
        };
        let rows = OutputRows {
            out: kept.results[0].view()?,
            lse: kept.results[1].view()?,
            dout: dout.view()?,
            dlse: dlse.as_ref().map(OnDevice::view).transpose()?,
        };
        let joint_rows = match (&kept.joint_results, &joint_dout) {
            (Some([out, lse]), Some(dout)) => {
                let dlse = joint_dlse.as_ref().map(OnDevice::view).transpose()?;
                Some(OutputRows { out: out.view()?, lse: lse.view()?, dout: dout.view()?, dlse })
            }
            _ => None,
        };
        let mut trace = Trace::default();
        let usp = self.usp.as_ref().ok_or_else(|| Error::invalid("engine", "call prepare first"))?;
        usp.backward(
            &self.member,
            &self.stream,
            &kept.inputs()?,
            &rows,
            joint_rows.as_ref(),
            &gradients,
            Some(&mut trace),
        )?;
        let result = Gradients {
            dq: self.download(&of_shards[0])?,
            dk: self.download(&of_shards[1])?,
            dv: self.download(&of_shards[2])?,
            joint: match &of_joint {
                Some([q, k, v]) => Some([self.download(q)?, self.download(k)?, self.download(v)?]),
                None => None,
            },
            dsinks: match &dsinks {
                Some(d) => Some(self.download(d)?.to_f32()),
                None => None,
            },
        };
        self.traces.truncate(1);
        self.traces.push(trace);
        Ok(result)
    }
}

impl<B: Backend> Engine for EngineOf<B> {
    fn backend(&self) -> &'static str {
        B::NAME
    }

    fn caps(&self) -> &Caps {
        self.member.device.caps()
    }

    fn rank(&self) -> u32 {
        self.member.collective.rank()
    }

    fn size(&self) -> u32 {
        self.member.collective.size()
    }

    fn prepare(&mut self, problem: &Problem, [q, k]: [&Layout; 2], mask: &Mask) -> Result<Bytes> {
        let device = &self.member.device;
        let memory = device.memory()?;
        (self.kept, self.resident, self.usp) = (None, None, None);
        self.meetings.clear();
        room::check_tensors(problem, [q, k], &self.beside, device.caps().memory_bytes)?;
        let plan = Plan::new(problem, q, k, mask, self.rank())?;
        room::check(&plan, plan.bytes()?, memory)?;
        let usp = Usp::prepare(&self.member, &self.stream, plan, |bytes| device.alloc(bytes))?;
        let bytes = usp.workspace();
        // Now with what kernels and messages take.
        room::check(usp.plan(), bytes, memory)?;
        self.usp = Some(usp);
        Ok(bytes)
    }

    fn plan(&self) -> Option<&Plan> {
        self.usp.as_ref().map(Usp::plan)
    }

    fn meet(&mut self) -> Result<()> {
        self.meetings.clear();
        self.traces.clear();
        for _ in 0..BARRIERS {
            let enter = self.member.device.record(&self.stream)?;
            self.member.collective.barrier(&self.stream)?;
            self.meetings.push([enter, self.member.device.record(&self.stream)?]);
        }
        Ok(())
    }

    fn forward(&mut self, shards: [&Tensor; 3], extra: &Extra) -> Result<Forwarded> {
        let (problem, [rows, _]) = self.planned()?;
        (self.kept, self.resident) = (None, None);
        self.tensor_bytes = 0;
        let wide = |rows| [problem.batch, rows, problem.heads, problem.head_dim_v];
        let thin = |rows| [problem.batch, rows, problem.heads, 1];
        let kept = Kept {
            shards: self.upload_all(shards)?,
            joint: match &extra.joint {
                Some([q, k, v]) => Some(self.upload_all([q, k, v])?),
                None => None,
            },
            slopes: self.per_head(extra.alibi_slopes.as_ref())?,
            sinks: self.per_head(extra.sinks.as_ref())?,
            seed: extra.seed,
            results: [self.empty(problem.dtype, wide(rows))?, self.empty(DType::F32, thin(rows))?],
            joint_results: if problem.joint > 0 {
                Some([self.empty(problem.dtype, wide(problem.joint))?, self.empty(DType::F32, thin(problem.joint))?])
            } else {
                None
            },
        };
        let outputs = Outputs {
            out: kept.results[0].view_mut()?,
            lse: kept.results[1].view_mut()?,
            joint: match &kept.joint_results {
                Some([out, lse]) => Some([out.view_mut()?, lse.view_mut()?]),
                None => None,
            },
        };
        let mut trace = Trace::default();
        let usp = self.usp.as_ref().ok_or_else(|| Error::invalid("engine", "call prepare first"))?;
        usp.forward(&self.member, &self.stream, &kept.inputs()?, &outputs, Some(&mut trace))?;
        let forwarded = Forwarded {
            out: self.download(&kept.results[0])?,
            lse: self.download(&kept.results[1])?,
            joint: match &kept.joint_results {
                Some([out, lse]) => Some([self.download(out)?, self.download(lse)?]),
                None => None,
            },
        };
        self.kept = Some(kept);
        self.traces = vec![trace];
        Ok(forwarded)
    }

    fn backward_joint(
        &mut self,
        dout: &Tensor,
        dlse: Option<&Tensor>,
        joint: Option<(&Tensor, Option<&Tensor>)>,
    ) -> Result<Gradients> {
        let kept = self.kept.take().ok_or_else(|| Error::invalid("engine", "call forward first"))?;
        let bytes = self.tensor_bytes;
        let result = self.gradients(&kept, dout, dlse, joint);
        self.kept = Some(kept);
        if result.is_err() {
            self.tensor_bytes = bytes;
        }
        result
    }

    fn reside(&mut self, packed: bool, extra: &Extra) -> Result<()> {
        self.put_residents(packed, extra)
    }

    fn repeat(&mut self, pass: Pass, times: u32) -> Result<Vec<Duration>> {
        self.run_again(pass, times)
    }

    fn trace(&mut self, pass: Pass) -> Result<()> {
        self.run_traced(pass)
    }

    fn peak(&self, dtype: DType) -> Result<Peak> {
        B::peak(&self.member.device, dtype)
    }

    fn kernels(&self, backward: bool) -> Vec<String> {
        self.usp.as_ref().map_or(Vec::new(), |usp| usp.kernels(&self.member, backward))
    }

    fn report(&self) -> Result<DeviceReport> {
        let device = &self.member.device;
        let first = self.meetings.first().map(|[enter, _]| enter);
        let first = first.or(self.traces.first().and_then(Trace::origin));
        let (mut spans, mut meetings) = (Vec::new(), Vec::new());
        for trace in &self.traces {
            for span in trace.spans() {
                let (start, end) = trace.times(device, first.or(trace.origin()), span)?;
                let &Span { work, step, backward, bytes_sent, .. } = span;
                spans.push(SpanReport { work, step, backward, start, end, bytes_sent });
            }
        }
        for [enter, leave] in &self.meetings {
            let from = first.unwrap_or(enter);
            meetings.push(device.elapsed(from, enter)?..device.elapsed(from, leave)?);
        }
        Ok(DeviceReport { spans, meetings, memory: device.memory()?, tensor_bytes: self.tensor_bytes })
    }

    fn abort(&self) {
        self.member.collective.abort();
    }
}
