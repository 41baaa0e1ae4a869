//! Rounds: how ranks meet to move data, or only to meet (barriers).
//!
//! Between each pair of ranks, the n-th round of one side meets the n-th round of the other. Both sides lay down what
//! they send and receive, so a round that is not the same on both sides is found as soon as both are there, whatever
//! else they wait for.
//!
//! ```text
//! run(round, peers):
//!   for p in peers:     lay the post for p down; another round there -> fault
//!   until every meeting is through:
//!     a fault              -> end with it
//!     a meeting where both are there and a copy is mine to do -> copy, without the lock
//!     a peer left, or the deadline passed -> fault: that peer is lost
//!     otherwise wait
//!   wait until nobody copies from or to my memory, then leave
//! ```
//!
//! A copy happens only when both sides have arrived: the sender's data is there, and the receiver's part is free.

use std::collections::HashMap;
use std::fmt::{Display, Formatter};
use std::sync::{Arc, MutexGuard};

use longspan_hal::{Error, Result, Strided};

use crate::clock::Clock;
use crate::group::{Fault, Group, State};
use crate::memory::Buffer;
use crate::sync::{Deadline, wait};

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

/// Elements in memory that one side registered.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The memory.
    pub buffer: Buffer,
    /// Which elements.
    pub at: Strided,
}

/// What one side lays down for one peer.
#[derive(Debug)]
pub(crate) struct Post {
    /// The round.
    pub tag: Tag,
    /// Messages to the peer, and where each is staged on the way.
    pub sends: Vec<(Part, Option<Part>)>,
    /// Messages from the peer.
    pub recvs: Vec<Part>,
    /// The clock of this side's stream, in checked mode.
    pub clock: Option<Clock>,
}

/// Meetings of all pairs.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    pairs: HashMap<(u32, u32), Pair>,
}

#[derive(Debug, Default)]
struct Pair {
    arrived: [u64; 2],
    meetings: HashMap<u64, Meeting>,
}

/// Sides: 0 is the lower rank. Directions: by the sending side.
#[derive(Debug, Default)]
struct Meeting {
    posts: [Option<Arc<Post>>; 2],
    copies: [Copying; 2],
    left: [bool; 2],
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Copying {
    #[default]
    Waiting,
    Now,
    Done,
}

/// One rank's part in one round.
#[derive(Debug)]
pub(crate) struct Round<'a> {
    /// The group.
    pub group: &'a Group,
    /// This rank.
    pub me: u32,
    /// Ends every wait.
    pub deadline: Deadline,
    /// Which round.
    pub tag: Tag,
}

/// A meeting of this rank.
#[derive(Clone, Copy, Debug)]
struct Spot {
    peer: u32,
    pair: (u32, u32),
    side: usize,
    number: u64,
}

/// A copy that this rank does: of which meeting, in which direction, from whom to whom.
struct Claim {
    spot: Spot,
    direction: usize,
    from: Arc<Post>,
    to: Arc<Post>,
}

impl Round<'_> {
    /// Runs the round; `copy` moves the messages of one direction of one pair. Returns what the peers knew.
    ///
    /// # Errors
    /// [`Error::PeerLost`], [`Error::Invalid`] if a peer runs another round, [`Error::Timeout`].
    pub(crate) fn run(&self, posts: Vec<(u32, Post)>, mut copy: impl FnMut(&Post, &Post)) -> Result<Clock> {
        let mut state = self.group.lock();
        let spots = self.arrive(&mut state, posts);
        let result = loop {
            if spots.iter().all(|s| state.rounds.through(s)) {
                break Ok(());
            }
            if let Err(error) = state.check(self.tag.call) {
                break Err(error);
            }
            if let Some(claim) = self.claim(&mut state, &spots) {
                drop(state);
                copy(&claim.from, &claim.to);
                state = self.group.lock();
                state.rounds.at(&claim.spot).copies[claim.direction] = Copying::Done;
                self.group.signal(claim.spot.peer).notify_all();
            } else if !self.give_up(&mut state, &spots) {
                state = self.deadline.wait(self.group.signal(self.me), state);
            }
        };
        let known = self.leave(state, &spots);
        result.map(|()| known)
    }

    /// Whether a peer will not come or the deadline passed; then the group is over.
    fn give_up(&self, state: &mut State, spots: &[Spot]) -> bool {
        let late = self.deadline.late();
        let missing: Vec<u32> = spots.iter().filter(|s| !state.rounds.met(s)).map(|s| s.peer).collect();
        if self.group.give_up(state, &missing, late) {
            return true;
        }
        if late.is_some() {
            self.group.fail(state, Fault::Broken(self.deadline.timeout(self.tag.call)));
        }
        late.is_some()
    }

    /// Lays the posts down.
    fn arrive(&self, state: &mut State, posts: Vec<(u32, Post)>) -> Vec<Spot> {
        let mut spots = Vec::with_capacity(posts.len());
        for (peer, post) in posts {
            let spot = state.rounds.next_spot(self.me, peer);
            let meeting = state.rounds.at(&spot);
            meeting.posts[spot.side] = Some(Arc::new(post));
            meeting.skip_empty();
            if let Some(other) = meeting.posts[1 - spot.side].as_ref().filter(|p| p.tag != self.tag) {
                let why = format!(
                    "rank {} runs {} while rank {peer} runs {}; all ranks must queue the same rounds in the same order",
                    self.me, self.tag, other.tag
                );
                self.group.fail(state, Fault::Broken(Error::invalid("round", why)));
            }
            self.group.signal(peer).notify_all();
            spots.push(spot);
        }
        spots
    }

    /// Takes a copy that can be done now and is this rank's to do.
    fn claim(&self, state: &mut State, spots: &[Spot]) -> Option<Claim> {
        let personality = self.group.personality();
        if personality.meets_first() && !spots.iter().all(|s| state.rounds.met(s)) {
            return None;
        }
        spots.iter().find_map(|spot| {
            let direction = if personality.pushes() { spot.side } else { 1 - spot.side };
            let meeting = state.rounds.at(spot);
            let (from, to) = (meeting.posts[direction].clone()?, meeting.posts[1 - direction].clone()?);
            let free = from.tag == to.tag && meeting.copies[direction] == Copying::Waiting;
            free.then(|| {
                meeting.copies[direction] = Copying::Now;
                Claim { spot: *spot, direction, from, to }
            })
        })
    }

    /// Ends this rank's part, once nobody copies from or to its memory.
    fn leave(&self, mut state: MutexGuard<'_, State>, spots: &[Spot]) -> Clock {
        while spots.iter().any(|s| state.rounds.at(s).copies.contains(&Copying::Now)) {
            state = wait(self.group.signal(self.me), state);
        }
        let mut known = Clock::default();
        for spot in spots {
            if let Some(clock) = state.rounds.leave(spot).and_then(|post| post.clock.clone()) {
                known.merge(&clock);
            }
        }
        known
    }
}

impl Rounds {
    /// The next meeting of `me` with `peer`.
    fn next_spot(&mut self, me: u32, peer: u32) -> Spot {
        let (pair, side) = ((me.min(peer), me.max(peer)), usize::from(me > peer));
        let arrived = &mut self.pairs.entry(pair).or_default().arrived[side];
        let number = *arrived;
        *arrived += 1;
        Spot { peer, pair, side, number }
    }

    fn at(&mut self, spot: &Spot) -> &mut Meeting {
        self.pairs.entry(spot.pair).or_default().meetings.entry(spot.number).or_default()
    }

    /// Whether both are there.
    fn met(&mut self, spot: &Spot) -> bool {
        self.at(spot).posts.iter().all(Option::is_some)
    }

    /// Whether both were there, in the same round, and everything has moved.
    fn through(&mut self, spot: &Spot) -> bool {
        let meeting = self.at(spot);
        let [Some(a), Some(b)] = &meeting.posts else { return false };
        a.tag == b.tag && meeting.copies == [Copying::Done; 2]
    }

    /// Leaves the meeting; returns the other side's post. A meeting that came to nothing lets go of this side's memory.
    fn leave(&mut self, spot: &Spot) -> Option<Arc<Post>> {
        let through = self.through(spot);
        let meeting = self.at(spot);
        if !through {
            meeting.posts[spot.side] = None;
        }
        meeting.left[spot.side] = true;
        let other = meeting.posts[1 - spot.side].clone();
        if meeting.left == [true; 2] {
            self.pairs.entry(spot.pair).or_default().meetings.remove(&spot.number);
        }
        other
    }
}

impl Meeting {
    /// Directions without messages are done when both are there.
    fn skip_empty(&mut self) {
        if let [Some(a), Some(b)] = &self.posts {
            for (copying, post) in self.copies.iter_mut().zip([a, b]) {
                if post.sends.is_empty() {
                    *copying = Copying::Done;
                }
            }
        }
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
