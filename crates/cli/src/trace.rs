//! `longspan run --trace`: a record as a file of trace events, which <https://ui.perfetto.dev> and `chrome://tracing` show.
//!
//! The format is JSON ("Trace Event Format"): a process is a rank, its threads 1, 2 and 3 are the streams of compute, of
//! transfers and of copies within the rank, times are microseconds with three decimals.
//!
//! | event | what |
//! |---|---|
//! | `M` | names and order of ranks and streams |
//! | `X` | a span: `name` says what and which step; `args` has `pass`, `phase`, `index`, for exchanges `bytes_sent`, `gb_per_s` (10^9 bytes sent over the span's time, which includes waiting), `to` and `from` (bytes by rank) |
//! | `s`, `f` | an arrow from the sender's span to the receiver's, one for each pair of ranks of an exchange; equal `id` |
//!
//! `otherData` says how far times of different ranks may be off (`clock_precision_us`, null if they are not comparable).

use std::time::Duration;

use longspan::{SpanReport, Work};
use serde_json::{Map, Value, json};

use crate::record::{Flow, Record};

/// The file's content.
pub fn trace(record: &Record) -> Value {
    let flows = record.flows();
    let mut events = Vec::new();
    for rank in 0..record.ranks.len() as u32 {
        events.extend(names(record, rank));
    }
    let mut timed = Vec::new();
    for (rank, spans) in (0u32..).zip(&record.ranks) {
        timed.extend(spans.spans.iter().map(|span| (span.start, slice(record, rank, span, &flows))));
    }
    for (id, flow) in flows.iter().enumerate() {
        timed.extend(arrow(id, flow));
    }
    // A slice comes before the arrows that start with it.
    timed.sort_by_key(|(at, _)| *at);
    events.extend(timed.into_iter().map(|(_, event)| event));
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "program": concat!("longspan ", env!("CARGO_PKG_VERSION")),
            "run": record.title,
            "mesh": record.mesh.to_string(),
            "clock_precision_us": record.precision.map(|p| p.as_secs_f64() * 1e6),
        },
    })
}

fn names(record: &Record, rank: u32) -> Vec<Value> {
    let at = record.mesh.coords(rank);
    let name = format!("rank {rank} (ring {}, ulysses {})", at.ring, at.ulysses);
    let meta =
        |what: &str, tid: u32, args: Value| json!({"ph": "M", "name": what, "pid": rank, "tid": tid, "args": args});
    vec![
        meta("process_name", 0, json!({"name": name})),
        meta("process_sort_index", 0, json!({"sort_index": rank})),
        meta("thread_name", 1, json!({"name": "compute"})),
        meta("thread_sort_index", 1, json!({"sort_index": 1})),
        meta("thread_name", 2, json!({"name": "transfer"})),
        meta("thread_sort_index", 2, json!({"sort_index": 2})),
        meta("thread_name", 3, json!({"name": "copies"})),
        meta("thread_sort_index", 3, json!({"sort_index": 3})),
    ]
}

fn slice(record: &Record, rank: u32, span: &SpanReport, flows: &[Flow<'_>]) -> Value {
    let pass = if span.backward { "backward" } else { "forward" };
    let mut args = Map::new();
    args.insert("pass".into(), pass.into());
    args.insert("phase".into(), span.step.phase.into());
    args.insert("index".into(), span.step.index.into());
    if span.work == Work::Exchange {
        let seconds = (span.end - span.start).as_secs_f64();
        args.insert("bytes_sent".into(), span.bytes_sent.into());
        if seconds > 0.0 {
            args.insert("gb_per_s".into(), (span.bytes_sent as f64 / seconds / 1e9).into());
        }
        let same = |s: &SpanReport| s.step == span.step && s.backward == span.backward;
        let to = flows.iter().filter(|f| f.from == rank && same(f.sent)).map(|f| (f.to, f.bytes));
        let from = flows.iter().filter(|f| f.to == rank && same(f.received)).map(|f| (f.from, f.bytes));
        args.insert("to".into(), by_rank(to));
        args.insert("from".into(), by_rank(from));
    }
    json!({
        "ph": "X", "name": record.name(span), "cat": pass, "pid": rank, "tid": stream(span),
        "ts": micros(span.start), "dur": micros(span.end - span.start), "args": args,
    })
}

fn by_rank(bytes: impl Iterator<Item = (u32, u64)>) -> Value {
    bytes.map(|(rank, bytes)| (format!("rank {rank}"), bytes.into())).collect::<Map<_, _>>().into()
}

/// Both ends of an arrow, each inside the span that it belongs to.
fn arrow(id: usize, flow: &Flow<'_>) -> [(Duration, Value); 2] {
    let (sent, received) = (flow.sent, flow.received);
    // A viewer takes an end at a span's very end for one behind it.
    let last = received.start.max(received.end.saturating_sub(Duration::from_nanos(1)));
    let event = |phase: &str, rank: u32, span: &SpanReport, at: Duration| {
        let name = format!("{}, {} bytes", span.step.phase, flow.bytes);
        let mut event = json!({
            "ph": phase, "id": id, "name": name, "cat": "message", "pid": rank, "tid": stream(span), "ts": micros(at),
        });
        if phase == "f" {
            event["bp"] = "e".into();
        }
        (at, event)
    };
    [event("s", flow.from, sent, sent.start), event("f", flow.to, received, last)]
}

/// The thread that stands for the stream of a span.
fn stream(span: &SpanReport) -> u32 {
    match span.work {
        Work::Compute => 1,
        Work::Exchange => 2,
        Work::Collect => 3,
    }
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::record::tests::records;

    /// What a viewer relies on: order in time, slices of known ranks and streams, and arrows whose two ends lie in slices of
    /// the ranks that exchanged.
    pub fn check(trace: &Value, ranks: usize) -> Result<(), TestCaseError> {
        let events = trace["traceEvents"].as_array().expect("a list");
        let of = |ph: &str| events.iter().filter(|e| e["ph"] == ph).collect::<Vec<_>>();
        let number = |e: &Value, key: &str| e[key].as_f64().expect("a number");
        let named: Vec<&Value> = of("M").into_iter().filter(|e| e["name"] == "process_name").collect();
        prop_assert_eq!(named.len(), ranks);
        let timed: Vec<f64> = events.iter().filter(|e| e["ph"] != "M").map(|e| number(e, "ts")).collect();
        prop_assert!(timed.windows(2).all(|w| w[0] <= w[1]), "{:?}", timed);
        for slice in of("X") {
            prop_assert!(number(slice, "dur") >= 0.0 && slice["pid"].as_u64().expect("a rank") < ranks as u64);
            prop_assert!(slice["tid"] == 1 || slice["tid"] == 2);
        }
        let ends =
            |ph: &str| of(ph).into_iter().map(|e| (e["id"].as_u64().expect("an id"), e)).collect::<BTreeMap<_, _>>();
        let (starts, finishes) = (ends("s"), ends("f"));
        prop_assert_eq!(starts.len(), of("s").len());
        prop_assert!(starts.keys().eq(finishes.keys()) && finishes.len() == of("f").len());
        for end in starts.values().chain(finishes.values()) {
            let inside = of("X").into_iter().any(|x| {
                let (ts, from) = (number(end, "ts"), number(x, "ts"));
                x["pid"] == end["pid"] && x["tid"] == 2 && from <= ts && ts <= from + number(x, "dur")
            });
            prop_assert!(inside, "{}", end);
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn traces_are_what_a_viewer_relies_on(record in records()) {
            let file = trace(&record).to_string();
            let read: Value = serde_json::from_str(&file).expect("JSON");
            check(&read, record.ranks.len())?;
            let spans: usize = record.ranks.iter().map(|r| r.spans.len()).sum();
            let events = read["traceEvents"].as_array().expect("a list");
            prop_assert_eq!(events.iter().filter(|e| e["ph"] == "X").count(), spans);
            let sent: u64 = record.ranks.iter().flat_map(|r| r.traffic.iter().flatten()).map(|t| t.bytes).sum();
            let told: u64 = events.iter().filter(|e| e["ph"] == "X")
                .filter_map(|e| e["args"]["to"].as_object()).flat_map(|to| to.values()).filter_map(Value::as_u64).sum();
            prop_assert_eq!(told, sent);
        }
    }
}
