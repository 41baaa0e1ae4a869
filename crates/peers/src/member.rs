//! A rank's side of its group: joining, calls that all ranks make together, the fault that ended the group.

use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use longspan_hal::{Error, Result, Step};

use crate::board::kind;
use crate::lock;
use crate::place::Place;
use crate::wire::{Fields, Reader, intern, read, write};

/// How long the board may take to answer beyond a wait's own limit.
const GRACE: Duration = Duration::from_secs(2);

/// A rank of a group. Dropping it leaves the group; dropped by a panic, it gives the group up.
#[derive(Debug)]
pub struct Member {
    /// This rank, from 0.
    pub rank: u32,
    /// Number of ranks.
    pub size: u32,
    /// Bounds every wait for a peer.
    pub limit: Duration,
    shared: Arc<Shared>,
    calls: AtomicU64,
    step: Mutex<Step>,
}

/// What the reader of the connection shares with the rank's other threads.
#[derive(Debug)]
struct Shared {
    socket: Mutex<TcpStream>,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    joined: bool,
    came: Option<u64>,
    verdicts: HashMap<u64, Vec<Vec<u8>>>,
    fault: Option<Fault>,
    rounds: Rounds,
    /// Whether the board hears of each.
    told: bool,
}

/// Exchanges that this rank queued, and those that its device came to.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Rounds {
    queued: u64,
    began: u64,
}

impl Rounds {
    fn fields(self) -> Fields {
        Fields::default().number(self.queued).number(self.began)
    }
}

/// Why a group is over.
#[derive(Clone, Debug)]
enum Fault {
    Broken(Error),
    Lost(u32, Step, Option<Duration>),
}

impl Fault {
    fn error(&self, call: &'static str) -> Error {
        match self {
            Self::Broken(error) => error.clone(),
            &Self::Lost(rank, step, late) => Error::PeerLost { rank, call, step, late },
        }
    }
}

impl Member {
    /// Joins the group whose board is at `place`, and waits until all ranks have; `limit` bounds this and every later wait
    /// for a rank.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a rank out of range or taken, another size than the ranks before, or a board that can't be
    /// reached; [`Error::Timeout`] naming how many ranks came.
    pub fn join(place: &Place, rank: u32, size: u32, limit: Duration) -> Result<Self> {
        if rank >= size {
            return Err(Error::invalid("rank", format!("rank {rank} of a group of {size}")));
        }
        let unreachable = |e: std::io::Error| {
            let how = "set LONGSPAN_ADDRESS, on the host of rank 0, to an address of it that all ranks reach";
            Error::invalid("group", format!("its board can't be reached: {e}; {how}"))
        };
        let mut socket = place.connect(limit).map_err(unreachable)?;
        socket.set_nodelay(true).map_err(unreachable)?;
        let reader = socket.try_clone().map_err(unreachable)?;
        let hello = Fields::default().bytes(place.word()).number(u64::from(rank)).number(u64::from(size));
        let hello = hello.bytes(this_process().as_bytes());
        write(&mut socket, kind::JOIN, &hello).map_err(unreachable)?;
        let shared = Arc::new(Shared { socket: Mutex::new(socket), state: Mutex::default(), wake: Condvar::new() });
        let listener = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("longspan group".into())
            .spawn(move || listener.listen(reader))
            .map_err(unreachable)?;
        let this = Self { rank, size, limit, shared, calls: AtomicU64::new(0), step: Mutex::default() };
        this.wait_for_all()?;
        Ok(this)
    }

    fn wait_for_all(&self) -> Result<()> {
        if self.shared.until(self.limit, |s| s.joined.then_some(()))?.is_some() {
            return Ok(());
        }
        self.shared.send(kind::WAITING, &Fields::default());
        let came = self.shared.until(GRACE, |s| s.came)?.unwrap_or(1);
        Err(Error::Timeout { call: came_text(came), limit: self.limit })
    }

    /// Collective. Meets all ranks in their next common call; the offers of all ranks, in rank order.
    ///
    /// # Errors
    /// [`Error::PeerLost`]; [`Error::Invalid`] if another rank makes another call; [`Error::Timeout`].
    pub fn agree(&self, name: &'static str, offer: &Fields) -> Result<Vec<Vec<u8>>> {
        self.call(kind::AGREE, name, offer)
    }

    /// Collective. As [`Member::agree`], but rank 0 alone gets the offers; the others get none.
    ///
    /// # Errors
    /// As [`Member::agree`].
    pub fn gather(&self, name: &'static str, offer: &Fields) -> Result<Vec<Vec<u8>>> {
        self.call(kind::GATHER, name, offer)
    }

    fn call(&self, kind: u8, name: &'static str, offer: &Fields) -> Result<Vec<Vec<u8>>> {
        self.alive(name)?;
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        self.shared.send(kind, &Fields::default().number(call).bytes(name.as_bytes()).bytes(&offer.0));
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
        self.shared.send(kind::STUCK_CALL, &Fields::default().number(call).limit(Some(self.limit)));
        verdict(GRACE).unwrap_or(Err(Error::Timeout { call: name, limit: self.limit }))
    }

    /// Checks that the group is not over, for `call`.
    ///
    /// # Errors
    /// What ended it.
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
        self.shared.send(kind::STEP, &Fields::default().step(step));
    }

    /// Notes that this rank queued round `round` (from 1).
    pub fn queued(&self, round: u64) {
        self.note(|rounds| rounds.queued = rounds.queued.max(round));
    }

    /// Notes that this rank's device came to round `round`, if the backend can see that.
    pub fn began(&self, round: u64) {
        self.note(|rounds| rounds.began = rounds.began.max(round));
    }

    fn note(&self, change: impl FnOnce(&mut Rounds)) {
        let said = {
            let mut state = lock(&self.shared.state);
            let before = state.rounds;
            change(&mut state.rounds);
            Some(state.rounds).filter(|rounds| state.told && *rounds != before)
        };
        if let Some(rounds) = said {
            self.shared.send(kind::ROUND, &rounds.fields());
        }
    }

    /// Says that round `round` does not end, and which rank this one waits for if all have queued it; round 0 if rounds are
    /// not reported. `late` if the limit passed, not if that rank is gone. The answer is a fault, which ends the group.
    pub fn stuck(&self, round: u64, suspect: u32, late: bool) {
        let (rounds, limit) = (lock(&self.shared.state).rounds, late.then_some(self.limit));
        let fields = rounds.fields().number(round).number(u64::from(suspect)).limit(limit);
        self.shared.send(kind::STUCK_ROUND, &fields);
    }

    /// Ends the group, since the ranks do not do the same: all get [`Error::Invalid`] about `what`.
    pub fn refuse(&self, what: &'static str, why: &str) -> Error {
        let error = Error::invalid(what, why);
        self.shared.fail(Fault::Broken(error.clone()));
        self.shared.send(kind::BROKEN, &Fields::default().bytes(what.as_bytes()).bytes(why.as_bytes()));
        error
    }

    /// Leaves the group in order, before this is dropped.
    pub fn leave(&self) {
        let rounds = lock(&self.shared.state).rounds;
        self.shared.send(kind::BYE, &rounds.fields());
        // The board reads what was sent before the end.
        let _ = lock(&self.shared.socket).shutdown(Shutdown::Write);
    }

    /// Waits for the fault that ends the group, for `call`; a [`Error::Timeout`] if none comes soon.
    pub fn wait_for_fault(&self, call: &'static str) -> Error {
        let fault = self.shared.until_or(GRACE, |s| s.fault.as_ref().map(|f| f.error(call)));
        fault.unwrap_or(Error::Timeout { call, limit: self.limit })
    }

    /// Gives the group up.
    pub fn abort(&self) {
        let step = *lock(&self.step);
        self.shared.fail(Fault::Lost(self.rank, step, None));
        self.shared.send(kind::ABORT, &Fields::default().step(step));
    }

    /// Ends the connection as a death of the process does.
    #[cfg(test)]
    pub(crate) fn cut(self) {
        let _ = lock(&self.shared.socket).shutdown(Shutdown::Both);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort();
        }
        self.leave();
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
        self.fail(Fault::Lost(0, Step::default(), None));
    }

    fn send(&self, kind: u8, fields: &Fields) {
        // A connection that broke shows in the reader, as a fault.
        let _ = write(&mut *lock(&self.socket), kind, fields);
    }

    fn hear(&self, kind: u8, fields: &mut Reader<'_>) -> std::io::Result<()> {
        match kind {
            kind::BROKEN => {
                let (what, why) = (intern(&fields.text()?), fields.text()?);
                self.fail(Fault::Broken(Error::invalid(what, why)));
            }
            kind::REFUSED => {
                let why = fields.text()?;
                self.fail(Fault::Broken(Error::invalid("rank", why)));
            }
            kind::CAME => lock(&self.state).came = Some(fields.number()?),
            kind::JOINED => lock(&self.state).joined = true,
            kind::LOST => {
                let rank = fields.number()? as u32;
                self.fail(Fault::Lost(rank, fields.step()?, fields.limit()?));
            }
            kind::TELL => {
                let rounds = {
                    let mut state = lock(&self.state);
                    state.told = true;
                    state.rounds
                };
                self.send(kind::ROUND, &rounds.fields());
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
        // A limit further away than the clock can say is none.
        let until = Instant::now().checked_add(limit);
        let mut state = lock(&self.state);
        loop {
            if let Some(value) = ready(&mut state) {
                return Some(value);
            }
            let left = until.map_or(limit, |until| until.saturating_duration_since(Instant::now()));
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

/// The process and its host, for messages.
fn this_process() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match host.trim() {
        "" => format!("process {}", std::process::id()),
        host => format!("process {} on {host}", std::process::id()),
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
