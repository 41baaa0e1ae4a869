//! Who the ranks of a group are to each other, and so how their messages travel.
//!
//! ```text
//! threads of one process      -> peer copies if all devices reach each other, else NCCL
//! processes of one host       -> the same, if also every process sees every device, and can share memory with all others
//! processes of several hosts  -> NCCL
//! ```
//!
//! Every rank says who it is and what stands in the way, so all decide alike.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use longspan_hal::{Error, Result, Transport};
use longspan_peers::{Fields, Member, Reader};

use crate::abroad::Abroad;
use crate::context::Context;
use crate::flags::{Flags, MOST, Places, no_memory};
use crate::region::{Region, random};

/// What the caller, or else `LONGSPAN_EXCHANGE`, asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Wish {
    /// Peer where all devices reach each other, else NCCL.
    Auto,
    Nccl,
    Peer,
}

/// Who a rank is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Card {
    /// Its process: the same for threads of one, and nowhere else.
    process: [u64; 2],
    /// Its host, since that started.
    host: String,
    /// Where its device is plugged in; the device's number where the driver can't say.
    bus: String,
    /// The device's number in its process.
    pub ordinal: u32,
    wish: u64,
}

/// How the ranks of a group exchange messages.
#[derive(Debug)]
pub(crate) enum Way {
    /// NCCL, with or without letters.
    Nccl { threads: bool },
    /// Peer copies between threads, on these devices.
    Threads(Vec<u32>),
    /// Peer copies between processes, by shared memory.
    Processes(Arc<Flags>),
}

impl Wish {
    /// What `transport` says, or else the variable.
    pub(crate) fn new(transport: Option<Transport>) -> Result<Self> {
        match transport {
            Some(Transport::Library) => Ok(Self::Nccl),
            Some(Transport::Peer) => Ok(Self::Peer),
            Some(_) => Ok(Self::Auto),
            None => Self::parse(std::env::var("LONGSPAN_EXCHANGE").ok().as_deref()),
        }
    }

    fn parse(text: Option<&str>) -> Result<Self> {
        match text {
            None | Some("" | "auto") => Ok(Self::Auto),
            Some("nccl") => Ok(Self::Nccl),
            Some("peer") => Ok(Self::Peer),
            Some(other) => Err(Error::invalid("LONGSPAN_EXCHANGE", format!("{other:?} is not auto, nccl or peer"))),
        }
    }

    /// How messages travel: `Ok(true)` by peer copies, unless something is in their way.
    fn peer(self, backend: &'static str, cards: &[Card], in_the_way: Option<&str>) -> Result<bool> {
        match (self, in_the_way) {
            (Self::Auto | Self::Peer, None) => Ok(true),
            (Self::Peer, Some(why)) => Err(Error::invalid("exchange", format!("{why}; use auto or nccl"))),
            (Self::Auto | Self::Nccl, _) if distinct(cards) => Ok(false),
            (Self::Auto | Self::Nccl, why) => {
                let devices: Vec<&str> = cards.iter().map(|c| c.bus.as_str()).collect();
                let (ranks, peer) = (cards.len(), why.map_or(String::new(), |why| format!(", if not for this: {why}")));
                Err(Error::Unsupported {
                    backend,
                    what: format!("an exchange by NCCL with several of {ranks} ranks on one device ({devices:?})"),
                    instead: format!("a device for each rank is, and so are peer copies (the exchange peer){peer}"),
                })
            }
        }
    }
}

/// Whether every rank has a device of its own.
fn distinct(cards: &[Card]) -> bool {
    let mut devices: Vec<_> = cards.iter().map(|c| (&c.host, &c.bus)).collect();
    devices.sort_unstable();
    devices.windows(2).all(|two| two[0] != two[1])
}

impl Card {
    /// This process's rank on `context`'s device.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a wish that is none.
    pub(crate) fn own(context: &'static Context) -> Result<Self> {
        static PROCESS: OnceLock<[u64; 2]> = OnceLock::new();
        let wish = Wish::new(context.machine.transport())?;
        let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Ok(Self {
            process: *PROCESS.get_or_init(|| [random(), random()]),
            host: host.trim().to_owned(),
            bus: bus(context, context.ordinal).unwrap_or_else(|| format!("device {}", context.ordinal)),
            ordinal: context.ordinal,
            wish: wish as u64,
        })
    }

    /// As an offer.
    pub(crate) fn fields(&self) -> Fields {
        let fields = Fields::default().number(self.process[0]).number(self.process[1]).bytes(self.host.as_bytes());
        fields.bytes(self.bus.as_bytes()).number(u64::from(self.ordinal)).number(self.wish)
    }

    /// The card of an offer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it can't be read.
    pub(crate) fn read(offer: &[u8]) -> Result<Self> {
        let mut fields = Reader(offer);
        let mut read = || -> std::io::Result<Self> {
            let process = [fields.number()?, fields.number()?];
            let (host, bus) = (fields.text()?, fields.text()?);
            Ok(Self { process, host, bus, ordinal: fields.number()? as u32, wish: fields.number()? })
        };
        read().map_err(|e| Error::invalid("group", format!("a rank's card can't be read: {e}")))
    }
}

/// Where device `ordinal` is plugged in, where the driver can say.
fn bus(context: &'static Context, ordinal: u32) -> Option<String> {
    let between = context.driver.between().ok()?;
    let device = context.machine.device(context.driver, ordinal).ok()?;
    let (asked, text) = between.bus_id(device);
    (asked.value == 0 && !text.is_empty()).then_some(text)
}

/// Collective: how the messages of the ranks with these `cards` travel. The context is bound.
///
/// # Errors
/// [`Error::Invalid`] if ranks wish different things, or for peer copies with something in their way;
/// [`Error::Unsupported`] for NCCL with several ranks on a device; [`Error::PeerLost`], [`Error::Driver`].
pub(crate) fn way(context: &'static Context, member: &Member, cards: &[Card]) -> Result<Way> {
    let wish = Wish::new(context.machine.transport())?;
    if let Some(rank) = cards.iter().position(|card| card.wish != wish as u64) {
        let why =
            format!("rank {} asks for another one than rank {rank}; all ranks must ask for the same", member.rank);
        return Err(Error::invalid("exchange", why));
    }
    let (name, own) = (context.machine.facts().name, &cards[member.rank as usize]);
    if cards.iter().all(|card| card.process == own.process) {
        let devices: Vec<u32> = cards.iter().map(|card| card.ordinal).collect();
        let far = context.unreachable(&devices)?;
        let far = far.map(|(a, b)| format!("device {a} can't access memory of device {b}"));
        let peer = wish.peer(name, cards, far.as_deref())?;
        return Ok(if peer { Way::Threads(devices) } else { Way::Nccl { threads: true } });
    }
    let shared = match wish {
        Wish::Nccl => None,
        Wish::Auto | Wish::Peer => Some(share(context, member, cards)?),
    };
    let in_the_way = shared.as_ref().and_then(|found| found.as_ref().err().map(String::as_str));
    wish.peer(name, cards, in_the_way)?;
    Ok(match shared {
        Some(Ok(flags)) => Way::Processes(flags),
        _ => Way::Nccl { threads: false },
    })
}

/// Collective: memory that all ranks, processes of one host, share; or what is in the way, the same on all.
fn share(
    context: &'static Context,
    member: &Member,
    cards: &[Card],
) -> Result<std::result::Result<Arc<Flags>, String>> {
    let (rank, size) = (member.rank, member.size);
    let near = together(cards).map_or_else(|| hidden(context, cards, rank), |why| Ok(Some(why)));
    if let Some(why) = first(member, "peer access", near.unwrap_or_else(|e| Some(e.to_string())))? {
        return Ok(Err(why));
    }
    let made = if rank == 0 { Some(Region::create(Places(size).bytes())) } else { None };
    let name = match &made {
        Some(Ok((_, path))) => Fields::default().bytes(path.as_os_str().as_encoded_bytes()),
        Some(Err(error)) => Fields::default().bytes(b"").bytes(no_memory(error).to_string().as_bytes()),
        None => Fields::default(),
    };
    let said = member.agree("shared memory", &name);
    let path = made.as_ref().and_then(|made| made.as_ref().ok().map(|(_, path)| path.clone()));
    let flags = said.and_then(|said| match made {
        Some(made) => made.map_err(|e| no_memory(&e)).and_then(|(region, _)| Flags::new(context, rank, size, region)),
        None => open(context, rank, size, &said[0]),
    });
    let why = first(member, "mapped", flags.as_ref().err().map(ToString::to_string));
    if let Some(path) = path {
        let _ = std::fs::remove_file(path);
    }
    if let Some(why) = why? {
        return Ok(Err(why));
    }
    let flags = Arc::new(flags?);
    let opened = Abroad::try_out(context, member, &flags)?;
    let why = first(member, "windows", opened.err().map(|e| e.to_string()))?;
    Ok(why.map_or(Ok(flags), Err))
}

/// Opens the memory that rank 0 made.
fn open(context: &'static Context, rank: u32, size: u32, said: &[u8]) -> Result<Flags> {
    let mut fields = Reader(said);
    match fields.text() {
        Ok(path) if !path.is_empty() => Flags::open(context, rank, size, Path::new(&path)),
        _ => Err(Error::invalid("shared memory", fields.text().unwrap_or_default())),
    }
}

/// Collective: what the first rank says that something is in the way of.
fn first(member: &Member, what: &'static str, mine: Option<String>) -> Result<Option<String>> {
    let all = member.agree(what, &Fields(mine.unwrap_or_default().into_bytes()))?;
    let first = all.iter().enumerate().find(|(_, why)| !why.is_empty());
    Ok(first.map(|(rank, why)| format!("rank {rank}: {}", String::from_utf8_lossy(why))))
}

/// Why ranks of these cards can't share memory, as far as cards tell.
fn together(cards: &[Card]) -> Option<String> {
    if cards.iter().any(|card| card.host != cards[0].host || card.host.is_empty()) {
        return Some("the ranks are on several hosts".to_owned());
    }
    let twice = |(i, card): (usize, &Card)| cards[..i].iter().any(|other| other.process == card.process);
    if cards.iter().enumerate().any(twice) {
        return Some("some processes have several ranks, others not".to_owned());
    }
    (cards.len() > MOST as usize).then(|| format!("{} ranks are more than {MOST}", cards.len()))
}

/// A device that this process does not see, or that its own can't reach.
fn hidden(context: &'static Context, cards: &[Card], me: u32) -> Result<Option<String>> {
    context.driver.between()?;
    let (machine, driver, own) = (context.machine, context.driver, context.ordinal);
    let visible: Vec<(Option<String>, u32)> =
        machine.devices()?.iter().map(|d| (bus(context, d.index), d.index)).collect();
    for (rank, card) in cards.iter().enumerate().filter(|(rank, _)| *rank != me as usize) {
        let Some((_, theirs)) = visible.iter().find(|(bus, _)| bus.as_deref() == Some(&card.bus)) else {
            return Ok(Some(format!(
                "the device of rank {rank} ({}) is hidden from this process; let every process see all devices",
                card.bus
            )));
        };
        for (a, b) in [(own, *theirs), (*theirs, own)] {
            if a != b && !machine.reaches(driver, a, b)? {
                return Ok(Some(format!("device {a} can't access memory of device {b}")));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(process: u64, host: &str, bus: &str) -> Card {
        Card { process: [process, 7], host: host.into(), bus: bus.into(), ordinal: 1, wish: Wish::Auto as u64 }
    }

    #[test]
    fn the_wish_is_auto_nccl_or_peer() {
        let of = |text| Wish::parse(text).ok();
        assert_eq!([None, Some(""), Some("auto")].map(of), [Some(Wish::Auto); 3]);
        assert_eq!([Some("nccl"), Some("peer"), Some("mpi")].map(of), [Some(Wish::Nccl), Some(Wish::Peer), None]);
    }

    #[test]
    fn what_the_caller_says_comes_before_the_variable() {
        let given = [Transport::Auto, Transport::Library, Transport::Peer].map(|t| Wish::new(Some(t)).ok());
        assert_eq!(given, [Some(Wish::Auto), Some(Wish::Nccl), Some(Wish::Peer)]);
    }

    #[test]
    fn auto_takes_peer_where_all_reach_each_other_and_nccl_needs_a_device_for_each_rank() {
        let (two, shared) = ([card(1, "h", "a"), card(2, "h", "b")], [card(1, "h", "a"), card(2, "h", "a")]);
        let far = Some("device 0 can't access memory of device 1");
        assert_eq!(Wish::Auto.peer("x", &shared, None), Ok(true));
        assert_eq!(Wish::Auto.peer("x", &two, far), Ok(false));
        assert_eq!(Wish::Nccl.peer("x", &two, None), Ok(false));
        assert!(matches!(Wish::Peer.peer("x", &two, far), Err(Error::Invalid { .. })));
        // The same place on another host is another device.
        assert_eq!(Wish::Nccl.peer("x", &[card(1, "h", "a"), card(2, "i", "a")], None), Ok(false));
        for (wish, far) in [(Wish::Auto, far), (Wish::Nccl, None)] {
            let refused = wish.peer("x", &shared, far).expect_err("NCCL has no such thing");
            assert!(
                matches!(refused, Error::Unsupported { .. }) && refused.to_string().contains("a device for each rank")
            );
            assert_eq!(refused.to_string().contains("can't access"), far.is_some());
        }
    }

    #[test]
    fn memory_is_shared_by_processes_of_one_host_with_a_rank_each() {
        assert_eq!(together(&[card(1, "h", "a"), card(2, "h", "a")]), None);
        let why = |cards: &[Card]| together(cards).expect("in the way");
        assert!(why(&[card(1, "h", "a"), card(2, "i", "a")]).contains("several hosts"));
        assert!(why(&[card(1, "", "a"), card(2, "", "a")]).contains("several hosts"));
        assert!(why(&[card(1, "h", "a"), card(2, "h", "b"), card(1, "h", "b")]).contains("several ranks"));
        let many: Vec<Card> = (0..65).map(|i| card(i, "h", "a")).collect();
        assert!(why(&many).contains("more than 64"));
    }

    #[test]
    fn a_card_comes_back_from_its_offer() {
        let card = card(9, "host", "0000:0b:00.0");
        assert_eq!(Card::read(&card.fields().0), Ok(card.clone()));
        assert!(Card::read(&card.fields().0[..20]).is_err());
    }
}
