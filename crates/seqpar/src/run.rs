//! One forward or backward in flight: the three streams, what is queued on them, and what is recorded of it.

use std::cell::RefCell;

use longspan_hal::{Accumulate, Attention, Backend, Collective, Device, Error, Result, Spec, Step, View, ViewMut};

use crate::message::Prepared;
use crate::trace::{Trace, Work};
use crate::workspace::Workspace;
use crate::{Member, Plan};

/// An event of a backend's device.
pub(crate) type Event<B> = <<B as Backend>::Device as Device>::Event;
/// A stream of a backend's device.
pub(crate) type Stream<B> = <<B as Backend>::Device as Device>::Stream;

/// Everything that the steps of one pass share.
pub(crate) struct Run<'a, B: Backend> {
    pub plan: &'a Plan,
    pub member: &'a Member<B>,
    pub workspace: &'a Workspace<B::Device>,
    pub scratch: Option<&'a <B::Device as Device>::Buffer>,
    /// The caller's stream: attention and sums.
    pub compute: &'a Stream<B>,
    /// Our own: all communication, in the same order on every rank.
    pub transfer: &'a Stream<B>,
    /// Our own: copies and sums of what came, and of this rank's own part, which find room where attention leaves some.
    pub aside: &'a Stream<B>,
    /// Whether this is a backward.
    pub backward: bool,
    pub trace: RefCell<Option<&'a mut Trace<B::Device>>>,
}

impl<'a, B: Backend> Run<'a, B> {
    /// Forks our own streams off the caller's, runs `body`, and joins them back, also on error.
    pub fn forked(&self, body: impl FnOnce() -> Result<()>) -> Result<()> {
        if let Some(trace) = self.trace.borrow_mut().as_mut() {
            trace.begin(&self.member.device, self.compute)?;
        }
        let fork = self.record(self.compute)?;
        self.wait(self.transfer, Some(&fork))?;
        self.wait(self.aside, Some(&fork))?;
        let done = body();
        let joined = [self.transfer, self.aside].map(|stream| self.order(stream, self.compute));
        joined.into_iter().fold(done, Result::and)
    }

    /// Everything queued on `second` from now on runs after everything queued on `first` so far.
    pub fn order(&self, first: &Stream<B>, second: &Stream<B>) -> Result<()> {
        let event = self.member.device.record(first)?;
        self.member.device.wait(second, &event)
    }

    /// The point after everything queued on `on` so far.
    pub fn record(&self, on: &Stream<B>) -> Result<Event<B>> {
        self.member.device.record(on)
    }

    /// `on` waits for `event`, if there is one.
    pub fn wait(&self, on: &Stream<B>, event: Option<&Event<B>>) -> Result<()> {
        event.map_or(Ok(()), |e| self.member.device.wait(on, e))
    }

    /// Queues an exchange on the transfer stream; the event is after it.
    pub fn exchange(&self, x: &Prepared<B>, sources: &[View<'_, B::Device>]) -> Result<Event<B>> {
        self.member.collective.progress(x.step);
        let sends = x.sends(sources)?;
        let bytes = x.bytes;
        self.spanned(Work::Exchange, self.transfer, x.step, bytes, || {
            self.member.collective.exchange(self.transfer, &x.exchange, &sends)
        })?;
        self.record(self.transfer)
    }

    /// Queues compute on the caller's stream.
    pub fn compute(&self, phase: &'static str, index: usize, queue: impl FnOnce() -> Result<()>) -> Result<()> {
        let step = Step { phase, index: index as u32 };
        self.member.collective.progress(step);
        self.spanned(Work::Compute, self.compute, step, 0, queue)
    }

    /// Queues sums of step `index` on the caller's stream.
    pub fn sum(&self, index: usize, queue: impl FnOnce() -> Result<()>) -> Result<()> {
        self.spanned(Work::Compute, self.compute, Step { phase: "sum", index: index as u32 }, 0, queue)
    }

    /// Queues copies and sums for head group `group` aside: of what came (`collect`), of this rank's own inputs (`take`) or
    /// results (`keep`).
    pub fn aside(&self, phase: &'static str, group: usize, queue: impl FnOnce() -> Result<()>) -> Result<()> {
        self.spanned(Work::Collect, self.aside, Step { phase, index: group as u32 }, 0, queue)
    }

    fn spanned(
        &self,
        work: Work,
        on: &Stream<B>,
        step: Step,
        bytes: u64,
        queue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        match self.trace.borrow_mut().as_mut() {
            None => return queue(),
            Some(trace) => trace.begin(&self.member.device, on)?,
        }
        let start = self.record(on)?;
        queue()?;
        let end = self.record(on)?;
        if let Some(trace) = self.trace.borrow_mut().as_mut() {
            trace.push(work, step, self.backward, bytes, [start, end]);
        }
        Ok(())
    }

    /// `into = round(sum of terms)` on `on`; nothing for empty tensors.
    pub fn accumulate(
        &self,
        on: &Stream<B>,
        into: ViewMut<'_, B::Device>,
        terms: &[View<'_, B::Device>],
    ) -> Result<()> {
        if into.at().is_empty() {
            return Ok(());
        }
        self.member.attention.accumulate(on, &Accumulate::new(into, terms)?)
    }

    /// `into` = dq of its sums on the compute stream; nothing for empty tensors.
    pub fn finish_dq(&self, spec: &Spec, into: ViewMut<'_, B::Device>, sums: View<'_, B::Device>) -> Result<()> {
        if into.at().is_empty() {
            return Ok(());
        }
        self.member.attention.finish_dq(self.compute, spec, into, sums)
    }

    /// A copy on `on`; nothing for empty tensors.
    pub fn copy(&self, on: &Stream<B>, from: View<'_, B::Device>, to: ViewMut<'_, B::Device>) -> Result<()> {
        if to.at().is_empty() { Ok(()) } else { self.member.device.copy(on, from, to) }
    }
}

/// An error for a tensor that the caller must give.
pub(crate) fn missing(what: &'static str) -> Error {
    Error::invalid(what, "the problem has joint tokens or sinks, so it must be given")
}
