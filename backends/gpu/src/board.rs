//! The progress board of a group: where each rank was last seen. It names the step of a rank that is lost.

use std::sync::Mutex;

use longspan_hal::Step;

use crate::sync::lock;

/// One step per rank; stays readable after a rank is gone.
#[derive(Debug)]
pub(crate) struct Board(Vec<Mutex<Step>>);

impl Board {
    /// A board for `size` ranks that reported nothing yet.
    pub(crate) fn new(size: u32) -> Self {
        Self((0..size).map(|_| Mutex::default()).collect())
    }

    /// Notes that `rank` is at `step`.
    pub(crate) fn report(&self, rank: u32, step: Step) {
        if let Some(slot) = self.0.get(rank as usize) {
            *lock(slot) = step;
        }
    }

    /// Where `rank` was last seen.
    pub(crate) fn step(&self, rank: u32) -> Step {
        self.0.get(rank as usize).map_or_else(Step::default, |slot| *lock(slot))
    }
}
