"""Times the kernels against PyTorch's FlashAttention-2 and cuDNN in the same run.

    python3 kernels/bench/speed.py EMIT [out.json] [quick]

bf16, [batch, seq, heads, dim] tensors, random normal data. TFLOP/s of 4 B H S S D operations (half when causal), backward
2.5x; medians of device-event times, the sides interleaved. Our backward includes delta, zeroing the f32 dq, and rounding
it, as PyTorch's does.
"""

import json
import random
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch import Case, Driver

NONE = 1 << 40


def shapes(quick):
    for d, h in ((64, 32), (128, 16), (256, 8)):
        for s in (2048, 16384) if quick else (2048, 8192, 16384):
            for causal in (False, True):
                yield max(1, 16384 // s), h, h, s, d, causal
    for s in (8192,) if quick else (4096, 8192, 32768, 65536):
        yield max(1, 16384 // s), 32, 8, s, 128, True


def orders(count):
    """Orders in which each of `count` sides comes equally often right behind each other one (Williams, 1949)."""
    zigzag = [i // 2 if i % 2 == 0 else count - 1 - i // 2 for i in range(count)]
    rows = [[(z + i) % count for z in zigzag] for i in range(count)]
    return rows if count % 2 == 0 else rows + [row[::-1] for row in rows]


def times(functions, least):
    """Median seconds of each function over at least `least` calls. What ran before sets the clock, which is slower after a hot kernel, so
    each comes equally often right behind each other one."""
    for f in functions:
        f()
        f()
    torch.cuda.synchronize()
    taken, rows = [[] for _ in functions], orders(len(functions))
    for _ in range(-(-least // len(rows))):
        for row in random.Random(len(taken[0])).sample(rows, len(rows)):
            for i in row:
                a, b = torch.cuda.Event(True), torch.cuda.Event(True)
                torch.cuda._sleep(600_000)  # the queue is full before the clock starts
                a.record()
                functions[i]()
                b.record()
                torch.cuda.synchronize()
                taken[i].append(a.elapsed_time(b) * 1e-3)
    return [statistics.median(t) for t in taken]


def ours(driver, program, b, h, hk, s, d, causal, deterministic):
    spec = dict(dtype="bf16", batch=b, q_rows=s, k_rows=s, heads=h, kv_heads=hk, head_dim=d, aligned=1)
    if deterministic:
        spec["deterministic"] = 1
    slices = [[i, 0, s, 0, s, -NONE, 0 if causal else NONE, 0, 0, 1, 1] for i in range(b)]
    return Case(driver, program, spec, slices)


def measure(driver, program, b, h, hk, s, d, causal):
    make = lambda heads: torch.randn(b, s, heads, d, device="cuda", dtype=torch.bfloat16)
    q, k, v, dout = make(h), make(hk), make(hk), make(h)
    tq, tk, tv = (t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v))
    case, fixed = (ours(driver, program, b, h, hk, s, d, causal, det) for det in (False, True))
    out, lse, delta = torch.empty_like(q), *(torch.empty(b, s, h, 1, device="cuda") for _ in range(2))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    sums = torch.empty(b, s, h, d, device="cuda")

    def backward():
        if "dq" in case.kernels:
            case.prepare(out, dout, lse, None, delta)
            return case.backward(q, k, v, dout, lse, delta, dq, dk, dv)
        case.prepare(out, dout, lse, None, delta)
        sums.zero_()
        case.backward(q, k, v, dout, lse, delta, sums, dk, dv)
        case.round_dq(dq, sums)

    def backward_fixed():
        fixed.prepare(out, dout, lse, None, delta)
        fixed.backward(q, k, v, dout, lse, delta, dq, dk, dv)

    def peer(kind):
        def forward():
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(tq, tk, tv, is_causal=causal, enable_gqa=h != hk)

        def forward_only():
            with torch.no_grad():
                return forward()

        result = forward()
        return result, forward_only, lambda: torch.autograd.grad(result, (tq, tk, tv), dout.transpose(1, 2), retain_graph=True)

    (reference, *fa2), (_, *cudnn) = peer(SDPBackend.FLASH_ATTENTION), peer(SDPBackend.CUDNN_ATTENTION)
    forward = times([fa2[0], cudnn[0], lambda: case.forward(q, k, v, out, lse)], 8)
    error = (out.transpose(1, 2).float() - reference.float()).abs().max().item()
    back = times([fa2[1], cudnn[1], backward, backward_fixed], 8)
    backward()
    wrong = max((a.transpose(1, 2).float() - b.float()).abs().max().item() for a, b in zip((dq, dk, dv), fa2[1]()))
    work = 4 * b * h * s * s * d * (0.5 if causal else 1) / 1e12
    row = dict(B=b, H=h, HK=hk, S=s, D=d, causal=causal, out_diff=error, grad_diff=wrong)
    row |= {name: work / t for name, t in zip(("fa2_fwd", "cudnn_fwd", "fwd"), forward)}
    return row | {name: 2.5 * work / t for name, t in zip(("fa2_bwd", "cudnn_bwd", "bwd", "bwd_deterministic"), back)}


def main():
    program, rows, driver = sys.argv[1], [], Driver()
    print(torch.cuda.get_device_name(), torch.__version__)
    print(" B  H HK     S   D mask    fwd  fa2 cudnn ratio   bwd  fa2 cudnn ratio   det  diff")
    driver.compile_all([ours(driver, program, 1, 1, 1, 256, d, True, f) for d in (64, 128, 256) for f in (False, True)])
    for shape in shapes("quick" in sys.argv):
        r = measure(driver, program, *shape)
        rows.append(r)
        better = {way: max(r[f"fa2_{way}"], r[f"cudnn_{way}"]) for way in ("fwd", "bwd")}
        print(f"{r['B']:2} {r['H']:2} {r['HK']:2} {r['S']:5} {r['D']:3} {'causal' if r['causal'] else 'full  '} {r['fwd']:5.0f} "
              f"{r['fa2_fwd']:4.0f} {r['cudnn_fwd']:4.0f} {r['fwd'] / better['fwd']:.2f} {r['bwd']:6.0f} {r['fa2_bwd']:4.0f} "
              f"{r['cudnn_bwd']:4.0f} {r['bwd'] / better['bwd']:.2f} {r['bwd_deterministic']:5.0f} "
              f"{r['out_diff']:.1e} {r['grad_diff']:.1e}", flush=True)
        torch.cuda.empty_cache()
    if len(sys.argv) > 2 and sys.argv[2].endswith(".json"):
        json.dump(rows, open(sys.argv[2], "w"), indent=1)


if __name__ == "__main__":
    main()
