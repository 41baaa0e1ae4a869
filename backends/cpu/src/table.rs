//! The table of active ranges of an allocation, and in checked mode its last accesses.
//!
//! Buffers are not Rust memory: nothing but the ordering contract keeps two queued operations apart. So an operation
//! states what it touches, and when it starts, every range is compared with what is active and, in checked mode, with
//! what was touched before:
//!
//! ```text
//! begin(op, range):
//!   for a in active, of another operation:   overlap and one writes           -> Race(a, op)
//!   for e in last, checked mode:             overlap and one writes and not e before op  -> Race(e, op)
//!     drop e where op covers it, is after it, and conflicts with whatever conflicts with e
//!   active += range;  last += range
//! end(op):  active -= ranges of op
//! ```
//!
//! Overlap is exact for strided views. A dropped entry is never missed: what comes without order after it has no order
//! after its successor either.

use std::fmt::{Display, Formatter};
use std::sync::Mutex;

use longspan_hal::{Error, Result, Strided, View, ViewMut};

use crate::CpuDevice;
use crate::clock::{Clock, some_host_saw};
use crate::memory::Buffer;
use crate::sync::lock;

/// The most accesses that checked mode remembers of one allocation; beyond, the oldest are forgotten.
const REMEMBERED: usize = 1024;

/// Elements of a buffer that an operation reads or writes.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    /// The memory; kept alive until the operation ran.
    pub buffer: Buffer,
    /// Which elements of it.
    pub at: Strided,
    /// Whether they are written (and perhaps read), or read only.
    pub write: bool,
}

impl Access {
    /// The elements of `view`, read.
    pub(crate) fn read(view: View<'_, CpuDevice>) -> Self {
        Self { buffer: view.buffer().clone(), at: *view.at(), write: false }
    }

    /// The elements of `view`, written.
    pub(crate) fn write(view: ViewMut<'_, CpuDevice>) -> Self {
        Self { buffer: view.buffer().clone(), at: *view.at(), write: true }
    }
}

/// Names an operation in messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Who {
    /// Its name, such as `copy`.
    pub op: &'static str,
    /// Its rank, once its device joined a group.
    pub rank: Option<u32>,
    /// Number of its stream among those of its device, from 0.
    pub stream: u32,
}

impl Display for Who {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "`{}` on rank {rank}, stream {}", self.op, self.stream),
            None => write!(f, "`{}` on stream {}", self.op, self.stream),
        }
    }
}

/// An operation that starts.
#[derive(Debug)]
pub(crate) struct Starting<'a> {
    /// Distinct for every operation of the process.
    pub id: u64,
    /// For messages.
    pub who: Who,
    /// Distinct for every stream of the process.
    pub stream: u64,
    /// The device handle of the stream.
    pub device: u64,
    /// Checked mode: the clock of the stream, this operation counted.
    pub clock: Option<&'a Clock>,
}

/// What one allocation knows of its accesses.
#[derive(Debug, Default)]
pub(crate) struct Table(Mutex<Ranges>);

#[derive(Debug, Default)]
struct Ranges {
    active: Vec<Active>,
    last: Vec<Last>,
}

#[derive(Debug)]
struct Active {
    id: u64,
    stream: u64,
    touch: Touch,
}

#[derive(Debug)]
struct Last {
    device: u64,
    stream: u64,
    time: u64,
    touch: Touch,
}

/// A range with its address: adopted memory of several handles shares one table.
#[derive(Clone, Copy, Debug)]
struct Touch {
    who: Who,
    block: u64,
    base: usize,
    at: Strided,
    write: bool,
}

impl Table {
    /// Registers `access` of `op`.
    ///
    /// # Errors
    /// [`Error::Race`] naming both operations.
    pub(crate) fn begin(&self, op: &Starting<'_>, access: &Access) -> Result<()> {
        if access.at.is_empty() {
            return Ok(());
        }
        let touch = Touch {
            who: op.who,
            block: access.buffer.id(),
            base: access.buffer.ptr() as usize,
            at: access.at,
            write: access.write,
        };
        let mut ranges = lock(&self.0);
        if let Some(a) = ranges.active.iter().find(|a| a.stream != op.stream && a.touch.conflicts(&touch)) {
            return Err(race(&a.touch, &touch));
        }
        if let Some(clock) = op.clock {
            ranges.remember(op, clock, touch)?;
        }
        ranges.active.push(Active { id: op.id, stream: op.stream, touch });
        Ok(())
    }

    /// Forgets the active ranges of operation `id`.
    pub(crate) fn end(&self, id: u64) {
        lock(&self.0).active.retain(|a| a.id != id);
    }

    /// How many accesses are remembered.
    #[cfg(test)]
    pub(crate) fn remembered(&self) -> usize {
        lock(&self.0).last.len()
    }

    /// Forgets everything about the handle `block`, which is dropped.
    pub(crate) fn forget(&self, block: u64) {
        lock(&self.0).last.retain(|l| l.touch.block != block);
    }
}

impl Ranges {
    /// Compares `touch` with the remembered accesses and remembers it.
    fn remember(&mut self, op: &Starting<'_>, clock: &Clock, touch: Touch) -> Result<()> {
        // Between device handles, the host orders in ways that no clock sees: enough that someone synchronised.
        let seen = |l: &Last| l.device != op.device && some_host_saw(l.stream, l.time);
        let before = |l: &Last| clock.time(l.stream) >= l.time || seen(l);
        if let Some(l) = self.last.iter().find(|l| !before(l) && l.touch.conflicts(&touch)) {
            return Err(race(&l.touch, &touch));
        }
        self.last.retain(|l| !(before(l) && touch.replaces(&l.touch)));
        if self.last.len() >= REMEMBERED {
            self.last.remove(0);
        }
        self.last.push(Last { device: op.device, stream: op.stream, time: clock.time(op.stream), touch });
        Ok(())
    }
}

impl Touch {
    fn conflicts(&self, other: &Self) -> bool {
        (self.write || other.write) && self.overlaps(other)
    }

    fn overlaps(&self, other: &Self) -> bool {
        if self.base == other.base {
            return self.at.overlaps(&other.at);
        }
        let (low, high) = if self.base < other.base { (self, other) } else { (other, self) };
        let apart = high.base - low.base;
        if low.at.byte_range().end <= apart {
            return false;
        }
        // Bases are aligned to 16 bytes, so the distance is a whole number of elements.
        high.at.shifted(apart / high.at.dtype().size()).is_ok_and(|at| low.at.overlaps(&at))
    }

    /// Whether every access that conflicts with `earlier` conflicts with `self`.
    fn replaces(&self, earlier: &Self) -> bool {
        (self.write || !earlier.write) && self.covers(earlier)
    }

    /// Whether `self` surely touches every element of `other`.
    fn covers(&self, other: &Self) -> bool {
        if self.base != other.base {
            return false;
        }
        let (own, its) = (self.at.byte_range(), other.at.byte_range());
        self.at == other.at || (self.at.is_dense() && own.start <= its.start && its.end <= own.end)
    }
}

fn race(first: &Touch, second: &Touch) -> Error {
    let verb = |t: &Touch| if t.write { "writes" } else { "reads" };
    let tell = |t: &Touch| format!("{} ({} bytes {:?})", t.who, verb(t), t.at.byte_range());
    Error::Race { first: tell(first), second: tell(second) }
}
