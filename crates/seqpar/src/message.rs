//! Lists of messages: what an exchange moves, known before any device is.

use std::ops::Range;

use longspan_hal::{Backend, Collective, DType, Extent, P2p, Result, Step, View};

use crate::Member;
use crate::workspace::{Region, Workspace};

/// A message to `to`: rows and heads of one of the exchange's sources.
#[derive(Clone, Debug)]
pub(crate) struct Send {
    pub to: u32,
    pub source: usize,
    pub rows: Range<usize>,
    pub heads: Range<usize>,
    pub dtype: DType,
    pub extent: Extent,
}

/// A message from `from` into a part of the window.
#[derive(Clone, Debug)]
pub(crate) struct Recv {
    pub from: u32,
    pub into: Region,
}

/// Everything that one exchange of one rank moves. Messages of a pair are in the same order on both sides.
#[derive(Clone, Debug, Default)]
pub(crate) struct Messages {
    pub sends: Vec<Send>,
    pub recvs: Vec<Recv>,
}

impl Messages {
    /// Bytes sent to each other rank, in list order; empty messages and local copies left out.
    pub fn bytes_to_others(&self, rank: u32) -> impl Iterator<Item = (u32, u64)> {
        self.sends
            .iter()
            .filter(move |s| s.to != rank)
            .map(|s| (s.to, (s.extent.iter().product::<usize>() * s.dtype.size()) as u64))
            .filter(|(_, bytes)| *bytes > 0)
    }

    /// Collective: prepares the exchange.
    pub fn prepare<B: Backend>(
        self,
        member: &Member<B>,
        workspace: &Workspace<B::Device>,
        phase: &'static str,
        index: u32,
    ) -> Result<Prepared<B>> {
        let mut ops = Vec::with_capacity(self.recvs.len() + self.sends.len());
        for r in &self.recvs {
            ops.push(P2p::Recv { from: r.from, into: workspace.view_mut(&r.into)? });
        }
        ops.extend(self.sends.iter().map(|s| P2p::Send { to: s.to, dtype: s.dtype, extent: s.extent }));
        let exchange = member.collective.prepare(&ops)?;
        let bytes = self.bytes_to_others(member.collective.rank()).map(|(_, b)| b).sum();
        Ok(Prepared { exchange, sends: self.sends, bytes, step: Step { phase, index } })
    }
}

/// An exchange that can run.
#[derive(Debug)]
pub(crate) struct Prepared<B: Backend> {
    pub exchange: <B::Collective as Collective<B::Device>>::Exchange,
    pub bytes: u64,
    pub step: Step,
    sends: Vec<Send>,
}

impl<B: Backend> Prepared<B> {
    /// The views to send, cut out of `sources`.
    pub fn sends<'a>(&self, sources: &[View<'a, B::Device>]) -> Result<Vec<View<'a, B::Device>>> {
        self.sends.iter().map(|s| sources[s.source].narrow(1, s.rows.clone())?.narrow(2, s.heads.clone())).collect()
    }
}
