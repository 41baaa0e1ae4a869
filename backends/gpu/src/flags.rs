//! How ranks that are processes of one host meet in a round: words that hosts read, and flags that streams write and wait for,
//! in memory that all of them map.
//!
//! ```text
//! tell(to):     the stream sets the flag of (topic, me, to); the host then counts the letter and says its round
//! await(from):  the host waits for the letter; then the stream waits for the flag and clears it
//! release:      the host sets all flags that this rank may wait for, again and again until its streams are through
//! ```
//!
//! A stream waits for a flag only after the other process queued what sets it. So every wait depends on work that was queued
//! before it, and the first of all unfinished pieces of work can always run: nothing deadlocks, also where streams share a
//! hardware queue or processes a device. Only a process that dies, or gives up, leaves waits behind; those the host ends.
//!
//! Flags return to 0, so that they serve any number of rounds. A pair has two, used in turn: in a barrier a rank may set its
//! next flag before the other has cleared the last one, but not the one after that.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use longspan_hal::{Error, Priority, Result};

use crate::context::Context;
use crate::driver::{Address, Between};
use crate::group::Group;
use crate::peer::{Tag, Topic};
use crate::region::{Region, lives};
use crate::stream::GpuStream;
use crate::sync::{Deadline, lock};

/// The most ranks of a group: they are bits of a word.
pub(crate) const MOST: u32 = 64;
/// Windows of a rank that others may have open.
const WINDOWS: usize = 256;
/// Letters of a pair that are under way: a rank is never more than two ahead.
const RING: u64 = 4;
/// Bytes of a pair's words: posted, taken, and the rounds of letters.
const PAIR: usize = 128;
/// Bytes of a flag: a cache line.
const FLAG: usize = 64;

/// The shared memory of a group, as one rank sees it.
#[derive(Debug)]
pub(crate) struct Flags {
    context: &'static Context,
    rank: u32,
    places: Places,
    region: Region,
    /// Where the device sees the region.
    device: Address,
    /// Which of this rank's windows are in use.
    windows: Mutex<[bool; WINDOWS]>,
    /// How often this rank has a window of another open.
    opened: Mutex<HashMap<(u32, usize), u32>>,
}

/// What lies where, for so many ranks, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places(pub u32);

impl Places {
    /// Of everything.
    pub(crate) fn bytes(self) -> usize {
        self.process(self.0).next_multiple_of(4096)
    }

    fn number(self, topic: Topic, [from, to]: [u32; 2]) -> usize {
        let n = self.0 as usize;
        (topic as usize * n + from as usize) * n + to as usize
    }

    fn flags(self) -> usize {
        2 * (self.0 as usize).pow(2) * PAIR
    }

    /// Words of a pair.
    fn pair(self, topic: Topic, pair: [u32; 2]) -> usize {
        self.number(topic, pair) * PAIR
    }

    /// A flag of a pair.
    fn flag(self, topic: Topic, pair: [u32; 2], turn: u64) -> usize {
        self.flags() + (2 * self.number(topic, pair) + (turn % 2) as usize) * FLAG
    }

    /// Who has a window open.
    fn open(self, owner: u32, window: usize) -> usize {
        self.flags() + 4 * (self.0 as usize).pow(2) * FLAG + (owner as usize * WINDOWS + window) * 8
    }

    /// The process of a rank.
    fn process(self, rank: u32) -> usize {
        self.open(self.0, rank as usize)
    }
}

impl Flags {
    /// Lets the device see `region`, and checks that its streams can wait for flags there. The context is bound.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the driver can't do that; [`Error::Driver`].
    pub(crate) fn new(context: &'static Context, rank: u32, size: u32, region: Region) -> Result<Self> {
        let between = context.driver.between()?;
        // SAFETY: the region is mapped as long as the flags live, which unregister it.
        let (registered, device) = unsafe { between.register(region.base() as *mut c_void, region.bytes()) };
        let (windows, opened) = (Mutex::new([false; WINDOWS]), Mutex::default());
        let flags = Self { context, rank, places: Places(size), region, device, windows, opened };
        context.check(registered)?;
        flags.region.word(flags.places.process(rank)).store(u64::from(std::process::id()), Ordering::Release);
        match flags.try_out(between) {
            Ok(()) => Ok(flags),
            Err(error) => {
                // A stream may still wait in this memory, so it stays.
                std::mem::forget(flags);
                Err(error)
            }
        }
    }

    /// Opens the region that another process named.
    ///
    /// # Errors
    /// As [`Flags::new`].
    pub(crate) fn open(context: &'static Context, rank: u32, size: u32, path: &Path) -> Result<Self> {
        let region = Region::open(path, Places(size).bytes()).map_err(|e| no_memory(&e))?;
        Self::new(context, rank, size, region)
    }

    /// A stream sets a flag, waits for it and clears it; another wait is ended by the host.
    fn try_out(&self, between: &Between) -> Result<()> {
        let (context, stream) = (self.context, GpuStream::new(self.context, Priority::Normal)?);
        let [set, held] = [0, 1].map(|turn| self.places.flag(Topic::Free, [self.rank, self.rank], turn));
        let address = |at: usize| self.device + at as Address;
        // SAFETY: the stream and the region live until the end of this function, which waits for the work.
        unsafe {
            context.check(between.write(stream.raw(), address(set), 1))?;
            context.check(between.wait(stream.raw(), address(set), 1))?;
            context.check(between.write(stream.raw(), address(set), 0))?;
            context.check(between.wait(stream.raw(), address(held), 1))?;
        }
        self.region.half(held).store(1, Ordering::Release);
        stream.synchronize("a stream's wait for a flag in shared memory", Duration::from_secs(5))?;
        self.region.half(held).store(0, Ordering::Release);
        let left = self.region.half(set).load(Ordering::Acquire);
        if left == 0 {
            return Ok(());
        }
        Err(Error::Unavailable {
            library: context.machine.facts().driver.what.to_owned(),
            why: format!("what a stream wrote to shared memory did not arrive there (a flag is {left})"),
            how_to_get_it: "use the exchange nccl".to_owned(),
        })
    }

    /// The device's address of a flag.
    fn flag(&self, topic: Topic, pair: [u32; 2], turn: u64) -> Address {
        self.device + self.places.flag(topic, pair, turn) as Address
    }

    /// Tells `to` that what this rank queued on `on` so far is its part of `round`. The context is bound.
    ///
    /// # Errors
    /// [`Error::Driver`]; [`Error::PeerLost`] if the peer does not take its letters.
    pub(crate) fn tell(&self, on: &GpuStream, group: &Group, topic: Topic, to: u32, round: &Numbered) -> Result<()> {
        let (pair, context) = ([self.rank, to], self.context);
        let at = self.places.pair(topic, pair);
        let (posted, taken) = (self.region.word(at), self.region.word(at + 8));
        let turn = posted.load(Ordering::Acquire);
        self.wait_for(group, to, round, || turn - taken.load(Ordering::Acquire) < RING)?;
        let flag = self.flag(topic, pair, turn);
        // SAFETY: the watch keeps the flags until the stream is through.
        context.check(unsafe { context.driver.between()?.write(on.raw(), flag, 1) })?;
        for (i, number) in round.tag.numbers().into_iter().enumerate() {
            self.region.word(at + 16 + (turn % RING) as usize * 24 + i * 8).store(number, Ordering::Relaxed);
        }
        posted.store(turn + 1, Ordering::Release);
        Ok(())
    }

    /// Waits until `from` queued its part of `round`; `on` waits until it ran. The context is bound.
    ///
    /// # Errors
    /// [`Error::PeerLost`]; [`Error::Invalid`] if it runs another round; [`Error::Driver`].
    pub(crate) fn hear(&self, on: &GpuStream, group: &Group, topic: Topic, from: u32, round: &Numbered) -> Result<()> {
        let (pair, context) = ([from, self.rank], self.context);
        let at = self.places.pair(topic, pair);
        let (posted, taken) = (self.region.word(at), self.region.word(at + 8));
        let turn = taken.load(Ordering::Acquire);
        self.wait_for(group, from, round, || posted.load(Ordering::Acquire) > turn)?;
        let number = |i: usize| self.region.word(at + 16 + (turn % RING) as usize * 24 + i * 8).load(Ordering::Relaxed);
        let theirs = Tag::of_numbers([number(0), number(1), number(2)]);
        taken.store(turn + 1, Ordering::Release);
        round.tag.check(group, from, theirs)?;
        let (between, flag) = (context.driver.between()?, self.flag(topic, pair, turn));
        // SAFETY: as in `tell`.
        context.check(unsafe { between.wait(on.raw(), flag, 1) })?;
        // SAFETY: as in `tell`.
        context.check(unsafe { between.write(on.raw(), flag, 0) })
    }

    fn wait_for(&self, group: &Group, peer: u32, round: &Numbered, there: impl Fn() -> bool) -> Result<()> {
        let call = round.tag.call;
        let done = || {
            group.alive(call)?;
            Ok(there())
        };
        match round.deadline.poll(call, done) {
            Err(Error::Timeout { .. }) => Err(group.stuck(round.number, peer, true, call)),
            result => result,
        }
    }

    /// Ends waits of this rank's streams; those that they get to later need it again.
    pub(crate) fn release(&self) {
        for topic in [Topic::Arrived, Topic::Free] {
            for from in (0..self.places.0).filter(|from| *from != self.rank) {
                for turn in [0, 1] {
                    self.region.half(self.places.flag(topic, [from, self.rank], turn)).store(1, Ordering::Release);
                }
            }
        }
    }

    /// A number for a window of this rank.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are too many.
    pub(crate) fn take_window(&self) -> Result<usize> {
        let mut windows = lock(&self.windows);
        let free = windows.iter().position(|used| !used);
        let free = free.ok_or_else(|| Error::invalid("window", format!("a rank has {WINDOWS} windows at most")))?;
        windows[free] = true;
        Ok(free)
    }

    /// Gives the number back.
    pub(crate) fn give_window(&self, window: usize) {
        lock(&self.windows)[window] = false;
    }

    /// Notes that this rank opened a window of `owner` once more.
    pub(crate) fn opened(&self, owner: u32, window: usize) {
        *lock(&self.opened).entry((owner, window)).or_default() += 1;
        self.region.word(self.places.open(owner, window)).fetch_or(1 << self.rank, Ordering::AcqRel);
    }

    /// Notes that it closed the window once.
    pub(crate) fn closed(&self, owner: u32, window: usize) {
        let mut opened = lock(&self.opened);
        let count = opened.entry((owner, window)).or_default();
        *count = count.saturating_sub(1);
        if *count == 0 {
            opened.remove(&(owner, window));
            self.region.word(self.places.open(owner, window)).fetch_and(!(1 << self.rank), Ordering::AcqRel);
        }
    }

    /// Whether a process that lives has a window of this rank open.
    pub(crate) fn is_open(&self, window: usize) -> bool {
        let ranks = self.region.word(self.places.open(self.rank, window)).load(Ordering::Acquire);
        let pid = |rank: u32| self.region.word(self.places.process(rank)).load(Ordering::Acquire) as u32;
        (0..self.places.0).any(|rank| ranks & (1 << rank) != 0 && lives(pid(rank)))
    }
}

impl Drop for Flags {
    fn drop(&mut self) {
        let Ok(_bound) = self.context.bind() else { return };
        if let Ok(between) = self.context.driver.between() {
            // SAFETY: it was registered by `new` (or that failed, which the driver says); the watch waited for queued work.
            let _ = unsafe { between.unregister(self.region.base() as *mut c_void) };
        }
    }
}

/// A round, with its number among all of this rank's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbered {
    /// Which round.
    pub tag: Tag,
    /// From 1; the board knows who is behind.
    pub number: u64,
    /// Ends every wait.
    pub deadline: Deadline,
}

/// Shared memory can't be had.
pub(crate) fn no_memory(error: &std::io::Error) -> Error {
    Error::Unavailable {
        library: "memory that processes share".to_owned(),
        why: format!("/dev/shm: {error}"),
        how_to_get_it: "run the processes in one container, with /dev/shm; or use the exchange nccl".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No two things lie in the same place, for any number of ranks.
    #[test]
    fn places_do_not_overlap() {
        assert!(16 + RING as usize * 24 <= PAIR);
        for size in [1, 2, 3, 8, MOST] {
            let (places, mut taken) = (Places(size), Vec::new());
            for topic in [Topic::Arrived, Topic::Free] {
                for pair in (0..size * size).map(|i| [i / size, i % size]) {
                    taken.push((places.pair(topic, pair), PAIR));
                    taken.extend([0, 1].map(|turn| (places.flag(topic, pair, turn), FLAG)));
                }
            }
            for rank in 0..size {
                taken.push((places.process(rank), 8));
                taken.extend((0..WINDOWS).map(|window| (places.open(rank, window), 8)));
            }
            taken.sort_unstable();
            assert!(taken.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0), "{size} ranks");
            assert!(taken.last().is_some_and(|(at, bytes)| at + bytes <= places.bytes()));
        }
    }
}
