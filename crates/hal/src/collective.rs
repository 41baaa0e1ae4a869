//! Data movement between the ranks of one sequence-parallel group: prepared exchanges, and nothing else.
//!
//! An all-to-all (Ulysses), a hop (ring), a route from owner to needer and a many-to-one return are all lists of
//! sends and receives that run as one exchange. Its equivalents: `ncclGroupStart`/`ncclSend`/`ncclRecv`/
//! `ncclGroupEnd`, `HcclBatchSendRecv`, `MPI_Alltoallw`, or peer copies with events.
//!
//! Ulysses and ring groups are rank lists that the mesh computes, not communicators: two communicators in flight on
//! one device are a known way to hang. All communication of a rank goes on one stream, in the same order on every
//! rank.

use std::fmt::{Debug, Display};

use crate::{DType, Device, Error, Extent, Result, View, ViewMut};

/// Where a rank is: shown on the progress board, and named when the rank is lost.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Step {
    /// What the rank does, such as `ring forward`; empty before the first report.
    pub phase: &'static str,
    /// Which step of it, from 0.
    pub index: u32,
}

impl Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.phase {
            "" => f.write_str("none"),
            phase => write!(f, "{phase} {}", self.index),
        }
    }
}

/// One message of an exchange. Messages between a pair of ranks match in list order; a message to oneself is a local
/// copy. Empty messages are fine and move nothing.
#[derive(Debug)]
pub enum P2p<'a, D: Device> {
    /// Receive into a part of a window. Messages of one exchange do not overlap in it.
    Recv {
        /// The sending rank.
        from: u32,
        /// Where it arrives; must lie in memory from [`Collective::window`].
        into: ViewMut<'a, D>,
    },
    /// Send elements of this dtype and extent; the view itself is given to each [`Collective::exchange`].
    Send {
        /// The receiving rank.
        to: u32,
        /// Element type.
        dtype: DType,
        /// Sizes of the axes; the receiver's view has the same.
        extent: Extent,
    },
}

/// The communicator of all ranks of one sequence-parallel group. See the ordering contract in `device.rs`.
pub trait Collective<D: Device>: Sized + Debug + Send + Sync + 'static {
    /// A prepared exchange: matched with its peers, windows registered, staging sized. It may run any number of
    /// times.
    type Exchange: Debug + Send + Sync + 'static;

    /// This rank, from 0.
    fn rank(&self) -> u32;

    /// Number of ranks.
    fn size(&self) -> u32;

    /// Collective. Device memory that peers may write during an exchange; the only such memory. Sizes may differ
    /// between ranks.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::PeerLost`], [`Error::Timeout`].
    fn window(&self, bytes: usize) -> Result<D::Buffer>;

    /// Collective. Matches sends with receives and sizes the staging. Every rank calls it in the same order.
    ///
    /// # Errors
    /// [`Error::Invalid`] on every rank if the messages of a pair differ in number, dtype or extent, if a peer is out
    /// of range, or if a receive is not in a window; [`Error::OutOfMemory`]; [`Error::PeerLost`];
    /// [`Error::Timeout`].
    fn prepare(&self, ops: &[P2p<'_, D>]) -> Result<Self::Exchange>;

    /// Bytes of device memory that the exchange holds for packing and staging, beside windows.
    fn staging_bytes(&self, exchange: &Self::Exchange) -> usize;

    /// Queues one round of the exchange on `on`; `sends` are the views for its [`P2p::Send`]s, in list order, in any
    /// memory.
    ///
    /// Every rank queues every exchange, in the same order, also one in which it has no messages. Sends do not overlap the
    /// receives of the same round. When `on` reaches it, this rank's receive parts are free to be overwritten; when it is done on `on`, all
    /// receives have arrived and all sends may be overwritten. Waits of the round end after the group's limit.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a view differs from its [`P2p::Send`]; [`Error::PeerLost`]; later failures at
    /// [`Device::synchronize`].
    fn exchange(&self, on: &D::Stream, exchange: &Self::Exchange, sends: &[View<'_, D>]) -> Result<()>;

    /// Collective over all ranks; a communicator of `members` (ranks of this one, ascending), for data-parallel meshes.
    /// All ranks give the same list. Ranks that are not members get `None`. Never used inside one attention.
    ///
    /// # Errors
    /// [`Error::Invalid`] for bad members; [`Error::PeerLost`]; [`Error::Timeout`].
    fn subgroup(&self, members: &[u32]) -> Result<Option<Self>>;

    /// Queues a barrier on `on`.
    ///
    /// # Errors
    /// [`Error::PeerLost`]; later failures at [`Device::synchronize`].
    fn barrier(&self, on: &D::Stream) -> Result<()>;

    /// Reports where this rank is to the progress board. Cheap; never blocks.
    fn progress(&self, step: Step);

    /// Gives the group up, from any thread: every wait of every rank ends with [`Error::PeerLost`] naming this rank.
    fn abort(&self);
}

/// Checks `sends` against the prepared messages: number, dtype and extent.
///
/// # Errors
/// [`Error::Invalid`] naming the first that differs.
pub fn check_sends<D: Device>(prepared: &[(DType, Extent)], sends: &[View<'_, D>]) -> Result<()> {
    if prepared.len() != sends.len() {
        return Err(Error::invalid("sends", format!("{} views for {} prepared sends", sends.len(), prepared.len())));
    }
    for (i, ((dtype, extent), view)) in prepared.iter().zip(sends).enumerate() {
        if view.dtype() != *dtype || view.extent() != *extent {
            return Err(Error::invalid(
                "sends",
                format!("view {i} is {} {:?}, prepared was {dtype} {extent:?}", view.dtype(), view.extent()),
            ));
        }
    }
    Ok(())
}
