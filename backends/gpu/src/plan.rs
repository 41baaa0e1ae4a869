//! Plans: the work lists of one spec and its slices, on the device.

use longspan_hal::{Result, Slices, Spec};
use longspan_kernels::params::{Piece, Tile};
use longspan_kernels::specialize::sections;
use longspan_kernels::{Specialization, View, WorkList};

use crate::context::Context;
use crate::device::GpuDevice;
use crate::driver::Address;
use crate::event::Event;
use crate::memory::Buffer;
use crate::stream::GpuStream;

/// Work lists of forward and backward, checked, tiled and on their way to the device.
#[derive(Debug)]
pub struct GpuPlan {
    /// What was planned.
    pub(crate) spec: Spec,
    /// Query tiles of the forward.
    pub(crate) forward: Tiles,
    /// Key tiles of the backward.
    pub(crate) backward: Tiles,
    /// Query tiles of the dq kernel, where it is used.
    pub(crate) dq: Option<Tiles>,
    lists: Buffer,
    ready: Event,
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
        let kernels = Kernels::of(context, spec, View { aligned: true })?;
        let dq = kernels.dq.as_ref().map(|k| WorkList::by_queries(spec, slices, k.rows)).transpose()?;
        let forward = WorkList::by_queries(spec, slices, kernels.forward.rows)?;
        let backward = WorkList::by_keys(spec, slices, kernels.backward.rows)?;
        let mut bytes = Vec::new();
        let mut lay = |list: &WorkList, section| {
            let tiles = bytes.len() as Address;
            bytes.extend_from_slice(tile_bytes(&list.tiles));
            let pieces = bytes.len() as Address;
            bytes.extend_from_slice(piece_bytes(&list.pieces));
            Tiles { tiles, pieces, count: list.tiles.len() as u32, section }
        };
        // Half of the cache: the other half is for what is written.
        let (by_queries, by_keys) = sections(spec, context.figures.cache_bytes / 2);
        let (mut forward, mut backward) = (lay(&forward, by_queries), lay(&backward, by_keys));
        let mut dq = dq.map(|list| lay(&list, by_queries));
        let lists = device.alloc_bound(bytes.len())?;
        for list in [Some(&mut forward), Some(&mut backward), dq.as_mut()].into_iter().flatten() {
            list.tiles += lists.address();
            list.pieces += lists.address();
        }
        lists.used_on(on)?;
        device.upload_bound(on, &bytes, lists.address())?;
        Ok(Self { spec: spec.clone(), forward, backward, dq, lists, ready: on.record(false)? })
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

/// The kernels that one spec uses.
pub(crate) struct Kernels {
    /// The forward.
    pub forward: Specialization,
    /// dk and dv, and dq where it is added by atomics.
    pub backward: Specialization,
    /// dq without atomics, where those are not used.
    pub dq: Option<Specialization>,
}

impl Kernels {
    /// The kernels for `spec` with views that allow `view`.
    ///
    /// # Errors
    /// [`longspan_hal::Error::Unsupported`], [`longspan_hal::Error::Invalid`].
    pub(crate) fn of(context: &Context, spec: &Spec, view: View) -> Result<Self> {
        let (name, target) = (context.machine.facts().name, context.figures.target);
        let dq = || Specialization::backward_dq(name, spec, target, view);
        Ok(Self {
            forward: Specialization::forward(name, spec, target, view)?,
            backward: Specialization::backward(name, spec, target, view)?,
            dq: (!Specialization::atomics(spec)).then(dq).transpose()?,
        })
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
