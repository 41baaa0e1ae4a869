use longspan_hal::DType;
use proptest::prelude::*;

use super::*;

/// Pairs `(batch, q, k)` of a slice.
fn pairs(s: &Slice) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
    let selected = |q: u32, k: u32| (s.lo..=s.hi).contains(&((i64::from(k - s.k.start)) - i64::from(q - s.q.start)));
    s.q.clone()
        .flat_map(move |q| s.k.clone().map(move |k| (q, k)))
        .filter(move |&(q, k)| selected(q, k))
        .map(|(q, k)| (s.batch as usize, q as usize, k as usize))
}

/// Pairs of a part, as the vendor documents bands: counted from the lower right corner.
fn pairs_of(p: &Part) -> Vec<(usize, usize, usize)> {
    let corner = p.keys.len() as i64 - p.rows.len() as i64;
    let sees = |i: usize, j: usize| {
        let right = j as i64 - i as i64 - corner;
        p.band.is_none_or(|[before, after]| -before <= right && right <= after)
    };
    (0..p.rows.len())
        .flat_map(|i| (0..p.keys.len()).map(move |j| (i, j)))
        .filter(|&(i, j)| sees(i, j))
        .map(|(i, j)| (p.batch, p.rows.start + i, p.keys.start + j))
        .collect()
}

fn problem() -> impl Strategy<Value = (Spec, Slices)> {
    let slice = (0u32..2, 0u32..40, 1u32..30, 0u32..60, 1u32..30, -40i64..40, 0i64..50);
    prop::collection::vec(slice, 0..6).prop_map(|list| {
        let spec = Spec::new(DType::F32, 2, [70, 90], [4, 2], 8);
        let mut good = Vec::new();
        for (batch, q, m, k, n, lo, width) in list {
            let s = Slice { lo, hi: lo + width, ..Slice::full(batch, q..q + m, k..k + n) };
            // A second slice of the same rows: only such rows need sums.
            let twin = Slice { k: (k + n) % 60..(k + n) % 60 + 1, lo: -100, hi: 100, ..s.clone() };
            for s in [s, twin] {
                let with: Vec<Slice> = good.iter().cloned().chain([s.clone()]).collect();
                if Slices::new(&spec, with).is_ok() {
                    good.push(s);
                }
            }
        }
        let slices = Slices::new(&spec, good).expect("checked one by one");
        (spec, slices)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn bands_select_the_pairs_of_their_slices((spec, slices) in problem()) {
        let plan = FusedPlan::new(&spec, &slices);
        for (s, p) in slices.as_slice().iter().zip(&plan.parts) {
            prop_assert_eq!(pairs(s).collect::<Vec<_>>(), pairs_of(p));
        }
    }

    #[test]
    fn runs_hold_every_row_once_and_their_parts_whole((spec, slices) in problem()) {
        let plan = FusedPlan::new(&spec, &slices);
        let rows: Vec<_> = plan.runs.iter().flat_map(|r| r.rows.clone().map(|row| (r.batch, row))).collect();
        prop_assert!(rows.is_sorted_by(|a, b| a < b));
        prop_assert_eq!(rows.len(), spec.batch * spec.q_rows);
        let inside = |p: &Part, r: &RowTile| r.rows.start <= p.rows.start && p.rows.end <= r.rows.end;
        for (i, p) in plan.parts.iter().enumerate().filter(|(_, p)| !p.rows.is_empty()) {
            let home = plan.runs.iter().filter(|r| r.slices.contains(&i) && inside(p, r)).count();
            prop_assert_eq!(home, 1);
        }
    }

    #[test]
    fn exclusive_means_that_nothing_is_summed((spec, slices) in problem()) {
        let plan = FusedPlan::new(&spec, &slices);
        let mut seen = [std::collections::BTreeSet::new(), std::collections::BTreeSet::new()];
        let mut fresh = true;
        for p in plan.parts.iter().filter(|p| !p.rows.is_empty()) {
            fresh &= p.rows.clone().all(|r| seen[0].insert((p.batch, r)));
            fresh &= p.keys.clone().all(|k| seen[1].insert((p.batch, k)));
        }
        // Two slices of a group without common rows are summed without need: allowed.
        prop_assert!(fresh || !plan.exclusive);
    }

    #[test]
    fn chunks_cover_the_heads_of_any_cut(first in 0usize..20, heads in 0usize..20, group in 1usize..9, rows in 1usize..60_000) {
        let spec = Spec::new(DType::Bf16, 1, [rows, rows], [1, 1], 128).with_head_cut(first, heads, first + heads, group);
        let plan = FusedPlan::new(&spec, &Slices::new(&spec, []).expect("none"));
        let mut next = 0;
        for chunk in &plan.chunks {
            prop_assert_eq!(chunk.heads.start, next);
            next = chunk.heads.end;
            let each = chunk.heads.len() / chunk.kv.len();
            for h in chunk.heads.clone() {
                prop_assert_eq!(spec.kv_head(h), chunk.kv.start + (h - chunk.heads.start) / each);
            }
            prop_assert!(chunk.kv.len() == 1 || Scratch::bytes(&spec, Sizes::of(&spec, chunk)) <= LIMIT);
        }
        prop_assert_eq!(next, heads);
    }
}

/// What fused attention takes beside its tensors at S = 32768, 8 heads of 128.
#[test]
fn scratch_of_a_long_sequence_stays_small() {
    let spec = Spec::new(DType::Bf16, 1, [32768, 32768], [8, 8], 128);
    let causal = Slice { hi: 0, ..Slice::full(0, 0..32768, 0..32768) };
    let bytes = FusedPlan::new(&spec, &Slices::new(&spec, [causal]).expect("one slice")).scratch_bytes();
    assert!(bytes <= 256 << 20, "{bytes} bytes");
}
