use longspan_hal::DType;
use proptest::prelude::*;

use super::*;

fn problem() -> impl Strategy<Value = (Spec, Slices, usize)> {
    let slice = (0u32..2, 0u32..40, 1u32..30, 0u32..60, 1u32..30, -40i64..40, 0i64..50);
    (prop::collection::vec(slice, 0..5), 1usize..20).prop_map(|(list, tile)| {
        let spec = Spec::new(DType::F32, 2, [70, 90], [1, 1], 8);
        let mut good = Vec::new();
        for (batch, q, m, k, n, lo, width) in list {
            let s = Slice { lo, hi: lo + width, ..Slice::full(batch, q..q + m, k..k + n) };
            let with: Vec<Slice> = good.iter().cloned().chain([s.clone()]).collect();
            if Slices::new(&spec, with).is_ok() {
                good.push(s);
            }
        }
        let slices = Slices::new(&spec, good).expect("checked one by one");
        (spec, slices, tile)
    })
}

fn pairs_of(s: &Slice, rows: Range<usize>, keys: Range<usize>) -> Vec<(u32, usize, usize)> {
    let rel = |q: usize, k: usize| (k as i64 - i64::from(s.k.start)) - (q as i64 - i64::from(s.q.start));
    rows.flat_map(|q| keys.clone().map(move |k| (q, k)))
        .filter(|&(q, k)| (s.lo..=s.hi).contains(&rel(q, k)))
        .map(|(q, k)| (s.batch, q, k))
        .collect()
}

fn all_pairs(slices: &Slices) -> Vec<(u32, usize, usize)> {
    let wide = |r: &Range<u32>| r.start as usize..r.end as usize;
    let mut all: Vec<_> = slices.as_slice().iter().flat_map(|s| pairs_of(s, wide(&s.q), wide(&s.k))).collect();
    all.sort_unstable();
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn row_tiles_cover_every_row_and_pair_once((spec, slices, tile) in problem()) {
        let plan = BasicPlan::with_tile(&spec, &slices, tile);
        let mut rows: Vec<_> = plan.rows.iter().flat_map(|t| t.rows.clone().map(|r| (t.batch, r))).collect();
        prop_assert!(rows.is_sorted());
        rows.dedup();
        prop_assert_eq!(rows.len(), spec.batch * spec.q_rows);
        let mut found = Vec::new();
        for t in &plan.rows {
            prop_assert!(!t.rows.is_empty() && t.rows.len() <= tile);
            let mut seeing: Vec<usize> = Vec::new();
            for s in &slices.as_slice()[t.slices.clone()] {
                for keys in key_pieces(s, &t.rows, tile) {
                    prop_assert!(keys.len() <= tile);
                    let pairs = pairs_of(s, t.rows.clone(), keys.clone());
                    // Every key that is loaded is selected by some row.
                    let seen: std::collections::BTreeSet<_> = pairs.iter().map(|p| p.2).collect();
                    prop_assert_eq!(seen.len(), keys.len());
                    seeing.extend(pairs.iter().map(|p| p.1));
                    found.extend(pairs);
                }
            }
            seeing.sort_unstable();
            seeing.dedup();
            // Every row that is loaded sees some key.
            prop_assert!(t.slices.is_empty() || seeing.len() == t.rows.len());
        }
        found.sort_unstable();
        prop_assert_eq!(found, all_pairs(&slices));
    }

    #[test]
    fn key_tiles_cover_every_key_and_pair_once((spec, slices, tile) in problem()) {
        let plan = BasicPlan::with_tile(&spec, &slices, tile);
        let keys: Vec<_> = plan.keys.iter().flat_map(|t| t.keys.clone().map(|k| (t.batch, k))).collect();
        prop_assert!(keys.is_sorted());
        prop_assert_eq!(keys.len(), spec.batch * spec.k_rows);
        let mut found = Vec::new();
        for t in &plan.keys {
            for p in &t.pairs {
                let s = &slices.as_slice()[p.slice];
                prop_assert!(p.keys.start >= t.keys.start && p.keys.end <= t.keys.end && p.rows.len() <= tile);
                let pairs = pairs_of(s, p.rows.clone(), p.keys.clone());
                let of = |f: fn(&(u32, usize, usize)) -> usize| pairs.iter().map(f).collect::<std::collections::BTreeSet<_>>();
                prop_assert_eq!(of(|p| p.1).len(), p.rows.len());
                prop_assert_eq!(of(|p| p.2).len(), p.keys.len());
                found.extend(pairs);
            }
        }
        found.sort_unstable();
        prop_assert_eq!(found, all_pairs(&slices));
    }

    #[test]
    fn units_cover_the_heads_of_any_cut(first in 0usize..20, heads in 0usize..20, group in 1usize..9) {
        let spec = Spec::new(DType::F32, 1, [4, 4], [1, 1], 8).with_head_cut(first, heads, first + heads, group);
        let mut next = 0;
        for unit in units(&spec) {
            prop_assert_eq!(unit.heads.start, next);
            next = unit.heads.end;
            let each = unit.heads.len() / unit.kv.len();
            for h in unit.heads.clone() {
                prop_assert_eq!(spec.kv_head(h), unit.kv.start + (h - unit.heads.start) / each);
            }
        }
        prop_assert_eq!(next, heads);
    }
}

/// What basic attention takes beside its tensors at S = 32768, 8 heads of 128.
#[test]
fn scratch_of_a_long_sequence_stays_small() {
    let spec = Spec::new(DType::Bf16, 1, [32768, 32768], [8, 8], 128).with_softcap(Some(30.0)).with_alibi(true);
    let causal = Slice { hi: 0, ..Slice::full(0, 0..32768, 0..32768) };
    for spec in [spec.clone(), spec.with_dropout(Some(0.1))] {
        let slices = Slices::new(&spec, [causal.clone()]).expect("one slice");
        let bytes = BasicPlan::new(&spec, &slices).scratch_bytes();
        assert!(bytes <= 256 << 20, "{bytes} bytes");
    }
}
