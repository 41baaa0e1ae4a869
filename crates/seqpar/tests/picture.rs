//! The pictures of layouts and routes.

mod common;

use common::{layouts_of, masks, meshes};
use longspan_seqpar::layout::Layout;
use longspan_seqpar::mask::Mask;
use longspan_seqpar::mesh::{Mesh, Placement};
use longspan_seqpar::picture::{Balance, holders, patches, steps};
use proptest::prelude::*;

fn mesh(ulysses: u32, ring: u32) -> Mesh {
    Mesh::new(ulysses, ring, Placement::UlyssesInner).expect("ok")
}

#[test]
fn holders_of_a_small_zigzag() {
    let picture = holders(&Layout::zigzag(64, &mesh(2, 2)), 100);
    let (held, none) = ("#".repeat(16), ".".repeat(16));
    let lines: Vec<&str> = picture.lines().collect();
    assert_eq!(lines[0], "zigzag layout of 64 tokens on 4 ranks: 2 ulysses x 2 ring, ulysses-inner");
    assert_eq!(lines[2], format!("rank  ring  ulysses  tokens 0{:>63}", 63));
    assert_eq!(lines[3], format!("   0     0        0  0-15   {held}{none}{none}{none}"));
    assert_eq!(lines[4], format!("   1     0        1  48-63  {none}{none}{none}{held}"));
    assert_eq!(lines[5], format!("   2     1        0  16-31  {none}{held}{none}{none}"));
    assert_eq!(lines[6], format!("   3     1        1  32-47  {none}{none}{held}{none}"));
}

#[test]
fn steps_of_a_small_zigzag() {
    let layout = Layout::zigzag(64, &mesh(2, 2));
    let picture = steps(&Mask::causal(), &layout, &layout, 0, 100).expect("ok");
    for line in [
        "ring rank 0 of 2 (ranks 0, 1), causal mask, zigzag layout, 32 queries",
        "step 0: its own block, 528 pairs, 50.8 % of this ring rank's",
        "  keys 0-15 (run 0) hop round the ring, since every ring rank needs them: next to 1",
        "  keys 48-63 (run 1) stay: no other ring rank needs them",
        "  attend: queries 48-63 x keys 48-63, 136 pairs",
        "          rows 16-31 x 16-31, j - i <= 0: keys up to the query itself",
        "step 1: the block of ring rank 1, 512 pairs, 49.2 % of this ring rank's",
        "  keys 16-31 (run 0) hop here from ring rank 1, their last stop",
        "          rows 16-31 x 0-15, all",
        "1,040 (query, key) pairs in all steps, per head and batch row",
    ] {
        assert!(picture.lines().any(|l| l == line), "`{line}` is not in\n{picture}");
    }
}

#[test]
fn what_nobody_needs_is_named() {
    let layout = Layout::zigzag(2000, &mesh(1, 8));
    let picture = steps(&Mask::window(Some(64), Some(0)), &layout, &layout, 1, 100).expect("ok");
    for line in [
        "  keys 125-249 (run 0) go straight to ring rank 2",
        "  keys 0-124 (run 0) come straight from their owner",
        "  1 of its 2 runs not needed",
        "          rows 0-124 x 0-124, 61 <= j - i: keys from 64 before the query",
        "step 2: nothing of ring rank 7 is needed: neither received nor computed",
    ] {
        assert!(picture.lines().any(|l| l == line), "`{line}` is not in\n{picture}");
    }
}

#[test]
fn balance_tells_zigzag_from_contiguous() {
    let mesh = mesh(1, 4);
    let of = |layout: Layout| Balance::new(&Mask::causal(), &layout, &layout).expect("ok");
    let zigzag = of(Layout::zigzag(64, &mesh));
    assert_eq!((zigzag.pairs.clone(), zigzag.max_over_mean()), (vec![520; 4], 1.0));
    assert_eq!(zigzag.to_string(), "balance: 520 to 520 pairs per ring rank, largest / mean 1.000 (1 is perfect)");
    let contiguous = of(Layout::contiguous(64, &mesh));
    assert_eq!(contiguous.pairs, [136, 392, 648, 904]);
    assert_eq!(contiguous.total(), 64 * 65 / 2);
    assert!((contiguous.max_over_mean() - 904.0 / 520.0).abs() < 1e-12);
    assert_eq!(of(Layout::contiguous(0, &mesh)).max_over_mean(), 1.0);
}

#[test]
fn large_pictures_are_cut_and_say_so() {
    let layout = Layout::stripe(1 << 20, &mesh(4, 64));
    assert!(holders(&layout, 100).contains("  ... and 128 more ranks\n"));
    let picture = steps(&Mask::causal(), &layout, &layout, 5, 100).expect("ok");
    assert!(picture.contains("  ... and 32 more steps\n"));
    assert!(picture.len() < 20_000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn lines_fit_and_cells_name_the_owner_of_the_key(
        (layout, mask) in (0usize..40, 1u32..7)
            .prop_flat_map(|(seq, ring)| (Just(seq), meshes(ring)))
            .prop_flat_map(|(seq, mesh)| (layouts_of(seq, mesh), masks(seq))),
        width in 0usize..140,
    ) {
        let (mesh, seq) = (*layout.mesh(), layout.seq());
        let fits = |text: &str| text.is_ascii() && text.lines().all(|line| line.len() <= width.max(60));
        prop_assert!(fits(&holders(&layout, width)));
        for ring in 0..mesh.ring() {
            let picture = steps(&mask, &layout, &layout, ring, width)?;
            prop_assert!(fits(&picture), "{}", picture);
            // One column is one token: all bars here are wide enough.
            for line in picture.lines().skip(3).take_while(|line| !line.is_empty()) {
                let (query, cells) = line.trim_start().split_once("  ").expect("a position and a bar");
                let query: usize = query.parse().expect("a position");
                prop_assert_eq!(mesh.coords(layout.locate(query).0).ring, ring);
                prop_assert_eq!(cells.len(), seq);
                for (key, cell) in cells.chars().enumerate() {
                    let owner = mesh.coords(layout.locate(key).0).ring;
                    let step = (ring + mesh.ring() - owner) % mesh.ring();
                    let expected = if mask.allows(query, key) { char::from_digit(step, 36).expect("few") } else { '.' };
                    prop_assert_eq!(cell, expected, "query {} key {}\n{}", query, key, picture);
                }
            }
        }
    }

    /// Every allowed pair is in exactly one slice of one patch: that of the query's ring rank, at the step of the key's owner.
    #[test]
    fn patches_cover_the_mask_once(
        (layout, mask) in (0usize..40, 1u32..7)
            .prop_flat_map(|(seq, ring)| (Just(seq), meshes(ring)))
            .prop_flat_map(|(seq, mesh)| (layouts_of(seq, mesh), masks(seq))),
    ) {
        let (mesh, seq) = (*layout.mesh(), layout.seq());
        let ring_of = |token| mesh.coords(layout.locate(token).0).ring;
        let mut seen = vec![0u32; seq * seq];
        for patch in patches(&mask, &layout, &layout)? {
            prop_assert_eq!((patch.owner + patch.step) % mesh.ring(), patch.ring);
            for slice in &patch.slices {
                for row in slice.q.clone() {
                    let query = (slice.q_pos + slice.q_step * i64::from(row - slice.q.start)) as usize;
                    for column in slice.keys_of(row) {
                        let key = (slice.k_pos + slice.k_step * i64::from(column - slice.k.start)) as usize;
                        prop_assert_eq!((ring_of(query), ring_of(key)), (patch.ring, patch.owner));
                        seen[query * seq + key] += 1;
                    }
                }
            }
        }
        for (at, &count) in seen.iter().enumerate() {
            prop_assert_eq!(count, u32::from(mask.allows(at / seq, at % seq)), "query {} key {}", at / seq, at % seq);
        }
    }
}

#[test]
fn patches_of_unequal_rings_are_refused() {
    let layout = |ring| Layout::contiguous(8, &mesh(1, ring));
    assert!(patches(&Mask::full(), &layout(2), &layout(3)).is_err());
    assert!(patches(&Mask::full(), &layout(3), &layout(2)).is_err());
}
