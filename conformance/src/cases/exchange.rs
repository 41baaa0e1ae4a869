//! An exchange written down as one table that every rank knows, run and checked bit by bit.

use longspan_hal::{Backend, Collective, DType, Device, Extent, P2p, Strided, View, ViewMut};

use crate::host::{Random, random_strided};
use crate::rank::{Buffer, Failure, Rank, Tensor, check};

/// One message of the table.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// Sender.
    pub from: u32,
    /// Receiver.
    pub to: u32,
    /// Element type.
    pub dtype: DType,
    /// Sizes of the axes.
    pub extent: Extent,
}

/// The exchange of a [`Backend`].
type Exchange<B> = <<B as Backend>::Collective as Collective<<B as Backend>::Device>>::Exchange;

/// A table, prepared: every send lies strided in poisoned memory of its own, every receive strided in one poisoned window.
pub struct Prepared<B: Backend> {
    /// The exchange.
    pub exchange: Exchange<B>,
    sends: Vec<(usize, Tensor<B>)>,
    receives: Vec<(usize, Strided)>,
    window: Buffer<B>,
    seed: u64,
}

/// What a queued round will have received.
pub struct Round<B: Backend> {
    number: u32,
    received: Vec<Tensor<B>>,
}

/// Prepares `messages` among the ranks of `group`.
///
/// # Errors
/// Those of the collective and the device.
pub fn prepare<B: Backend>(
    rank: &Rank<B>,
    group: &B::Collective,
    messages: &[Message],
) -> Result<Prepared<B>, Failure> {
    let (me, mut random) = (group.rank(), Random::new(rank.seed ^ u64::from(group.rank())));
    let (mut sends, mut receives, mut end) = (Vec::new(), Vec::new(), 0);
    for (i, m) in messages.iter().enumerate() {
        if m.from == me {
            let offset = random.below(7);
            sends.push((i, rank.blank(random_strided(&mut random, m.dtype, offset, m.extent)?)?));
        }
        if m.to == me {
            let offset = (end / m.dtype.size()) + 2 + random.below(5);
            let at = random_strided(&mut random, m.dtype, offset, m.extent)?;
            end = at.byte_range().end.next_multiple_of(4);
            receives.push((i, at));
        }
    }
    let window = group.window(end + 16)?;
    rank.poison(&window)?;
    let mut ops = Vec::new();
    for (i, m) in messages.iter().enumerate() {
        if m.from == me {
            ops.push(P2p::Send { to: m.to, dtype: m.dtype, extent: m.extent });
        }
        if let Some((_, at)) = receives.iter().find(|(n, _)| *n == i) {
            ops.push(P2p::Recv { from: m.from, into: ViewMut::new(&window, *at)? });
        }
    }
    let exchange = group.prepare(&ops)?;
    drop(ops);
    Ok(Prepared { exchange, sends, receives, window, seed: rank.seed })
}

impl<B: Backend> Prepared<B> {
    /// The bytes of message `i` in round `round`: known to sender and receiver.
    fn bytes(&self, i: usize, round: u32, n: usize) -> Vec<u8> {
        let mut random = Random::new(self.seed ^ ((i as u64) << 32) ^ u64::from(round));
        (0..n).map(|_| random.bits() as u8).collect()
    }

    /// Queues a round, and behind it what the contract allows at once: sends are overwritten, receives are copied away and
    /// poisoned.
    ///
    /// # Errors
    /// Those of the collective and the device.
    pub fn queue(&self, rank: &Rank<B>, group: &B::Collective, number: u32) -> Result<Round<B>, Failure> {
        for (i, tensor) in &self.sends {
            let bytes = self.bytes(*i, number, tensor.at.bytes());
            rank.device.upload(&rank.stream, &bytes, tensor.view_mut()?)?;
        }
        let views = self.sends.iter().map(|(_, t)| t.view()).collect::<Result<Vec<_>, _>>()?;
        group.exchange(&rank.stream, &self.exchange, &views)?;
        for (_, tensor) in &self.sends {
            rank.device.upload(&rank.stream, &vec![0xFF; tensor.at.bytes()], tensor.view_mut()?)?;
        }
        let mut received = Vec::new();
        for (_, at) in &self.receives {
            let to = rank.blank(Strided::dense(at.dtype(), at.extent()))?;
            rank.device.copy(&rank.stream, View::new(&self.window, *at)?, to.view_mut()?)?;
            rank.device.upload(&rank.stream, &vec![0xFF; at.bytes()], ViewMut::new(&self.window, *at)?)?;
            received.push(to);
        }
        Ok(Round { number, received })
    }

    /// Waits for a round and checks what it brought; nothing beside the messages was written.
    ///
    /// # Errors
    /// [`Failure::Wrong`] naming the message; those of the stream.
    pub fn check(&self, rank: &Rank<B>, round: &Round<B>) -> Result<(), Failure> {
        for ((i, at), tensor) in self.receives.iter().zip(&round.received) {
            let same = rank.read_bytes(tensor)? == self.bytes(*i, round.number, at.bytes());
            check(same, || format!("message {i} of round {} arrived with other bytes ({at:?})", round.number))?;
        }
        for (_, tensor) in &self.sends {
            rank.check_around("send", tensor)?;
        }
        rank.check_outside("window", &self.window, &self.receives.iter().map(|(_, at)| *at).collect::<Vec<_>>())
    }
}

/// Runs `rounds` rounds of `messages` among all ranks, all queued before the first is checked.
///
/// # Errors
/// As [`prepare`] and [`Prepared::check`].
pub fn run<B: Backend>(rank: &Rank<B>, messages: &[Message], rounds: u32) -> Result<(), Failure> {
    run_in(rank, &rank.collective, messages, rounds)
}

/// [`run`] among the ranks of `group`.
///
/// # Errors
/// As [`run`].
pub fn run_in<B: Backend>(
    rank: &Rank<B>,
    group: &B::Collective,
    messages: &[Message],
    rounds: u32,
) -> Result<(), Failure> {
    rank.step("prepare", 0);
    let prepared = prepare(rank, group, messages)?;
    let mut queued = Vec::new();
    for round in 0..rounds {
        rank.step("exchange", round);
        queued.push(prepared.queue(rank, group, round)?);
    }
    rank.step("check", 0);
    queued.iter().try_for_each(|round| prepared.check(rank, round))
}
