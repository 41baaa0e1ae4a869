//! Operators that work element by element, with broadcasting. Operand types must be equal where the vendor's promotion would
//! otherwise decide; only `InplaceCopy` converts.

use std::ffi::c_void;
use std::sync::Arc;

use crate::operator::{Operator, array, operator, require, scalar};
use crate::tensor::{Ready, Tensor, dtype, rows};

type Handle = *const c_void;
type Real = Box<dyn Fn(&[&[f32]], &mut [f32]) + Send>;
type Int = Box<dyn Fn(&[&[i64]], &mut [i64]) + Send>;

enum Kernel {
    Int(Int),
    Real(Real),
}

/// Whether `dims` broadcasts to `to`.
fn broadcasts(dims: &[usize], to: &[usize]) -> bool {
    dims.len() <= to.len() && dims.iter().rev().zip(to.iter().rev()).all(|(a, b)| a == b || *a == 1)
}

/// Merges axes that follow each other in the memory of every tensor: fewer and longer rows.
fn merged(dims: &[usize], strides: &[Vec<usize>]) -> (Vec<usize>, Vec<Vec<usize>>) {
    let (mut to, mut steps) = (Vec::new(), vec![Vec::new(); strides.len()]);
    for (axis, &dim) in dims.iter().enumerate() {
        let follows = |(s, t): (&Vec<usize>, &Vec<usize>)| t.last().is_some_and(|&outer| outer == s[axis] * dim);
        if !to.is_empty() && strides.iter().zip(&steps).all(follows) {
            to.last_mut().into_iter().for_each(|last| *last *= dim);
            steps.iter_mut().zip(strides).for_each(|(t, s)| t.last_mut().into_iter().for_each(|last| *last = s[axis]));
        } else if dim != 1 || axis + 1 == dims.len() {
            to.push(dim);
            steps.iter_mut().zip(strides).for_each(|(t, s)| t.push(s[axis]));
        }
    }
    (to, steps)
}

/// Runs `kernel` over the rows of the output (the last tensor) and the inputs before it.
fn map(tensors: &[Ready], kernel: &Kernel) {
    let Some((out, inputs)) = tensors.split_last() else { return };
    let strides: Vec<Vec<usize>> = tensors.iter().map(|t| t.broadcast(&out.dims)).collect();
    let (dims, strides) = merged(&out.dims, &strides);
    let n = dims.last().copied().unwrap_or(1);
    let last = |i: usize| strides[i].last().copied().unwrap_or(0);
    let all: Vec<&Vec<usize>> = strides.iter().collect();
    match kernel {
        Kernel::Real(f) => {
            let (mut buffers, mut to) = (vec![vec![0.0f32; n]; inputs.len()], vec![0.0f32; n]);
            rows(&dims, &all, |at| {
                buffers.iter_mut().enumerate().for_each(|(i, b)| inputs[i].load(at[i], last(i), b));
                f(&buffers.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut to);
                out.store(at[inputs.len()], last(inputs.len()), &to);
            });
        }
        Kernel::Int(f) => {
            let (mut buffers, mut to) = (vec![vec![0i64; n]; inputs.len()], vec![0i64; n]);
            rows(&dims, &all, |at| {
                buffers.iter_mut().enumerate().for_each(|(i, b)| inputs[i].load_int(at[i], last(i), b));
                f(&buffers.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut to);
                out.store_int(at[inputs.len()], last(inputs.len()), &to);
            });
        }
    }
}

/// Checks shapes and overlaps, then runs.
fn elementwise(op: Operator, inputs: &[Arc<Tensor>], out: &Tensor, kernel: Kernel) -> Result<Operator, i32> {
    let fit = inputs.iter().all(|t| broadcasts(&t.dims, &out.dims));
    require(
        fit,
        format!("shapes {:?} do not broadcast to {:?}", inputs.iter().map(|t| &t.dims).collect::<Vec<_>>(), out.dims),
    )?;
    let apart = inputs.iter().all(|t| !t.meets(out) || t.same(out));
    require(apart, "an output overlaps an input without being it")?;
    op.run(move |tensors| {
        map(tensors, &kernel);
        Ok(())
    })
}

fn unary(input: Handle, out: Handle, f: fn(f32) -> f32) -> Result<Operator, i32> {
    let mut op = Operator::new();
    let (a, out) = (op.tensor(input)?, op.tensor(out)?);
    require(a.dtype == out.dtype && dtype::is_float(a.dtype), "a real operator of other types")?;
    let kernel = move |x: &[&[f32]], to: &mut [f32]| to.iter_mut().zip(x[0]).for_each(|(to, x)| *to = f(*x));
    elementwise(op, &[a], &out, Kernel::Real(Box::new(kernel)))
}

/// `out = f(a, b)`, in whichever domain the tensors are.
fn binary(
    a: Handle,
    b: Handle,
    out: Handle,
    real: impl Fn(f32, f32) -> f32 + Send + 'static,
    int: Option<fn(i64, i64) -> i64>,
) -> Result<Operator, i32> {
    let mut op = Operator::new();
    let (a, b, out) = (op.tensor(a)?, op.tensor(b)?, op.tensor(out)?);
    require(a.dtype == b.dtype && a.dtype == out.dtype, "operands of unequal types")?;
    let kernel = match (dtype::is_float(a.dtype), int) {
        (true, _) => Kernel::Real(Box::new(move |x, to| {
            to.iter_mut().zip(x[0].iter().zip(x[1])).for_each(|(to, (a, b))| *to = real(*a, *b));
        })),
        (false, Some(f)) => Kernel::Int(Box::new(move |x, to| {
            to.iter_mut().zip(x[0].iter().zip(x[1])).for_each(|(to, (a, b))| *to = f(*a, *b));
        })),
        (false, None) => return require(false, "an operator of reals with integers").map(|()| op),
    };
    elementwise(op, &[a, b], &out, kernel)
}

/// `out = f(a)` with a number inside `f`, in whichever domain the tensor is.
fn with_number(
    a: Handle,
    out: Handle,
    real: Option<Box<dyn Fn(f32) -> f32 + Send>>,
    int: Option<Box<dyn Fn(i64) -> i64 + Send>>,
    bools: bool,
) -> Result<Operator, i32> {
    let mut op = Operator::new();
    let (a, out) = (op.tensor(a)?, op.tensor(out)?);
    let wanted = if bools { dtype::BOOL } else { a.dtype };
    require(out.dtype == wanted, "an output of another type")?;
    let kernel = match (dtype::is_float(a.dtype), real, int) {
        (true, Some(f), _) => {
            Kernel::Real(Box::new(move |x, to| to.iter_mut().zip(x[0]).for_each(|(to, x)| *to = f(*x))))
        }
        (false, _, Some(f)) => {
            Kernel::Int(Box::new(move |x, to| to.iter_mut().zip(x[0]).for_each(|(to, x)| *to = f(*x))))
        }
        _ => return require(false, "an operator that does not know this type").map(|()| op),
    };
    elementwise(op, &[a], &out, kernel)
}

operator!(aclnnExpGetWorkspaceSize, aclnnExp, (a: Handle, out: Handle) |a, out| unary(a, out, f32::exp));
operator!(aclnnLogGetWorkspaceSize, aclnnLog, (a: Handle, out: Handle) |a, out| unary(a, out, f32::ln));
operator!(aclnnTanhGetWorkspaceSize, aclnnTanh, (a: Handle, out: Handle) |a, out| unary(a, out, f32::tanh));

operator!(aclnnAddGetWorkspaceSize, aclnnAdd, (a: Handle, b: Handle, alpha: Handle, out: Handle) |a, b, alpha, out| {
    let alpha = scalar(alpha)?;
    require(alpha.real == 1.0, "alpha of an addition other than 1 is not emulated")?;
    binary(a, b, out, |a, b| a + b, Some(i64::wrapping_add))
});
operator!(aclnnSubGetWorkspaceSize, aclnnSub, (a: Handle, b: Handle, alpha: Handle, out: Handle) |a, b, alpha, out| {
    let alpha = scalar(alpha)?.real;
    binary(a, b, out, move |a, b| a - alpha * b, None)
});
operator!(aclnnMulGetWorkspaceSize, aclnnMul, (a: Handle, b: Handle, out: Handle) |a, b, out| {
    binary(a, b, out, |a, b| a * b, Some(i64::wrapping_mul))
});
operator!(aclnnDivGetWorkspaceSize, aclnnDiv, (a: Handle, b: Handle, out: Handle) |a, b, out| {
    binary(a, b, out, |a, b| a / b, None)
});
operator!(aclnnMaximumGetWorkspaceSize, aclnnMaximum, (a: Handle, b: Handle, out: Handle) |a, b, out| {
    binary(a, b, out, maximum, Some(i64::max))
});
operator!(aclnnBitwiseXorTensorGetWorkspaceSize, aclnnBitwiseXorTensor, (a: Handle, b: Handle, out: Handle) |a, b, out| {
    binary(a, b, out, |_, _| f32::NAN, Some(|a, b| a ^ b))
});

/// The larger; NaN if either is.
pub(crate) fn maximum(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}

operator!(aclnnAddsGetWorkspaceSize, aclnnAdds, (a: Handle, other: Handle, alpha: Handle, out: Handle) |a, other, alpha, out| {
    let (b, alpha) = (scalar(other)?, scalar(alpha)?);
    let (real, int) = (alpha.real * b.real, alpha.int * b.int);
    with_number(a, out, Some(Box::new(move |x| x + real)), Some(Box::new(move |x| x + int)), false)
});
operator!(aclnnMulsGetWorkspaceSize, aclnnMuls, (a: Handle, other: Handle, out: Handle) |a, other, out| {
    let b = scalar(other)?;
    with_number(a, out, Some(Box::new(move |x| x * b.real)), Some(Box::new(move |x| x.wrapping_mul(b.int))), false)
});
operator!(aclnnFloorDividesGetWorkspaceSize, aclnnFloorDivides, (a: Handle, other: Handle, out: Handle) |a, other, out| {
    let b = scalar(other)?;
    require(b.int != 0, "a division by 0")?;
    with_number(a, out, None, Some(Box::new(move |x| x.div_euclid(b.int))), false)
});
operator!(aclnnBitwiseAndScalarGetWorkspaceSize, aclnnBitwiseAndScalar, (a: Handle, other: Handle, out: Handle) |a, other, out| {
    let b = scalar(other)?;
    with_number(a, out, None, Some(Box::new(move |x| x & b.int)), false)
});
operator!(aclnnEqScalarGetWorkspaceSize, aclnnEqScalar, (a: Handle, other: Handle, out: Handle) |a, other, out| {
    let b = scalar(other)?;
    let (real, int) = (move |x| f32::from(x == b.real), move |x| i64::from(x == b.int));
    with_number(a, out, Some(Box::new(real)), Some(Box::new(int)), true)
});
operator!(aclnnLtScalarGetWorkspaceSize, aclnnLtScalar, (a: Handle, other: Handle, out: Handle) |a, other, out| {
    let b = scalar(other)?;
    let (real, int) = (move |x| f32::from(x < b.real), move |x| i64::from(x < b.int));
    with_number(a, out, Some(Box::new(real)), Some(Box::new(int)), true)
});

operator!(aclnnSWhereGetWorkspaceSize, aclnnSWhere, (condition: Handle, a: Handle, b: Handle, out: Handle) |condition, a, b, out| {
    let mut op = Operator::new();
    let (c, a, b, out) = (op.tensor(condition)?, op.tensor(a)?, op.tensor(b)?, op.tensor(out)?);
    require(c.dtype == dtype::BOOL && a.dtype == b.dtype && a.dtype == out.dtype, "SWhere of unequal types")?;
    let kernel = if dtype::is_float(a.dtype) {
        Kernel::Real(Box::new(|x, to| (0..to.len()).for_each(|i| to[i] = if x[0][i] != 0.0 { x[1][i] } else { x[2][i] })))
    } else {
        Kernel::Int(Box::new(|x, to| (0..to.len()).for_each(|i| to[i] = if x[0][i] != 0 { x[1][i] } else { x[2][i] })))
    };
    elementwise(op, &[c, a, b], &out, kernel)
});

operator!(aclnnInplaceCopyGetWorkspaceSize, aclnnInplaceCopy, (out: Handle, from: Handle) |out, from| {
    let mut op = Operator::new();
    let (from, out) = (op.tensor(from)?, op.tensor(out)?);
    require(broadcasts(&from.dims, &out.dims), format!("a copy of {:?} to {:?}", from.dims, out.dims))?;
    let kernel = if dtype::is_float(from.dtype) || dtype::is_float(out.dtype) {
        Kernel::Real(Box::new(|x: &[&[f32]], to: &mut [f32]| to.copy_from_slice(x[0])))
    } else {
        Kernel::Int(Box::new(|x: &[&[i64]], to: &mut [i64]| to.copy_from_slice(x[0])))
    };
    let same = from.dtype == out.dtype;
    op.run(move |tensors| {
        if same {
            copy_bits(&tensors[0], &tensors[1]);
        } else {
            map(tensors, &kernel);
        }
        Ok(())
    })
});

/// A copy between tensors of one type keeps every bit.
fn copy_bits(from: &Ready, to: &Ready) {
    let strides = from.broadcast(&to.dims);
    let last = |s: &[usize]| s.last().copied().unwrap_or(0);
    let n = to.dims.last().copied().unwrap_or(1);
    rows(&to.dims, &[&strides, &to.strides], |at| {
        to.copy_bits([at[1], last(&to.strides)], from, [at[0], last(&strides)], n);
    });
}

operator!(aclnnInplaceFillScalarGetWorkspaceSize, aclnnInplaceFillScalar, (out: Handle, value: Handle) |out, value| {
    let mut op = Operator::new();
    let (out, value) = (op.tensor(out)?, scalar(value)?);
    let kernel = if dtype::is_float(out.dtype) {
        Kernel::Real(Box::new(move |_, to| to.fill(value.real)))
    } else {
        Kernel::Int(Box::new(move |_, to| to.fill(value.int)))
    };
    elementwise(op, &[], &out, kernel)
});

operator!(aclnnInplaceMaskedFillScalarGetWorkspaceSize, aclnnInplaceMaskedFillScalar, (this: Handle, mask: Handle, value: Handle) |this, mask, value| {
    let mut op = Operator::new();
    let (mask, before, value) = (op.tensor(mask)?, op.tensor(this)?, scalar(value)?);
    let out = op.tensor(this)?;
    // The vendor's document allows strides for the tensor, not for the mask.
    require(mask.dtype == dtype::BOOL && mask.is_dense(), "a mask that is not bool or not dense")?;
    let kernel = if dtype::is_float(out.dtype) {
        Kernel::Real(Box::new(move |x, to| (0..to.len()).for_each(|i| to[i] = if x[0][i] != 0.0 { value.real } else { x[1][i] })))
    } else {
        Kernel::Int(Box::new(move |x, to| (0..to.len()).for_each(|i| to[i] = if x[0][i] != 0 { value.int } else { x[1][i] })))
    };
    elementwise(op, &[mask, before], &out, kernel)
});

/// Reduces the axes `dims` of `a`, which are kept with size 1.
fn reduce(
    a: Handle,
    dims: Handle,
    keep: bool,
    out: Handle,
    start: f32,
    f: fn(f32, f32) -> f32,
) -> Result<Operator, i32> {
    let mut op = Operator::new();
    let (a, dims, out) = (op.tensor(a)?, array(dims)?, op.tensor(out)?);
    let mut wanted = a.dims.clone();
    for d in dims {
        let axis = if d < 0 { d + a.dims.len() as i64 } else { d };
        require((0..a.dims.len() as i64).contains(&axis), "a reduction of an axis that is not there")?;
        wanted[axis as usize] = 1;
    }
    require(
        keep && wanted == out.dims && a.dtype == out.dtype,
        "a reduction to another shape or type, or without keepDims",
    )?;
    require(a.dtype == dtype::F32, "a reduction of another type than f32 is not emulated")?;
    op.run(move |t| {
        let (a, out) = (&t[0], &t[1]);
        let to = out.broadcast(&a.dims);
        let strides = [&a.strides, &to];
        let n = a.dims.last().copied().unwrap_or(1);
        let (step, out_step) = (a.strides.last().copied().unwrap_or(1), to.last().copied().unwrap_or(0));
        let mut fill = vec![start; out.dims.last().copied().unwrap_or(1)];
        let own = out.strides.clone();
        rows(&out.dims, &[&own], |at| out.store(at[0], own.last().copied().unwrap_or(1), &fill));
        let mut row = vec![0.0f32; n];
        rows(&a.dims, &strides, |at| {
            a.load(at[0], step, &mut row);
            if out_step == 0 {
                // Eight running values, as vector units have.
                let mut lanes = [start; 8];
                row.iter().enumerate().for_each(|(i, x)| lanes[i % 8] = f(lanes[i % 8], *x));
                let mut one = [0.0];
                out.load(at[1], 0, &mut one);
                out.store(at[1], 0, &[lanes.iter().fold(one[0], |a, b| f(a, *b))]);
            } else {
                fill.resize(n, 0.0);
                out.load(at[1], out_step, &mut fill);
                fill.iter_mut().zip(&row).for_each(|(a, x)| *a = f(*a, *x));
                out.store(at[1], out_step, &fill);
            }
        });
        Ok(())
    })
}

operator!(aclnnAmaxGetWorkspaceSize, aclnnAmax, (a: Handle, dims: Handle, keep: bool, out: Handle) |a, dims, keep, out| {
    reduce(a, dims, keep, out, f32::NEG_INFINITY, maximum)
});
operator!(aclnnReduceSumGetWorkspaceSize, aclnnReduceSum, (a: Handle, dims: Handle, keep: bool, kind: i32, out: Handle) |a, dims, keep, kind: i32, out| {
    require(kind == dtype::F32, "a sum in another type than f32 is not emulated")?;
    reduce(a, dims, keep, out, 0.0, |a, b| a + b)
});
