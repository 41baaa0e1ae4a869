//! What a run did when: spans on the device, for reports and pictures.

use std::time::Duration;

use longspan_hal::{Device, Result, Step};

/// What a span did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Work {
    /// Copies and sums within this rank of what came and of its own part, on a stream of their own.
    Collect,
    /// Attention or a sum, on the caller's stream.
    Compute,
    /// Data movement between ranks, on the transfer stream. Includes waiting for the other ranks to come to it.
    Exchange,
}

/// One stretch of work between two events.
#[derive(Debug)]
pub struct Span<D: Device> {
    /// What it did.
    pub work: Work,
    /// Which step of which phase it was.
    pub step: Step,
    /// Whether it belongs to a backward.
    pub backward: bool,
    /// Bytes sent to other ranks.
    pub bytes_sent: u64,
    start: D::Event,
    end: D::Event,
}

/// Spans of one run in the order of queueing. Given to a forward or backward, which records events around all its work.
#[derive(Debug)]
pub struct Trace<D: Device> {
    origin: Option<D::Event>,
    spans: Vec<Span<D>>,
}

impl<D: Device> Default for Trace<D> {
    fn default() -> Self {
        Self { origin: None, spans: Vec::new() }
    }
}

impl<D: Device> Trace<D> {
    /// The spans in order of queueing.
    pub fn spans(&self) -> &[Span<D>] {
        &self.spans
    }

    /// The run's first event; none before the run.
    pub fn origin(&self) -> Option<&D::Event> {
        self.origin.as_ref()
    }

    /// Start and end of a span, from `origin`, an event that is not behind it; without one, from the run's first event. To be
    /// called after the run was synchronised.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Invalid`] if the run is not done.
    pub fn times(&self, device: &D, origin: Option<&D::Event>, span: &Span<D>) -> Result<(Duration, Duration)> {
        let origin = origin.or(self.origin.as_ref()).unwrap_or(&span.start);
        Ok((device.elapsed(origin, &span.start)?, device.elapsed(origin, &span.end)?))
    }

    /// Time and bytes sent, summed over the spans of `work`. To be called after the run was synchronised.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Invalid`] if the run is not done.
    pub fn total(&self, device: &D, work: Work) -> Result<(Duration, u64)> {
        let mut sum = (Duration::ZERO, 0);
        for span in self.spans.iter().filter(|s| s.work == work) {
            sum.0 += device.elapsed(&span.start, &span.end)?;
            sum.1 += span.bytes_sent;
        }
        Ok(sum)
    }

    pub(crate) fn begin(&mut self, device: &D, on: &D::Stream) -> Result<()> {
        if self.origin.is_none() {
            self.origin = Some(device.record(on)?);
        }
        Ok(())
    }

    pub(crate) fn push(
        &mut self,
        work: Work,
        step: Step,
        backward: bool,
        bytes_sent: u64,
        [start, end]: [D::Event; 2],
    ) {
        self.spans.push(Span { work, step, backward, bytes_sent, start, end });
    }
}
