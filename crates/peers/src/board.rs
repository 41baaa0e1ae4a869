//! The board of a group: a small server in one process, by custom that of rank 0. Every rank holds one connection.
//!
//! ```text
//! JOIN word, rank, size, who  -> JOINED to all when the last came; CAME n to who asks with WAITING
//! AGREE call, name, offer     -> VERDICT call, all offers, when the last came; another name there -> BROKEN to all
//! GATHER call, name, offer    -> the same, with the offers for rank 0 alone
//! STEP                        noted
//! ABORT                       -> LOST rank, step to all: who gave up
//! STUCK call or round, limit  -> LOST rank, step, limit to all: the rank that is furthest behind
//! BROKEN what, why            -> the same to all: a rank saw that another does something else
//! BYE rounds, began           the rank left: whoever needs it from now on makes the group LOST
//! connection ends without BYE the rank died: LOST to all
//! ROUND rounds, began         the answer to TELL: how many exchanges it queued, and its device came to; again whenever it changes
//! ```
//!
//! Ranks queue exchanges without a word: a frame for each would cost more than a small exchange does. The board asks (TELL)
//! once it matters, which is when one is stuck or the first has left.
//!
//! The first fault stays, so all ranks name the same culprit.

use std::collections::HashMap;
use std::io::{Read, Result};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use longspan_hal::Step;

use crate::lock;
use crate::place::{Place, Reach};
use crate::wire::{Fields, Reader, read, write};

/// Kinds of frames, from and to the server.
pub(crate) mod kind {
    pub const JOIN: u8 = 1;
    pub const AGREE: u8 = 2;
    pub const STEP: u8 = 3;
    pub const ROUND: u8 = 4;
    pub const ABORT: u8 = 5;
    pub const STUCK_CALL: u8 = 6;
    pub const STUCK_ROUND: u8 = 7;
    pub const WAITING: u8 = 8;
    pub const GATHER: u8 = 9;
    pub const BYE: u8 = 10;
    pub const JOINED: u8 = 20;
    pub const VERDICT: u8 = 21;
    pub const LOST: u8 = 22;
    pub const BROKEN: u8 = 23;
    pub const CAME: u8 = 24;
    pub const REFUSED: u8 = 25;
    pub const TELL: u8 = 26;
}

/// How long a server waits for its first connection.
const NOBODY: Duration = Duration::from_secs(600);

/// How long a connection may take to say who it is, and a rank to take what it is told.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long ranks may take to say how many rounds they queued. One that hangs does not say it.
const ANSWER: Duration = Duration::from_millis(500);

/// The most bytes of a JOIN: nothing of a stranger is kept.
const HELLO: u64 = 4096;

/// The server of one group.
#[derive(Debug)]
pub enum Board {}

/// A rank that died, gave up, or did not come.
#[derive(Clone, Debug)]
pub struct Lost {
    /// The rank.
    pub rank: u32,
    /// Its process and host, in its own words.
    pub who: String,
    /// The last step that it reported.
    pub step: Step,
}

/// Told once, of the rank that ended the group.
type Tell = Box<dyn Fn(Lost) + Send>;

#[derive(Default)]
struct Server {
    size: u64,
    word: Vec<u8>,
    ranks: HashMap<u64, Rank>,
    calls: HashMap<u64, Call>,
    over: bool,
    /// Whether ranks tell of their rounds.
    told: bool,
    stuck: Option<Stuck>,
    tell: Option<Tell>,
}

/// A round that does not end.
#[derive(Clone, Copy, Debug)]
struct Stuck {
    /// Who says so.
    rank: u64,
    round: u64,
    /// Who is waited for if all have queued it.
    suspect: u64,
    /// What passed.
    limit: Option<Duration>,
}

#[derive(Debug)]
struct Rank {
    writer: TcpStream,
    who: String,
    step: Step,
    /// Exchanges that it queued, as far as it said.
    rounds: Option<u64>,
    /// Exchanges that its device came to; 0 where the backend does not say.
    began: u64,
    gone: bool,
}

#[derive(Debug, Default)]
struct Call {
    name: String,
    offers: HashMap<u64, Vec<u8>>,
    /// Whether rank 0 alone gets the offers.
    gather: bool,
}

impl Board {
    /// Opens a board that threads of this process serve until all its ranks left.
    ///
    /// # Errors
    /// If no socket can be opened.
    pub fn open(reach: Reach) -> Result<Place> {
        let (listener, place) = Place::open(reach)?;
        Self::serve(listener, place.word().to_vec())?;
        Ok(place)
    }

    /// Opens a board at an address that every rank knows, for ranks that say `word`.
    ///
    /// # Errors
    /// If the address is taken, or not of this host.
    pub fn open_at(address: SocketAddr, word: &[u8]) -> Result<Place> {
        Self::serve(TcpListener::bind(address)?, word.to_vec())?;
        Ok(Place::known(vec![address], word))
    }

    /// Opens a board, says where it is, and serves it in this thread until all its ranks left; `lost` hears of the rank that
    /// ended the group.
    ///
    /// # Errors
    /// If no socket can be opened, or `announce` fails.
    pub fn host(
        reach: Reach,
        announce: impl FnOnce(&Place) -> Result<()>,
        lost: impl Fn(Lost) + Send + 'static,
    ) -> Result<()> {
        let (listener, place) = Place::open(reach)?;
        listener.set_nonblocking(true)?;
        announce(&place)?;
        let server = Server { word: place.word().to_vec(), tell: Some(Box::new(lost)), ..Server::default() };
        let server = Arc::new(Mutex::new(server));
        accept(&listener, &server);
        while lock(&server).ranks.values().any(|r| !r.gone) {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn serve(listener: TcpListener, word: Vec<u8>) -> Result<()> {
        listener.set_nonblocking(true)?;
        let server = Arc::new(Mutex::new(Server { word, ..Server::default() }));
        let run = move || accept(&listener, &server);
        std::thread::Builder::new().name("longspan board".into()).spawn(run).map(drop)
    }
}

/// Accepts until all ranks came, everybody left, or nobody came for long.
fn accept(listener: &TcpListener, server: &Arc<Mutex<Server>>) {
    let start = Instant::now();
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                let server = Arc::clone(server);
                // Without a thread the connection closes, and the rank's join times out.
                let _ =
                    std::thread::Builder::new().name("longspan board".into()).spawn(move || attend(socket, &server));
            }
            Err(_) => {
                let server = lock(server);
                let full = server.size > 0 && server.ranks.len() as u64 == server.size;
                if full || server.over || start.elapsed() > NOBODY {
                    return;
                }
                drop(server);
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Serves one connection until it ends.
fn attend(mut socket: TcpStream, server: &Arc<Mutex<Server>>) {
    let prepared = socket.set_nonblocking(false).and_then(|()| socket.set_nodelay(true));
    let prepared = prepared.and_then(|()| socket.set_read_timeout(Some(PATIENCE)));
    let prepared = prepared.and_then(|()| socket.set_write_timeout(Some(PATIENCE)));
    let Ok(rank) = prepared.and_then(|()| join(&mut socket, server)) else { return };
    if socket.set_read_timeout(None).is_err() {
        return lock(server).leave(rank, false);
    }
    let mut bye = false;
    while let Ok((kind, body)) = read(&mut socket) {
        bye = kind == kind::BYE;
        if lock(server).handle(rank, kind, &mut Reader(&body)).is_err() || bye {
            break;
        }
        if kind == kind::STUCK_ROUND {
            let server = Arc::clone(server);
            let _ = std::thread::Builder::new().name("longspan board".into()).spawn(move || {
                std::thread::sleep(ANSWER);
                lock(&server).judge(true);
            });
        }
    }
    lock(server).leave(rank, bye);
    // The rank's reader ends with it; a socket that is closed already is as good.
    let _ = socket.shutdown(Shutdown::Both);
}

fn join(socket: &mut TcpStream, server: &Mutex<Server>) -> Result<u64> {
    let (kind, body) = read(&mut Read::by_ref(socket).take(HELLO))?;
    let mut fields = Reader(&body);
    let word = fields.bytes()?;
    let (rank, size, who) = (fields.number()?, fields.number()?, fields.text()?);
    let mut server = lock(server);
    let refuse = |socket: &mut TcpStream, why: String| {
        write(socket, kind::REFUSED, &Fields::default().bytes(why.as_bytes()))?;
        Err(std::io::Error::other("refused"))
    };
    if kind != kind::JOIN || word != server.word {
        return refuse(socket, "it is of another group or job".into());
    }
    if server.size > 0 && server.size != size {
        let why = format!("this rank joins {size} ranks, ranks before it joined {}", server.size);
        return refuse(socket, why);
    }
    if server.ranks.get(&rank).is_some_and(|r| !r.gone) {
        return refuse(socket, format!("rank {rank} of this group is taken"));
    }
    server.size = size;
    let writer = socket.try_clone()?;
    server.ranks.insert(rank, Rank { writer, who, step: Step::default(), rounds: None, began: 0, gone: false });
    if server.ranks.len() as u64 == size {
        server.tell_all(kind::JOINED, &Fields::default());
    }
    Ok(rank)
}

impl Server {
    fn handle(&mut self, rank: u64, kind: u8, fields: &mut Reader<'_>) -> Result<()> {
        match kind {
            kind::AGREE | kind::GATHER => {
                let (call, name, offer) = (fields.number()?, fields.text()?, fields.bytes()?.to_vec());
                self.agree(rank, call, name, offer, kind == kind::GATHER);
            }
            kind::STEP => {
                let step = fields.step()?;
                self.ranks.entry(rank).and_modify(|r| r.step = step);
            }
            kind::BYE => self.count(rank, fields)?,
            kind::ROUND => {
                self.count(rank, fields)?;
                self.need_rounds();
                self.judge(false);
            }
            kind::ABORT => {
                let step = fields.step()?;
                self.ranks.entry(rank).and_modify(|r| r.step = step);
                self.lose(rank, None);
            }
            kind::STUCK_CALL => {
                let (call, limit) = (fields.number()?, fields.limit()?);
                let missing = |r: &u64| self.calls.get(&call).is_some_and(|c| !c.offers.contains_key(r));
                if let Some(rank) = (0..self.size).find(missing) {
                    self.lose(rank, limit);
                }
            }
            kind::STUCK_ROUND => {
                self.count(rank, fields)?;
                let (round, suspect) = (fields.number()?, fields.number()?);
                self.stuck.get_or_insert(Stuck { rank, round, suspect, limit: fields.limit()? });
                self.ask();
                self.judge(false);
            }
            kind::BROKEN => {
                let (what, why) = (fields.bytes()?, fields.bytes()?);
                self.end(&Fields::default().bytes(what).bytes(why));
            }
            kind::WAITING => {
                let came = self.ranks.values().filter(|r| !r.gone).count() as u64;
                self.tell(rank, kind::CAME, &Fields::default().number(came));
            }
            _ => return Err(std::io::Error::other("a frame of another kind")),
        }
        Ok(())
    }

    fn agree(&mut self, rank: u64, number: u64, name: String, offer: Vec<u8>, gather: bool) {
        let size = self.size;
        let call = self.calls.entry(number).or_insert_with(|| Call { name: name.clone(), gather, ..Call::default() });
        if call.name != name || call.gather != gather {
            let other = call.offers.keys().min().copied().unwrap_or(0);
            let why = format!(
                "call {number} is `{name}` on rank {rank} and `{}` on rank {other}; all ranks must make the same calls in \
                 the same order",
                call.name
            );
            return self.end(&Fields::default().bytes(b"collective call").bytes(why.as_bytes()));
        }
        call.offers.insert(rank, offer);
        if call.offers.len() as u64 == size {
            let none = Fields::default().number(number);
            let all = |f: Fields, r| f.bytes(call.offers.get(&r).map_or(&[], Vec::as_slice));
            let all = (0..size).fold(none.clone(), all);
            self.calls.remove(&number);
            // As in `tell_all`.
            for rank in (0..size).rev() {
                self.tell(rank, kind::VERDICT, if gather && rank > 0 { &none } else { &all });
            }
            return;
        }
        self.need_calls();
    }

    /// The ranks do not do the same; `fields` say what and why.
    fn end(&mut self, fields: &Fields) {
        if !std::mem::replace(&mut self.over, true) {
            self.tell_all(kind::BROKEN, fields);
        }
    }

    /// A rank that left is lost as soon as an open call misses it.
    fn need_calls(&mut self) {
        let gone = |r: &u64| self.ranks.get(r).is_some_and(|r| r.gone);
        let missing = |c: &Call| (0..self.size).find(|r| gone(r) && !c.offers.contains_key(r));
        if let Some(rank) = self.calls.values().find_map(missing) {
            self.lose(rank, None);
        }
    }

    /// Frames of a rank may overtake each other.
    fn count(&mut self, rank: u64, fields: &mut Reader<'_>) -> Result<()> {
        let (rounds, began) = (fields.number()?, fields.number()?);
        self.ranks.entry(rank).and_modify(|r| {
            r.rounds = r.rounds.max(Some(rounds));
            r.began = r.began.max(began);
        });
        Ok(())
    }

    /// Has all ranks tell of their rounds.
    fn ask(&mut self) {
        if !std::mem::replace(&mut self.told, true) {
            self.tell_all(kind::TELL, &Fields::default());
        }
    }

    /// Who is lost of those that are in the way of a round. Not before all answered, but for the `last` time.
    fn judge(&mut self, last: bool) {
        let Some(Stuck { rank, round, suspect, limit }) = self.stuck else { return };
        if last || self.ranks.values().all(|r| r.gone || r.rounds.is_some()) {
            self.lose(self.behind(rank, round).unwrap_or(suspect), limit);
        }
    }

    /// Who keeps `rank` waiting in `round`: the first that did not queue it; or whose device is furthest from it, if they say.
    fn behind(&self, rank: u64, round: u64) -> Option<u64> {
        let queued = (0..self.size).find(|r| self.ranks.get(r).is_none_or(|r| r.rounds < Some(round)));
        let began = |r: u64| self.ranks.get(&r).map_or(0, |r| r.began);
        let last = (0..self.size).min_by_key(|r| began(*r)).filter(|r| began(*r) < began(rank));
        queued.or(last)
    }

    /// A rank that left is lost as soon as another queues a round that it did not.
    fn need_rounds(&mut self) {
        let most = self.ranks.values().map(|r| r.rounds).max().flatten();
        let behind = |r: &u64| self.ranks.get(r).is_some_and(|r| r.gone && r.rounds < most);
        if let Some(rank) = (0..self.size).find(behind) {
            self.lose(rank, None);
        }
    }

    fn leave(&mut self, rank: u64, bye: bool) {
        if self.ranks.len() as u64 == self.size {
            self.ranks.entry(rank).and_modify(|r| r.gone = true);
            if !bye {
                self.lose(rank, None);
            }
            self.need_calls();
            self.need_rounds();
            self.ask();
        } else {
            // Not formed yet: the place is free again.
            self.ranks.remove(&rank);
        }
        if self.ranks.values().all(|r| r.gone) {
            self.over = true;
        }
    }

    /// Ends the group: `rank` is gone, or did not come within the limit that is given.
    fn lose(&mut self, rank: u64, late: Option<Duration>) {
        if !std::mem::replace(&mut self.over, true) {
            let of = self.ranks.get(&rank);
            let (step, who) = of.map_or_else(Default::default, |r| (r.step, r.who.clone()));
            if let Some(tell) = &self.tell {
                tell(Lost { rank: rank as u32, who, step });
            }
            self.tell_all(kind::LOST, &Fields::default().number(rank).step(step).limit(late));
        }
    }

    fn tell(&mut self, rank: u64, kind: u8, fields: &Fields) {
        if let Some(rank) = self.ranks.get_mut(&rank).filter(|r| !r.gone) {
            // A rank that can't be told is gone; its own connection notices, closed here if it only hangs.
            if write(&mut rank.writer, kind, fields).is_err() {
                let _ = rank.writer.shutdown(Shutdown::Both);
            }
        }
    }

    /// Rank 0 last: its process, by custom this one, may end at once, and the board with it.
    fn tell_all(&mut self, kind: u8, fields: &Fields) {
        for rank in (0..self.size).rev() {
            self.tell(rank, kind, fields);
        }
    }
}
