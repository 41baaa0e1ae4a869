//! `BatchMatMul`: f32 accumulation, rounded once to the output's type.

use std::ffi::c_void;

use crate::operator::{Operator, operator, require};
use crate::tensor::dtype;

type Handle = *const c_void;

operator!(aclnnBatchMatMulGetWorkspaceSize, aclnnBatchMatMul, (a: Handle, b: Handle, out: Handle, cube: i8) |a, b, out, cube: i8| {
    let mut op = Operator::new();
    let (a, b, out) = (op.tensor(a)?, op.tensor(b)?, op.tensor(out)?);
    require(a.dims.len() == 3 && b.dims.len() == 3 && out.dims.len() == 3, "BatchMatMul of tensors without 3 axes")?;
    let ([n, i, k], [nb, kb, j]) = ([a.dims[0], a.dims[1], a.dims[2]], [b.dims[0], b.dims[1], b.dims[2]]);
    require(n == nb && k == kb && out.dims == [n, i, j], format!("BatchMatMul of {:?} and {:?} to {:?}", a.dims, b.dims, out.dims))?;
    require(a.dtype == b.dtype && a.dtype == out.dtype && dtype::is_float(a.dtype), "BatchMatMul of unequal types")?;
    require(cube == 0, "cubeMathType other than 0 (keep precision) is not emulated")?;
    require(!out.meets(&a) && !out.meets(&b), "BatchMatMul onto an operand")?;
    // Operands may be transposed, nothing else.
    let plain = |t: &crate::tensor::Tensor| t.dims[1] <= 1 || t.dims[2] <= 1 || t.strides[1] == 1 || t.strides[2] == 1;
    require(plain(&a) && plain(&b) && out.is_dense(), "BatchMatMul of operands with gaps, or to an output that is not dense")?;
    op.run(move |t| {
        let (a, b) = (t[0].dense(), t[1].dense());
        let mut c = vec![0.0f32; n * i * j];
        for batch in 0..n {
            for row in 0..i {
                let to = &mut c[(batch * i + row) * j..][..j];
                for inner in 0..k {
                    let x = a[(batch * i + row) * k + inner];
                    to.iter_mut().zip(&b[(batch * k + inner) * j..][..j]).for_each(|(c, y)| *c += x * y);
                }
            }
        }
        t[2].store_dense(&c);
        Ok(())
    })
});
