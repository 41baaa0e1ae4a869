//! Strided copies and fills.
//!
//! ```text
//! copy(from, to), equal extents:
//!   axes    = axes longer than 1, by the stride of `to`, outermost first
//!   merge   (outer, inner) where outer.stride == inner.extent * inner.stride in both
//!   run     = the innermost axis if its strides are 1 in both: one memcpy; otherwise single elements
//!   for every index of the other axes: copy a run
//! ```
//!
//! Distinct indices of a view never name the same element ([`Strided`]), so the order of the copies does not matter.

use half::{bf16, f16};
use longspan_hal::{DType, Strided};

/// One axis of a copy: length, and strides of both sides in elements.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Axis {
    len: usize,
    from: usize,
    to: usize,
}

/// Copies the elements of `at_from` to those of `at_to`, which have the same dtype and extent.
///
/// # Safety
/// `from` and `to` are the bases of memory that holds the two views, aligned to the element size; nobody writes the
/// elements of `from` or touches those of `to` meanwhile, and the two sets of elements do not overlap.
pub(crate) unsafe fn copy(from: *const u8, at_from: &Strided, to: *mut u8, at_to: &Strided) {
    debug_assert_eq!((at_from.dtype(), at_from.extent()), (at_to.dtype(), at_to.extent()));
    if at_from.is_empty() {
        return;
    }
    let size = at_from.dtype().size();
    let axes = merged(at_from, at_to);
    // SAFETY: the first elements lie inside the memory that the caller vouches for.
    let (from, to) = unsafe { (from.add(at_from.offset() * size), to.add(at_to.offset() * size)) };
    // SAFETY: the axes enumerate exactly the elements of the two views.
    unsafe {
        match size {
            2 => nest::<u16>(&axes, from.cast(), to.cast()),
            _ => nest::<u32>(&axes, from.cast(), to.cast()),
        }
    }
}

/// Writes `value`, rounded to the dtype, to every element of `at`.
///
/// # Safety
/// As [`copy`], for `to`.
pub(crate) unsafe fn fill(value: f32, to: *mut u8, at: &Strided) {
    if at.is_empty() {
        return;
    }
    // SAFETY: the first element lies inside the memory that the caller vouches for.
    let first = unsafe { to.add(at.offset() * at.dtype().size()) };
    let axes = merged(at, at);
    // SAFETY: the axes enumerate exactly the elements of the view.
    unsafe {
        match at.dtype() {
            DType::Bf16 => fill_nest(&axes, bf16::from_f32(value).to_bits(), first.cast()),
            DType::F16 => fill_nest(&axes, f16::from_f32(value).to_bits(), first.cast()),
            _ => fill_nest(&axes, value.to_bits(), first.cast()),
        }
    }
}

/// The axes of a copy, outermost first, merged where both sides allow it.
fn merged(from: &Strided, to: &Strided) -> Vec<Axis> {
    let mut axes: Vec<Axis> = (0..4)
        .filter(|&a| to.extent()[a] > 1)
        .map(|a| Axis { len: to.extent()[a], from: from.strides()[a], to: to.strides()[a] })
        .collect();
    axes.sort_by_key(|a| std::cmp::Reverse((a.to, a.from)));
    let mut merged: Vec<Axis> = Vec::with_capacity(4);
    for inner in axes {
        match merged.last_mut() {
            Some(outer) if outer.from == inner.len * inner.from && outer.to == inner.len * inner.to => {
                *outer = Axis { len: outer.len * inner.len, ..inner };
            }
            _ => merged.push(inner),
        }
    }
    merged
}

/// # Safety
/// `from` and `to` point to the first elements of the part that `axes` enumerate.
unsafe fn nest<T: Copy>(axes: &[Axis], from: *const T, to: *mut T) {
    match axes {
        // SAFETY: a single element.
        [] => unsafe { to.copy_from_nonoverlapping(from, 1) },
        // SAFETY: the axis is contiguous on both sides.
        [Axis { len, from: 1, to: 1 }] => unsafe { to.copy_from_nonoverlapping(from, *len) },
        [axis] => {
            for i in 0..axis.len {
                // SAFETY: index i of the axis, on both sides.
                unsafe { to.add(i * axis.to).write(from.add(i * axis.from).read()) };
            }
        }
        [axis, inner @ ..] => {
            for i in 0..axis.len {
                // SAFETY: index i of the axis starts the part that the inner axes enumerate.
                unsafe { nest(inner, from.add(i * axis.from), to.add(i * axis.to)) };
            }
        }
    }
}

/// # Safety
/// As [`nest`], for `to`.
unsafe fn fill_nest<T: Copy>(axes: &[Axis], value: T, to: *mut T) {
    match axes {
        // SAFETY: a single element.
        [] => unsafe { to.write(value) },
        [axis, inner @ ..] => {
            for i in 0..axis.len {
                // SAFETY: index i of the axis starts the part that the inner axes enumerate.
                unsafe { fill_nest(inner, value, to.add(i * axis.to)) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two nested layouts of one extent, with gaps and any order of the outer axes.
    fn pair() -> impl Strategy<Value = (Strided, Strided)> {
        let side = || ([0usize..3, 0..3, 0..3], Just([0usize, 1, 2]).prop_shuffle(), 0usize..9);
        (
            prop_oneof![Just(DType::Bf16), Just(DType::F16), Just(DType::F32)],
            [0usize..5, 0..5, 0..5, 0..5],
            side(),
            side(),
        )
            .prop_map(|(dtype, extent, a, b)| (nested(dtype, extent, a), nested(dtype, extent, b)))
    }

    fn nested(dtype: DType, extent: [usize; 4], (gaps, order, offset): ([usize; 3], [usize; 3], usize)) -> Strided {
        let mut strides = [0, 0, 0, 1];
        let mut span = extent[3].max(1);
        for (axis, gap) in order.into_iter().zip(gaps) {
            strides[axis] = span + gap;
            span += extent[axis].saturating_sub(1) * strides[axis];
        }
        Strided::new(dtype, offset, extent, strides).expect("nested by construction")
    }

    fn indices(extent: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
        let n: usize = extent.iter().product();
        (0..n).map(move |i| {
            let d = i % extent[3];
            let h = i / extent[3] % extent[2];
            let s = i / (extent[3] * extent[2]) % extent[1];
            [i / (extent[3] * extent[2] * extent[1]), s, h, d]
        })
    }

    fn words(at: &Strided) -> usize {
        at.byte_range().end.div_ceil(4) + 2
    }

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn copies_each_element_and_no_other((a, b) in pair()) {
            let from: Vec<u32> = (0..words(&a) as u32).map(|i| i.wrapping_mul(0x9E37_79B9)).collect();
            let mut to = vec![0xAAAA_AAAAu32; words(&b)];
            let (source, mut wanted) = (bytes(&from), bytes(&to));
            let size = a.dtype().size();
            for at in indices(a.extent()) {
                let (s, d) = (a.offset_of(at) * size, b.offset_of(at) * size);
                wanted[d..d + size].copy_from_slice(&source[s..s + size]);
            }
            // SAFETY: both vectors hold their views and are distinct.
            unsafe { copy(from.as_ptr().cast(), &a, to.as_mut_ptr().cast(), &b) };
            prop_assert_eq!(bytes(&to), wanted);
        }

        #[test]
        fn fills_each_element_and_no_other((a, _) in pair(), value in -70000f32..70000.0) {
            let mut to = vec![0xAAAA_AAAAu32; words(&a)];
            let mut wanted = bytes(&to);
            let element: Vec<u8> = match a.dtype() {
                DType::Bf16 => bf16::from_f32(value).to_ne_bytes().to_vec(),
                DType::F16 => f16::from_f32(value).to_ne_bytes().to_vec(),
                _ => value.to_ne_bytes().to_vec(),
            };
            for at in indices(a.extent()) {
                let start = a.offset_of(at) * element.len();
                wanted[start..start + element.len()].copy_from_slice(&element);
            }
            // SAFETY: the vector holds the view.
            unsafe { fill(value, to.as_mut_ptr().cast(), &a) };
            prop_assert_eq!(bytes(&to), wanted);
        }
    }

    #[test]
    fn merges_what_is_contiguous_on_both_sides() {
        let dense = Strided::dense(DType::F32, [2, 3, 4, 5]);
        assert_eq!(merged(&dense, &dense), [Axis { len: 120, from: 1, to: 1 }]);
        let heads = Strided::dense(DType::F32, [2, 3, 8, 5]).narrow(2, 4..8).expect("inside");
        assert_eq!(merged(&heads, &dense), [Axis { len: 6, from: 40, to: 20 }, Axis { len: 20, from: 1, to: 1 }]);
        let bhsd = Strided::dense_bhsd(DType::F32, [1, 3, 4, 5]);
        let bshd = Strided::dense(DType::F32, [1, 3, 4, 5]);
        assert_eq!(merged(&bhsd, &bshd).last(), Some(&Axis { len: 5, from: 1, to: 1 }));
    }
}
