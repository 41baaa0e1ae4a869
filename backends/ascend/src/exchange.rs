//! A prepared exchange: one send and one receive a peer, with all messages of the pair packed behind each other.
//!
//! ```text
//! round on a stream:  self pairs are copied
//!                     several or strided messages to a peer -> packed into staging; one dense message goes as it lies
//!                     one HcclAlltoAllV where every rank sends to every other one (Ulysses), otherwise one HcclBatchSendRecv
//!                     staging -> the receive views, where messages were packed
//! ```
//!
//! HcclAlltoAllV takes one memory a direction, so there either all parcels go as they lie, in one buffer, or all are packed.
//!
//! Messages of a packed pair start at multiples of 64 bytes, on both sides alike.

use longspan_hal::{DType, Device, Error, Extent, P2p, Result, Strided, View, check_sends};

use ascendcl_sys::{HcclDataType, HcclSendRecvItem, HcclSendRecvType};

use longspan_peers::Message;

use crate::copy::{Place, on_device};
use crate::memory::AscendBuffer;
use crate::stream::StreamState;
use crate::{AscendDevice, AscendStream};

const ALIGN: usize = 64;

/// A prepared exchange.
#[derive(Debug)]
pub struct AscendExchange {
    /// The communicator that prepared it.
    pub(crate) comm: u64,
    sends: Vec<(DType, Extent)>,
    receives: Vec<(AscendBuffer, Strided)>,
    /// Pairs of a send and a receive of this rank with itself.
    local: Vec<(usize, usize)>,
    outgoing: Vec<Parcel>,
    incoming: Vec<Parcel>,
    staging: AscendBuffer,
    /// Whether it runs as one all-to-all.
    pub(crate) together: bool,
}

/// Lists of an all-to-all, sends first: an entry a rank, in bytes.
#[derive(Debug)]
pub(crate) struct AllToAll {
    /// The lowest address.
    pub bases: [usize; 2],
    pub counts: [Vec<u64>; 2],
    /// From the lowest address.
    pub offsets: [Vec<u64>; 2],
}

impl AllToAll {
    /// The items of a batch in `size` ranks, each direction in one buffer.
    pub fn new(items: &[HcclSendRecvItem], size: u32) -> Self {
        let mut all = Self {
            bases: [0; 2],
            counts: [vec![0; size as usize], vec![0; size as usize]],
            offsets: [vec![0; size as usize], vec![0; size as usize]],
        };
        for (side, kind) in [HcclSendRecvType::HCCL_SEND, HcclSendRecvType::HCCL_RECV].into_iter().enumerate() {
            let mine = || items.iter().filter(|i| i.sendRecvType == kind);
            let base = mine().map(|i| i.buf as usize).min().unwrap_or(0);
            all.bases[side] = base;
            for item in mine() {
                all.counts[side][item.remoteRank as usize] = item.count;
                all.offsets[side][item.remoteRank as usize] = (item.buf as usize - base) as u64;
            }
        }
        all
    }
}

/// Everything between this rank and a peer, in one direction.
#[derive(Debug)]
struct Parcel {
    peer: u32,
    bytes: usize,
    /// Offset in the staging.
    at: usize,
    /// Index of each message, and its offset in the parcel.
    messages: Vec<(usize, usize)>,
}

/// Messages of `ops`; receives must lie in a window of communicator `comm` of `size` ranks.
pub(crate) fn messages(ops: &[P2p<'_, AscendDevice>], comm: u64, size: u32) -> Result<Vec<Message>> {
    let checked = |m: Message| {
        if m.peer < size {
            return Ok(m);
        }
        Err(Error::invalid("peer", format!("rank {} of {size}", m.peer)))
    };
    ops.iter()
        .map(|op| match op {
            P2p::Send { to, dtype, extent } => {
                checked(Message { receives: false, peer: *to, dtype: *dtype, extent: *extent })
            }
            P2p::Recv { from, into } => {
                if into.buffer().window() != comm {
                    return Err(Error::invalid("receive", "it does not lie in a window of this communicator"));
                }
                checked(Message { receives: true, peer: *from, dtype: into.dtype(), extent: into.extent() })
            }
        })
        .collect()
}

impl AscendExchange {
    /// The exchange of `ops` for rank `me` of communicator `comm`, with its staging.
    pub(crate) fn new(
        device: &AscendDevice,
        comm: u64,
        me: u32,
        size: u32,
        ops: &[P2p<'_, AscendDevice>],
        messages: &[Message],
    ) -> Result<Self> {
        let of = |receives| messages.iter().filter(move |m| m.receives == receives).copied().collect::<Vec<_>>();
        let (sends, recvs) = (of(false), of(true));
        let receives = ops
            .iter()
            .filter_map(|op| match op {
                P2p::Recv { into, .. } => Some((into.buffer().clone(), *into.at())),
                P2p::Send { .. } => None,
            })
            .collect();
        let own = |list: &[Message]| (0..list.len()).filter(|&i| list[i].peer == me).collect::<Vec<_>>();
        let local = own(&sends).into_iter().zip(own(&recvs)).collect();
        let mut end = 0;
        let outgoing = parcels(&sends, me, size, &mut end);
        let incoming = parcels(&recvs, me, size, &mut end);
        let staging = device.alloc(end)?;
        let sends = sends.iter().map(|m| (m.dtype, m.extent)).collect();
        Ok(Self { comm, sends, receives, local, outgoing, incoming, staging, together: false })
    }

    /// Bytes of the staging.
    pub(crate) fn staging_bytes(&self) -> usize {
        self.staging.bytes()
    }

    /// Checks the views of a round.
    pub(crate) fn check(&self, sends: &[View<'_, AscendDevice>]) -> Result<()> {
        check_sends(&self.sends, sends)
    }

    /// Queues local copies and packing; the items of the batch, none where no other rank takes part.
    pub(crate) fn pack(&self, on: &AscendStream, sends: &[View<'_, AscendDevice>]) -> Result<Vec<HcclSendRecvItem>> {
        for (send, receive) in &self.local {
            let (from, (buffer, at)) = (&sends[*send], &self.receives[*receive]);
            on_device(&on.0, Place { buffer: from.buffer(), at: from.at() }, Place { buffer, at })?;
        }
        let mut items = Vec::with_capacity(self.outgoing.len() + self.incoming.len());
        let outgoing = self.direct(&self.outgoing, |i| (sends[i].buffer(), sends[i].at()));
        for (parcel, direct) in self.outgoing.iter().zip(outgoing) {
            let address = match direct {
                Some(address) => address,
                None => {
                    for (i, offset) in &parcel.messages {
                        let from = Place { buffer: sends[*i].buffer(), at: sends[*i].at() };
                        self.staged(&on.0, parcel.at + offset, from, true)?;
                    }
                    self.staging.address() + parcel.at
                }
            };
            items.push(item(HcclSendRecvType::HCCL_SEND, address, parcel));
        }
        for (parcel, direct) in self.incoming.iter().zip(self.arrivals()) {
            let address = direct.unwrap_or(self.staging.address() + parcel.at);
            items.push(item(HcclSendRecvType::HCCL_RECV, address, parcel));
        }
        Ok(items)
    }

    /// Queues unpacking.
    pub(crate) fn unpack(&self, on: &AscendStream) -> Result<()> {
        for (parcel, _) in self.incoming.iter().zip(self.arrivals()).filter(|(_, direct)| direct.is_none()) {
            for (i, offset) in &parcel.messages {
                let (buffer, at) = &self.receives[*i];
                self.staged(&on.0, parcel.at + offset, Place { buffer, at }, false)?;
            }
        }
        Ok(())
    }

    /// Memory that a round uses beside the sends.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = AscendBuffer> + '_ {
        self.receives.iter().map(|(b, _)| b.clone()).chain([self.staging.clone()])
    }

    /// Where incoming parcels arrive without staging.
    fn arrivals(&self) -> Vec<Option<usize>> {
        self.direct(&self.incoming, |i| (&self.receives[i].0, &self.receives[i].1))
    }

    /// Addresses of the parcels that go as they lie: those of one dense message; `view` gives the place of a message.
    fn direct<'v>(
        &self,
        parcels: &[Parcel],
        view: impl Fn(usize) -> (&'v AscendBuffer, &'v Strided),
    ) -> Vec<Option<usize>> {
        let one = |p: &Parcel| match p.messages[..] {
            [(one, _)] if view(one).1.is_dense() => Some(view(one)),
            _ => None,
        };
        let places: Vec<_> = parcels.iter().map(one).collect();
        let alike = |p: &Option<(&AscendBuffer, _)>| matches!((p, &places[0]), (Some(a), Some(b)) if a.0.same(b.0));
        if self.together && !places.iter().all(alike) {
            return vec![None; parcels.len()];
        }
        places.into_iter().map(|p| p.map(|(buffer, at)| address(buffer, at))).collect()
    }

    /// Copies between a view and the staging at byte `offset`.
    fn staged(&self, on: &StreamState, offset: usize, view: Place<'_>, pack: bool) -> Result<()> {
        let dense = Strided::dense(view.at.dtype(), view.at.extent()).shifted(offset / view.at.dtype().size())?;
        let staged = Place { buffer: &self.staging, at: &dense };
        if pack { on_device(on, view, staged) } else { on_device(on, staged, view) }
    }
}

fn address(buffer: &AscendBuffer, at: &Strided) -> usize {
    buffer.address() + at.byte_range().start
}

fn item(kind: HcclSendRecvType, address: usize, parcel: &Parcel) -> HcclSendRecvItem {
    HcclSendRecvItem {
        sendRecvType: kind,
        buf: address as *mut std::ffi::c_void,
        count: parcel.bytes as u64,
        dataType: HcclDataType::HCCL_DATA_TYPE_UINT8,
        remoteRank: parcel.peer,
    }
}

/// One parcel for every other rank that has a message with bytes; `end` is the end of the staging so far.
fn parcels(list: &[Message], me: u32, size: u32, end: &mut usize) -> Vec<Parcel> {
    let mut all = Vec::new();
    for peer in (0..size).filter(|&p| p != me) {
        let mut parcel = Parcel { peer, bytes: 0, at: *end, messages: Vec::new() };
        for (i, m) in list.iter().enumerate().filter(|(_, m)| m.peer == peer && m.bytes() > 0) {
            let offset = parcel.bytes.next_multiple_of(ALIGN);
            parcel.messages.push((i, offset));
            parcel.bytes = offset + m.bytes();
        }
        if parcel.bytes > 0 {
            *end = (*end + parcel.bytes).next_multiple_of(ALIGN);
            all.push(parcel);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_all_to_all_counts_from_the_lowest_address() {
        let of = |kind, address, remote, bytes| {
            item(kind, address, &Parcel { peer: remote, bytes, at: 0, messages: Vec::new() })
        };
        let (send, receive) = (HcclSendRecvType::HCCL_SEND, HcclSendRecvType::HCCL_RECV);
        let items = [of(send, 900, 0, 7), of(send, 640, 2, 5), of(receive, 64, 0, 3), of(receive, 128, 2, 9)];
        let all = AllToAll::new(&items, 3);
        assert_eq!(all.bases, [640, 64]);
        assert_eq!(all.counts, [vec![7, 0, 5], vec![3, 0, 9]]);
        assert_eq!(all.offsets, [vec![260, 0, 0], vec![0, 0, 64]]);
    }

    #[test]
    fn both_sides_of_a_pair_lay_their_parcel_out_alike() {
        let message = |receives, peer, dim| Message { receives, peer, dtype: DType::F16, extent: [1, 1, 3, dim] };
        let dims = [5, 0, 7, 1];
        let sends: Vec<_> = dims.iter().flat_map(|&d| [message(false, 2, d), message(false, 0, d + 1)]).collect();
        let receives: Vec<_> = dims.iter().map(|&d| message(true, 1, d)).collect();
        let (mut a, mut b) = (0, 0);
        let to = parcels(&sends, 1, 3, &mut a).pop().expect("a parcel to rank 2");
        let from = parcels(&receives, 2, 3, &mut b).pop().expect("a parcel from rank 1");
        let offsets = |p: &Parcel| p.messages.iter().map(|(_, offset)| *offset).collect::<Vec<_>>();
        assert_eq!((to.peer, from.peer, to.bytes, offsets(&to)), (2, 1, from.bytes, offsets(&from)));
        assert!(offsets(&to).iter().all(|o| o % ALIGN == 0));
    }
}
