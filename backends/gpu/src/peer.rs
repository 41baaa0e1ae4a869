//! The peer exchange: ranks are threads of one process, and a sender's copy engine writes straight into the receiver's window.
//!
//! ```text
//! exchange(on):
//!   for p in senders to me:     post `free` to p: an event on `on` after which my part may be written, and where it is
//!   copy what I send to myself
//!   for p in receivers of mine: collect `free` of p; `on` waits for it; copy; post `arrived`: an event on `on`
//!   for p in senders to me:     collect `arrived` of p; `on` waits for it
//! ```
//!
//! The host waits until its peers have *queued* their part, never until the device did it: every event is recorded before
//! somebody waits for it. So the devices never spin on a value, work reaches them in an order that can't deadlock even where
//! streams share a hardware queue, several ranks may share one device, and no device waits for a rank that died.

use std::fmt::{Display, Formatter};
use std::sync::Arc;

use longspan_hal::Result;

use crate::copy::{self, Job};
use crate::event::Event;
use crate::exchange::{GpuExchange, Part};
use crate::group::Member;
use crate::stream::GpuStream;
use crate::sync::Deadline;

/// Which round a rank is in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Tag {
    /// `exchange` or `barrier`.
    pub call: &'static str,
    /// Which exchange: the number of its `prepare` among the group's common calls.
    pub id: u64,
    /// Which of its rounds, from 0.
    pub round: u64,
}

/// What a letter is about.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Topic {
    /// From the sender: the messages have arrived.
    Arrived,
    /// From the receiver: its part may be written. Also: here I am.
    Free,
}

/// What one rank tells another in a round.
#[derive(Clone, Debug)]
pub(crate) struct Letter {
    /// The round.
    pub tag: Tag,
    /// The point in the writer's stream.
    pub event: Option<Event>,
    /// Where messages arrive, in list order.
    pub parts: Arc<Vec<Part>>,
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
    pub member: &'a Member,
    /// Its stream, whose context is bound.
    pub on: &'a GpuStream,
    /// Which round.
    pub tag: Tag,
    /// Ends every wait.
    pub deadline: Deadline,
}

impl Round<'_> {
    /// Queues the round of an exchange.
    ///
    /// # Errors
    /// [`longspan_hal::Error::PeerLost`], [`longspan_hal::Error::Driver`].
    pub(crate) fn exchange(&self, exchange: &GpuExchange, sends: &[Part]) -> Result<()> {
        let (draft, me, n) = (&exchange.draft, self.member.rank, self.member.group.size);
        for part in draft.recvs.iter().chain(sends) {
            part.buffer.used_on(self.on)?;
        }
        // Everybody starts with another peer, so that nobody is written by all at once.
        let others = (1..n).map(|step| (me + step) % n);
        let senders: Vec<u32> = others.clone().filter(|p| draft.from.contains(p)).collect();
        let free = if senders.is_empty() { None } else { Some(self.on.record(false)?) };
        for &peer in &senders {
            let letter = Letter { tag: self.tag, event: free.clone(), parts: exchange.parts_from(peer) };
            self.member.post(Topic::Free, peer, letter);
        }
        self.copy(exchange, sends, me, &exchange.parts_from(me))?;
        for peer in others.filter(|p| draft.to.contains(p)) {
            let letter = self.await_letter(Topic::Free, peer)?;
            self.copy(exchange, sends, peer, &letter.parts)?;
            let event = Some(self.on.record(false)?);
            self.member.post(Topic::Arrived, peer, Letter { tag: self.tag, event, parts: Arc::default() });
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
            near &= std::ptr::eq(to.buffer.context(), self.on.context());
            jobs.extend(Job::new(from.place(), to.place()));
        }
        if near { copy::local(self.on, jobs) } else { copy::remote(self.on, jobs) }
    }

    /// Meets `peers`: what they queued before happens before what this rank queues afterwards.
    ///
    /// # Errors
    /// As [`Round::exchange`].
    pub(crate) fn meet(&self, peers: &[u32]) -> Result<()> {
        let here = Some(self.on.record(false)?);
        for &peer in peers {
            let letter = Letter { tag: self.tag, event: here.clone(), parts: Arc::default() };
            self.member.post(Topic::Free, peer, letter);
        }
        peers.iter().try_for_each(|&peer| self.await_letter(Topic::Free, peer).map(drop))
    }

    /// Collects a letter; the stream waits for its event.
    fn await_letter(&self, topic: Topic, peer: u32) -> Result<Letter> {
        let letter = self.member.collect(topic, peer, self.tag, self.deadline)?;
        if let Some(event) = &letter.event {
            self.on.wait(event)?;
        }
        Ok(letter)
    }
}
