//! A rank in its group: the common calls and the fault of `longspan_peers`, and letters between two ranks in a round.
//!
//! ```text
//! agree(call, offer):  n-th call of this rank meets the n-th call of every other rank, over TCP: joining and preparing
//! mail:                what two ranks tell each other in a round, without TCP
//!                      threads of one process: letters with events;  processes of one host: words and flags in shared memory;
//!                      processes of several hosts: none, the devices meet (NCCL)
//! ```
//!
//! Every wait of a rank ends when what it waits for is there, when the group has a fault, when a rank that is needed left, or at
//! the deadline. The first fault stays: all ranks name the same culprit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use longspan_hal::{Error, GroupId, Result, Step};
use longspan_peers::{Board, Fields, Member, Place, Reach};

use crate::flags::Flags;
use crate::letters::Letters;

/// Distinct for every communicator of the process.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A rank's place in its group; dropping it leaves the group.
#[derive(Debug)]
pub(crate) struct Group {
    /// Marks this communicator's windows and exchanges.
    pub key: u64,
    /// How ranks meet outside of rounds.
    pub member: Member,
    /// How they meet in rounds.
    pub mail: Mail,
    /// Whether a call said what ended the group.
    told: AtomicBool,
}

/// How two ranks meet in a round.
#[derive(Debug)]
pub(crate) enum Mail {
    /// Ranks are threads of this process.
    Letters(Arc<Letters>),
    /// Ranks are processes of this host.
    Flags(Arc<Flags>),
    /// Only on the devices.
    None,
}

/// The id of a new group, whose board this process serves.
///
/// # Errors
/// [`Error::Unavailable`] if no socket can be opened.
pub(crate) fn new_id() -> Result<GroupId> {
    let place = Board::open(Reach::of_job()).map_err(|e| Error::Unavailable {
        library: "the progress board".into(),
        why: format!("no socket could be opened: {e}"),
        how_to_get_it: "set LONGSPAN_ADDRESS to an address of this host that all ranks reach".into(),
    })?;
    Ok(GroupId(place.to_bytes()))
}

/// Joins the group `id` and waits until all ranks have.
///
/// # Errors
/// [`Error::Invalid`] for a rank out of range or taken, another size than the ranks before; [`Error::Timeout`].
pub(crate) fn join(id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<Member> {
    let place = Place::from_bytes(&id.0);
    let place = place.map_err(|_| Error::invalid("group id", "it was not made by a backend of GPUs"))?;
    Member::join(&place, rank, size, limit)
}

impl Group {
    /// The place of `member`, whose rounds meet by `mail`.
    pub(crate) fn new(member: Member, mail: Mail) -> Self {
        Self { key: NEXT.fetch_add(1, Ordering::Relaxed), member, mail, told: AtomicBool::new(false) }
    }

    /// This rank.
    pub(crate) fn rank(&self) -> u32 {
        self.member.rank
    }

    /// Number of ranks.
    pub(crate) fn size(&self) -> u32 {
        self.member.size
    }

    /// Gives the group up.
    pub(crate) fn abort(&self) {
        if let Mail::Letters(letters) = &self.mail {
            self.member.progress(letters.step(self.rank()));
        }
        self.member.abort();
    }

    /// Reports the step.
    pub(crate) fn progress(&self, step: Step) {
        match &self.mail {
            // All who may ask are in this process.
            Mail::Letters(letters) => letters.report(self.rank(), step),
            Mail::Flags(_) | Mail::None => self.member.progress(step),
        }
    }

    /// Checks that the group is not over, for `call`.
    ///
    /// # Errors
    /// [`Error::PeerLost`], or what else ended it.
    pub(crate) fn alive(&self, call: &'static str) -> Result<()> {
        self.member.alive(call).map_err(|e| self.with_step(e))
    }

    /// Meets all ranks in their next common call; the offers of all, in rank order.
    ///
    /// # Errors
    /// [`Error::PeerLost`]; [`Error::Invalid`] if another rank makes another call.
    pub(crate) fn agree(&self, name: &'static str, offer: &Fields) -> Result<Vec<Vec<u8>>> {
        self.member.agree(name, offer).map_err(|e| self.with_step(e))
    }

    /// Rank `from` does not come to round `round` of this rank's, within the limit (`late`) or since it left: what ended the group.
    pub(crate) fn stuck(&self, round: u64, from: u32, late: bool, call: &'static str) -> Error {
        self.member.stuck(round, from, late);
        self.with_step(self.member.wait_for_fault(call))
    }

    /// Gives the group up since `call` failed. What ended it before says more than that; where NCCL fails, that may come soon.
    pub(crate) fn fail(&self, call: &'static str, error: Error) -> Error {
        let fault = match &error {
            Error::Driver { call: function, .. } if function.starts_with("nccl") => {
                Some(self.member.wait_for_fault(call)).filter(|fault| !matches!(fault, Error::Timeout { .. }))
            }
            _ => self.member.fault(call),
        };
        let error = fault.unwrap_or(error);
        self.abort();
        self.with_step(error)
    }

    /// Whether the caller knows that the group is over.
    pub(crate) fn told(&self) -> bool {
        self.told.load(Ordering::Acquire)
    }

    /// What ended the group, for the caller. The step of a lost thread is known here.
    fn with_step(&self, error: Error) -> Error {
        self.told.store(true, Ordering::Release);
        match (&self.mail, error) {
            (Mail::Letters(letters), Error::PeerLost { rank, call, late, .. }) => {
                Error::PeerLost { rank, call, step: letters.step(rank), late }
            }
            (_, error) => error,
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Mail::Letters(letters) = &self.mail {
            letters.leave(self.member.rank);
        }
    }
}
