//! Letters between ranks that are threads of one process: they arrive in order, each with the round that it belongs to.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use longspan_hal::{Result, Step};

use crate::event::Event;
use crate::exchange::Part;
use crate::group::Group;
use crate::peer::{Tag, Topic};
use crate::sync::{Deadline, lock};

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

/// The letters of a group, and where its ranks were last seen.
#[derive(Debug)]
pub(crate) struct Letters {
    state: Mutex<State>,
    /// Signals the waits of each rank.
    wake: Vec<Condvar>,
    steps: Vec<Mutex<Step>>,
}

#[derive(Debug)]
struct State {
    /// By topic, sender and receiver.
    letters: HashMap<(Topic, u32, u32), VecDeque<Letter>>,
    gone: Vec<bool>,
}

/// Letters of the groups of this process, by the group's id.
static GROUPS: Mutex<BTreeMap<Vec<u8>, Weak<Letters>>> = Mutex::new(BTreeMap::new());

/// How long a wait looks again and again before it sleeps: waking up takes longer than most letters.
const AWAKE: Duration = Duration::from_micros(100);
/// How long a wait does not look at the group's fault.
const NAP: Duration = Duration::from_millis(5);

impl Letters {
    /// The letters of group `id`, the same for all its ranks in this process.
    pub(crate) fn of(id: &[u8], size: u32) -> Arc<Self> {
        let mut groups = lock(&GROUPS);
        if let Some(letters) = groups.get(id).and_then(Weak::upgrade) {
            return letters;
        }
        groups.retain(|_, letters| letters.strong_count() > 0);
        let n = size as usize;
        let letters = Arc::new(Self {
            state: Mutex::new(State { letters: HashMap::new(), gone: vec![false; n] }),
            wake: (0..n).map(|_| Condvar::new()).collect(),
            steps: (0..n).map(|_| Mutex::default()).collect(),
        });
        groups.insert(id.to_vec(), Arc::downgrade(&letters));
        letters
    }

    /// Notes that `rank` is at `step`.
    pub(crate) fn report(&self, rank: u32, step: Step) {
        if let Some(slot) = self.steps.get(rank as usize) {
            *lock(slot) = step;
        }
    }

    /// Where `rank` was last seen, also after it is gone.
    pub(crate) fn step(&self, rank: u32) -> Step {
        self.steps.get(rank as usize).map_or_else(Step::default, |slot| *lock(slot))
    }

    /// Notes that `rank` writes no more letters.
    pub(crate) fn leave(&self, rank: u32) {
        if let Some(gone) = lock(&self.state).gone.get_mut(rank as usize) {
            *gone = true;
        }
        self.wake.iter().for_each(Condvar::notify_all);
    }

    /// Lays a letter down.
    pub(crate) fn post(&self, topic: Topic, [from, to]: [u32; 2], letter: Letter) {
        let mut state = lock(&self.state);
        state.letters.entry((topic, from, to)).or_default().push_back(letter);
        self.wake[to as usize].notify_all();
    }

    /// Takes the next letter of `from` to the rank of `group`, which belongs to `round`.
    ///
    /// # Errors
    /// [`longspan_hal::Error::PeerLost`]; [`longspan_hal::Error::Invalid`] if it belongs to another round.
    pub(crate) fn collect(
        &self,
        group: &Group,
        topic: Topic,
        from: u32,
        round: Tag,
        deadline: Deadline,
    ) -> Result<Letter> {
        let (me, start) = (group.rank(), Instant::now());
        let mut state = lock(&self.state);
        loop {
            if let Some(letter) = state.letters.get_mut(&(topic, from, me)).and_then(VecDeque::pop_front) {
                drop(state);
                return round.check(group, from, letter.tag).map(|()| letter);
            }
            let gone = state.gone.get(from as usize).copied().unwrap_or(true);
            if gone || deadline.passed() {
                drop(state);
                group.alive(round.call)?;
                return Err(group.stuck(0, from, !gone, round.call));
            }
            if start.elapsed() < AWAKE {
                drop(state);
                (0..64).for_each(|_| std::hint::spin_loop());
                state = lock(&self.state);
                continue;
            }
            // Whoever ends the group tells the board, not every letter box.
            group.alive(round.call)?;
            state = deadline.wait(&self.wake[me as usize], state, NAP);
        }
    }
}

#[cfg(test)]
mod tests {
    use longspan_hal::Error;

    use super::*;
    use crate::group::{Mail, join, new_id};

    const LIMIT: Duration = Duration::from_secs(20);
    const ROUND: Tag = Tag { call: "exchange", id: 3, round: 0 };

    /// Runs `body` on ranks of one group, a thread each.
    fn on_ranks<T: Send>(size: u32, body: impl Fn(Group, &Letters) -> T + Sync) -> Vec<T> {
        let id = new_id().expect("a socket");
        std::thread::scope(|scope| {
            let run = |rank| {
                let (id, body) = (&id, &body);
                scope.spawn(move || {
                    let letters = Letters::of(&id.0, size);
                    let member = join(id, rank, size, LIMIT).expect("all come");
                    body(Group::new(member, Mail::Letters(Arc::clone(&letters))), &letters)
                })
            };
            let threads: Vec<_> = (0..size).map(run).collect();
            threads.into_iter().map(|t| t.join().expect("no rank panics")).collect()
        })
    }

    fn post(group: &Group, letters: &Letters, topic: Topic, to: u32, tag: Tag) {
        letters.post(topic, [group.rank(), to], Letter { tag, event: None, parts: Arc::default() });
    }

    #[test]
    fn a_group_is_of_this_backend_and_needs_all_its_ranks() {
        let (id, short) = (new_id().expect("a socket"), Duration::from_millis(100));
        let late = join(&id, 0, 2, short).expect_err("the other does not come");
        assert_eq!(late, Error::Timeout { call: "join (1 rank came)", limit: short });
        let foreign = join(&longspan_hal::GroupId(vec![1, 2, 3]), 0, 2, short);
        assert!(matches!(foreign, Err(Error::Invalid { what: "group id", .. })));
    }

    #[test]
    fn letters_arrive_in_order_and_of_the_right_round() {
        let results = on_ranks(2, |group, letters| {
            let peer = 1 - group.rank();
            for round in 0..50 {
                post(&group, letters, Topic::Free, peer, Tag { round, ..ROUND });
            }
            (0..50).try_for_each(|round| {
                let tag = Tag { round, ..ROUND };
                letters.collect(&group, Topic::Free, peer, tag, Deadline::after(LIMIT)).map(drop)
            })
        });
        assert_eq!(results, [Ok(()), Ok(())]);
    }

    #[test]
    fn another_round_ends_the_group_for_all() {
        let results = on_ranks(2, |group, letters| {
            let tag = Tag { id: u64::from(group.rank()), ..ROUND };
            post(&group, letters, Topic::Free, 1 - group.rank(), tag);
            letters.collect(&group, Topic::Free, 1 - group.rank(), tag, Deadline::after(LIMIT)).map(drop)
        });
        assert!(results.iter().all(|r| matches!(r, Err(Error::Invalid { what: "round", .. }))), "{results:?}");
    }

    #[test]
    fn a_rank_that_leaves_or_gives_up_is_named_with_its_step() {
        let step = Step { phase: "ring", index: 4 };
        for abort in [false, true] {
            let results = on_ranks(3, |group, letters| {
                if group.rank() == 1 {
                    group.progress(step);
                    if abort {
                        group.abort();
                    }
                    return Ok(());
                }
                letters.collect(&group, Topic::Arrived, 1, ROUND, Deadline::after(LIMIT)).map(drop)
            });
            let lost = Err(Error::PeerLost { rank: 1, call: "exchange", step, late: None });
            assert_eq!(results, [lost.clone(), Ok(()), lost]);
        }
    }

    #[test]
    fn a_rank_that_stays_away_is_lost_at_the_deadline() {
        let results = on_ranks(2, |group, letters| {
            let short = Deadline::after(Duration::from_millis(50));
            let result = match group.rank() {
                0 => letters.collect(&group, Topic::Free, 1, ROUND, short).map(drop),
                _ => Ok(()),
            };
            // Nobody leaves before the deadline.
            std::thread::sleep(Duration::from_millis(200));
            result
        });
        assert!(matches!(results[0], Err(Error::PeerLost { rank: 1, .. })), "{results:?}");
    }
}
