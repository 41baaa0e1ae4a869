//! Plans: the work lists of one spec and its slices, on the device.

use std::sync::{Arc, Mutex};

use longspan_hal::{Error, KernelClass, Result, Slices, Spec};
use longspan_kernels::params::{Piece, Tile};
use longspan_kernels::specialize::sections;
use longspan_kernels::{Specialization, View, WorkList};

use crate::device::GpuDevice;
use crate::driver::Address;
use crate::event::Event;
use crate::memory::Buffer;
use crate::stream::{Core, GpuStream};
use crate::sync::lock;

/// Work lists of forward and backward, checked, tiled and on their way to the device.
#[derive(Debug)]
pub struct GpuPlan {
    /// What was planned.
    pub(crate) spec: Spec,
    /// Query tiles of the forward.
    pub(crate) forward: Lists,
    /// Key tiles of the backward.
    pub(crate) backward: Lists,
    /// Query tiles of the dq kernel, where it is used.
    pub(crate) dq: Lists,
    /// Whether the backward may add dq to f32 memory.
    pub(crate) adds_dq: bool,
    lists: Buffer,
    /// Offset of [`COUNTERS`] counters for kernels whose blocks take tiles by themselves.
    counters: Address,
    users: Mutex<Users<Arc<Core>>>,
    ready: Event,
}

/// One a stream, whose launches follow each other.
const COUNTERS: usize = 64;

/// Whose each of [`COUNTERS`] is.
#[derive(Debug)]
struct Users<T> {
    of: Vec<T>,
    next: usize,
}

impl<T> Users<T> {
    /// The place of `user`, and whose it was if it was another's.
    fn place(&mut self, user: T, same: impl Fn(&T, &T) -> bool) -> (usize, Option<T>) {
        if let Some(place) = self.of.iter().position(|x| same(x, &user)) {
            return (place, None);
        }
        if self.of.len() < COUNTERS {
            self.of.push(user);
            return (self.of.len() - 1, None);
        }
        let place = self.next;
        self.next = (place + 1) % COUNTERS;
        (place, Some(std::mem::replace(&mut self.of[place], user)))
    }
}

/// Work lists of one pass, by rows of a tile: kernels for views with and without tensor maps may have different ones.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lists(Vec<(u32, Tiles)>);

impl Lists {
    /// The list for a kernel with tiles of `rows` rows.
    ///
    /// # Errors
    /// [`Error::Invalid`] if none was planned.
    pub(crate) fn of(&self, rows: u32) -> Result<&Tiles> {
        let found = self.0.iter().find(|(r, _)| *r == rows).map(|(_, tiles)| tiles);
        found.ok_or_else(|| Error::invalid("plan", format!("it has no tiles of {rows} rows")))
    }
}

/// One work list.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tiles {
    /// Where its tiles lie.
    pub tiles: Address,
    /// Where its pieces lie.
    pub pieces: Address,
    /// Number of tiles.
    pub count: u32,
    /// Heads whose blocks are neighbours.
    pub section: u32,
}

impl GpuPlan {
    /// Tiles `slices` and uploads the lists. The context is bound.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Unsupported`], [`longspan_hal::Error::Invalid`], [`longspan_hal::Error::OutOfMemory`].
    pub(crate) fn new(device: &GpuDevice, on: &GpuStream, spec: &Spec, slices: &Slices) -> Result<Self> {
        let context = device.context();
        // The rest of the cache is for what is written.
        let [by_queries, by_keys] = sections(spec, context.figures.cache_bytes / 8 * 5, context.figures.units);
        let mut plan = Layout { bytes: vec![0; 4 * COUNTERS], of: [(); 3].map(|()| Lists::default()) };
        let kernels = VIEWS.map(|view| Kernels::of(device, spec, view));
        let adds_dq = kernels.iter().flatten().any(|k| k.backward.adds_dq());
        let apart = kernels.iter().flatten().any(|k| !k.backward.adds_dq());
        for kernels in kernels {
            let kernels = kernels?;
            let queries = |rows| WorkList::by_queries(spec, slices, rows, by_queries.batches);
            plan.add(0, by_queries.heads, kernels.forward.rows, queries)?;
            plan.add(1, by_keys.heads, kernels.backward.rows, |rows| {
                WorkList::by_keys(spec, slices, rows, by_keys.batches)
            })?;
            if apart {
                plan.add(2, by_queries.heads, kernels.dq.rows, queries)?;
            }
        }
        let lists = device.alloc_bound(plan.bytes.len())?;
        for (_, list) in plan.of.iter_mut().flat_map(|of| &mut of.0) {
            list.tiles += lists.address();
            list.pieces += lists.address();
        }
        lists.used_on(on)?;
        device.upload_bound(on, &plan.bytes, lists.address())?;
        let ([forward, backward, dq], counters) = (plan.of, lists.address());
        let users = Mutex::new(Users { of: Vec::new(), next: 0 });
        let (spec, ready) = (spec.clone(), on.record(false)?);
        Ok(Self { spec, forward, backward, dq, adds_dq, lists, counters, users, ready })
    }

    /// Address of the counter of launches on `on`: 0, and 0 again after each of them. The context is bound.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Driver`].
    pub(crate) fn counter(&self, on: &GpuStream) -> Result<Address> {
        let mut users = lock(&self.users);
        let (place, before) = users.place(Arc::clone(on.core()), Arc::ptr_eq);
        if let Some(done) = before.and_then(|core| core.mark()) {
            on.wait(&done)?;
        }
        Ok(self.counters + 4 * place as Address)
    }

    /// Bytes of the lists.
    pub(crate) fn bytes(&self) -> usize {
        self.lists.bytes()
    }

    /// Work on `on` may read the lists from now on. The context is bound.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Driver`].
    pub(crate) fn read_on(&self, on: &GpuStream) -> Result<()> {
        self.lists.used_on(on)?;
        if self.ready.happened()? { Ok(()) } else { on.wait(&self.ready) }
    }
}

/// What views may allow.
const VIEWS: [View; 2] = [View { aligned: true, mapped: true }, View { aligned: true, mapped: false }];

/// Lists as they will lie on the device.
struct Layout {
    bytes: Vec<u8>,
    /// Of the forward, the backward and the dq kernel.
    of: [Lists; 3],
}

impl Layout {
    fn add(&mut self, to: usize, section: u32, rows: u32, make: impl Fn(u32) -> Result<WorkList>) -> Result<()> {
        if self.of[to].0.iter().any(|(r, _)| *r == rows) {
            return Ok(());
        }
        let list = make(rows)?;
        let tiles = self.bytes.len() as Address;
        self.bytes.extend_from_slice(tile_bytes(&list.tiles));
        let pieces = self.bytes.len() as Address;
        self.bytes.extend_from_slice(piece_bytes(&list.pieces));
        self.of[to].0.push((rows, Tiles { tiles, pieces, count: list.tiles.len() as u32, section }));
        Ok(())
    }
}

/// The kernels that one spec uses.
pub(crate) struct Kernels {
    /// The forward.
    pub forward: Specialization,
    /// dk and dv, and dq where it is added by atomics.
    pub backward: Specialization,
    /// dq where `backward` does not add it.
    pub dq: Specialization,
}

impl Kernels {
    /// The kernels for `spec` with views that allow `view`.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Unsupported`], [`longspan_hal::Error::Invalid`].
    pub(crate) fn of(device: &GpuDevice, spec: &Spec, view: View) -> Result<Self> {
        let (name, target) = (device.context().machine.facts().name, device.target());
        let kernels = Self {
            forward: Specialization::forward(name, spec, target, view)?,
            backward: Specialization::backward(name, spec, target, view)?,
            dq: Specialization::backward_dq(name, spec, target, view)?,
        };
        let flash3 = kernels.forward.box_rows > 0 && kernels.backward.box_rows > 0;
        if device.kernels() == KernelClass::Flash3 && view.mapped && !flash3 {
            return Err(Error::Unsupported {
                backend: name,
                what: format!("kernels of class flash3 for {} of head size {} here", spec.dtype, spec.head_dim),
                instead: "16-bit elements, head sizes in multiples of 8, on compute capability 9.0 are; or auto"
                    .to_owned(),
            });
        }
        Ok(kernels)
    }
}

fn tile_bytes(tiles: &[Tile]) -> &[u8] {
    // SAFETY: plain data without padding bytes (`longspan_kernels::params` checks the size).
    unsafe { std::slice::from_raw_parts(tiles.as_ptr().cast(), size_of_val(tiles)) }
}

fn piece_bytes(pieces: &[Piece]) -> &[u8] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(pieces.as_ptr().cast(), size_of_val(pieces)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stream_has_a_counter_of_its_own_until_there_are_too_many() {
        let mut users = Users { of: Vec::new(), next: 0 };
        let mut place = |user: usize| users.place(user, |a, b| a == b);
        for round in 0..2 {
            for user in 0..COUNTERS {
                assert_eq!(place(user), (user, None), "round {round}");
            }
        }
        assert_eq!(place(100), (0, Some(0)));
        assert_eq!(place(101), (1, Some(1)));
        assert_eq!(place(100), (0, None));
        assert_eq!(place(0), (2, Some(2)));
    }
}
