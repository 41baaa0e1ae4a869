//! Strided views of device memory.
//!
//! Every tensor in Longspan is a view of rank 4, `[batch, seq, heads, dim]`, with strides in elements.
//! BSHD, BHSD, THD (batch 1) and packed QKV are views of this kind with different strides; row
//! statistics such as lse are views with `dim` 1, whatever order they lie in. The last axis has stride 1.

use std::ops::Range;

use crate::{Device, Error, Result};

/// Sizes of the four axes `[batch, seq, heads, dim]`.
pub type Extent = [usize; 4];

/// Element type of a view.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum DType {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The name that the command line and reports use: `bf16`, `f16`, `f32`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the elements of a tensor lie in a buffer: dtype, offset, extent and strides.
///
/// Offset and strides count elements. Distinct indices never name the same element: the strides, sorted,
/// nest (each at least the span of the axes inside it), which every layout in use does.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Strided {
    dtype: DType,
    offset: usize,
    extent: Extent,
    strides: [usize; 4],
}

impl Strided {
    /// A strided tensor at `offset` elements from the start of its buffer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the last axis (when longer than 1) has a stride other than 1, if two indices
    /// would name the same element, or if an address would overflow.
    pub fn new(dtype: DType, offset: usize, extent: Extent, strides: [usize; 4]) -> Result<Self> {
        let this = Self { dtype, offset, extent, strides };
        if extent[3] > 1 && strides[3] != 1 {
            return Err(Error::invalid(
                "view",
                format!("the last axis (head_dim) has stride {}, it must be 1", strides[3]),
            ));
        }
        this.check_nesting()?;
        Ok(this)
    }

    /// A dense `[batch, seq, heads, dim]` tensor at the start of its buffer (BSHD order). No buffer holds one whose addresses
    /// overflow: a view of it is refused.
    pub fn dense(dtype: DType, extent: Extent) -> Self {
        let [_, s, h, d] = extent;
        let [hd, sh] = [h.saturating_mul(d), s.saturating_mul(h)];
        Self { dtype, offset: 0, extent, strides: [sh.saturating_mul(d), hd, d, 1] }
    }

    /// A dense tensor that lies as `[batch, heads, seq, dim]` (BHSD order), indexed `[batch, seq, heads, dim]`.
    pub fn dense_bhsd(dtype: DType, extent: Extent) -> Self {
        let [_, s, h, d] = extent;
        let [sd, hs] = [s.saturating_mul(d), h.saturating_mul(s)];
        Self { dtype, offset: 0, extent, strides: [hs.saturating_mul(d), d, sd, 1] }
    }

    fn check_nesting(&self) -> Result<()> {
        let overflow = || Error::invalid("view", "the extent and strides overflow the address space");
        if self.is_empty() {
            return Ok(());
        }
        let mut axes: Vec<usize> = (0..4).filter(|&a| self.extent[a] > 1).collect();
        axes.sort_by_key(|&a| self.strides[a]);
        let mut span = 1usize;
        for a in axes {
            if self.strides[a] < span {
                return Err(Error::invalid(
                    "view",
                    format!(
                        "axis {a} of extent {:?} has stride {}, but the axes inside it span {span} elements: elements would overlap",
                        self.extent, self.strides[a]
                    ),
                ));
            }
            span = (self.extent[a] - 1)
                .checked_mul(self.strides[a])
                .and_then(|x| x.checked_add(span))
                .ok_or_else(overflow)?;
        }
        span.checked_add(self.offset).and_then(|n| n.checked_mul(self.dtype.size())).ok_or_else(overflow)?;
        Ok(())
    }

    /// Element type.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Elements from the start of the buffer to the first element.
    pub const fn offset(&self) -> usize {
        self.offset
    }

    /// Sizes of the axes.
    pub const fn extent(&self) -> Extent {
        self.extent
    }

    /// Strides of the axes, in elements.
    pub const fn strides(&self) -> [usize; 4] {
        self.strides
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.extent.contains(&0)
    }

    /// Number of elements; the largest number where it is larger.
    pub fn elements(&self) -> usize {
        self.extent.iter().fold(1, |n, &axis| n.saturating_mul(axis))
    }

    /// Bytes of the elements themselves, without the gaps between them; the largest number where they are more.
    pub fn bytes(&self) -> usize {
        self.elements().saturating_mul(self.dtype.size())
    }

    /// Byte range of the buffer that holds all elements (gaps included); empty for an empty tensor. What overflows ends at the
    /// largest number, behind every buffer.
    pub fn byte_range(&self) -> Range<usize> {
        let size = self.dtype.size();
        let start = self.offset.saturating_mul(size);
        if self.is_empty() {
            return start..start;
        }
        let axis = |a: usize| (self.extent[a] - 1).saturating_mul(self.strides[a]);
        let last = (0..4).fold(self.offset, |at, a| at.saturating_add(axis(a)));
        start..last.saturating_add(1).saturating_mul(size)
    }

    /// Whether the elements lie without gaps in row-major order.
    pub fn is_dense(&self) -> bool {
        let mut expected = 1;
        (0..4).rev().all(|a| {
            let ok = self.extent[a] <= 1 || self.strides[a] == expected;
            expected = expected.saturating_mul(self.extent[a]);
            ok
        }) || self.is_empty()
    }

    /// Element offset in the buffer of index `at`, which must lie inside the extent.
    pub fn offset_of(&self, at: [usize; 4]) -> usize {
        self.offset + (0..4).map(|a| at[a] * self.strides[a]).sum::<usize>()
    }

    /// The part with `range` of axis `axis` (0 batch, 1 seq, 2 heads, 3 dim).
    ///
    /// # Errors
    /// [`Error::Invalid`] if the range does not lie inside the axis, or on overflow.
    pub fn narrow(&self, axis: usize, range: Range<usize>) -> Result<Self> {
        if axis >= 4 || range.start > range.end || range.end > self.extent[axis] {
            return Err(Error::invalid(
                "view",
                format!("range {range:?} of axis {axis} is outside extent {:?}", self.extent),
            ));
        }
        let mut part = *self;
        part.extent[axis] = range.len();
        // An empty part keeps its offset, so that it never points behind the buffer.
        if !part.is_empty() {
            let moved = range.start.checked_mul(self.strides[axis]).and_then(|by| part.offset.checked_add(by));
            part.offset = moved.ok_or_else(|| Error::invalid("view", "offset overflows"))?;
        }
        Ok(part)
    }

    /// The same memory moved by `elements` within its buffer.
    ///
    /// # Errors
    /// [`Error::Invalid`] on overflow.
    pub fn shifted(&self, elements: usize) -> Result<Self> {
        Self::new(
            self.dtype,
            self.offset.checked_add(elements).ok_or_else(|| Error::invalid("view", "offset overflows"))?,
            self.extent,
            self.strides,
        )
    }

    /// Whether any element of `self` shares a byte with an element of `other` in the same buffer (exact).
    pub fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.byte_range(), other.byte_range());
        if self.is_empty() || other.is_empty() || a.end <= b.start || b.end <= a.start {
            return false;
        }
        if let Some(answer) = self.overlaps_alike(other) {
            return answer;
        }
        let (few, many) = if self.row_count() <= other.row_count() { (self, other) } else { (other, self) };
        few.rows().any(|row| many.meets(&row))
    }

    /// [`Strided::overlaps`] for equal dtypes and strides (packed tensors) without walking rows: the offsets' difference is
    /// written as a sum of index differences times strides, which nest, so each axis has two candidates.
    fn overlaps_alike(&self, other: &Self) -> Option<bool> {
        let used = |a: usize| self.extent[a] > 1 || other.extent[a] > 1;
        if self.dtype != other.dtype || (0..4).any(|a| used(a) && self.strides[a] != other.strides[a]) {
            return None;
        }
        let mut axes: Vec<usize> = (0..4).filter(|&a| used(a)).collect();
        axes.sort_by_key(|&a| std::cmp::Reverse(self.strides[a]));
        // With unequal extents an axis may span more than the next stride of the other view; then walk rows instead.
        let nested = axes.windows(2).all(|w| {
            let inner = self.extent[w[1]].max(other.extent[w[1]]) - 1;
            self.strides[w[0]] > inner.saturating_mul(self.strides[w[1]])
        });
        nested.then(|| self.differs_by(other, &axes, other.offset as i64 - self.offset as i64))
    }

    /// Whether `diff = sum over axes of (i - j) * stride` has a solution with `i` in `self`, `j` in `other`.
    fn differs_by(&self, other: &Self, axes: &[usize], diff: i64) -> bool {
        let Some((&axis, inner)) = axes.split_first() else {
            return diff == 0;
        };
        let stride = self.strides[axis] as i64;
        let (low, high) = (1 - other.extent[axis] as i64, self.extent[axis] as i64 - 1);
        let near = diff.div_euclid(stride);
        [near, near + 1]
            .into_iter()
            .any(|steps| (low..=high).contains(&steps) && self.differs_by(other, inner, diff - steps * stride))
    }

    /// Number of maximal runs that are contiguous along the last axis.
    fn row_count(&self) -> usize {
        self.extent[..3].iter().product()
    }

    /// Byte ranges of the runs along the last axis.
    fn rows(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let [b, s, h, d] = self.extent;
        let size = self.dtype.size();
        (0..b).flat_map(move |ib| {
            (0..s).flat_map(move |is| {
                (0..h).map(move |ih| {
                    let start = self.offset_of([ib, is, ih, 0]) * size;
                    start..start + d * size
                })
            })
        })
    }

    /// Whether an element of `self` meets the byte range: descends the axes from the largest stride.
    fn meets(&self, bytes: &Range<usize>) -> bool {
        let mut axes = [0, 1, 2];
        axes.sort_by_key(|&a| std::cmp::Reverse(self.strides[a]));
        self.meets_from(&axes, self.offset, bytes)
    }

    fn meets_from(&self, axes: &[usize], base: usize, bytes: &Range<usize>) -> bool {
        let size = self.dtype.size();
        let Some((&axis, inner)) = axes.split_first() else {
            return base * size < bytes.end && bytes.start < (base + self.extent[3]) * size;
        };
        let inside: usize =
            inner.iter().map(|&a| (self.extent[a] - 1) * self.strides[a]).sum::<usize>() + self.extent[3];
        let stride = self.strides[axis].max(1);
        // Only indices whose span [base + i*stride, + inside) can meet the bytes.
        let (lo, hi) = (bytes.start / size, bytes.end.div_ceil(size));
        if hi <= base {
            return false;
        }
        let first = (lo + 1).saturating_sub(base + inside).div_ceil(stride);
        let last = ((hi - base - 1) / stride).min(self.extent[axis] - 1);
        (first..=last).any(|i| self.meets_from(inner, base + i * self.strides[axis], bytes))
    }
}

macro_rules! view {
    ($name:ident, $doc:literal) => {
        #[doc = $doc]
        #[derive(Debug)]
        pub struct $name<'a, D: Device> {
            buffer: &'a D::Buffer,
            at: Strided,
        }

        impl<D: Device> Clone for $name<'_, D> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<D: Device> Copy for $name<'_, D> {}

        impl<'a, D: Device> $name<'a, D> {
            /// A view of `buffer`.
            ///
            /// # Errors
            /// [`Error::Invalid`] if an element would lie behind the buffer's end.
            pub fn new(buffer: &'a D::Buffer, at: Strided) -> Result<Self> {
                let (end, have) = (at.byte_range().end, D::bytes(buffer));
                if end > have {
                    return Err(Error::invalid("view", format!("it ends at byte {end}, its buffer has {have} bytes")));
                }
                Ok(Self { buffer, at })
            }

            /// The buffer under the view.
            pub fn buffer(&self) -> &'a D::Buffer {
                self.buffer
            }

            /// Where the elements lie in the buffer.
            pub fn at(&self) -> &Strided {
                &self.at
            }

            /// Element type.
            pub fn dtype(&self) -> DType {
                self.at.dtype
            }

            /// Sizes of the axes `[batch, seq, heads, dim]`.
            pub fn extent(&self) -> Extent {
                self.at.extent
            }

            /// The part with `range` of axis `axis`.
            ///
            /// # Errors
            /// [`Error::Invalid`] if the range does not lie inside the axis.
            pub fn narrow(&self, axis: usize, range: Range<usize>) -> Result<Self> {
                Ok(Self { buffer: self.buffer, at: self.at.narrow(axis, range)? })
            }

            /// Whether this view and `other` can share memory: same buffer, overlapping elements.
            pub fn aliases(&self, buffer: &D::Buffer, at: &Strided) -> bool {
                D::same(self.buffer, buffer) && self.at.overlaps(at)
            }
        }
    };
}

view!(View, "Elements of a device buffer that a call reads.");
view!(
    ViewMut,
    "Elements of a device buffer that a call writes. Buffers are not Rust memory, so this is a statement \
     of intent that argument checks and the checked CPU backend use, not a borrow."
);

impl<'a, D: Device> ViewMut<'a, D> {
    /// The same elements, to be read.
    pub fn read(&self) -> View<'a, D> {
        View { buffer: self.buffer, at: self.at }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A random nested view in a small buffer.
    fn strided() -> impl Strategy<Value = Strided> {
        let axis = 1usize..4;
        let gap = 0usize..3;
        (
            prop_oneof![Just(DType::F16), Just(DType::F32)],
            0usize..40,
            [axis.clone(), axis.clone(), axis.clone(), axis],
            [gap.clone(), gap.clone(), gap],
            Just([0usize, 1, 2]).prop_shuffle(),
        )
            .prop_map(|(dtype, offset, extent, gaps, order)| {
                let mut strides = [0, 0, 0, 1];
                let mut span = extent[3];
                for (a, gap) in order.into_iter().zip(gaps) {
                    strides[a] = span + gap;
                    span += (extent[a] - 1) * strides[a];
                }
                Strided::new(dtype, offset, extent, strides).expect("nested by construction")
            })
    }

    /// A size about a power of two.
    fn size() -> impl Strategy<Value = usize> {
        (prop_oneof![0u32..18, 0u32..64], 0usize..3).prop_map(|(power, more)| (1usize << power) + more - 1)
    }

    fn bytes_of(s: &Strided) -> std::collections::HashSet<usize> {
        s.rows().flatten().collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn overlap_is_exact(a in strided(), b in strided()) {
            prop_assert_eq!(a.overlaps(&b), !bytes_of(&a).is_disjoint(&bytes_of(&b)));
        }

        #[test]
        fn overlap_of_packed_parts_is_exact(a in strided(), by in 0usize..30) {
            let b = a.shifted(by).expect("small");
            prop_assert_eq!(a.overlaps(&b), !bytes_of(&a).is_disjoint(&bytes_of(&b)));
        }

        /// What can't be addressed ends behind every buffer, and so does its last element, or it is refused.
        #[test]
        fn nothing_wraps(extent in [size(), size(), size(), size()]) {
            let bytes = extent.iter().fold(4u128, |n, &axis| n.saturating_mul(axis as u128));
            let wanted = usize::try_from(bytes).unwrap_or(usize::MAX);
            for whole in [Strided::dense(DType::F32, extent), Strided::dense_bhsd(DType::F32, extent)] {
                prop_assert_eq!((whole.bytes(), whole.byte_range()), (wanted, 0..wanted));
                if whole.is_empty() {
                    continue;
                }
                match (0..4).try_fold(whole, |part, axis| part.narrow(axis, extent[axis] - 1..extent[axis])) {
                    Ok(last) => prop_assert_eq!((last.elements(), last.byte_range().end), (1, wanted)),
                    Err(_) => prop_assert_eq!(wanted, usize::MAX),
                }
            }
        }

        #[test]
        fn byte_range_is_tight(a in strided()) {
            let bytes = bytes_of(&a);
            prop_assert_eq!(bytes.len(), a.bytes());
            prop_assert_eq!(bytes.iter().min().copied(), Some(a.byte_range().start));
            prop_assert_eq!(bytes.iter().max().map(|m| m + 1), Some(a.byte_range().end));
        }
    }

    #[test]
    fn parts_of_nothing_stay_where_they_are() {
        let nothing = Strided::dense(DType::F32, [1, 0, 4, 8]);
        assert_eq!(nothing.narrow(2, 2..4).expect("inside").byte_range(), 0..0);
    }

    #[test]
    fn refuses_a_last_axis_with_gaps_and_elements_that_overlap() {
        assert!(Strided::new(DType::F32, 0, [1, 2, 2, 4], [16, 8, 4, 2]).is_err());
        assert!(Strided::new(DType::F32, 0, [1, 2, 2, 4], [8, 3, 4, 1]).is_err());
        assert!(Strided::new(DType::F32, 0, [1, 4, 1, 4], [0, 0, 0, 1]).is_err());
        assert!(Strided::new(DType::F32, usize::MAX / 2, [1, 2, 2, 4], [16, 8, 4, 1]).is_err());
        assert!(Strided::dense(DType::F32, [1 << 62, 1, 1, 1]).shifted(0).is_err());
    }
}
