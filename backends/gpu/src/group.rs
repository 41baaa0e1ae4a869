//! What the ranks of a group share: who is there, what went wrong, the calls that all ranks make together, and letters.
//!
//! Ranks are threads of this process. Every wait of a rank ends when what it waits for is there, when the group has a fault,
//! when a rank that is needed left, or at the deadline. The first fault stays: all ranks name the same culprit.
//!
//! ```text
//! agree(call, offer):  n-th call of this rank meets the n-th call of every other rank; the last to come judges for all
//! post(to, letter), collect(from):  letters between two ranks arrive in order, each with the round that it belongs to
//! ```

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::Duration;

use longspan_hal::{Error, GroupId, Result, Step};

use crate::board::Board;
use crate::matching::{Agreement, Offer, judge};
use crate::peer::{Letter, Tag, Topic};
use crate::sync::{Deadline, lock};

/// The shared state of a group of ranks in this process.
#[derive(Debug)]
pub(crate) struct Group {
    /// Distinct for every group of the process.
    pub key: u64,
    /// Number of ranks.
    pub size: u32,
    /// The progress board.
    pub board: Board,
    state: Mutex<State>,
    /// Signals the waits of each rank.
    wake: Vec<Condvar>,
}

/// What changes, under one lock.
#[derive(Debug, Default)]
struct State {
    fault: Option<Fault>,
    joined: Vec<bool>,
    formed: bool,
    gone: Vec<bool>,
    next_call: Vec<u64>,
    calls: HashMap<u64, Call>,
    /// By topic, sender and receiver.
    letters: HashMap<(Topic, u32, u32), VecDeque<Letter>>,
}

/// Why a group is over.
#[derive(Clone, Debug)]
enum Fault {
    /// The ranks do not do the same.
    Broken(Error),
    /// A rank died, gave up or did not come.
    Lost { rank: u32, step: Step },
}

/// A call that all ranks make together.
#[derive(Debug)]
struct Call {
    name: &'static str,
    offers: Vec<Option<Offer>>,
    verdict: Option<Result<Agreement>>,
    left: u32,
}

/// A rank's place in its group; dropping it leaves the group.
#[derive(Debug)]
pub(crate) struct Member {
    /// The group.
    pub group: Arc<Group>,
    /// The rank in it.
    pub rank: u32,
    /// Bounds every wait for a peer.
    pub limit: Duration,
}

/// Groups of a machine in this process, by id.
#[derive(Debug)]
pub(crate) struct Groups(Mutex<BTreeMap<Vec<u8>, Weak<Group>>>);

static NEXT_GROUP: AtomicU64 = AtomicU64::new(1);
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// The id of a new group of backend `name`.
pub(crate) fn new_id(name: &str) -> GroupId {
    let number = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    let process = u64::from(std::process::id());
    GroupId([name.as_bytes(), &process.to_le_bytes(), &number.to_le_bytes()].concat())
}

impl Groups {
    /// No group.
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    fn find(&self, id: &GroupId, size: u32) -> Arc<Group> {
        let mut groups = lock(&self.0);
        if let Some(group) = groups.get(&id.0).and_then(Weak::upgrade) {
            return group;
        }
        groups.retain(|_, group| group.strong_count() > 0);
        let group = Arc::new(Group::new(size, false));
        groups.insert(id.0.clone(), Arc::downgrade(&group));
        group
    }
}

impl Member {
    /// Joins the group `id` and waits until all ranks have.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a rank out of range or taken, another size than the ranks before; [`Error::Timeout`].
    pub(crate) fn join(groups: &Groups, id: &GroupId, rank: u32, size: u32, limit: Duration) -> Result<Arc<Self>> {
        if rank >= size {
            return Err(Error::invalid("rank", format!("rank {rank} of a group of {size}")));
        }
        let group = groups.find(id, size);
        if group.size != size {
            let why = format!("this rank joins {size} ranks, ranks before it joined {}", group.size);
            return Err(Error::invalid("group", why));
        }
        group.gather(rank, Deadline::after(limit))?;
        Ok(Arc::new(Self { group, rank, limit }))
    }

    /// Gives the group up.
    pub(crate) fn abort(&self) {
        let fault = Fault::Lost { rank: self.rank, step: self.group.board.step(self.rank) };
        self.group.fail(&mut self.group.lock(), fault);
    }

    /// Checks that the group is not over, for `call`.
    ///
    /// # Errors
    /// [`Error::PeerLost`], or what else ended it.
    pub(crate) fn alive(&self, call: &'static str) -> Result<()> {
        self.group.lock().check(call)
    }

    /// Meets all ranks in their next common call. Returns its number and what came of it.
    ///
    /// # Errors
    /// The one verdict of all ranks; [`Error::PeerLost`].
    pub(crate) fn agree(&self, name: &'static str, offer: Offer) -> Result<(u64, Agreement)> {
        let (group, me, deadline) = (&self.group, self.rank, Deadline::after(self.limit));
        let mut state = group.lock();
        state.check(name)?;
        let number = state.next_call[me as usize];
        state.next_call[me as usize] += 1;
        group.offer(&mut state, me, number, name, offer);
        loop {
            if let Some(verdict) = state.verdict(number, group.size) {
                return Ok((number, verdict?));
            }
            state.check(name)?;
            let missing = state.missing(number);
            if !group.give_up(&mut state, &missing, deadline.passed()) {
                state = deadline.wait(&group.wake[me as usize], state);
            }
        }
    }

    /// Lays a letter down for `to`.
    pub(crate) fn post(&self, topic: Topic, to: u32, letter: Letter) {
        let mut state = self.group.lock();
        state.letters.entry((topic, self.rank, to)).or_default().push_back(letter);
        self.group.wake[to as usize].notify_all();
    }

    /// Takes the next letter of `from`, which belongs to `round`.
    ///
    /// # Errors
    /// [`Error::PeerLost`]; [`Error::Invalid`] if it belongs to another round.
    pub(crate) fn collect(&self, topic: Topic, from: u32, round: Tag, deadline: Deadline) -> Result<Letter> {
        let group = &self.group;
        let mut state = group.lock();
        loop {
            state.check(round.call)?;
            if let Some(letter) = state.letters.get_mut(&(topic, from, self.rank)).and_then(VecDeque::pop_front) {
                if letter.tag == round {
                    return Ok(letter);
                }
                let why = format!(
                    "rank {} runs {round} while rank {from} runs {}; all ranks must queue the same rounds in the same order",
                    self.rank, letter.tag
                );
                group.fail(&mut state, Fault::Broken(Error::invalid("round", why)));
            } else if !group.give_up(&mut state, &[from], deadline.passed()) {
                state = deadline.wait(&group.wake[self.rank as usize], state);
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.group.lock().gone[self.rank as usize] = true;
        self.group.wake_all();
    }
}

impl Group {
    /// A group of `size` ranks; `formed` if they need not join.
    pub(crate) fn new(size: u32, formed: bool) -> Self {
        let n = size as usize;
        let state =
            State { joined: vec![formed; n], formed, gone: vec![false; n], next_call: vec![0; n], ..State::default() };
        Self {
            key: NEXT_GROUP.fetch_add(1, Ordering::Relaxed),
            size,
            board: Board::new(size),
            state: Mutex::new(state),
            wake: (0..n).map(|_| Condvar::new()).collect(),
        }
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
            state = deadline.wait(&self.wake[rank as usize], state);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn wake_all(&self) {
        self.wake.iter().for_each(Condvar::notify_all);
    }

    /// Ends the group with `fault`, unless it is over already.
    fn fail(&self, state: &mut State, fault: Fault) {
        if state.fault.is_none() {
            state.fault = Some(fault);
            self.wake_all();
        }
    }

    /// Whether one of `missing` will not come: it left, or the deadline passed. Then the group is over.
    fn give_up(&self, state: &mut State, missing: &[u32], late: bool) -> bool {
        let gone = missing.iter().find(|&&rank| state.gone[rank as usize]);
        let Some(&rank) = gone.or_else(|| missing.first().filter(|_| late)) else { return false };
        self.fail(state, Fault::Lost { rank, step: self.board.step(rank) });
        true
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
            call.verdict = Some(judge(&offers));
            self.wake_all();
        }
    }
}

impl State {
    /// The fault as the error of `call`.
    fn check(&self, call: &'static str) -> Result<()> {
        match &self.fault {
            None => Ok(()),
            Some(Fault::Broken(error)) => Err(error.clone()),
            Some(Fault::Lost { rank, step }) => Err(Error::PeerLost { rank: *rank, call, step: *step }),
        }
    }

    /// The verdict on a call, taken by one rank.
    fn verdict(&mut self, number: u64, size: u32) -> Option<Result<Agreement>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);
    const ROUND: Tag = Tag { call: "exchange", id: 3, round: 0 };

    fn letter(tag: Tag) -> Letter {
        Letter { tag, event: None, parts: Arc::default() }
    }

    /// Runs `body` on ranks of one group, a thread each.
    fn on_ranks<T: Send>(size: u32, limit: Duration, body: impl Fn(Arc<Member>) -> T + Sync) -> Vec<T> {
        let (groups, id) = (Groups::new(), new_id("test"));
        std::thread::scope(|scope| {
            let run = |rank| {
                let (groups, id, body) = (&groups, &id, &body);
                scope.spawn(move || body(Member::join(groups, id, rank, size, limit).expect("all come")))
            };
            let threads: Vec<_> = (0..size).map(run).collect();
            threads.into_iter().map(|t| t.join().expect("no rank panics")).collect()
        })
    }

    #[test]
    fn a_group_needs_all_its_ranks_and_each_once() {
        let (groups, id, short) = (Groups::new(), new_id("test"), Duration::from_millis(30));
        let late = Member::join(&groups, &id, 0, 2, short).expect_err("the other does not come");
        assert_eq!(late, Error::Timeout { call: "join (1 rank came)", limit: short });
        assert!(matches!(Member::join(&groups, &id, 2, 2, short), Err(Error::Invalid { .. })));
        assert_ne!(new_id("test"), new_id("test"));
    }

    #[test]
    fn letters_arrive_in_order_and_of_the_right_round() {
        let results = on_ranks(2, LIMIT, |member| {
            let peer = 1 - member.rank;
            for round in 0..50 {
                member.post(Topic::Free, peer, letter(Tag { round, ..ROUND }));
            }
            (0..50).try_for_each(|round| {
                member.collect(Topic::Free, peer, Tag { round, ..ROUND }, Deadline::after(LIMIT)).map(drop)
            })
        });
        assert_eq!(results, [Ok(()), Ok(())]);
    }

    #[test]
    fn another_round_ends_the_group_for_all() {
        let results = on_ranks(2, LIMIT, |member| {
            let tag = Tag { id: u64::from(member.rank), ..ROUND };
            member.post(Topic::Free, 1 - member.rank, letter(tag));
            member.collect(Topic::Free, 1 - member.rank, tag, Deadline::after(LIMIT)).map(drop)
        });
        assert!(results.iter().all(|r| matches!(r, Err(Error::Invalid { what: "round", .. }))), "{results:?}");
    }

    #[test]
    fn a_rank_that_leaves_or_gives_up_is_named_with_its_step() {
        let step = Step { phase: "ring", index: 4 };
        for abort in [false, true] {
            let results = on_ranks(3, LIMIT, |member| {
                if member.rank == 1 {
                    member.group.board.report(1, step);
                    if abort {
                        member.abort();
                    }
                    return Ok(());
                }
                member.collect(Topic::Arrived, 1, ROUND, Deadline::after(LIMIT)).map(drop)
            });
            let lost = Err(Error::PeerLost { rank: 1, call: "exchange", step });
            assert_eq!(results, [lost.clone(), Ok(()), lost]);
        }
    }

    #[test]
    fn a_rank_that_stays_away_is_lost_at_the_deadline() {
        let results = on_ranks(2, LIMIT, |member| {
            let result = match member.rank {
                0 => member.collect(Topic::Free, 1, ROUND, Deadline::after(Duration::from_millis(50))).map(drop),
                _ => Ok(()),
            };
            // Nobody leaves before the deadline.
            std::thread::sleep(Duration::from_millis(200));
            result
        });
        assert!(matches!(results[0], Err(Error::PeerLost { rank: 1, .. })), "{results:?}");
    }

    #[test]
    fn calls_that_differ_end_the_group() {
        let results = on_ranks(2, LIMIT, |member| {
            let name = if member.rank == 0 { "window" } else { "prepare" };
            member.agree(name, Offer::Window(Ok(()))).map(drop)
        });
        assert!(
            results.iter().any(|r| matches!(r, Err(Error::Invalid { what: "collective call", .. }))),
            "{results:?}"
        );
        assert!(results.iter().all(Result::is_err), "{results:?}");
    }

    #[test]
    fn a_subgroup_is_one_group_for_its_members() {
        let results = on_ranks(3, LIMIT, |member| {
            let (_, agreed) = member.agree("subgroup", Offer::Subgroup(vec![0, 2])).expect("all agree");
            match agreed {
                Agreement::Group(group) => (group.key, group.size),
                other => panic!("{other:?}"),
            }
        });
        assert!(results.iter().all(|r| *r == results[0] && r.1 == 2), "{results:?}");
    }
}
