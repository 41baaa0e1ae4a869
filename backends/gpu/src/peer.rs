//! The peer exchange: a sender's copy engine writes straight into the receiver's window.
//!
//! ```text
//! exchange(on):
//!   for p in senders to me:     tell p `free`: from this point of `on` on my part may be written
//!   side by side, on `on` and on the lanes that fork from it:
//!     for p in receivers of mine: await `free` of p; copy; tell p `arrived`: from this point on
//!     copy what I send to myself
//!   join the lanes
//!   for p in senders to me:     await `arrived` of p
//! ```
//!
//! Copies side by side hide each other's start, and the local one, which is a kernel, is hidden by those of the engines.
//!
//! The host waits until its peers have *queued* their part, never until the device did it; the stream waits for the device.
//! Between threads a point is an event in a letter, which also says where messages arrive. Every event is recorded before
//! somebody waits for it: devices never spin on a value, several ranks may share one device, and no device waits for a rank
//! that died. Between processes a point is a flag in shared memory (`flags.rs`), and where messages arrive is known since
//! `prepare`.

use std::fmt::{Display, Formatter};
use std::sync::Arc;

use longspan_hal::{Priority, Result};

use crate::context::Context;
use crate::copy::{self, Job};
use crate::event::Event;
use crate::exchange::{GpuExchange, Part};
use crate::flags::Numbered;
use crate::group::{Group, Mail};
use crate::letters::Letter;
use crate::stream::GpuStream;

/// Which round a rank is in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Tag {
    /// `exchange` or `barrier`.
    pub call: &'static str,
    /// Which exchange: the number of its `prepare` among the group's.
    pub id: u64,
    /// Which of its rounds, from 0.
    pub round: u64,
}

/// What ranks tell each other.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Topic {
    /// From the sender: the messages have arrived.
    Arrived = 0,
    /// From the receiver: its part may be written. Also: here I am.
    Free = 1,
}

const CALLS: [&str; 2] = ["exchange", "barrier"];

impl Tag {
    /// Checks that `theirs`, of rank `from`, is this round; otherwise the group is over.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Invalid`], on all ranks.
    pub(crate) fn check(self, group: &Group, from: u32, theirs: Self) -> Result<()> {
        if self == theirs {
            return Ok(());
        }
        let why = format!(
            "rank {} runs {self} while rank {from} runs {theirs}; all ranks must queue the same rounds in the same order",
            group.rank()
        );
        Err(group.member.refuse("round", &why))
    }

    /// As numbers, for [`Tag::of_numbers`].
    pub(crate) fn numbers(self) -> [u64; 3] {
        [u64::from(self.call == CALLS[1]), self.id, self.round]
    }

    /// The round of these [`Tag::numbers`].
    pub(crate) fn of_numbers([call, id, round]: [u64; 3]) -> Self {
        Self { call: CALLS[usize::from(call != 0)], id, round }
    }
}

impl Display for Tag {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self.call {
            "barrier" => write!(f, "barrier {}", self.round),
            call => write!(f, "{call} {} round {}", self.id, self.round),
        }
    }
}

/// Streams beside the one of an exchange. Few, since streams share hardware queues.
#[derive(Debug)]
pub(crate) struct Lanes([GpuStream; 3]);

impl Lanes {
    /// Lanes on the device of `context`.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Driver`].
    pub(crate) fn new(context: &'static Context) -> Result<Self> {
        let lane = || GpuStream::new(context, Priority::High);
        Ok(Self([lane()?, lane()?, lane()?]))
    }
}

/// One rank's part in one round.
pub(crate) struct Round<'a> {
    /// The rank.
    pub group: &'a Group,
    /// Its stream, whose context is bound.
    pub on: &'a GpuStream,
    /// Streams that may fork from it.
    pub lanes: &'a Lanes,
    /// Which round, and until when it waits.
    pub numbered: Numbered,
}

impl Round<'_> {
    /// Queues the round of an exchange.
    ///
    /// # Errors
    /// [`longspan_hal::Error::PeerLost`], [`longspan_hal::Error::Driver`].
    pub(crate) fn exchange(&self, exchange: &GpuExchange, sends: &[Part]) -> Result<()> {
        let (draft, me, n) = (&exchange.draft, self.group.rank(), self.group.size());
        for part in draft.recvs.iter().chain(sends) {
            part.buffer.used_on(self.on)?;
        }
        // Everybody starts with another peer, so that nobody is written by all at once.
        let others = (1..n).map(|step| (me + step) % n);
        let senders: Vec<u32> = others.clone().filter(|p| draft.from.contains(p)).collect();
        let free = if senders.is_empty() { None } else { self.point(self.on)? };
        for &peer in &senders {
            self.tell(self.on, Topic::Free, peer, free.clone(), || exchange.parts_from(peer))?;
        }
        let receivers: Vec<u32> = others.chain([me]).filter(|p| draft.to.contains(p)).collect();
        self.side_by_side(&receivers, |lane, peer| {
            if peer == me {
                return self.copy(lane, exchange, sends, me, &exchange.parts_from(me));
            }
            let letter = self.await_letter(lane, Topic::Free, peer)?;
            let told = letter.map(|letter| letter.parts);
            let to = told.as_deref().map_or_else(|| exchange.parts_at(peer), Vec::as_slice);
            self.copy(lane, exchange, sends, peer, to)?;
            self.tell(lane, Topic::Arrived, peer, self.point(lane)?, Arc::default)
        })?;
        senders.into_iter().try_for_each(|peer| self.await_letter(self.on, Topic::Arrived, peer).map(drop))
    }

    /// Queues `work` for each of `peers`, the first on the round's stream and the others on lanes, which join it in every case.
    fn side_by_side(&self, peers: &[u32], work: impl Fn(&GpuStream, u32) -> Result<()>) -> Result<()> {
        let lanes = &self.lanes.0[..peers.len().saturating_sub(1).min(self.lanes.0.len())];
        let fork = if lanes.is_empty() { None } else { Some(self.on.record(false)?) };
        let forked = lanes.iter().try_for_each(|lane| fork.iter().try_for_each(|fork| lane.wait(fork)));
        let of = |i: usize| if i == 0 { self.on } else { &lanes[(i - 1) % lanes.len()] };
        let done = forked.and_then(|()| peers.iter().enumerate().try_for_each(|(i, &peer)| work(of(i), peer)));
        let joined = lanes.iter().try_for_each(|lane| self.on.wait(&lane.record(false)?));
        done.and(joined)
    }

    /// Queues the messages to `peer`.
    fn copy(&self, on: &GpuStream, exchange: &GpuExchange, sends: &[Part], peer: u32, to: &[Part]) -> Result<()> {
        let from = exchange.draft.sends_to(peer).map(|i| &sends[i]);
        let mut jobs = Vec::new();
        let mut near = true;
        for (from, to) in from.zip(to) {
            // Its owner may give it up before the lane joins.
            to.buffer.used_on(on)?;
            near &= to.buffer.is_near(on.context());
            jobs.extend(Job::new(from.place(), to.place()));
        }
        if near { copy::local(on, jobs) } else { copy::remote(on, jobs) }
    }

    /// Meets `peers`: what they queued before happens before what this rank queues afterwards.
    ///
    /// # Errors
    /// As [`Round::exchange`].
    pub(crate) fn meet(&self, peers: &[u32]) -> Result<()> {
        let here = self.point(self.on)?;
        for &peer in peers {
            self.tell(self.on, Topic::Free, peer, here.clone(), Arc::default)?;
        }
        peers.iter().try_for_each(|&peer| self.await_letter(self.on, Topic::Free, peer).map(drop))
    }

    /// This point of the stream, for letters.
    fn point(&self, on: &GpuStream) -> Result<Option<Event>> {
        match &self.group.mail {
            Mail::Letters(_) => on.record(false).map(Some),
            Mail::Flags(_) | Mail::None => Ok(None),
        }
    }

    /// Tells `peer` that this rank's part is queued.
    fn tell(
        &self,
        on: &GpuStream,
        topic: Topic,
        peer: u32,
        event: Option<Event>,
        parts: impl FnOnce() -> Arc<Vec<Part>>,
    ) -> Result<()> {
        match &self.group.mail {
            Mail::Letters(letters) => {
                let letter = Letter { tag: self.numbered.tag, event, parts: parts() };
                letters.post(topic, [self.group.rank(), peer], letter);
                Ok(())
            }
            Mail::Flags(flags) => flags.tell(on, self.group, topic, peer, &self.numbered),
            Mail::None => Ok(()),
        }
    }

    /// Waits until `peer` queued its part; the stream waits until that ran.
    fn await_letter(&self, on: &GpuStream, topic: Topic, peer: u32) -> Result<Option<Letter>> {
        match &self.group.mail {
            Mail::Letters(letters) => {
                let Numbered { tag, deadline, .. } = self.numbered;
                let letter = letters.collect(self.group, topic, peer, tag, deadline)?;
                if let Some(event) = &letter.event {
                    on.wait(event)?;
                }
                Ok(Some(letter))
            }
            Mail::Flags(flags) => flags.hear(on, self.group, topic, peer, &self.numbered).map(|()| None),
            Mail::None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_comes_back_from_its_numbers() {
        for call in CALLS {
            let tag = Tag { call, id: 5, round: u64::MAX };
            assert_eq!(Tag::of_numbers(tag.numbers()), tag);
        }
    }
}
