//! What ranks tell each other before an exchange, and the judgement, which every rank makes alike from the same offers.
//!
//! ```text
//! for every pair (a, b): the sends of a to b and the receives of b from a are as many,
//!                        and equal in dtype and extent one by one
//! ```

use longspan_hal::{DType, Error, Extent, Result};

use crate::wire::{Fields, Reader};

/// One message as its rank declared it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Message {
    /// Whether this rank receives it.
    pub receives: bool,
    /// The other rank.
    pub peer: u32,
    /// Element type.
    pub dtype: DType,
    /// Sizes of the axes.
    pub extent: Extent,
}

impl Message {
    /// Bytes that travel.
    pub fn bytes(&self) -> usize {
        self.extent.iter().product::<usize>() * self.dtype.size()
    }
}

/// An offer: messages, or why this rank has none.
pub fn offer(messages: &Result<Vec<Message>>) -> Fields {
    match messages {
        Err(error) => Fields::default().number(0).bytes(error.to_string().as_bytes()),
        Ok(messages) => messages.iter().fold(Fields::default().number(1), |fields, m| {
            let fields = fields.number(u64::from(m.receives)).number(u64::from(m.peer)).number(code(m.dtype));
            m.extent.iter().fold(fields, |f, &x| f.number(x as u64))
        }),
    }
}

fn code(dtype: DType) -> u64 {
    match dtype {
        DType::Bf16 => 0,
        DType::F16 => 1,
        _ => 2,
    }
}

fn parse(offer: &[u8]) -> std::io::Result<std::result::Result<Vec<Message>, String>> {
    let mut fields = Reader(offer);
    if fields.number()? == 0 {
        return Ok(Err(fields.text()?));
    }
    let mut messages = Vec::new();
    while !fields.0.is_empty() {
        let (receives, peer) = (fields.number()? != 0, fields.number()? as u32);
        let dtype = [DType::Bf16, DType::F16, DType::F32][fields.number()?.min(2) as usize];
        let mut extent = [0; 4];
        for x in &mut extent {
            *x = fields.number()? as usize;
        }
        messages.push(Message { receives, peer, dtype, extent });
    }
    Ok(Ok(messages))
}

/// Judges the [`offer`]s of all ranks; whether every rank sends bytes to every other one.
///
/// # Errors
/// [`Error::Invalid`] naming the message that does not fit, the same on every rank.
pub fn judge(offers: &[Vec<u8>]) -> Result<bool> {
    let wrong = |why: String| Err(Error::invalid("exchange", why));
    let mut all = Vec::new();
    for (rank, offer) in offers.iter().enumerate() {
        match parse(offer) {
            Ok(Ok(messages)) => all.push(messages),
            Ok(Err(why)) => return wrong(format!("rank {rank}: {why}")),
            Err(error) => return wrong(format!("rank {rank}: {error}")),
        }
    }
    for (from, sends) in all.iter().enumerate() {
        for (to, receives) in all.iter().enumerate() {
            let a: Vec<_> = sends.iter().filter(|m| !m.receives && m.peer as usize == to).collect();
            let b: Vec<_> = receives.iter().filter(|m| m.receives && m.peer as usize == from).collect();
            if a.len() != b.len() {
                return wrong(format!(
                    "rank {from} sends {} messages to rank {to}, which expects {}",
                    a.len(),
                    b.len()
                ));
            }
            if let Some(i) = (0..a.len()).find(|&i| (a[i].dtype, a[i].extent) != (b[i].dtype, b[i].extent)) {
                return wrong(format!(
                    "message {i} from rank {from} to rank {to} is {} {:?}, expected is {} {:?}",
                    a[i].dtype, a[i].extent, b[i].dtype, b[i].extent
                ));
            }
        }
    }
    let sends = |from: usize, to: usize| {
        all[from].iter().any(|m: &Message| !m.receives && m.peer as usize == to && m.bytes() > 0)
    };
    Ok((0..all.len()).all(|from| (0..all.len()).all(|to| from == to || sends(from, to))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(receives: bool, peer: u32, dim: usize) -> Message {
        Message { receives, peer, dtype: DType::F16, extent: [1, 2, 3, dim] }
    }

    fn judged(lists: [Vec<Message>; 2]) -> Result<bool> {
        judge(&lists.map(|l| offer(&Ok(l)).0))
    }

    #[test]
    fn pairs_match_in_order_whatever_lies_between() {
        let a = vec![
            message(false, 1, 4),
            message(true, 1, 6),
            message(false, 1, 5),
            message(false, 0, 7),
            message(true, 0, 7),
        ];
        let b = vec![message(true, 0, 4), message(true, 0, 5), message(false, 0, 6)];
        assert_eq!(judged([a, b]), Ok(true));
    }

    #[test]
    fn all_to_all_means_bytes_from_every_rank_to_every_other() {
        let pair = |dim, back| {
            let a = vec![message(false, 1, dim), message(true, 1, back), message(false, 0, 3), message(true, 0, 3)];
            judged([a, vec![message(true, 0, dim), message(false, 0, back)]])
        };
        assert_eq!([pair(4, 5), pair(4, 0), pair(0, 0)], [Ok(true), Ok(false), Ok(false)]);
    }

    #[test]
    fn what_differs_is_named() {
        let text = |lists| judged(lists).expect_err("they differ").to_string();
        assert!(
            text([vec![message(false, 1, 4)], vec![]]).contains("rank 0 sends 1 messages to rank 1, which expects 0")
        );
        let swapped =
            text([vec![message(false, 1, 4), message(false, 1, 5)], vec![message(true, 0, 5), message(true, 0, 4)]]);
        assert!(swapped.contains("message 0 from rank 0 to rank 1"), "{swapped}");
        let refused = judge(&[offer(&Ok(vec![])).0, offer(&Err(Error::invalid("recv", "no window"))).0]);
        assert!(refused.expect_err("refused").to_string().contains("rank 1: invalid recv: no window"));
    }
}
