//! Ranks of one process: a thread each.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use longspan_hal::{Backend, Collective, DeviceInfo, Error, Result, Step};
use longspan_seqpar::{Member, Mesh};

use crate::engine::{Engine, EngineOf};
use crate::select::{Visit, select};

/// How long a rank waits for a peer unless told otherwise.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(300);

/// Runs `body` on every rank of `mesh`, a thread each, on the backend that `backend` selects; results in rank order.
///
/// # Errors
/// The error that caused the others: if a rank fails or panics, every other rank gets [`Error::PeerLost`].
pub fn on_ranks<T: Send>(
    backend: &str,
    mesh: &Mesh,
    body: impl Fn(&mut dyn Engine) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let mut results = on_ranks_within(backend, mesh, DEFAULT_LIMIT, body)?;
    // The cause first: a rank that failed by itself, not one that lost it.
    let own = |r: &Result<T>| matches!(r, Err(e) if !matches!(e, Error::PeerLost { .. }));
    if let Some(cause) = results.iter().position(own) {
        results.swap(0, cause);
    }
    results.into_iter().collect()
}

/// As [`on_ranks`], with a limit on every wait for a peer, and every rank's own result.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::Unavailable`] if the backend cannot be had.
pub fn on_ranks_within<T: Send>(
    backend: &str,
    mesh: &Mesh,
    limit: Duration,
    body: impl Fn(&mut dyn Engine) -> Result<T> + Sync,
) -> Result<Vec<Result<T>>> {
    struct OnRanks<F> {
        size: u32,
        limit: Duration,
        body: F,
    }
    impl<T: Send, F: Fn(&mut dyn Engine) -> Result<T> + Sync> Visit for OnRanks<F> {
        type Output = Vec<Result<T>>;

        fn visit<B: Backend>(self, devices: Vec<DeviceInfo>) -> Result<Self::Output> {
            let count = devices.len().max(1);
            spawn::<B, T>(&devices, self.size, self.limit, |member| {
                let first = member.collective.rank() % count as u32;
                let beside = (first..self.size).step_by(count).collect();
                with_engine(member, beside, self.limit, &self.body)
            })
        }
    }
    select(backend, OnRanks { size: mesh.size(), limit, body })
}

/// Runs `body` on each of the first `count` devices that `backend` selects, all at once, each the only rank of a group of its
/// own; results in the order of the devices.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::Unavailable`] if the backend cannot be had; the first error of a device.
pub fn on_devices<T: Send>(
    backend: &str,
    count: usize,
    limit: Duration,
    body: impl Fn(&mut dyn Engine) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    struct OnDevices<F> {
        count: usize,
        limit: Duration,
        body: F,
    }
    impl<T: Send, F: Fn(&mut dyn Engine) -> Result<T> + Sync> Visit for OnDevices<F> {
        type Output = Vec<T>;

        fn visit<B: Backend>(self, devices: Vec<DeviceInfo>) -> Result<Self::Output> {
            let Self { count, limit, body } = &self;
            let alone = |info: &DeviceInfo| -> Result<T> {
                let ranks =
                    spawn::<B, T>(std::slice::from_ref(info), 1, *limit, |m| with_engine(m, vec![0], *limit, body))?;
                ranks.into_iter().next().unwrap_or_else(|| Err(Error::invalid("ranks", "there were none")))
            };
            std::thread::scope(|scope| {
                let chosen = devices.iter().take(*count);
                let threads: Vec<_> = chosen.map(|info| scope.spawn(|| alone(info))).collect();
                let lost = || Error::PeerLost {
                    rank: 0,
                    call: "its own code, which panicked",
                    step: Step::default(),
                    late: None,
                };
                threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(lost()))).collect()
            })
        }
    }
    select(backend, OnDevices { count, limit, body })
}

/// Runs `body` on an engine for `member`, on whose device are the ranks `beside`; if it fails, the other ranks hear of it.
fn with_engine<B: Backend, T>(
    member: Member<B>,
    beside: Vec<u32>,
    limit: Duration,
    body: &impl Fn(&mut dyn Engine) -> Result<T>,
) -> Result<T> {
    let mut engine = EngineOf::new(member, beside, limit)?;
    let result = body(&mut engine);
    if result.is_err() {
        engine.abort();
    }
    result
}

/// Starts `size` ranks of one group, a thread each, on `devices` in turn; results in rank order. A rank that panics gives
/// [`Error::PeerLost`] naming itself.
///
/// # Errors
/// [`Error::Invalid`] without devices; errors of [`Backend::group_id`]. Errors of ranks are in the list.
pub fn spawn<B: Backend, T: Send>(
    devices: &[DeviceInfo],
    size: u32,
    limit: Duration,
    body: impl Fn(Member<B>) -> Result<T> + Sync,
) -> Result<Vec<Result<T>>> {
    if devices.is_empty() {
        return Err(Error::invalid("devices", format!("{} has none on this machine", B::NAME)));
    }
    let id = B::group_id()?;
    let one = |rank: u32| {
        let info = &devices[rank as usize % devices.len()];
        let run = || body(Member::join(info, &id, rank, size, limit)?);
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
            Err(Error::PeerLost { rank, call: "its own code, which panicked", step: Step::default(), late: None })
        })
    };
    Ok(std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size)
            .map(|rank| {
                let one = &one;
                std::thread::Builder::new().name(format!("rank {rank}")).spawn_scoped(scope, move || one(rank))
            })
            .collect();
        threads
            .into_iter()
            .enumerate()
            .map(|(rank, thread)| match thread {
                Ok(t) => t.join().unwrap_or_else(|_| {
                    Err(Error::PeerLost {
                        rank: rank as u32,
                        call: "its own code, which panicked",
                        step: Step::default(),
                        late: None,
                    })
                }),
                Err(e) => Err(Error::Unavailable {
                    library: "a thread".into(),
                    why: e.to_string(),
                    how_to_get_it: "run fewer ranks, or raise the process's thread limit".into(),
                }),
            })
            .collect()
    }))
}
