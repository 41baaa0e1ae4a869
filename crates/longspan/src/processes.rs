//! The processes of a launched job: one process is one rank, and this module is how it learns which, and meets the others.
//!
//! ```text
//! join:  who am I?       MPI (mpirun, srun), or torchrun's variables
//!        process 0 opens the job's board and broadcasts where it is; all join it
//! share, gather:         what all processes tell each other, on the board, whatever the backend
//! on_rank:               process 0 makes the group's id, shares it; this process's device by its place on the host
//! ```
//!
//! The board is beside the backend: it works when the backend's own communication has failed, and it names who is lost.

use std::io::Result as IoResult;
use std::net::{SocketAddr, ToSocketAddrs};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use longspan_hal::{Backend, DeviceInfo, Error, GroupId, Result, Step};
use longspan_peers::{Board, Fields, Member, Place, Reach, Reader};
use longspan_seqpar::Mesh;

use crate::engine::{Engine, EngineOf};
use crate::select::{Visit, select};

/// How long processes may take to find each other.
const START: Duration = Duration::from_secs(120);

/// Limit of waits on the job's board: what a process waits for there may be a whole run of another. A process that dies ends
/// them all.
const RUN: Duration = Duration::from_secs(30 * 86_400);

/// The processes of this job, one rank each.
#[derive(Debug)]
pub struct Processes {
    member: Member,
    local_rank: u32,
    local_size: u32,
    reach: Reach,
    mpi: bool,
}

/// What a launcher told this process.
struct Told {
    rank: u32,
    size: u32,
    local_rank: u32,
    local_size: u32,
    from: From,
}

enum From {
    #[cfg_attr(not(feature = "mpi"), allow(dead_code))]
    Mpi,
    /// Where rank 0 meets the others first.
    Torchrun(SocketAddr),
}

impl Processes {
    /// The job that this process was started in, for the backend that `selector` names: by MPI's launcher where the backend is
    /// `mpi` or the launcher's variables are there, by torchrun's variables otherwise. `None` if nobody started several
    /// processes: ranks are threads then. `open` opens the job's board in process 0; [`Board::open`] does.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the backend's ranks are threads, or variables are wrong; [`Error::Unavailable`] if MPI is
    /// not compiled in; [`Error::Timeout`] if some process does not come.
    pub fn join(selector: &str, open: impl FnOnce(Reach) -> IoResult<Place>) -> Result<Option<Self>> {
        let backend = selector.split(':').next().unwrap_or(selector);
        let Some(told) = told(backend)? else { return Ok(None) };
        if backend == "cpu" || backend.starts_with("cpu-") {
            let why = format!(
                "the ranks of `{backend}` are threads of one process, and this is one of {} that a launcher started: start \
                 it once, or take the backend `mpi`",
                told.size
            );
            return Err(Error::invalid("backend", why));
        }
        let reach = if told.local_size == told.size { Reach::Host } else { Reach::Network };
        reach.set_for_job();
        let place = if told.rank == 0 { place_bytes(open(reach).map_err(no_board)) } else { Vec::new() };
        let place = told.broadcast(place)?;
        let mut fields = Reader(&place);
        let place = match (fields.number(), fields.bytes()) {
            (Ok(1), Ok(bytes)) => Place::from_bytes(bytes).map_err(no_board)?,
            (_, why) => return Err(Error::invalid("job", String::from_utf8_lossy(why.unwrap_or_default()))),
        };
        let mut member = Member::join(&place, told.rank, told.size, START)?;
        member.limit = RUN;
        let (local_rank, local_size) = (told.local_rank, told.local_size);
        Ok(Some(Self { member, local_rank, local_size, reach, mpi: matches!(told.from, From::Mpi) }))
    }

    /// Whether a launcher started this process with others, by the variables that launchers set. Starts nothing itself.
    ///
    /// # Errors
    /// [`Error::Invalid`] if torchrun's variables are wrong.
    pub fn launched() -> Result<bool> {
        let variable = |name: &str| std::env::var(name).ok();
        Ok(by_mpi(variable) || torchrun(variable)?.is_some_and(|told| told.size > 1))
    }

    /// This process, from 0.
    pub fn rank(&self) -> u32 {
        self.member.rank
    }

    /// Number of processes.
    pub fn size(&self) -> u32 {
        self.member.size
    }

    /// Who has to reach a board that process 0 opens for others of this job.
    pub fn reach(&self) -> Reach {
        self.reach
    }

    /// Collective: the bytes of every process, in rank order. `name` is the same on all.
    ///
    /// # Errors
    /// [`Error::PeerLost`] if a process died; [`Error::Invalid`] if another one calls something else.
    pub fn share(&self, name: &'static str, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.member.agree(name, &Fields(bytes.to_vec()))
    }

    /// Collective: as [`Processes::share`], but process 0 alone gets the bytes; the others get none.
    ///
    /// # Errors
    /// As [`Processes::share`].
    pub fn gather(&self, name: &'static str, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.member.gather(name, &Fields(bytes))
    }

    /// Collective: the id of a new group of `B`, made by process 0.
    ///
    /// # Errors
    /// Those of [`Backend::group_id`] on process 0, as [`Error::Invalid`] elsewhere; [`Error::PeerLost`].
    pub fn group_id<B: Backend>(&self) -> Result<GroupId> {
        let made = if self.rank() == 0 { Some(B::group_id()) } else { None };
        let said = match &made {
            Some(Ok(id)) => Fields::default().number(1).bytes(&id.0),
            Some(Err(error)) => Fields::default().number(0).bytes(error.to_string().as_bytes()),
            None => Fields::default(),
        };
        let all = self.share("group id", &said.0)?;
        if let Some(made) = made {
            return made;
        }
        let mut fields = Reader(&all[0]);
        match (fields.number(), fields.bytes()) {
            (Ok(1), Ok(id)) => Ok(GroupId(id.to_vec())),
            (_, why) => Err(Error::invalid("group", String::from_utf8_lossy(why.unwrap_or_default()))),
        }
    }

    /// This process's device among those of its host.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none.
    pub fn device<'a>(&self, devices: &'a [DeviceInfo], backend: &str) -> Result<&'a DeviceInfo> {
        let none = || Error::invalid("devices", format!("{backend} has none on this host"));
        devices.get(self.local_rank as usize % devices.len().max(1)).ok_or_else(none)
    }

    /// Ranks on this process's device, of `devices` of its host. The others count as this one: which they are is not known.
    fn beside(&self, devices: usize) -> Vec<u32> {
        let first = self.local_rank % devices.max(1) as u32;
        (first..self.local_size).step_by(devices.max(1)).map(|_| self.rank()).collect()
    }

    /// Collective: runs `body` on this process's rank of `mesh`; `limit` bounds every wait for a peer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the mesh has not as many ranks as the job has processes; the backend's own; [`Error::PeerLost`]
    /// if another rank failed, or this one panicked.
    pub fn on_rank<T>(
        &self,
        selector: &str,
        mesh: &Mesh,
        limit: Duration,
        body: impl FnOnce(&mut dyn Engine) -> Result<T>,
    ) -> Result<T> {
        struct OnRank<'a, F> {
            processes: &'a Processes,
            limit: Duration,
            body: F,
        }
        impl<T, F: FnOnce(&mut dyn Engine) -> Result<T>> Visit for OnRank<'_, F> {
            type Output = T;

            fn visit<B: Backend>(self, devices: Vec<DeviceInfo>) -> Result<T> {
                let id = self.processes.group_id::<B>()?;
                let device = self.processes.device(&devices, B::NAME)?;
                let place = [self.processes.rank(), self.processes.size()];
                let beside = self.processes.beside(devices.len());
                engine_in_group::<B, T>(device, &id, place, beside, self.limit, self.body)
            }
        }
        self.check(mesh)?;
        select(selector, OnRank { processes: self, limit, body })
    }

    /// Checks that `mesh` has one rank for every process.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check(&self, mesh: &Mesh) -> Result<()> {
        if mesh.size() == self.size() {
            return Ok(());
        }
        let why = format!(
            "{mesh} is {} ranks, but the job has {} processes: start {} processes, or choose U and R with U x R = {}",
            mesh.size(),
            self.size(),
            mesh.size(),
            self.size()
        );
        Err(Error::invalid("mesh", why))
    }

    /// Leaves the job in order: every process calls it. MPI, where it was started, has ended afterwards.
    pub fn leave(self) {
        let mpi = self.mpi;
        drop(self);
        if mpi {
            #[cfg(feature = "mpi")]
            longspan_mpi::finalize();
        }
    }

    /// Ends this process with exit code `code`, and with it the job, when others may be lost.
    pub fn abort(self, code: i32) -> ! {
        // Not a word to the board: it says who was lost first, and that is not this one.
        if self.mpi {
            #[cfg(feature = "mpi")]
            longspan_mpi::abort(code);
        }
        std::process::exit(code)
    }
}

/// Runs `body` on one rank of the group `id`, whose ranks are anywhere; `place` is the rank and their number. The others
/// lose this rank if it fails.
///
/// # Errors
/// As [`Backend::open`] and [`Backend::join`]; the body's own; [`Error::PeerLost`] if it panicked.
pub fn in_group<B: Backend, T>(
    device: &DeviceInfo,
    id: &GroupId,
    place: [u32; 2],
    limit: Duration,
    body: impl FnOnce(&mut dyn Engine) -> Result<T>,
) -> Result<T> {
    engine_in_group::<B, T>(device, id, place, vec![place[0]], limit, body)
}

fn engine_in_group<B: Backend, T>(
    device: &DeviceInfo,
    id: &GroupId,
    place: [u32; 2],
    beside: Vec<u32>,
    limit: Duration,
    body: impl FnOnce(&mut dyn Engine) -> Result<T>,
) -> Result<T> {
    let [rank, size] = place;
    let run = || {
        let member = longspan_seqpar::Member::<B>::join(device, id, rank, size, limit)?;
        let mut engine = EngineOf::new(member, beside, limit)?;
        let result = body(&mut engine);
        if result.is_err() {
            engine.abort();
        }
        result
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        Err(Error::PeerLost { rank, call: "its own code, which panicked", step: Step::default(), late: None })
    })
}

fn place_bytes(place: Result<Place>) -> Vec<u8> {
    match place {
        Ok(place) => Fields::default().number(1).bytes(&place.to_bytes()).0,
        Err(error) => Fields::default().number(0).bytes(error.to_string().as_bytes()).0,
    }
}

fn no_board(error: std::io::Error) -> Error {
    Error::Unavailable {
        library: "the job's board".into(),
        why: error.to_string(),
        how_to_get_it: "set LONGSPAN_ADDRESS to an address of the host of process 0 that all processes reach".into(),
    }
}

/// What the launcher says, if one started several processes; for the backend `mpi` always.
fn told(backend: &str) -> Result<Option<Told>> {
    if backend == "mpi" || by_mpi(|name| std::env::var(name).ok()) {
        return by_world(backend);
    }
    match torchrun(|name| std::env::var(name).ok())? {
        Some(told) if told.size > 1 => Ok(Some(told)),
        _ => Ok(None),
    }
}

/// Whether a launcher of MPI started this process with others.
fn by_mpi(variable: impl Fn(&str) -> Option<String>) -> bool {
    let many = |name| variable(name).and_then(|v| v.parse::<u32>().ok()).is_some_and(|n| n > 1);
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"].iter().any(|name| many(name))
}

#[cfg(feature = "mpi")]
fn by_world(backend: &str) -> Result<Option<Told>> {
    if backend.starts_with("cpu") {
        // Refused before MPI starts.
        return Ok(Some(Told { rank: 0, size: 2, local_rank: 0, local_size: 2, from: From::Mpi }));
    }
    let world = longspan_mpi::world()?;
    let [rank, size] = [world.rank, world.size];
    Ok(Some(Told { rank, size, local_rank: world.local_rank, local_size: world.local_size, from: From::Mpi }))
}

#[cfg(not(feature = "mpi"))]
fn by_world(_backend: &str) -> Result<Option<Told>> {
    Err(Error::Unavailable {
        library: "MPI".into(),
        why: "a launcher of MPI started this process, and this build has no MPI".into(),
        how_to_get_it: crate::select::BUILD_MPI.into(),
    })
}

/// What torchrun's variables say (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`).
/// torchrun itself listens on the port, so the processes meet at the next one.
fn torchrun(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Told>> {
    let (Some(rank), Some(size)) = (variable("RANK"), variable("WORLD_SIZE")) else { return Ok(None) };
    let (Some(host), Some(port)) = (variable("MASTER_ADDR"), variable("MASTER_PORT")) else { return Ok(None) };
    let wrong = |name: &str, value: &str| {
        Error::invalid(
            "launcher's variables",
            format!("{name}={value}; torchrun sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        )
    };
    let number = |name: &str, value: &str| value.trim().parse::<u32>().map_err(|_| wrong(name, value));
    let (rank, size) = (number("RANK", &rank)?, number("WORLD_SIZE", &size)?);
    let local = |name, otherwise| variable(name).map_or(Ok(otherwise), |value| number(name, &value));
    let (local_rank, local_size) = (local("LOCAL_RANK", 0)?, local("LOCAL_WORLD_SIZE", 1)?);
    if rank >= size {
        return Err(wrong("RANK", &rank.to_string()));
    }
    let next =
        port.trim().parse::<u16>().ok().and_then(|p| p.checked_add(1)).ok_or_else(|| wrong("MASTER_PORT", &port))?;
    let meet = (host.trim(), next).to_socket_addrs().ok().and_then(|mut all| all.next());
    let meet = meet.ok_or_else(|| wrong("MASTER_ADDR", &host))?;
    Ok(Some(Told { rank, size, local_rank, local_size, from: From::Torchrun(meet) }))
}

impl Told {
    /// Collective: the bytes of process 0.
    fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        match self.from {
            #[cfg(feature = "mpi")]
            From::Mpi => longspan_mpi::broadcast(&bytes),
            #[cfg(not(feature = "mpi"))]
            From::Mpi => Ok(bytes),
            From::Torchrun(meet) => {
                // Jobs of one port are told apart by torchrun's own name of the run.
                let word = std::env::var("TORCHELASTIC_RUN_ID").unwrap_or_default();
                if self.rank == 0 {
                    let any = if meet.is_ipv4() { "0.0.0.0" } else { "::" };
                    let at = any.parse().map(|ip| SocketAddr::new(ip, meet.port())).unwrap_or(meet);
                    Board::open_at(at, word.as_bytes()).map_err(no_board)?;
                }
                let place = Place::known(vec![meet], word.as_bytes());
                let member = Member::join(&place, self.rank, self.size, START)?;
                Ok(member.agree("job", &Fields(bytes))?.swap_remove(0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use longspan_seqpar::Placement;

    use super::*;

    fn variables(list: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        let list: Vec<(String, String)> = list.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        move |name| list.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
    }

    const TORCHRUN: [(&str, &str); 6] = [
        ("RANK", "3"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn torchruns_variables_are_read() {
        let told = torchrun(variables(&TORCHRUN)).expect("right").expect("there");
        assert_eq!((told.rank, told.size, told.local_rank, told.local_size), (3, 8, 1, 2));
        assert!(matches!(told.from, From::Torchrun(at) if at.to_string() == "127.0.0.1:29501"));
        assert!(torchrun(variables(&TORCHRUN[..3])).expect("no launcher").is_none());
        for (name, bad) in
            [("RANK", "x"), ("RANK", "8"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "65535"), ("LOCAL_RANK", "-1")]
        {
            let mut list = TORCHRUN;
            list.iter_mut().filter(|(n, _)| *n == name).for_each(|(_, v)| *v = bad);
            assert!(matches!(torchrun(variables(&list)), Err(Error::Invalid { .. })), "{name}={bad}");
        }
    }

    #[test]
    fn launchers_of_mpi_are_known_by_their_variables() {
        assert!(by_mpi(variables(&[("OMPI_COMM_WORLD_SIZE", "2")])) && by_mpi(variables(&[("PMI_SIZE", "4")])));
        assert!(!by_mpi(variables(&[("PMI_SIZE", "1")])) && !by_mpi(variables(&[("WORLD_SIZE", "4")])));
    }

    /// Threads stand in for processes: the board can't tell.
    fn as_processes<T: Send>(size: u32, body: impl Fn(Processes) -> T + Sync) -> Vec<T> {
        let place = Board::open(Reach::Host).expect("a socket");
        std::thread::scope(|scope| {
            let start = |rank| {
                let (place, body) = (&place, &body);
                scope.spawn(move || {
                    let member = Member::join(place, rank, size, START).expect("all come");
                    body(Processes { member, local_rank: rank, local_size: size, reach: Reach::Host, mpi: false })
                })
            };
            let all: Vec<_> = (0..size).map(start).collect();
            all.into_iter().map(|t| t.join().expect("no panic")).collect()
        })
    }

    #[test]
    fn a_mesh_of_another_size_is_refused_with_what_to_do() {
        let mesh = Mesh::new(2, 2, Placement::UlyssesInner).expect("four ranks");
        let errors = as_processes(3, |p| p.on_rank("mpi", &mesh, START, |_| Ok(())).expect_err("refused").to_string());
        assert!(errors.iter().all(|e| e.contains("is 4 ranks") && e.contains("start 4 processes")), "{errors:?}");
    }

    #[test]
    fn processes_share_and_gather_in_rank_order() {
        as_processes(3, |p| {
            let mine = [p.rank() as u8; 2];
            assert_eq!(p.share("mine", &mine).expect("all share"), [[0, 0], [1, 1], [2, 2]]);
            let gathered = p.gather("mine", mine.to_vec()).expect("all gather");
            assert_eq!(gathered.len(), if p.rank() == 0 { 3 } else { 0 });
            p.leave();
        });
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn a_group_made_by_process_0_serves_all() {
        let mesh = Mesh::new(3, 1, Placement::UlyssesInner).expect("three ranks");
        let ranks = as_processes(3, |p| {
            let ok = p.on_rank("cpu", &mesh, START, |engine| Ok((engine.rank(), engine.size())));
            let lost = p.on_rank("cpu", &mesh, START, |engine| {
                assert!(engine.rank() != 1, "told to stop");
                let layout = longspan_seqpar::Layout::contiguous(12, &mesh);
                let problem = longspan_seqpar::Problem::new(longspan_hal::DType::F32, 1, [3, 3], 8);
                engine.prepare(&problem, [&layout, &layout], &longspan_seqpar::Mask::full()).map(drop)
            });
            assert!(matches!(lost, Err(Error::PeerLost { rank: 1, .. })), "{lost:?}");
            ok.expect("all come")
        });
        assert_eq!(ranks, [(0, 3), (1, 3), (2, 3)]);
    }
}
