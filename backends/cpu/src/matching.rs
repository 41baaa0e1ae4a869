//! The verdicts of calls that all ranks make together: one for all, from what each rank offers.

use std::collections::BTreeMap;
use std::sync::Arc;

use longspan_hal::{DType, Error, Extent, Result};

use crate::group::Group;
use crate::personality::Personality;

/// What a rank brings to a common call.
#[derive(Clone, Debug)]
pub(crate) enum Offer {
    /// Its messages, or why it cannot.
    Prepare(Result<Vec<Shape>>),
    /// The members of the new group.
    Subgroup(Vec<u32>),
    /// Whether its memory was allocated.
    Window(Result<()>),
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
pub(crate) fn judge(offers: &[Offer], personality: Personality) -> Result<Option<Arc<Group>>> {
    let mut messages = Vec::new();
    let mut members: Option<&Vec<u32>> = None;
    for (rank, offer) in (0u32..).zip(offers) {
        match offer {
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
    members.map_or(Ok(None), |list| subgroup(list, offers.len(), personality).map(Some))
}

/// An error of one rank, as all ranks see it.
fn of_rank(rank: u32, error: &Error) -> Error {
    match error {
        Error::Invalid { what, why } => Error::invalid(what, format!("on rank {rank}: {why}")),
        other => other.clone(),
    }
}

fn subgroup(members: &[u32], size: usize, personality: Personality) -> Result<Arc<Group>> {
    let ascending = members.windows(2).all(|w| w[0] < w[1]);
    let Some(&last) = members.last().filter(|&&last| ascending && (last as usize) < size) else {
        let why = format!("{members:?} is not an ascending list of at least one of the ranks 0..{size}");
        return Err(Error::invalid("members", why));
    };
    // As many as there are distinct ranks up to `last`, so the count fits.
    let count = u32::try_from(members.len()).unwrap_or(last);
    Ok(Arc::new(Group::new(count, personality, true)))
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
