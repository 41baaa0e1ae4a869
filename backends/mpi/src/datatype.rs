//! Strided views as MPI types: the axes that are not contiguous become nested `MPI_Type_create_hvector`s.
//!
//! ```text
//! axes  = axes longer than 1, in index order; neighbours merged where outer.stride == inner.len * inner.stride
//! type  = element; for axis from the innermost: hvector(axis.len, 1, axis.stride * element size, type)
//! ```
//!
//! Both sides name the elements in the order of the index, `[batch, seq, heads, dim]`, so axes keep that order, also in a view
//! whose strides have another (BHSD).

use std::ffi::c_int;

use longspan_hal::{Error, Result, Strided};
use mpi::ffi;

use crate::world::{Handle, check, lock};

/// A committed MPI type of all elements of a view, relative to its first element.
#[derive(Debug)]
pub(crate) struct Datatype {
    raw: Handle<ffi::MPI_Datatype>,
    /// Elements that arrive.
    pub elements: usize,
}

impl Datatype {
    /// The type of `at`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an axis longer than MPI counts; [`Error::Driver`].
    pub fn new(at: &Strided) -> Result<Self> {
        let size = at.dtype().size();
        let _mpi = lock();
        // SAFETY: constants of MPI; two-byte dtypes travel as their bits.
        let mut raw = unsafe { if size == 2 { ffi::RSMPI_UINT16_T } else { ffi::RSMPI_UINT32_T } };
        let mut derived = false;
        for (len, stride) in axes(at).into_iter().rev() {
            let (inner, len) = (raw, count(len)?);
            let bytes = (stride * size) as ffi::MPI_Aint;
            // SAFETY: MPI is started and the lock is held; `inner` lives. Types that are part of another may be freed.
            unsafe {
                let code = ffi::MPI_Type_create_hvector(len, 1, bytes, inner, &mut raw);
                if derived {
                    let _ = ffi::MPI_Type_free(&mut { inner });
                }
                check("MPI_Type_create_hvector", code)?;
            }
            derived = true;
        }
        if !derived {
            // SAFETY: as above. A type of its own, so that every one can be freed.
            check("MPI_Type_contiguous", unsafe { ffi::MPI_Type_contiguous(1, raw, &mut raw) })?;
        }
        // SAFETY: as above.
        check("MPI_Type_commit", unsafe { ffi::MPI_Type_commit(&mut raw) })?;
        Ok(Self { raw: Handle(raw), elements: at.elements() })
    }

    pub fn raw(&self) -> ffi::MPI_Datatype {
        self.raw.0
    }
}

impl Drop for Datatype {
    fn drop(&mut self) {
        if mpi::environment::is_finalized() {
            return;
        }
        let _mpi = lock();
        // SAFETY: MPI runs and the lock is held; freed once. Requests that use it keep it.
        let _ = unsafe { ffi::MPI_Type_free(&mut self.raw.0) };
    }
}

fn count(len: usize) -> Result<c_int> {
    c_int::try_from(len)
        .map_err(|_| Error::invalid("message", format!("an axis of {len} elements is too long for MPI")))
}

/// Axes `(length, stride)` in index order, outermost first, merged where that leaves the order of the elements.
fn axes(at: &Strided) -> Vec<(usize, usize)> {
    let mut merged: Vec<(usize, usize)> = Vec::with_capacity(4);
    for (len, stride) in at.extent().into_iter().zip(at.strides()).filter(|axis| axis.0 > 1) {
        match merged.last_mut() {
            // An axis that MPI could not count stays apart.
            Some(outer) if outer.1 == len * stride && outer.0 * len <= c_int::MAX as usize => {
                *outer = (outer.0 * len, stride);
            }
            _ => merged.push((len, stride)),
        }
    }
    merged
}

/// Whether the elements lie behind each other in index order.
pub(crate) fn is_contiguous(at: &Strided) -> bool {
    matches!(axes(at)[..], [] | [(_, 1)])
}

#[cfg(test)]
mod tests {
    use longspan_hal::DType;

    use super::*;

    #[test]
    fn axes_keep_the_order_of_the_index() {
        let dense = Strided::dense(DType::F32, [2, 3, 4, 5]);
        assert_eq!(axes(&dense), [(120, 1)]);
        assert!(is_contiguous(&dense));
        let heads = Strided::dense(DType::F32, [2, 3, 8, 5]).narrow(2, 4..8).expect("inside");
        assert_eq!(axes(&heads), [(6, 40), (20, 1)]);
        let bhsd = Strided::dense_bhsd(DType::F32, [1, 3, 4, 5]);
        assert_eq!(axes(&bhsd), [(3, 5), (4, 15), (5, 1)]);
        assert!(!is_contiguous(&bhsd) && !is_contiguous(&heads));
        assert_eq!(axes(&Strided::dense(DType::F32, [1, 1, 1, 1])), []);
    }
}
