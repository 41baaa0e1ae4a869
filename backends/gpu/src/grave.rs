//! What is given up by its owner while queued work still uses it.
//!
//! ```text
//! bury(what, streams that used it):  note the point after the last use on each stream
//! reap():                            free everything whose points have all happened, and that no other process has open
//! ```
//!
//! Nothing waits: reaping happens along with allocations, synchronisations and burials.

use std::any::Any;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use longspan_hal::Result;

use crate::abroad::{Export, Import};
use crate::context::Context;
use crate::driver::Address;
use crate::event::Event;
use crate::staging::Block;
use crate::sync::{Deadline, lock};

/// What can be buried.
pub(crate) enum Remains {
    /// A window that other processes may have open.
    Export(Address, Export),
    /// A window of another process.
    Import(Address, Import),
    /// Whatever keeps adopted memory alive.
    Owner { _owner: Arc<dyn Any + Send + Sync> },
    /// Pinned host memory.
    Pinned(Block),
    /// Plain memory.
    Plain(Address),
    /// Memory of the pool.
    Pool(Address),
}

/// How long other processes are waited for that have a window open.
const OTHERS: Duration = Duration::from_secs(1);

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
        if after.is_empty() && !remains.is_open() {
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
                let done = all[i].0.is_empty() && !all[i].1.is_open();
                if done { free.push(all.swap_remove(i).1) } else { i += 1 }
            }
        }
        // Outside of the lock: an owner's end may bury more.
        free.into_iter().for_each(|remains| remains.free(context));
    }

    /// Waits until everything is free; for other processes, not for long.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Timeout`].
    pub(crate) fn wait(&self, context: &'static Context, deadline: Deadline) -> Result<()> {
        let others = Deadline::after(OTHERS);
        deadline.poll("freeing memory", || {
            self.reap(context);
            Ok(lock(&self.0).iter().all(|(after, _)| after.is_empty() && others.passed()))
        })
    }
}

impl Remains {
    /// Whether another process uses it.
    fn is_open(&self) -> bool {
        matches!(self, Self::Export(_, export) if export.is_open())
    }

    fn free(self, context: &'static Context) {
        match self {
            Self::Export(address, _) | Self::Plain(address) => context.plain_free(address),
            Self::Import(address, import) => import.close(context, address),
            Self::Owner { .. } => {}
            Self::Pinned(block) => context.pinned.put_back(context, block),
            Self::Pool(address) => context.pool_free(address),
        }
    }
}
