//! What is given up by its owner while queued work still uses it.
//!
//! ```text
//! bury(what, streams that used it):  note the point after the last use on each stream
//! reap():                            free everything whose points have all happened
//! ```
//!
//! Nothing waits: reaping happens along with allocations, synchronisations and burials.

use std::any::Any;
use std::sync::{Arc, Mutex};

use longspan_hal::Result;

use crate::context::Context;
use crate::driver::Address;
use crate::event::Event;
use crate::staging::Block;
use crate::sync::{Deadline, lock};

/// What can be buried.
pub(crate) enum Remains {
    /// Whatever keeps adopted memory alive.
    Owner { _owner: Arc<dyn Any + Send + Sync> },
    /// Pinned host memory.
    Pinned(Block),
    /// Plain memory.
    Plain(Address),
    /// Memory of the pool.
    Pool(Address),
}

/// Everything that waits to be freed.
#[derive(Default)]
pub(crate) struct Grave(Mutex<Vec<(Vec<Event>, Remains)>>);

impl std::fmt::Debug for Grave {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Grave({})", lock(&self.0).len())
    }
}

impl Grave {
    /// Frees `remains` once `after` have happened. The context is bound.
    pub(crate) fn bury(&self, context: &'static Context, after: Vec<Event>, remains: Remains) {
        if after.is_empty() {
            return remains.free(context);
        }
        lock(&self.0).push((after, remains));
    }

    /// Frees what can be freed. The context is bound.
    pub(crate) fn reap(&self, context: &'static Context) {
        let mut free = Vec::new();
        {
            let mut all = lock(&self.0);
            let mut i = 0;
            while i < all.len() {
                // Where the device failed for good, nothing uses anything any more.
                all[i].0.retain(|event| matches!(event.happened(), Ok(false)));
                if all[i].0.is_empty() { free.push(all.swap_remove(i).1) } else { i += 1 }
            }
        }
        // Outside of the lock: an owner's end may bury more.
        free.into_iter().for_each(|remains| remains.free(context));
    }

    /// Waits until everything is free.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Timeout`].
    pub(crate) fn wait(&self, context: &'static Context, deadline: Deadline) -> Result<()> {
        deadline.poll("freeing memory", || {
            self.reap(context);
            Ok(lock(&self.0).is_empty())
        })
    }
}

impl Remains {
    fn free(self, context: &'static Context) {
        match self {
            Self::Owner { .. } => {}
            Self::Pinned(block) => context.pinned.put_back(context, block),
            Self::Plain(address) => context.plain_free(address),
            Self::Pool(address) => context.pool_free(address),
        }
    }
}
