//! The progress board of a group: a small server in the process that made the group's id. Every rank holds one connection.
//!
//! ```text
//! JOIN rank, size             -> JOINED to all when the last came; CAME n to who asks with WAITING
//! AGREE call, name, offer     -> VERDICT call, all offers, when the last came; another name there -> BROKEN to all
//! STEP, ROUND                 noted
//! ABORT, STUCK call or round  -> LOST rank, step to all: who gave up, or the first rank that is not there yet
//! connection ends             the rank left: whoever needs it from now on makes the group LOST
//! ```
//!
//! The first fault stays, so all ranks name the same culprit.

use std::collections::HashMap;
use std::io::Result;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use longspan_hal::Step;

use crate::context::lock;
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
    pub const JOINED: u8 = 20;
    pub const VERDICT: u8 = 21;
    pub const LOST: u8 = 22;
    pub const BROKEN: u8 = 23;
    pub const CAME: u8 = 24;
    pub const REFUSED: u8 = 25;
}

/// How long a server waits for its first connection.
const NOBODY: Duration = Duration::from_secs(600);

#[derive(Debug, Default)]
struct Server {
    size: u64,
    ranks: HashMap<u64, Rank>,
    calls: HashMap<u64, Call>,
    over: bool,
}

#[derive(Debug)]
struct Rank {
    writer: TcpStream,
    step: Step,
    /// Exchanges that it queued.
    rounds: u64,
    gone: bool,
}

#[derive(Debug, Default)]
struct Call {
    name: String,
    offers: HashMap<u64, Vec<u8>>,
}

/// Starts the server of a new group; its address.
pub(crate) fn serve() -> Result<SocketAddr> {
    // Ranks of other hosts reach this one where LONGSPAN_ADDRESS says.
    let host = std::env::var("LONGSPAN_ADDRESS").ok().and_then(|a| a.parse::<IpAddr>().ok());
    let host = host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let listener = TcpListener::bind((host, 0))?;
    let address = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    std::thread::Builder::new().name("longspan board".into()).spawn(move || accept(&listener))?;
    Ok(address)
}

/// Accepts until all ranks came, everybody left, or nobody came for long.
fn accept(listener: &TcpListener) {
    let (server, start) = (Arc::new(Mutex::new(Server::default())), Instant::now());
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                let server = Arc::clone(&server);
                // Without a thread the connection closes, and the rank's join times out.
                let _ =
                    std::thread::Builder::new().name("longspan board".into()).spawn(move || attend(socket, &server));
            }
            Err(_) => {
                let server = lock(&server);
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
fn attend(mut socket: TcpStream, server: &Mutex<Server>) {
    let prepared = socket.set_nonblocking(false).and_then(|()| socket.set_nodelay(true));
    let Ok(rank) = prepared.and_then(|()| join(&mut socket, server)) else { return };
    while let Ok((kind, body)) = read(&mut socket) {
        if lock(server).handle(rank, kind, &mut Reader(&body)).is_err() {
            break;
        }
    }
    lock(server).leave(rank);
}

fn join(socket: &mut TcpStream, server: &Mutex<Server>) -> Result<u64> {
    let (kind, body) = read(socket)?;
    let mut fields = Reader(&body);
    let (rank, size) = (fields.number()?, fields.number()?);
    let mut server = lock(server);
    let refuse = |socket: &mut TcpStream, why: String| {
        write(socket, kind::REFUSED, &Fields::default().bytes(why.as_bytes()))?;
        Err(std::io::Error::other("refused"))
    };
    if kind != kind::JOIN || (server.size > 0 && server.size != size) {
        let why = format!("this rank joins {size} ranks, ranks before it joined {}", server.size);
        return refuse(socket, why);
    }
    if server.ranks.get(&rank).is_some_and(|r| !r.gone) {
        return refuse(socket, format!("rank {rank} of this group is taken"));
    }
    server.size = size;
    let writer = socket.try_clone()?;
    server.ranks.insert(rank, Rank { writer, step: Step::default(), rounds: 0, gone: false });
    if server.ranks.len() as u64 == size {
        server.tell_all(kind::JOINED, &Fields::default());
    }
    Ok(rank)
}

impl Server {
    fn handle(&mut self, rank: u64, kind: u8, fields: &mut Reader<'_>) -> Result<()> {
        match kind {
            kind::AGREE => {
                let (call, name, offer) = (fields.number()?, fields.text()?, fields.bytes()?.to_vec());
                self.agree(rank, call, name, offer);
            }
            kind::STEP => {
                let step = fields.step()?;
                self.ranks.entry(rank).and_modify(|r| r.step = step);
            }
            kind::ROUND => {
                let round = fields.number()?;
                self.ranks.entry(rank).and_modify(|r| r.rounds = round);
                self.need_rounds();
            }
            kind::ABORT => {
                let step = fields.step()?;
                self.ranks.entry(rank).and_modify(|r| r.step = step);
                self.lose(rank);
            }
            kind::STUCK_CALL => {
                let call = fields.number()?;
                let missing = |r: &u64| self.calls.get(&call).is_some_and(|c| !c.offers.contains_key(r));
                if let Some(rank) = (0..self.size).find(missing) {
                    self.lose(rank);
                }
            }
            kind::STUCK_ROUND => {
                let round = fields.number()?;
                let behind = |r: &u64| self.ranks.get(r).is_none_or(|state| state.rounds < round);
                // All of them queued it: the one that waits may as well name itself.
                let lost = (0..self.size).find(behind).unwrap_or(rank);
                self.lose(lost);
            }
            kind::WAITING => {
                let came = self.ranks.values().filter(|r| !r.gone).count() as u64;
                self.tell(rank, kind::CAME, &Fields::default().number(came));
            }
            _ => return Err(std::io::Error::other("a frame of another kind")),
        }
        Ok(())
    }

    fn agree(&mut self, rank: u64, number: u64, name: String, offer: Vec<u8>) {
        let size = self.size;
        let call = self.calls.entry(number).or_insert_with(|| Call { name: name.clone(), ..Call::default() });
        if call.name != name {
            let other = call.offers.keys().min().copied().unwrap_or(0);
            let why = format!(
                "call {number} is `{name}` on rank {rank} and `{}` on rank {other}; all ranks must make the same calls in \
                 the same order",
                call.name
            );
            self.over = true;
            return self.tell_all(kind::BROKEN, &Fields::default().bytes(why.as_bytes()));
        }
        call.offers.insert(rank, offer);
        if call.offers.len() as u64 == size {
            let fields = Fields::default().number(number);
            let all = (0..size).fold(fields, |f, r| f.bytes(call.offers.get(&r).map_or(&[], Vec::as_slice)));
            self.calls.remove(&number);
            return self.tell_all(kind::VERDICT, &all);
        }
        self.need_calls();
    }

    /// A rank that left is lost as soon as an open call misses it.
    fn need_calls(&mut self) {
        let gone = |r: &u64| self.ranks.get(r).is_some_and(|r| r.gone);
        let missing = |c: &Call| (0..self.size).find(|r| gone(r) && !c.offers.contains_key(r));
        if let Some(rank) = self.calls.values().find_map(missing) {
            self.lose(rank);
        }
    }

    /// A rank that left is lost as soon as another queues a round that it did not.
    fn need_rounds(&mut self) {
        let most = self.ranks.values().map(|r| r.rounds).max().unwrap_or(0);
        let behind = |r: &u64| self.ranks.get(r).is_some_and(|r| r.gone && r.rounds < most);
        if let Some(rank) = (0..self.size).find(behind) {
            self.lose(rank);
        }
    }

    fn leave(&mut self, rank: u64) {
        if self.ranks.len() as u64 == self.size {
            self.ranks.entry(rank).and_modify(|r| r.gone = true);
            self.need_calls();
            self.need_rounds();
        } else {
            // Not formed yet: the place is free again.
            self.ranks.remove(&rank);
        }
        if self.ranks.values().all(|r| r.gone) {
            self.over = true;
        }
    }

    fn lose(&mut self, rank: u64) {
        if !std::mem::replace(&mut self.over, true) {
            let step = self.ranks.get(&rank).map_or_else(Step::default, |r| r.step);
            self.tell_all(kind::LOST, &Fields::default().number(rank).step(step));
        }
    }

    fn tell(&mut self, rank: u64, kind: u8, fields: &Fields) {
        if let Some(rank) = self.ranks.get_mut(&rank).filter(|r| !r.gone) {
            // A rank that can't be told is gone; its own connection notices.
            let _ = write(&mut rank.writer, kind, fields);
        }
    }

    fn tell_all(&mut self, kind: u8, fields: &Fields) {
        for rank in 0..self.size {
            self.tell(rank, kind, fields);
        }
    }
}
