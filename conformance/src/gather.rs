//! Bytes from every rank to every rank, on the host and beside the backend under test, so that a verdict does not depend on
//! it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use longspan_hal::Error;
use longspan_peers::{Fields, Member, Place};

use crate::Failure;

/// Bytes of every rank, in rank order.
pub type Shares = Arc<Vec<Vec<u8>>>;

/// Host-side gather of one team.
pub trait Gather: Send + Sync {
    /// Collective: hands in `bytes`; every rank gets those of all ranks.
    ///
    /// # Errors
    /// [`Failure::Wrong`] naming the ranks that did not come within `limit`, or [`Failure::Lost`].
    fn share(&self, rank: u32, bytes: Vec<u8>, limit: Duration) -> Result<Shares, Failure>;

    /// This rank failed: others stop waiting for it.
    fn give_up(&self, rank: u32);
}

/// [`Gather`] of threads of one process.
#[derive(Debug)]
pub struct SharedMemory {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    given: Vec<Option<Vec<u8>>>,
    round: u64,
    last: Shares,
    lost: Option<u32>,
}

impl SharedMemory {
    /// For `size` threads.
    pub fn new(size: u32) -> Self {
        let state = State { given: vec![None; size as usize], round: 0, last: Arc::default(), lost: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A rank that panicked while it held the lock left a state that is still a state.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Gather for SharedMemory {
    fn share(&self, rank: u32, bytes: Vec<u8>, limit: Duration) -> Result<Shares, Failure> {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        let round = state.round;
        state.given[rank as usize] = Some(bytes);
        if state.given.iter().all(Option::is_some) {
            // Nobody can finish the next round before every rank took this one.
            state.last = Arc::new(state.given.iter_mut().map(|g| g.take().unwrap_or_default()).collect());
            state.round += 1;
            self.changed.notify_all();
        }
        loop {
            if state.round != round {
                return Ok(state.last.clone());
            }
            if let Some(lost) = state.lost {
                return Err(Failure::lost(lost));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let absent: Vec<usize> = (0..state.given.len()).filter(|&r| state.given[r].is_none()).collect();
                return Err(Failure::wrong(format!("gather: ranks {absent:?} did not come within {limit:?}")));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    fn give_up(&self, rank: u32) {
        self.lock().lost.get_or_insert(rank);
        self.changed.notify_all();
    }
}

/// [`Gather`] of processes: a group of its own on the host side.
#[derive(Debug)]
pub struct OnBoard(Member);

impl OnBoard {
    /// Collective: joins the board at `place` as `rank` of `size`.
    ///
    /// # Errors
    /// Those of [`Member::join`].
    pub fn join(place: &Place, rank: u32, size: u32, limit: Duration) -> Result<Self, Failure> {
        Ok(Self(Member::join(place, rank, size, limit)?))
    }
}

impl Gather for OnBoard {
    fn share(&self, _rank: u32, bytes: Vec<u8>, _limit: Duration) -> Result<Shares, Failure> {
        match self.0.agree("gather", &Fields(bytes)) {
            Ok(all) => Ok(Arc::new(all)),
            Err(Error::PeerLost { rank, .. }) => Err(Failure::lost(rank)),
            Err(other) => Err(other.into()),
        }
    }

    fn give_up(&self, _rank: u32) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn many_rounds_arrive_in_rank_order() {
        let all = SharedMemory::new(4);
        thread::scope(|s| {
            for rank in 0..4u32 {
                let all = &all;
                s.spawn(move || {
                    for round in 0..200u32 {
                        let got = all.share(rank, vec![rank as u8, round as u8], Duration::from_secs(10));
                        let wanted: Vec<_> = (0..4).map(|r| vec![r, round as u8]).collect();
                        assert_eq!(*got.expect("all came"), wanted);
                    }
                });
            }
        });
    }

    #[test]
    fn absent_and_failed_ranks_are_named() {
        let all = SharedMemory::new(2);
        let late = all.share(0, vec![], Duration::from_millis(20)).expect_err("rank 1 is absent").to_string();
        assert!(late.contains("[1]"), "{late}");
        let all = SharedMemory::new(2);
        all.give_up(1);
        assert!(all.share(0, vec![], Duration::from_secs(10)).expect_err("rank 1 gave up").to_string().contains('1'));
    }
}
