//! The verdicts of calls that all ranks make together: one for all, from what each rank offers.

use std::collections::BTreeMap;
use std::sync::Arc;

use longspan_hal::{DType, Error, Extent, Result};

use crate::group::Group;

/// What a rank brings to a common call.
#[derive(Clone, Debug)]
pub(crate) enum Offer {
    /// Bytes from one rank for all: the others bring none.
    Bytes(Result<Option<Vec<u8>>>),
    /// Its device.
    Device(u32),
    /// Its messages, or why it cannot.
    Prepare(Result<Vec<Shape>>),
    /// The members of the new group.
    Subgroup(Vec<u32>),
    /// Whether its memory was allocated.
    Window(Result<()>),
}

/// What comes of a common call.
#[derive(Clone, Debug)]
pub(crate) enum Agreement {
    /// The bytes that one rank brought.
    Bytes(Vec<u8>),
    /// The device of each rank.
    Devices(Vec<u32>),
    /// Everything is as it should be.
    Done,
    /// The new group.
    Group(Arc<Group>),
}

/// One message as one side sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// The other rank.
    pub peer: u32,
    /// Whether this side sends.
    pub send: bool,
    /// Element type.
    pub dtype: DType,
    /// Sizes of the axes.
    pub extent: Extent,
}

/// The verdict on the offers of all ranks, in rank order.
pub(crate) fn judge(offers: &[Offer]) -> Result<Agreement> {
    let (mut messages, mut devices, mut bytes) = (Vec::new(), Vec::new(), None);
    let mut members: Option<&Vec<u32>> = None;
    for (rank, offer) in (0u32..).zip(offers) {
        match offer {
            Offer::Bytes(brought) => bytes = bytes.or(brought.clone()?),
            Offer::Device(ordinal) => devices.push(*ordinal),
            Offer::Prepare(shapes) => messages.push(shapes.as_ref().map_err(|e| of_rank(rank, e))?),
            Offer::Subgroup(list) if members.is_some_and(|m| m != list) => {
                let why = format!("rank {rank} names {list:?}, rank 0 {:?}", members.unwrap_or(list));
                return Err(Error::invalid("members", why));
            }
            Offer::Subgroup(list) => members = Some(list),
            Offer::Window(allocated) => allocated.clone()?,
        }
    }
    match_messages(&messages)?;
    if let Some(list) = members {
        return subgroup(list, offers.len()).map(Agreement::Group);
    }
    Ok(match bytes {
        Some(bytes) => Agreement::Bytes(bytes),
        None if devices.len() == offers.len() => Agreement::Devices(devices),
        None => Agreement::Done,
    })
}

/// An error of one rank, as all ranks see it.
fn of_rank(rank: u32, error: &Error) -> Error {
    match error {
        Error::Invalid { what, why } => Error::invalid(what, format!("on rank {rank}: {why}")),
        other => other.clone(),
    }
}

fn subgroup(members: &[u32], size: usize) -> Result<Arc<Group>> {
    let ascending = members.windows(2).all(|w| w[0] < w[1]);
    let Some(&last) = members.last().filter(|&&last| ascending && (last as usize) < size) else {
        let why = format!("{members:?} is not an ascending list of at least one of the ranks 0..{size}");
        return Err(Error::invalid("members", why));
    };
    // As many as there are distinct ranks up to `last`, so the count fits.
    let count = u32::try_from(members.len()).unwrap_or(last);
    Ok(Arc::new(Group::new(count, true)))
}

type Messages = BTreeMap<(u32, u32), Vec<(DType, Extent)>>;

/// Matches the messages of every pair, in list order.
fn match_messages(ranks: &[&Vec<Shape>]) -> Result<()> {
    let (mut sent, mut received) = (Messages::new(), Messages::new());
    for (rank, shapes) in (0u32..).zip(ranks) {
        for s in *shapes {
            let (list, pair) = if s.send { (&mut sent, (rank, s.peer)) } else { (&mut received, (s.peer, rank)) };
            list.entry(pair).or_default().push((s.dtype, s.extent));
        }
    }
    let none = Vec::new();
    for &(from, to) in sent.keys().chain(received.keys()) {
        let [out, into] = [&sent, &received].map(|list| list.get(&(from, to)).unwrap_or(&none));
        if out.len() != into.len() {
            let why = format!("rank {from} sends {} messages to rank {to}, which receives {}", out.len(), into.len());
            return Err(Error::invalid("exchange", why));
        }
        if let Some((i, (a, b))) = out.iter().zip(into).enumerate().find(|(_, (a, b))| a != b) {
            let why = format!(
                "message {i} from rank {from} to rank {to} is sent as {} {:?} and received as {} {:?}",
                a.0, a.1, b.0, b.1
            );
            return Err(Error::invalid("exchange", why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(send: bool, peer: u32, n: usize) -> Shape {
        Shape { peer, send, dtype: DType::F32, extent: [1, 1, 1, n] }
    }

    #[test]
    fn messages_match_in_list_order() {
        let good = [
            Offer::Prepare(Ok(vec![shape(true, 1, 3), shape(true, 1, 4), shape(true, 0, 1), shape(false, 0, 1)])),
            Offer::Prepare(Ok(vec![shape(false, 0, 3), shape(false, 0, 4)])),
        ];
        assert!(matches!(judge(&good), Ok(Agreement::Done)));
        for bad in [
            vec![shape(false, 0, 4), shape(false, 0, 3)],
            vec![shape(false, 0, 3)],
            vec![shape(false, 0, 3), shape(false, 0, 4), shape(true, 0, 1)],
        ] {
            let offers = [good[0].clone(), Offer::Prepare(Ok(bad))];
            assert!(matches!(judge(&offers), Err(Error::Invalid { what: "exchange", .. })));
        }
    }

    #[test]
    fn one_rank_that_cannot_is_enough_and_is_named() {
        let offers = [Offer::Prepare(Ok(vec![])), Offer::Prepare(Err(Error::invalid("exchange", "no")))];
        assert_eq!(judge(&offers).expect_err("refused").to_string(), "invalid exchange: on rank 1: no");
        let short = Error::OutOfMemory { wanted: 2, free: 1 };
        let offers = [Offer::Window(Err(short.clone())), Offer::Window(Ok(()))];
        assert_eq!(judge(&offers).expect_err("refused"), short);
    }

    #[test]
    fn bytes_and_devices_reach_all() {
        let offers = [Offer::Bytes(Ok(Some(vec![7]))), Offer::Bytes(Ok(None))];
        assert!(matches!(judge(&offers), Ok(Agreement::Bytes(b)) if b == [7]));
        let offers = [Offer::Device(1), Offer::Device(0)];
        assert!(matches!(judge(&offers), Ok(Agreement::Devices(d)) if d == [1, 0]));
    }

    #[test]
    fn members_are_the_same_on_all_ranks_and_ascend() {
        let of = |a: &[u32], b: &[u32]| judge(&[Offer::Subgroup(a.to_vec()), Offer::Subgroup(b.to_vec())]);
        assert!(matches!(of(&[0, 1], &[0, 1]), Ok(Agreement::Group(g)) if g.size == 2));
        for (a, b) in [(vec![1, 0], vec![1, 0]), (vec![2], vec![2]), (vec![], vec![]), (vec![0], vec![1])] {
            assert!(matches!(of(&a, &b), Err(Error::Invalid { what: "members", .. })));
        }
    }
}
