//! What a rank did when, as bytes for process 0 of a job.

use std::io::{Error, Result};
use std::time::Duration;

use longspan::{DeviceReport, Memory, SpanReport, Step, Traffic, Work};
use longspan_peers::{Fields, Reader};

/// Times of a rank, and the messages that it sent in the forward and in the backward.
pub type Told = (DeviceReport, [Vec<Traffic>; 2]);

const WORK: [Work; 3] = [Work::Collect, Work::Compute, Work::Exchange];

/// Adds `told` to `fields`.
pub fn pack(fields: Fields, (report, traffic): &Told) -> Fields {
    let DeviceReport { spans, meetings, memory, tensor_bytes } = report;
    let Memory { used, peak, free, .. } = *memory;
    let fields = [used, peak, free, *tensor_bytes].into_iter().fold(fields, Fields::number);
    let fields = spans.iter().fold(fields.number(spans.len() as u64), |f, span| {
        let work = WORK.iter().position(|w| *w == span.work).unwrap_or_default();
        let f = f.number(work as u64).step(span.step).number(u64::from(span.backward)).number(span.bytes_sent);
        f.number(nanos(span.start)).number(nanos(span.end))
    });
    let fields = meetings.iter().fold(fields.number(meetings.len() as u64), |f, meeting| {
        f.number(nanos(meeting.start)).number(nanos(meeting.end))
    });
    traffic.iter().fold(fields, |f, pass| {
        pass.iter().fold(f.number(pass.len() as u64), |f, message| {
            let Traffic { phase, index, to, bytes } = *message;
            f.step(Step { phase, index }).number(u64::from(to)).number(bytes)
        })
    })
}

/// What [`pack`] added.
///
/// # Errors
/// If it is something else.
pub fn unpack(fields: &mut Reader<'_>) -> Result<Told> {
    let [used, peak, free, tensor_bytes] = [fields.number()?, fields.number()?, fields.number()?, fields.number()?];
    let memory = Memory::new(used, peak, free);
    let spans = list(fields, span)?;
    let meetings = list(fields, |f| Ok(time(f)?..time(f)?))?;
    let traffic = [list(fields, message)?, list(fields, message)?];
    Ok((DeviceReport { spans, meetings, memory, tensor_bytes }, traffic))
}

fn list<T>(fields: &mut Reader<'_>, one: impl Fn(&mut Reader<'_>) -> Result<T>) -> Result<Vec<T>> {
    (0..fields.number()?).map(|_| one(fields)).collect()
}

fn span(fields: &mut Reader<'_>) -> Result<SpanReport> {
    let work = WORK.get(fields.number()? as usize).copied().ok_or_else(|| Error::other("work of an unknown kind"))?;
    let (step, backward, bytes_sent) = (fields.step()?, fields.number()? == 1, fields.number()?);
    Ok(SpanReport { work, step, backward, start: time(fields)?, end: time(fields)?, bytes_sent })
}

fn message(fields: &mut Reader<'_>) -> Result<Traffic> {
    let Step { phase, index } = fields.step()?;
    Ok(Traffic { phase, index, to: fields.number()? as u32, bytes: fields.number()? })
}

fn time(fields: &mut Reader<'_>) -> Result<Duration> {
    fields.number().map(Duration::from_nanos)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::record::tests::records;

    proptest! {
        #[test]
        fn what_a_rank_did_comes_back_from_its_bytes(record in records()) {
            for rank in record.ranks {
                let meetings = rank.spans.iter().map(|s| s.start..s.end).collect();
                let report =
                    DeviceReport { spans: rank.spans, meetings, memory: Memory::new(1, 2, 3), tensor_bytes: 4 };
                let told = (report, rank.traffic);
                let bytes = pack(Fields::default(), &told).0;
                let mut fields = Reader(&bytes);
                prop_assert_eq!(format!("{:?}", unpack(&mut fields).expect("packed above")), format!("{told:?}"));
                prop_assert!(fields.0.is_empty());
                prop_assert!(unpack(&mut Reader(&bytes[..bytes.len() - 1])).is_err());
            }
        }
    }
}
