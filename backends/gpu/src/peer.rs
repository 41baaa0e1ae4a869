//! The peer exchange: a sender's copy engine writes straight into the receiver's window.
//!
//! ```text
//! exchange(on):
//!   for p in senders to me:     tell p `free`: from this point of `on` on my part may be written
//!   copy what I send to myself
//!   for p in receivers of mine: await `free` of p; copy; tell p `arrived`: from this point of `on` on
//!   for p in senders to me:     await `arrived` of p
//! ```
//!
//! The host waits until its peers have *queued* their part, never until the device did it; the stream waits for the device.
//! Between threads a point is an event in a letter, which also says where messages arrive. Every event is recorded before
//! somebody waits for it: devices never spin on a value, several ranks may share one device, and no device waits for a rank
//! that died. Between processes a point is a flag in shared memory (`flags.rs`), and where messages arrive is known since
//! `prepare`.

use std::fmt::{Display, Formatter};
use std::sync::Arc;

use longspan_hal::Result;

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

/// One rank's part in one round.
pub(crate) struct Round<'a> {
    /// The rank.
    pub group: &'a Group,
    /// Its stream, whose context is bound.
    pub on: &'a GpuStream,
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
        let free = if senders.is_empty() { None } else { self.point()? };
        for &peer in &senders {
            self.tell(Topic::Free, peer, free.clone(), || exchange.parts_from(peer))?;
        }
        self.copy(exchange, sends, me, &exchange.parts_from(me))?;
        for peer in others.filter(|p| draft.to.contains(p)) {
            let letter = self.await_letter(Topic::Free, peer)?;
            let told = letter.map(|letter| letter.parts);
            self.copy(exchange, sends, peer, told.as_deref().map_or_else(|| exchange.parts_at(peer), Vec::as_slice))?;
            self.tell(Topic::Arrived, peer, self.point()?, Arc::default)?;
        }
        senders.into_iter().try_for_each(|peer| self.await_letter(Topic::Arrived, peer).map(drop))
    }

    /// Queues the messages to `peer`.
    fn copy(&self, exchange: &GpuExchange, sends: &[Part], peer: u32, to: &[Part]) -> Result<()> {
        let from = exchange.draft.sends_to(peer).map(|i| &sends[i]);
        let mut jobs = Vec::new();
        let mut near = true;
        for (from, to) in from.zip(to) {
            to.buffer.used_on(self.on)?;
            near &= to.buffer.is_near(self.on.context());
            jobs.extend(Job::new(from.place(), to.place()));
        }
        if near { copy::local(self.on, jobs) } else { copy::remote(self.on, jobs) }
    }

    /// Meets `peers`: what they queued before happens before what this rank queues afterwards.
    ///
    /// # Errors
    /// As [`Round::exchange`].
    pub(crate) fn meet(&self, peers: &[u32]) -> Result<()> {
        let here = self.point()?;
        for &peer in peers {
            self.tell(Topic::Free, peer, here.clone(), Arc::default)?;
        }
        peers.iter().try_for_each(|&peer| self.await_letter(Topic::Free, peer).map(drop))
    }

    /// This point of the stream, for letters.
    fn point(&self) -> Result<Option<Event>> {
        match &self.group.mail {
            Mail::Letters(_) => self.on.record(false).map(Some),
            Mail::Flags(_) | Mail::None => Ok(None),
        }
    }

    /// Tells `peer` that this rank's part is queued.
    fn tell(
        &self,
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
            Mail::Flags(flags) => flags.tell(self.on, self.group, topic, peer, &self.numbered),
            Mail::None => Ok(()),
        }
    }

    /// Waits until `peer` queued its part; the stream waits until that ran.
    fn await_letter(&self, topic: Topic, peer: u32) -> Result<Option<Letter>> {
        match &self.group.mail {
            Mail::Letters(letters) => {
                let Numbered { tag, deadline, .. } = self.numbered;
                let letter = letters.collect(self.group, topic, peer, tag, deadline)?;
                if let Some(event) = &letter.event {
                    self.on.wait(event)?;
                }
                Ok(Some(letter))
            }
            Mail::Flags(flags) => flags.hear(self.on, self.group, topic, peer, &self.numbered).map(|()| None),
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
