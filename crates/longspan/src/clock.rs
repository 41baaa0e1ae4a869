//! One clock for all ranks, from barriers that they passed together.
//!
//! ```text
//! rank r enters barrier b at E(r, b) and leaves it at X(r, b), on its own clock; nobody leaves before everybody has entered
//! true times:   X(r) = E(r) + d(r) <= max E + d(r) <= X(s) + d(r)      for any r, s, with d(r) = X(r) - E(r)
//! so            |X(r) - X(s)| <= max d
//! choose the b with the least max over r of d(r, b), and let X(r, b) be the same moment for all r: wrong by max d at most
//! ```
//!
//! No host clock is needed, so it holds for ranks in other processes and on other machines. Clocks that drift apart during the
//! run are not corrected: some microseconds a second at most on the machines that we know.

use std::time::Duration;

use crate::DeviceReport;

/// Puts the spans and meetings of all ranks on one clock, whose zero is the earliest moment of any rank, and returns how far
/// times of different ranks may be off at most. `None`, and nothing is changed, if the ranks did not all meet equally often.
pub fn align(ranks: &mut [DeviceReport]) -> Option<Duration> {
    let meetings = ranks.first()?.meetings.len();
    if ranks.iter().any(|rank| rank.meetings.len() != meetings) {
        return None;
    }
    let longest = |b: usize| ranks.iter().map(|r| r.meetings[b].end.saturating_sub(r.meetings[b].start)).max();
    let (precision, best) = (0..meetings).filter_map(|b| Some((longest(b)?, b))).min()?;
    let latest = ranks.iter().map(|rank| rank.meetings[best].end).max()?;
    for rank in ranks {
        let later = latest - rank.meetings[best].end;
        for span in &mut rank.spans {
            span.start += later;
            span.end += later;
        }
        for meeting in &mut rank.meetings {
            *meeting = meeting.start + later..meeting.end + later;
        }
    }
    Some(precision)
}

#[cfg(test)]
mod tests {
    use longspan_hal::{Memory, Step};
    use longspan_seqpar::Work;

    use super::*;
    use crate::SpanReport;

    const US: Duration = Duration::from_micros(1);

    /// A rank that was `ahead` at the true zero, and saw `barriers` (true times in microseconds) and one span.
    fn rank(barriers: &[(u32, u32)], clock: u32, span: (u32, u32)) -> DeviceReport {
        let own = |t: u32| US * (t - clock);
        let span = SpanReport {
            work: Work::Compute,
            step: Step::default(),
            backward: false,
            start: own(span.0),
            end: own(span.1),
            bytes_sent: 0,
        };
        let meetings = barriers.iter().map(|&(enter, leave)| own(enter)..own(leave)).collect();
        DeviceReport { spans: vec![span], meetings, memory: Memory::default(), tensor_bytes: 0 }
    }

    #[test]
    fn ranks_whose_clocks_start_apart_agree_after_a_meeting() {
        // Rank 1's clock starts 70 us after rank 0's; the second barrier is passed within 4 us.
        let a = rank(&[(10, 100), (101, 103)], 10, (200, 300));
        let b = rank(&[(80, 102), (100, 104)], 80, (210, 290));
        let mut ranks = [a, b];
        assert_eq!(align(&mut ranks), Some(4 * US));
        assert_eq!(ranks[0].spans[0].start, 190 * US);
        // Off by one: the ranks left the barrier at 103 and 104.
        assert_eq!(ranks[1].spans[0].start, 199 * US);
        assert_eq!(ranks[0].meetings[1].end, ranks[1].meetings[1].end);
    }

    #[test]
    fn without_a_common_meeting_nothing_changes() {
        let mut ranks = [rank(&[(1, 2)], 0, (3, 4)), rank(&[], 0, (3, 4))];
        assert_eq!(align(&mut ranks), None);
        assert_eq!(ranks[0].spans, ranks[1].spans);
        assert_eq!(align(&mut []), None);
    }

    /// The promise of the precision, over many clocks and barriers.
    #[test]
    fn times_of_two_ranks_are_never_further_apart_than_the_precision() {
        let mut state = 1u64;
        let mut draw = |below: u32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 % below
        };
        for _ in 0..500 {
            let size = 1 + draw(6) as usize;
            let clocks: Vec<u32> = (0..size).map(|_| draw(1000)).collect();
            let mut barriers = vec![Vec::new(); size];
            for b in 0..4 {
                let enters: Vec<u32> = (0..size).map(|_| 1000 * (b + 1) + draw(300)).collect();
                let last = enters.iter().copied().max().unwrap_or(0);
                for r in 0..size {
                    barriers[r].push((enters[r], last + draw(50)));
                }
            }
            let mut ranks: Vec<_> = (0..size).map(|r| rank(&barriers[r], clocks[r], (9000, 9001))).collect();
            let precision = align(&mut ranks).expect("they met");
            let starts: Vec<Duration> = ranks.iter().map(|r| r.spans[0].start).collect();
            let [least, most] = [starts.iter().min(), starts.iter().max()].map(|t| *t.expect("ranks"));
            assert!(most - least <= precision, "{starts:?} {precision:?}");
        }
    }
}
