//! Requests on their way. A wait ends when all arrived, when the group is over, or at the limit; whatever has not arrived
//! then is cancelled or kept alive for good, never freed under MPI's hands.
//!
//! ```text
//! wait:  test all -> done, or one failed
//!        the group has a fault -> give the requests up
//!        the limit passed      -> tell the board who is waited for; its verdict is the fault
//!        otherwise test again: at once, after a yield, after longer and longer naps (`Pace`)
//! ```
//!
//! Sends are synchronous (`MPI_Issend`): one is done when its receiver has come to the round, not when MPI has put a copy
//! aside. So a rank that stays away is noticed by those who send to it, and nobody runs ahead of the others.
//!
//! Testing is what moves the data in MPI, so the thread that waits is the one that communicates; the threads that compute
//! are not disturbed. A blocking `MPI_Waitall` would do the same and burn a core that attention needs.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use longspan_cpu::transport::Part;
use longspan_hal::{Error, Result};
use longspan_peers::Member;
use mpi::ffi;

use crate::datatype::Datatype;
use crate::pace::{NAPS, Pace};
use crate::world::{Handle, NAME, World, check, lock};

/// How long cancelled requests may take to end.
const LAST_WAIT: Duration = Duration::from_millis(500);

/// One message of this rank.
#[derive(Debug)]
pub(crate) struct Message {
    /// The other rank, in the group.
    pub peer: u32,
    /// The other process, in the job.
    pub process: u32,
    pub receive: bool,
    /// Where it lies or arrives; `None` for a message without elements.
    pub at: Option<(Part, Arc<Datatype>)>,
}

/// Messages on their way.
#[derive(Debug)]
pub(crate) struct Flight {
    messages: Vec<Message>,
    requests: Vec<Handle<ffi::MPI_Request>>,
    statuses: Vec<ffi::MPI_Status>,
    crowded: bool,
}

/// Flights that did not end: their memory has to live as long as MPI may touch it.
static LOST: Mutex<Vec<Flight>> = Mutex::new(Vec::new());

impl Flight {
    /// Posts all messages, receives first.
    ///
    /// # Errors
    /// [`Error::Driver`]; what was posted is given up.
    pub fn post(world: &World, tag: c_int, mut messages: Vec<Message>) -> Result<Self> {
        messages.sort_by_key(|m| !m.receive);
        // SAFETY: a status is plain numbers, for which zeros will do where MPI writes none.
        let statuses = vec![unsafe { MaybeUninit::zeroed().assume_init() }; messages.len()];
        let requests = Vec::with_capacity(messages.len());
        let mut flight = Self { requests, statuses, messages, crowded: world.crowded };
        let mpi = lock();
        for i in 0..flight.messages.len() {
            match flight.messages[i].post(world, tag) {
                Ok(request) => flight.requests.push(Handle(request)),
                Err(error) => {
                    drop(mpi);
                    flight.abandon();
                    return Err(error);
                }
            }
        }
        drop(mpi);
        Ok(flight)
    }

    /// Waits until everything arrived and was sent.
    ///
    /// # Errors
    /// What ended the group; [`Error::Driver`] for a message that failed or has another length.
    pub fn wait(mut self, member: &Member, call: &'static str, round: u64) -> Result<()> {
        let until = Instant::now().checked_add(member.limit);
        let mut pace = Pace::new(self.crowded);
        loop {
            match self.test() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => {
                    self.abandon();
                    return Err(error);
                }
            }
            if let Some(fault) = member.fault(call) {
                self.abandon();
                return Err(fault);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                member.stuck(round, self.suspect().unwrap_or(member.rank), true);
                let fault = member.wait_for_fault(call);
                self.abandon();
                return Err(fault);
            }
            pace.pause();
        }
    }

    /// Whether all are done; lets MPI work on them.
    fn test(&mut self) -> Result<bool> {
        let n = self.requests.len();
        if n == 0 {
            return Ok(true);
        }
        let mut done = 0;
        let _mpi = lock();
        // SAFETY: MPI runs and the lock is held; both lists have `n` entries; the memory of the messages is kept.
        let code = unsafe {
            let (requests, statuses) = (self.requests.as_mut_ptr(), self.statuses.as_mut_ptr());
            ffi::MPI_Testall(n as c_int, requests.cast(), &mut done, statuses)
        };
        if code != ffi::MPI_SUCCESS as c_int {
            return Err(self.failed(code));
        }
        if done == 0 {
            return Ok(false);
        }
        for (message, status) in self.messages.iter().zip(&self.statuses).filter(|(m, _)| m.receive) {
            message.check_length(status)?;
        }
        Ok(true)
    }

    /// The error of the message that failed.
    fn failed(&self, code: c_int) -> Error {
        let fine = [ffi::MPI_SUCCESS as c_int, ffi::MPI_ERR_PENDING as c_int];
        for (message, status) in self.messages.iter().zip(&self.statuses).filter(|(_, s)| !fine.contains(&s.MPI_ERROR))
        {
            if let Err(Error::Driver { backend, call, code, message: text }) = check("MPI_Testall", status.MPI_ERROR) {
                return Error::Driver { backend, call, code, message: format!("{}: {text}", message.name()) };
            }
        }
        check("MPI_Testall", code).err().unwrap_or(Error::invalid("message", "MPI did not say what is wrong"))
    }

    /// The peer of a message that has not arrived.
    fn suspect(&self) -> Option<u32> {
        let _mpi = lock();
        self.messages.iter().zip(&self.requests).find_map(|(message, request)| {
            let mut done = 0;
            let mut status = MaybeUninit::<ffi::MPI_Status>::zeroed();
            // SAFETY: MPI runs and the lock is held; the request lives, and stays as it is.
            let code = unsafe { ffi::MPI_Request_get_status(request.0, &mut done, status.as_mut_ptr()) };
            (code != 0 || done == 0).then_some(message.peer)
        })
    }

    /// Cancels what is on its way; what can't be cancelled keeps its memory for good.
    fn abandon(mut self) {
        let until = Instant::now() + LAST_WAIT;
        for request in &mut self.requests {
            let _mpi = lock();
            // SAFETY: MPI runs and the lock is held; null requests are skipped. A failure leaves the request as it was.
            unsafe {
                if request.0 != ffi::RSMPI_REQUEST_NULL {
                    let _ = ffi::MPI_Cancel(&mut request.0);
                }
            }
        }
        while Instant::now() < until {
            if self.requests.iter_mut().all(ended) {
                return;
            }
            std::thread::sleep(NAPS[1]);
        }
        LOST.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }
}

/// Whether a request is over, well or not.
fn ended(request: &mut Handle<ffi::MPI_Request>) -> bool {
    let mut done = 0;
    let mut status = MaybeUninit::<ffi::MPI_Status>::zeroed();
    let _mpi = lock();
    // SAFETY: MPI runs and the lock is held; a request that is done becomes the null request, which is always done.
    let code = unsafe { ffi::MPI_Test(&mut request.0, &mut done, status.as_mut_ptr()) };
    code == ffi::MPI_SUCCESS as c_int && done != 0
}

impl Message {
    /// # Errors
    /// [`Error::Driver`].
    fn post(&self, world: &World, tag: c_int) -> Result<ffi::MPI_Request> {
        let (peer, comm) = (self.process as c_int, world.comm());
        let (first, count, kind) = match &self.at {
            Some((part, kind)) => (part.first(), 1, kind.raw()),
            // SAFETY: a constant of MPI.
            None => (std::ptr::null_mut(), 0, unsafe { ffi::RSMPI_UINT8_T }),
        };
        // SAFETY: MPI runs and the lock is held (by `Flight::post`). The type names elements of the part, which is kept until
        // the request ended and which the running job has named as read or written.
        unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            if self.receive {
                check("MPI_Irecv", ffi::MPI_Irecv(first.cast(), count, kind, peer, tag, comm, &mut request))?;
            } else {
                check("MPI_Issend", ffi::MPI_Issend(first.cast(), count, kind, peer, tag, comm, &mut request))?;
            }
            Ok(request)
        }
    }

    /// A shorter message than was agreed on is no error to MPI.
    fn check_length(&self, status: &ffi::MPI_Status) -> Result<()> {
        let Some((part, kind)) = &self.at else { return Ok(()) };
        let mut came: ffi::MPI_Count = 0;
        // SAFETY: MPI runs and the lock is held; the status is of a receive of this type.
        check("MPI_Get_elements_x", unsafe { ffi::MPI_Get_elements_x(status, kind.raw(), &mut came) })?;
        if came as usize == kind.elements {
            return Ok(());
        }
        let (wanted, dtype) = (kind.elements, part.at().dtype());
        let message = format!("{}: {came} elements came, {wanted} of {dtype} were agreed on", self.name());
        Err(Error::Driver { backend: NAME, call: "MPI_Irecv", code: i64::from(ffi::MPI_ERR_COUNT), message })
    }

    fn name(&self) -> String {
        format!("the message {} rank {}", if self.receive { "from" } else { "to" }, self.peer)
    }
}
