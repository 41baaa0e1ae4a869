//! Specializations fit the machines that they are for, over all head sizes.

use longspan_hal::{DType, Spec, Strided};
use longspan_kernels::specialize::MAX_HEAD_DIM;
use longspan_kernels::{Family, Specialization, Target, View};

/// All architectures that have figures of their own.
fn targets() -> Vec<Target> {
    let nvidia = [80, 86, 89, 90, 100].map(Target::nvidia);
    let amd = ["gfx90a", "gfx942", "gfx1100"].map(|name| Target::amd(name, 64 << 10, 64 << 10).expect("known"));
    nvidia.into_iter().chain(amd).collect()
}

/// Every head size with a few option sets.
fn specs() -> impl Iterator<Item = Spec> {
    let sizes = (1..=MAX_HEAD_DIM).map(|d| (d, d)).chain([(192, 128), (128, 256), (256, 64), (7, 33)]);
    sizes.flat_map(|(d, dv)| {
        let plain = Spec::new(DType::Bf16, 1, [64, 64], [4, 2], d).with_head_dim_v(dv);
        [
            plain.clone(),
            plain.clone().with_softcap(Some(2.0)).with_deterministic(true),
            plain.with_alibi(true).with_dropout(Some(0.1)).with_partial(true),
            Spec::new(DType::F32, 1, [64, 64], [4, 2], d).with_head_dim_v(dv),
        ]
    })
}

fn number(kernel: &Specialization, name: &str) -> Option<u32> {
    kernel.defines.iter().find_map(|d| d.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

#[test]
fn every_head_size_has_kernels_that_fit_every_architecture() {
    for (spec, target) in specs().flat_map(|s| targets().into_iter().map(move |t| (s.clone(), t))) {
        let view = View { aligned: spec.head_dim % 8 == 0, mapped: spec.head_dim % 8 == 0 };
        let kernels = [
            Specialization::forward("test", &spec, target, view),
            Specialization::backward("test", &spec, target, view),
            Specialization::backward_dq("test", &spec, target, view),
        ];
        for kernel in kernels {
            let kernel = kernel.unwrap_or_else(|e| panic!("{} x {}, {target:?}: {e}", spec.head_dim, spec.head_dim_v));
            assert!(kernel.shared_bytes <= target.block_bytes, "{}", kernel.name());
            assert_eq!(number(&kernel, "SHARED_BYTES"), Some(kernel.shared_bytes), "{}", kernel.name());
            let (d, dv) = (number(&kernel, "HEAD_DIM"), number(&kernel, "HEAD_DIM_V"));
            assert!(d >= Some(spec.head_dim as u32) && dv >= Some(spec.head_dim_v as u32));
            assert!(kernel.threads.is_multiple_of(32) && kernel.rows.is_multiple_of(16));
        }
    }
}

/// What `sm80_attention_backward.cu` asserts of dq when it is compiled.
#[test]
fn warps_divide_dq_on_every_architecture() {
    for (spec, target) in specs().flat_map(|s| targets().into_iter().map(move |t| (s.clone(), t))) {
        let view = View { aligned: true, mapped: false };
        let kernel = Specialization::backward("test", &spec, target, view).expect("all head sizes have one");
        let (Some(along), true) = (number(&kernel, "DQ_WARPS_M"), kernel.adds_dq()) else { continue };
        let (queries, d) = (number(&kernel, "BLOCK_M").unwrap_or(0), number(&kernel, "HEAD_DIM").unwrap_or(0));
        let across = kernel.threads / 32 / along;
        let name = kernel.name();
        assert!(queries % (16 * along) == 0 && d % (16 * across) == 0 && across > 0, "{target:?}: {name}");
        let columns = d / across / number(&kernel, "DQ_PARTS").unwrap_or(1);
        assert!(!kernel.sums_dq() || (columns * 8).is_multiple_of(d), "{target:?}: {name}");
    }
}

/// An order of sums is the same for every call that adds to them: it depends on nothing but the spec, and on whether views are
/// aligned, which `reorder_dq` is for.
#[test]
fn sums_of_dq_lie_in_lines_where_rows_are_whole() {
    let lines = |q_rows, d, target: Target, aligned| {
        let spec = Spec::new(DType::Bf16, 1, [q_rows, 64], [4, 2], d);
        let view = View { aligned, mapped: false };
        Specialization::backward("test", &spec, target, view).expect("supported").sums_dq()
    };
    for arch in [80, 86, 89, 100] {
        let target = Target::nvidia(arch);
        assert!([64, 128, 256].iter().all(|d| lines(64, *d, target, true)), "{arch}");
        assert!(!lines(60, 64, target, true) && !lines(64, 96, target, true) && !lines(64, 64, target, false));
    }
    // Beside Hopper's own kernels, whose sums lie in another order.
    assert!(!lines(64, 128, Target::nvidia(90), true));
    assert!(lines(64, 128, Target { flash3: false, ..Target::nvidia(90) }, true));
}

#[test]
fn keys_differ_where_defines_do_and_names_are_readable() {
    let of = |spec: &Spec| {
        Specialization::forward("test", spec, Target::nvidia(90), View { aligned: true, mapped: false })
            .expect("supported")
    };
    let plain = Spec::new(DType::Bf16, 1, [64, 64], [1, 1], 64);
    let (a, b) = (of(&plain), of(&plain.clone().with_softcap(Some(1.0))));
    assert_ne!(a.key(), b.key());
    assert_eq!(a.key(), of(&plain.with_softcap(None)).key());
    assert!(b.name().starts_with("sm80_attention_forward IO_BF16") && b.name().contains("SOFTCAP"), "{}", b.name());
}

#[test]
fn heads_over_256_are_refused_with_what_is_possible() {
    let spec = Spec::new(DType::F16, 1, [64, 64], [1, 1], 257);
    let refusal = Specialization::forward("cuda", &spec, Target::nvidia(90), View { aligned: false, mapped: false });
    let text = refusal.expect_err("too large").to_string();
    assert!(text.contains("head_dim 257") && text.contains("256"), "{text}");
}

#[test]
fn views_with_odd_strides_or_offsets_are_not_aligned() {
    let view = |offset, row, dim| Strided::new(DType::F16, offset, [1, 4, 2, dim], [0, row, dim, 1]).expect("valid");
    let aligned = |v: &Strided| View::of([v]).aligned;
    assert!(aligned(&view(0, 128, 64)) && aligned(&view(8, 136, 64)));
    assert!(!aligned(&view(4, 128, 64)) && !aligned(&view(0, 132, 64)) && !aligned(&view(0, 120, 60)));
    let statistics = Strided::new(DType::F32, 3, [1, 4, 2, 1], [0, 2, 1, 1]).expect("valid");
    assert!(View::of([&statistics, &view(0, 128, 64)]).aligned);
}

#[test]
fn amd_names_have_a_family_or_no_kernels() {
    let family = |name| Target::amd(name, 1, 1).map(|t| (t.family, t.arch));
    assert_eq!(family("gfx942:sramecc+:xnack-"), Some((Family::Cdna, 0x942)));
    assert_eq!(family("gfx90a"), Some((Family::Cdna, 0x90a)));
    assert_eq!(family("gfx1100"), Some((Family::Rdna, 0x1100)));
    assert_eq!(["gfx908", "gfx1030", "gfx1201", "sm_90", "gfx", ""].map(family), [None; 6]);
}

#[test]
fn waves_divide_blocks() {
    for (spec, target) in specs().flat_map(|s| targets().into_iter().map(move |t| (s.clone(), t))) {
        let wave = if target.family == Family::Cdna { 64 } else { 32 };
        let view = View { aligned: false, mapped: false };
        for kernel in [
            Specialization::forward("test", &spec, target, view),
            Specialization::backward("test", &spec, target, view),
        ] {
            assert!(kernel.expect("supported").threads.is_multiple_of(wave));
        }
    }
}
