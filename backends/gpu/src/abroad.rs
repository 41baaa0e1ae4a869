//! Windows between processes of one host: how a rank hands out its own, and opens those of others.
//!
//! ```text
//! window():            the owner asks the driver for a handle
//! prepare:             handles travel with the messages; a sender opens each window once, as long as an exchange needs it
//! the window is freed: once nobody who lives has it open, since memory that is open elsewhere must not be freed
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use longspan_hal::{DType, Error, Result, Strided};
use longspan_peers::{Fields, Member, Reader};

use crate::context::Context;
use crate::driver::{Address, MEMORY_HANDLE, MemoryHandle};
use crate::exchange::{Draft, Part};
use crate::flags::Flags;
use crate::memory::{Block, Buffer};
use crate::region::random;
use crate::sync::lock;

/// Windows are whole pages of the device: the driver shares no less, and small allocations lie in a common one.
pub(crate) const PAGE: usize = 2 << 20;

/// A window that other processes may open.
#[derive(Debug)]
pub(crate) struct Export {
    flags: Arc<Flags>,
    window: usize,
    handle: MemoryHandle,
    /// Tells windows apart that had the same number.
    serial: u64,
}

/// A window of another process.
#[derive(Debug)]
pub(crate) struct Import {
    flags: Arc<Flags>,
    owner: u32,
    window: usize,
}

/// What a rank says of a window.
struct Card {
    window: usize,
    serial: u64,
    bytes: usize,
    handle: MemoryHandle,
}

/// Windows of others that are open: by their rank and serial.
type Opened = HashMap<(u32, u64), Weak<Block>>;

/// The windows of other processes, as one rank uses them.
#[derive(Debug)]
pub(crate) struct Abroad {
    context: &'static Context,
    flags: Arc<Flags>,
    opened: Mutex<Opened>,
}

impl Export {
    /// The handle of plain memory at `address`. The context is bound.
    ///
    /// # Errors
    /// [`Error::Driver`]; [`Error::Invalid`] for too many windows.
    pub(crate) fn new(context: &'static Context, flags: &Arc<Flags>, address: Address) -> Result<Self> {
        let (exported, handle) = context.driver.between()?.export(address);
        context.check(exported)?;
        Ok(Self { flags: Arc::clone(flags), window: flags.take_window()?, handle, serial: random() })
    }

    /// Whether another process has it open.
    pub(crate) fn is_open(&self) -> bool {
        self.flags.is_open(self.window)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.flags.give_window(self.window);
    }
}

impl Import {
    /// Closes the window. The context is bound, and no queued work uses it.
    pub(crate) fn close(self, context: &'static Context, address: Address) {
        if let Ok(between) = context.driver.between() {
            // SAFETY: it was opened by `Abroad::open`, and is closed once, behind all work (see `grave.rs`).
            let _ = unsafe { between.close(address) };
        }
        self.flags.closed(self.owner, self.window);
    }
}

impl Abroad {
    /// Windows of ranks that meet by `flags`.
    pub(crate) fn new(context: &'static Context, flags: Arc<Flags>) -> Self {
        Self { context, flags, opened: Mutex::default() }
    }

    /// The memory that all share.
    pub(crate) fn flags(&self) -> &Arc<Flags> {
        &self.flags
    }

    /// What other processes open a window of this one by; nothing for an empty one.
    fn card(buffer: &Buffer) -> Vec<u8> {
        let card = buffer.with_export(|Export { window, handle, serial, .. }| {
            let card = Fields::default().number(*window as u64).number(*serial);
            card.number(buffer.bytes() as u64).bytes(&handle.0).0
        });
        card.unwrap_or_default()
    }

    /// Collective: opens a window of every other rank and closes it. Containers and virtual machines may not allow that. The
    /// context is bound. The inner error is this rank's own.
    ///
    /// # Errors
    /// [`Error::PeerLost`].
    pub(crate) fn try_out(context: &'static Context, member: &Member, flags: &Arc<Flags>) -> Result<Result<()>> {
        let at = Strided::dense(DType::F32, [1, 1, 1, 16]);
        let mine = Buffer::window(context, at.bytes(), 0, &Arc::default(), Some(flags));
        let card = mine.as_ref().map(Self::card).unwrap_or_default();
        let cards = member.agree("a window", &Fields(card))?;
        let abroad = Self::new(context, Arc::clone(flags));
        let one = |(rank, card): (u32, &Vec<u8>)| {
            let unreadable = |e: std::io::Error| Error::invalid("window", format!("of rank {rank}: {e}"));
            abroad.buffer(rank, read_card(card).map_err(unreadable)?, &at).map(drop)
        };
        let mut others = (0u32..).zip(&cards).filter(|(rank, _)| *rank != member.rank);
        let opened = others.try_for_each(one);
        // Kept until everybody has closed it.
        member.agree("windows opened", &Fields::default())?;
        Ok(mine.and(opened))
    }

    /// Where the messages of `draft` arrive, for the processes that send them.
    pub(crate) fn describe(draft: &Draft) -> Fields {
        let mut fields = Fields::default();
        for (&from, part) in draft.from.iter().zip(&draft.recvs) {
            let (card, offset) = (Self::card(&part.buffer), part.at.offset());
            fields = fields.number(u64::from(from)).bytes(&card).number(offset as u64);
            fields = part.at.strides().iter().fold(fields, |f, &s| f.number(s as u64));
        }
        fields
    }

    /// Opens the windows that the sends of `draft` go to, from what each rank described. The context is bound. By rank, in
    /// list order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if something can't be read or does not lie in its window; [`Error::Driver`].
    pub(crate) fn open(&self, me: u32, draft: &Draft, described: &[&[u8]]) -> Result<Vec<Vec<Part>>> {
        let parts = |(rank, bytes): (u32, &&[u8])| {
            if rank == me {
                return Ok(Vec::new());
            }
            let sends = draft.sends_to(rank).map(|i| draft.sends[i]);
            let unreadable = |e: std::io::Error| Error::invalid("exchange", format!("what rank {rank} says: {e}"));
            let places = places(bytes, me).map_err(unreadable)?;
            let one = |((dtype, extent), (card, offset, strides)): (_, Spot)| {
                let at = Strided::new(dtype, offset, extent, strides)?;
                Ok(Part { buffer: self.buffer(rank, card, &at)?, at })
            };
            sends.zip(places).map(one).collect()
        };
        (0u32..).zip(described).map(parts).collect()
    }

    /// The window of `rank`, opened now or before.
    fn buffer(&self, rank: u32, card: Option<Card>, at: &Strided) -> Result<Buffer> {
        let outside = || Error::invalid("exchange", format!("a message to rank {rank} does not end in its window"));
        let Some(card) = card.filter(|_| !at.is_empty()) else {
            return if at.is_empty() { Ok(Buffer::nothing(self.context)) } else { Err(outside()) };
        };
        if at.byte_range().end > card.bytes {
            return Err(outside());
        }
        let mut opened = lock(&self.opened);
        opened.retain(|_, block| block.strong_count() > 0);
        if let Some(block) = opened.get(&(rank, card.serial)).and_then(Weak::upgrade) {
            return Ok(Buffer::again(block));
        }
        let (result, address) = self.context.driver.between()?.import(card.handle);
        self.context.check(result)?;
        self.flags.opened(rank, card.window);
        let import = Import { flags: Arc::clone(&self.flags), owner: rank, window: card.window };
        let buffer = Buffer::import(self.context, address, card.bytes, import);
        opened.insert((rank, card.serial), buffer.weak());
        Ok(buffer)
    }
}

/// A window's card, and offset and strides of the message in it.
type Spot = (Option<Card>, usize, [usize; 4]);

/// Where messages of `from` arrive, in list order, from what a rank described.
fn places(bytes: &[u8], from: u32) -> std::io::Result<Vec<Spot>> {
    let (mut fields, mut all) = (Reader(bytes), Vec::new());
    while !fields.0.is_empty() {
        let (sender, card) = (fields.number()?, fields.bytes()?);
        let offset = fields.number()? as usize;
        let mut strides = [0; 4];
        for stride in &mut strides {
            *stride = fields.number()? as usize;
        }
        if sender == u64::from(from) {
            all.push((read_card(card)?, offset, strides));
        }
    }
    Ok(all)
}

/// No card: the window is empty.
fn read_card(bytes: &[u8]) -> std::io::Result<Option<Card>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let mut fields = Reader(bytes);
    let (window, serial, bytes) = (fields.number()? as usize, fields.number()?, fields.number()? as usize);
    let handle: [u8; MEMORY_HANDLE] =
        fields.bytes()?.try_into().map_err(|_| std::io::Error::other("a handle of another size"))?;
    Ok(Some(Card { window, serial, bytes, handle: MemoryHandle(handle) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_one_sender_are_read_in_order() {
        let card = Fields::default().number(3).number(99).number(4096).bytes(&[7; MEMORY_HANDLE]).0;
        let spot = |f: Fields, from: u64, card: &[u8], offset: u64| {
            (1..5).fold(f.number(from).bytes(card).number(offset), Fields::number)
        };
        let all = spot(spot(spot(Fields::default(), 1, &card, 10), 2, &card, 20), 1, &[], 30).0;
        let read = places(&all, 1).expect("well formed");
        assert_eq!(read.iter().map(|spot| (spot.1, spot.2)).collect::<Vec<_>>(), [10, 30].map(|o| (o, [1, 2, 3, 4])));
        let first = read[0].0.as_ref().expect("a card");
        assert_eq!((first.window, first.serial, first.bytes, first.handle.0[5]), (3, 99, 4096, 7));
        assert!(read[1].0.is_none());
        assert!(places(&all[..all.len() - 1], 1).is_err(), "cut short");
        let short = spot(Fields::default(), 1, &Fields::default().number(1).number(2).number(3).bytes(&[1]).0, 0).0;
        assert!(places(&short, 1).is_err(), "a handle of another size");
    }
}
