//! What the ranks of a group share: who is there, what went wrong, and the calls that all ranks make together.
//!
//! Every wait of a rank ends when what it waits for is there, when the group has a fault, when a rank that is needed
//! left, or at the deadline. The first fault stays: all ranks name the same culprit.
//!
//! ```text
//! agree(call, offer):  n-th call of this rank meets the n-th call of every other rank
//!   another name there          -> fault: calls in different order
//!   last to come                -> judge all offers, one verdict for all
//!   a missing rank left, or the deadline passed -> fault: that rank is lost
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, Weak};
use std::time::Duration;

use longspan_hal::{Error, GroupId, Result, Step};

use crate::board::Board;
use crate::matching::{Offer, judge};
use crate::personality::Personality;
use crate::round::Rounds;
use crate::sync::{Deadline, lock};

/// The shared state of a group of ranks in this process.
#[derive(Debug)]
pub(crate) struct Group {
    /// Distinct for every group of the process.
    key: u64,
    size: u32,
    personality: Personality,
    board: Board,
    state: Mutex<State>,
    /// Signals the waits of each rank.
    wake: Vec<Condvar>,
}

/// What changes, under one lock.
#[derive(Debug)]
pub(crate) struct State {
    fault: Option<Fault>,
    joined: Vec<bool>,
    formed: bool,
    gone: Vec<bool>,
    next_call: Vec<u64>,
    calls: HashMap<u64, Call>,
    /// Meetings of ranks in exchanges and barriers.
    pub rounds: Rounds,
}

/// Why a group is over.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// The ranks do not do the same.
    Broken(Error),
    /// A rank died, gave up or did not come within the limit.
    Lost { rank: u32, step: Step, late: Option<Duration> },
}

/// A call that all ranks make together.
#[derive(Debug)]
struct Call {
    name: &'static str,
    offers: Vec<Option<Offer>>,
    verdict: Option<Result<Option<Arc<Group>>>>,
    left: u32,
}

/// A rank's place in its group; dropping the last handle of it leaves the group.
#[derive(Debug)]
pub(crate) struct Member {
    /// The group.
    pub group: Arc<Group>,
    /// The rank in it.
    pub rank: u32,
    /// Bounds every wait for a peer.
    pub limit: Duration,
}

static NEXT_GROUP: AtomicU64 = AtomicU64::new(1);
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A key that no group of this process has.
pub(crate) fn next_key() -> u64 {
    NEXT_GROUP.fetch_add(1, Ordering::Relaxed)
}

/// Groups of this process by id.
static GROUPS: LazyLock<Mutex<HashMap<Vec<u8>, Weak<Group>>>> = LazyLock::new(Mutex::default);

/// The id of a new group.
pub(crate) fn new_id() -> GroupId {
    let number = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    GroupId([&b"cpu"[..], &u64::from(std::process::id()).to_le_bytes(), &number.to_le_bytes()].concat())
}

impl Member {
    /// Joins the group `id` and waits until all ranks have.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a rank out of range or taken, another size or personality than the ranks before;
    /// [`Error::Timeout`].
    pub(crate) fn join(
        id: &GroupId,
        rank: u32,
        size: u32,
        limit: Duration,
        personality: Personality,
    ) -> Result<Arc<Self>> {
        if rank >= size {
            return Err(Error::invalid("rank", format!("rank {rank} of a group of {size}")));
        }
        let group = Group::find(id, size, personality);
        if group.size != size || group.personality != personality {
            let why = format!(
                "this rank joins {size} ranks as {personality:?}, ranks before it joined {} as {:?}",
                group.size, group.personality
            );
            return Err(Error::invalid("group", why));
        }
        group.gather(rank, Deadline::after(limit))?;
        Ok(Arc::new(Self { group, rank, limit }))
    }

    /// Gives the group up.
    pub(crate) fn abort(&self) {
        let step = self.group.board.step(self.rank);
        self.group.fail(&mut self.group.lock(), Fault::Lost { rank: self.rank, step, late: None });
    }

    /// [`Group::agree`] of this rank.
    pub(crate) fn agree(&self, call: &'static str, offer: Offer) -> Result<(u64, Option<Arc<Group>>)> {
        self.group.agree(self.rank, Deadline::after(self.limit), call, offer)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.group.lock().gone[self.rank as usize] = true;
        self.group.wake_all();
    }
}

impl Fault {
    /// What a wait in `call` returns.
    fn error(&self, call: &'static str) -> Error {
        match self {
            Self::Broken(error) => error.clone(),
            &Self::Lost { rank, step, late } => Error::PeerLost { rank, call, step, late },
        }
    }
}

impl Group {
    /// A group of `size` ranks; `formed` if they need not join.
    pub(crate) fn new(size: u32, personality: Personality, formed: bool) -> Self {
        let n = size as usize;
        let state = State {
            fault: None,
            joined: vec![formed; n],
            formed,
            gone: vec![false; n],
            next_call: vec![0; n],
            calls: HashMap::new(),
            rounds: Rounds::default(),
        };
        Self {
            key: next_key(),
            size,
            personality,
            board: Board::new(size),
            state: Mutex::new(state),
            wake: (0..n).map(|_| Condvar::new()).collect(),
        }
    }

    fn find(id: &GroupId, size: u32, personality: Personality) -> Arc<Self> {
        let mut groups = lock(&GROUPS);
        if let Some(group) = groups.get(&id.0).and_then(Weak::upgrade) {
            return group;
        }
        groups.retain(|_, group| group.strong_count() > 0);
        let group = Arc::new(Self::new(size, personality, false));
        groups.insert(id.0.clone(), Arc::downgrade(&group));
        group
    }

    /// Enters as `rank` and waits for the others; leaves again if they do not come.
    fn gather(&self, rank: u32, deadline: Deadline) -> Result<()> {
        let mut state = self.lock();
        if std::mem::replace(&mut state.joined[rank as usize], true) {
            return Err(Error::invalid("rank", format!("rank {rank} of this group is taken")));
        }
        if state.joined.iter().all(|&j| j) {
            state.formed = true;
            self.wake_all();
        }
        while !state.formed {
            if deadline.passed() {
                let came = state.joined.iter().filter(|&&j| j).count();
                state.joined[rank as usize] = false;
                return Err(deadline.timeout(came_text(came)));
            }
            state = deadline.wait(self.signal(rank), state);
        }
        Ok(())
    }

    /// Distinct for every group of the process.
    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    /// Number of ranks.
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// How all its ranks exchange.
    pub(crate) fn personality(&self) -> Personality {
        self.personality
    }

    /// The progress board.
    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    /// Locks what changes.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The signal of the waits of `rank`.
    pub(crate) fn signal(&self, rank: u32) -> &Condvar {
        &self.wake[rank as usize]
    }

    /// Wakes every wait of every rank.
    pub(crate) fn wake_all(&self) {
        self.wake.iter().for_each(Condvar::notify_all);
    }

    /// Ends the group with `fault`, unless it is over already.
    pub(crate) fn fail(&self, state: &mut State, fault: Fault) {
        if state.fault.is_none() {
            state.fault = Some(fault);
            self.wake_all();
        }
    }

    /// Checks that the group is not over, for `call`.
    pub(crate) fn alive(&self, call: &'static str) -> Result<()> {
        self.lock().check(call)
    }

    /// Whether one of `missing` will not come: it left, or the limit that is given passed. Then the group is over.
    pub(crate) fn give_up(&self, state: &mut State, missing: &[u32], late: Option<Duration>) -> bool {
        let gone = missing.iter().find(|&&rank| state.gone[rank as usize]);
        let Some(&rank) = gone.or_else(|| missing.first().filter(|_| late.is_some())) else { return false };
        let late = late.filter(|_| gone.is_none());
        self.fail(state, Fault::Lost { rank, step: self.board.step(rank), late });
        true
    }

    /// Meets all ranks in their next common call. Returns the number of the call.
    fn agree(&self, me: u32, deadline: Deadline, name: &'static str, offer: Offer) -> Result<(u64, Option<Arc<Self>>)> {
        let mut state = self.lock();
        state.check(name)?;
        let number = state.next_call[me as usize];
        state.next_call[me as usize] += 1;
        self.offer(&mut state, me, number, name, offer);
        loop {
            if let Some(verdict) = state.verdict(number, self.size) {
                return Ok((number, verdict?));
            }
            state.check(name)?;
            let missing = state.missing(number);
            if !self.give_up(&mut state, &missing, deadline.late()) {
                state = deadline.wait(self.signal(me), state);
            }
        }
    }

    /// Lays the offer down; the last one judges.
    fn offer(&self, state: &mut State, me: u32, number: u64, name: &'static str, offer: Offer) {
        let n = self.size as usize;
        let call = state.calls.entry(number).or_insert_with(|| Call {
            name,
            offers: (0..n).map(|_| None).collect(),
            verdict: None,
            left: 0,
        });
        if call.name != name {
            let other = call.offers.iter().position(Option::is_some).unwrap_or(0);
            let why = format!(
                "call {number} is `{name}` on rank {me} and `{}` on rank {other}; all ranks must make the same calls in the \
                 same order",
                call.name
            );
            return self.fail(state, Fault::Broken(Error::invalid("collective call", why)));
        }
        call.offers[me as usize] = Some(offer);
        if call.offers.iter().all(Option::is_some) {
            let offers: Vec<Offer> = call.offers.drain(..).flatten().collect();
            call.verdict = Some(judge(&offers, self.personality));
            self.wake_all();
        }
    }
}

impl State {
    /// The fault as the error of `call`.
    pub(crate) fn check(&self, call: &'static str) -> Result<()> {
        self.fault.as_ref().map_or(Ok(()), |fault| Err(fault.error(call)))
    }

    /// The verdict on a call, taken by one rank.
    fn verdict(&mut self, number: u64, size: u32) -> Option<Result<Option<Arc<Group>>>> {
        let call = self.calls.get_mut(&number)?;
        let verdict = call.verdict.clone()?;
        call.left += 1;
        if call.left == size {
            self.calls.remove(&number);
        }
        Some(verdict)
    }

    fn missing(&self, number: u64) -> Vec<u32> {
        let offers = self.calls.get(&number).map_or(&[][..], |call| &call.offers);
        (0..).zip(offers).filter(|(_, offer)| offer.is_none()).map(|(rank, _)| rank).collect()
    }
}

/// [`Error::Timeout`] carries static text: how many ranks came.
fn came_text(came: usize) -> &'static str {
    const CAME: [&str; 9] = [
        "join (0 ranks came)",
        "join (1 rank came)",
        "join (2 ranks came)",
        "join (3 ranks came)",
        "join (4 ranks came)",
        "join (5 ranks came)",
        "join (6 ranks came)",
        "join (7 ranks came)",
        "join (8 ranks came)",
    ];
    CAME.get(came).copied().unwrap_or("join (more than 8 ranks came, but not all)")
}
