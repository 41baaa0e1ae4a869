//! Messages that are lost.

use std::sync::{Arc, Mutex, PoisonError};

use longspan_cpu::Cpu as CpuBackend;
use longspan_hal::{Backend, Collective, Device, P2p, Result, Step, Strided, View, ViewMut};

use super::{Cpu, Fault, FaultyDevice, fault, view_mut, views};

type Below = <CpuBackend as Backend>::Collective;

#[derive(Debug)]
pub struct FaultyCollective {
    cpu: Arc<Cpu>,
    below: Below,
    phase: Mutex<&'static str>,
}

/// Memory for zeros.
type Zeros = (<Cpu as Device>::Buffer, Strided);

/// An exchange; for each of its sends whether it goes to another rank, and what goes instead when it is lost.
#[derive(Debug)]
pub struct Exchange {
    below: <Below as Collective<Cpu>>::Exchange,
    sends: Vec<(bool, Zeros)>,
}

impl FaultyCollective {
    pub fn new(cpu: Arc<Cpu>, below: Below) -> Self {
        Self { cpu, below, phase: Mutex::new("") }
    }

    /// Whether what this exchange sends to other ranks is lost (zeros arrive).
    fn loses(&self) -> bool {
        let phase = *self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        matches!((fault(), phase), (Fault::DroppedReturn, "return") | (Fault::OwnSinksOnly, "share dsinks"))
    }
}

impl Collective<FaultyDevice> for FaultyCollective {
    type Exchange = Exchange;

    fn prepare(&self, ops: &[P2p<'_, FaultyDevice>]) -> Result<Exchange> {
        let mut sends = Vec::new();
        let mut list = Vec::new();
        for op in ops {
            list.push(match op {
                P2p::Recv { from, into } => P2p::Recv { from: *from, into: view_mut(*into)? },
                P2p::Send { to, dtype, extent } => {
                    // Taken now: a run itself takes no memory.
                    let at = Strided::dense(*dtype, *extent);
                    sends.push((*to != self.rank(), (self.cpu.alloc(at.bytes())?, at)));
                    P2p::Send { to: *to, dtype: *dtype, extent: *extent }
                }
            });
        }
        Ok(Exchange { below: self.below.prepare(&list)?, sends })
    }

    fn exchange(
        &self,
        on: &<Cpu as Device>::Stream,
        exchange: &Exchange,
        sends: &[View<'_, FaultyDevice>],
    ) -> Result<()> {
        let sends = views(sends)?;
        if !self.loses() {
            return self.below.exchange(on, &exchange.below, &sends);
        }
        let mut given = Vec::new();
        for (send, (leaves, (buffer, at))) in sends.iter().zip(&exchange.sends) {
            self.cpu.fill(on, 0.0, ViewMut::new(buffer, *at)?)?;
            given.push(if *leaves { View::new(buffer, *at)? } else { *send });
        }
        self.below.exchange(on, &exchange.below, &given)
    }

    fn progress(&self, step: Step) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = step.phase;
        self.below.progress(step);
    }

    // From here on: as below.

    fn rank(&self) -> u32 {
        self.below.rank()
    }

    fn size(&self) -> u32 {
        self.below.size()
    }

    fn window(&self, bytes: usize) -> Result<<Cpu as Device>::Buffer> {
        self.below.window(bytes)
    }

    fn staging_bytes(&self, exchange: &Exchange) -> usize {
        self.below.staging_bytes(&exchange.below)
    }

    fn subgroup(&self, members: &[u32]) -> Result<Option<Self>> {
        Ok(self.below.subgroup(members)?.map(|below| Self::new(self.cpu.clone(), below)))
    }

    fn barrier(&self, on: &<Cpu as Device>::Stream) -> Result<()> {
        self.below.barrier(on)
    }

    fn abort(&self) {
        self.below.abort();
    }
}
