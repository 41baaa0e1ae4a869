//! A rank's place in its group: joining, calls that all ranks make together, the fault that ended the group.

use std::collections::HashMap;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use longspan_hal::{Error, Result, Step};

use crate::board::kind;
use crate::context::lock;
use crate::wire::{Fields, Reader, read, write};

/// How long the board may take to answer beyond a wait's own limit.
const GRACE: Duration = Duration::from_secs(2);

/// A rank of a group.
#[derive(Debug)]
pub(crate) struct Member {
    pub rank: u32,
    pub size: u32,
    /// Bounds every wait for a peer.
    pub limit: Duration,
    shared: Arc<Shared>,
    socket: Mutex<TcpStream>,
    calls: AtomicU64,
    step: Mutex<Step>,
}

/// What the reader of the connection writes.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    joined: bool,
    came: Option<u64>,
    verdicts: HashMap<u64, Vec<Vec<u8>>>,
    fault: Option<Fault>,
}

/// Why a group is over.
#[derive(Clone, Debug)]
enum Fault {
    Broken(Error),
    Lost(u32, Step),
}

impl Fault {
    fn error(&self, call: &'static str) -> Error {
        match self {
            Self::Broken(error) => error.clone(),
            Self::Lost(rank, step) => Error::PeerLost { rank: *rank, call, step: *step },
        }
    }
}

impl Member {
    /// Joins the group whose board is at `address`; waits until all ranks have.
    pub fn join(address: SocketAddr, rank: u32, size: u32, limit: Duration) -> Result<Self> {
        let unreachable = |e: std::io::Error| Error::invalid("group id", format!("no board at {address}: {e}"));
        let mut socket =
            TcpStream::connect_timeout(&address, limit.max(Duration::from_millis(1))).map_err(unreachable)?;
        socket.set_nodelay(true).map_err(unreachable)?;
        let reader = socket.try_clone().map_err(unreachable)?;
        let hello = Fields::default().number(u64::from(rank)).number(u64::from(size));
        write(&mut socket, kind::JOIN, &hello).map_err(unreachable)?;
        let shared = Arc::new(Shared::default());
        let listener = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("longspan group".into())
            .spawn(move || listener.listen(reader))
            .map_err(unreachable)?;
        let this = Self {
            rank,
            size,
            limit,
            shared,
            socket: Mutex::new(socket),
            calls: AtomicU64::new(0),
            step: Mutex::default(),
        };
        this.gather()?;
        Ok(this)
    }

    fn gather(&self) -> Result<()> {
        if self.shared.until(self.limit, |s| s.joined.then_some(()))?.is_some() {
            return Ok(());
        }
        self.send(kind::WAITING, &Fields::default());
        let came = self.shared.until(GRACE, |s| s.came)?.unwrap_or(1);
        Err(Error::Timeout { call: came_text(came), limit: self.limit })
    }

    /// Meets all ranks in their next common call; the offers of all ranks.
    pub fn agree(&self, name: &'static str, offer: &Fields) -> Result<Vec<Vec<u8>>> {
        self.alive(name)?;
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        self.send(kind::AGREE, &Fields::default().number(call).bytes(name.as_bytes()).bytes(&offer.0));
        let verdict = |limit| {
            self.shared.until_or(limit, |s| match (s.verdicts.remove(&call), &s.fault) {
                (Some(verdict), _) => Some(Ok(verdict)),
                (None, Some(fault)) => Some(Err(fault.error(name))),
                (None, None) => None,
            })
        };
        if let Some(result) = verdict(self.limit) {
            return result;
        }
        self.send(kind::STUCK_CALL, &Fields::default().number(call));
        verdict(GRACE).unwrap_or(Err(Error::Timeout { call: name, limit: self.limit }))
    }

    /// Whether the group is not over, for `call`.
    pub fn alive(&self, call: &'static str) -> Result<()> {
        self.fault(call).map_or(Ok(()), Err)
    }

    /// The error that ended the group.
    pub fn fault(&self, call: &'static str) -> Option<Error> {
        lock(&self.shared.state).fault.as_ref().map(|f| f.error(call))
    }

    /// Reports the step.
    pub fn progress(&self, step: Step) {
        *lock(&self.step) = step;
        self.send(kind::STEP, &Fields::default().step(step));
    }

    /// Reports that this rank queued round `round` (from 1).
    pub fn queued(&self, round: u64) {
        self.send(kind::ROUND, &Fields::default().number(round));
    }

    /// Says that round `round` does not end.
    pub fn stuck(&self, round: u64) {
        self.send(kind::STUCK_ROUND, &Fields::default().number(round));
    }

    /// Gives the group up.
    pub fn abort(&self) {
        let step = *lock(&self.step);
        self.shared.fail(Fault::Lost(self.rank, step));
        self.send(kind::ABORT, &Fields::default().step(step));
    }

    fn send(&self, kind: u8, fields: &Fields) {
        // A connection that broke shows in the reader, as a fault.
        let _ = write(&mut *lock(&self.socket), kind, fields);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = lock(&self.socket).shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn listen(&self, mut socket: TcpStream) {
        while let Ok((kind, body)) = read(&mut socket) {
            if self.hear(kind, &mut Reader(&body)).is_err() {
                break;
            }
        }
        // The board is gone: the process that made the group's id (by custom rank 0's) died.
        self.fail(Fault::Lost(0, Step::default()));
    }

    fn hear(&self, kind: u8, fields: &mut Reader<'_>) -> std::io::Result<()> {
        match kind {
            kind::BROKEN => {
                let why = fields.text()?;
                self.fail(Fault::Broken(Error::invalid("collective call", why)));
            }
            kind::REFUSED => {
                let why = fields.text()?;
                self.fail(Fault::Broken(Error::invalid("rank", why)));
            }
            kind::CAME => lock(&self.state).came = Some(fields.number()?),
            kind::JOINED => lock(&self.state).joined = true,
            kind::LOST => {
                let rank = fields.number()? as u32;
                self.fail(Fault::Lost(rank, fields.step()?));
            }
            kind::VERDICT => {
                let (call, mut offers) = (fields.number()?, Vec::new());
                while !fields.0.is_empty() {
                    offers.push(fields.bytes()?.to_vec());
                }
                lock(&self.state).verdicts.insert(call, offers);
            }
            _ => return Err(std::io::Error::other("a frame of another kind")),
        }
        self.wake.notify_all();
        Ok(())
    }

    /// The first fault stays.
    fn fail(&self, fault: Fault) {
        lock(&self.state).fault.get_or_insert(fault);
        self.wake.notify_all();
    }

    /// Waits until `ready` gives something; `None` after `limit`.
    fn until_or<T>(&self, limit: Duration, mut ready: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let until = Instant::now() + limit;
        let mut state = lock(&self.state);
        loop {
            if let Some(value) = ready(&mut state) {
                return Some(value);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.wake.wait_timeout(state, left).map_or_else(|e| e.into_inner().0, |(s, _)| s);
        }
    }

    /// [`Self::until_or`], ended by a fault.
    fn until<T>(&self, limit: Duration, mut ready: impl FnMut(&mut State) -> Option<T>) -> Result<Option<T>> {
        let found = self.until_or(limit, |s| match (ready(s), &s.fault) {
            (Some(value), _) => Some(Ok(value)),
            (None, Some(fault)) => Some(Err(fault.error("join"))),
            (None, None) => None,
        });
        found.transpose()
    }
}

/// [`Error::Timeout`] carries static text: how many ranks came.
fn came_text(came: u64) -> &'static str {
    const CAME: [&str; 9] = [
        "join (0 ranks came)",
        "join (1 rank came)",
        "join (2 ranks came)",
        "join (3 ranks came)",
        "join (4 ranks came)",
        "join (5 ranks came)",
        "join (6 ranks came)",
        "join (7 ranks came)",
        "join (8 ranks came)",
    ];
    CAME.get(came as usize).copied().unwrap_or("join (more than 8 ranks came, but not all)")
}
