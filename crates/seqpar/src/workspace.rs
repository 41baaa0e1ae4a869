//! Memory of one rank, laid out before anything runs.
//!
//! Two allocations: the *window*, which peers write, and the *buffer*, which they do not. Regions are tensors without gaps at
//! fixed offsets in them. Forward and backward never run at the same time, so each is laid out from the start and the sizes are
//! the larger of both: exact, and known before the run.

use std::ops::Range;

use longspan_hal::{DType, Device, Error, Extent, Result, Strided, View, ViewMut};

/// Alignment of regions in bytes, that of a device allocation.
const ALIGN: usize = 256;

/// Bytes that one rank needs beside the caller's tensors.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Bytes {
    /// Memory that peers write.
    pub window: usize,
    /// Memory that they do not; scratch and work lists of kernels included.
    pub buffer: usize,
    /// Staging that the collective holds for packing.
    pub staging: usize,
    /// What the backend holds for its kernels, and for the streams that run them: the caller's and that of transfers.
    pub held: usize,
}

impl Bytes {
    /// All of it.
    pub const fn total(&self) -> usize {
        self.window.saturating_add(self.buffer).saturating_add(self.staging).saturating_add(self.held)
    }

    /// Bytes of the window and the buffer where forward and backward share them.
    pub(crate) fn shared(a: Self, b: Self) -> Self {
        Self {
            window: a.window.max(b.window),
            buffer: a.buffer.max(b.buffer),
            staging: a.staging.max(b.staging),
            held: a.held.max(b.held),
        }
    }
}

/// Which allocation a region is in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    Buffer,
    Window,
}

/// What a tensor without gaps takes memory for.
pub(crate) type Tensor = (DType, Extent);

/// A tensor without gaps in one of the two allocations.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Region {
    pub place: Place,
    pub at: Strided,
}

impl Region {
    /// The tensor of another, not larger, extent at the same start.
    pub fn with_extent(&self, extent: Extent) -> Result<Self> {
        self.tensor((self.at.dtype(), extent))
    }

    /// Another tensor at the same start.
    pub fn tensor(&self, (dtype, extent): Tensor) -> Result<Self> {
        let at = lying(dtype, extent).shifted(self.at.byte_range().start / dtype.size())?;
        Ok(Self { place: self.place, at })
    }

    /// The part with rows `rows` and heads `heads`.
    pub fn part(&self, rows: Range<usize>, heads: Range<usize>) -> Result<Self> {
        Ok(Self { place: self.place, at: self.at.narrow(1, rows)?.narrow(2, heads)? })
    }

    /// All heads of rows `rows`.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        Ok(Self { place: self.place, at: self.at.narrow(1, rows)? })
    }
}

/// How a tensor without gaps lies: row after row, but row statistics head after head, so that a cut of heads is whole lines of
/// them and not 4 bytes here and there.
fn lying(dtype: DType, extent: Extent) -> Strided {
    if extent[3] == 1 { Strided::dense_bhsd(dtype, extent) } else { Strided::dense(dtype, extent) }
}

/// Hands out regions one after the other.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    bytes: Bytes,
}

impl Arena {
    /// A region for a tensor without gaps.
    pub fn take(&mut self, place: Place, dtype: DType, extent: Extent) -> Result<Region> {
        self.take_shared(place, (dtype, extent), &[])
    }

    /// The region of `first`, with room for each of `others` at the same start: for tensors none of which is there when
    /// another one is.
    pub fn take_shared(&mut self, place: Place, first: Tensor, others: &[Tensor]) -> Result<Region> {
        let next = match place {
            Place::Buffer => &mut self.bytes.buffer,
            Place::Window => &mut self.bytes.window,
        };
        let start = Region { place, at: lying(first.0, first.1).shifted(*next / first.0.size())? };
        let others = others.iter().map(|tensor| start.tensor(*tensor)).collect::<Result<Vec<_>>>()?;
        let end = others.iter().fold(start.at.byte_range().end, |end, r| end.max(r.at.byte_range().end));
        let end = end.checked_next_multiple_of(ALIGN);
        *next = end.ok_or_else(|| Error::invalid("problem", "its memory overflows the address space"))?;
        Ok(start)
    }

    /// Bytes handed out so far.
    pub fn bytes(&self) -> Bytes {
        self.bytes
    }
}

/// The two allocations of a rank.
#[derive(Debug)]
pub(crate) struct Workspace<D: Device> {
    pub window: D::Buffer,
    pub buffer: D::Buffer,
}

impl<D: Device> Workspace<D> {
    /// A region, to be read.
    pub fn view(&self, region: &Region) -> Result<View<'_, D>> {
        View::new(self.allocation(region.place), region.at)
    }

    /// A region, to be written.
    pub fn view_mut(&self, region: &Region) -> Result<ViewMut<'_, D>> {
        ViewMut::new(self.allocation(region.place), region.at)
    }

    fn allocation(&self, place: Place) -> &D::Buffer {
        match place {
            Place::Buffer => &self.buffer,
            Place::Window => &self.window,
        }
    }
}
