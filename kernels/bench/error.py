"""RMS errors of the kernels beside their peers', against attention in f64, on the same bf16 data.

    python3 kernels/bench/error.py EMIT

Random normal data, and the same with outliers (N(0, 1), 0.1 % of the elements N(0, 100)). Peers: PyTorch's FlashAttention-2 and
cuDNN, and FlashAttention-3 where the wheel flash-attn3-jax is installed (head sizes up to 128). A row a tensor: RMS error over
all of its elements, ratio = ours / fa3, or / the best of the others where there is no fa3.
"""

import os
import subprocess
import sys
import tempfile

import numpy
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch import Case, Driver

NONE = 1 << 40
NAMES = ("out", "dq", "dk", "dv")
SHAPES = [  # batch, heads, KV heads, rows, head size, causal
    (1, 4, 4, 4096, 64, False),
    (1, 4, 4, 4096, 64, True),
    (1, 4, 4, 4096, 128, False),
    (1, 4, 4, 4096, 128, True),
    (1, 8, 2, 8192, 128, True),
    (2, 4, 1, 2048, 96, True),
    (1, 2, 2, 4096, 256, False),
    (1, 2, 2, 4096, 256, True),
]
FA3 = """
import sys, numpy, jax, jax.numpy as jnp
from flash_attn3_jax import flash_mha
data = numpy.load(sys.argv[1])
q, k, v, dout = (jax.lax.bitcast_convert_type(jnp.asarray(data[n]), jnp.bfloat16) for n in ("q", "k", "v", "dout"))
causal = bool(data["causal"])
out, pull = jax.vjp(lambda q, k, v: flash_mha(q, k, v, is_causal=causal), q, k, v)
numpy.savez(sys.argv[2], **{n: numpy.asarray(x.astype(jnp.float32)) for n, x in zip(("out", "dq", "dk", "dv"), (out, *pull(dout)))})
"""


def draw(shape, outliers, seed):
    b, h, hk, s, d, _ = shape
    source = torch.Generator(device="cuda").manual_seed(seed)
    def make(heads):
        x = torch.randn(b, s, heads, d, device="cuda", generator=source)
        if outliers:
            wild = torch.rand(x.shape, device="cuda", generator=source) < 1e-3
            x = torch.where(wild, x + 100 ** 0.5 * torch.randn(x.shape, device="cuda", generator=source), x)
        return x.bfloat16()
    return make(h), make(hk), make(hk), make(h)


def exact(q, k, v, dout, causal):
    """out, dq, dk, dv in f64, a query head at a time."""
    b, s, h, d = q.shape
    group = h // k.shape[2]
    results = [torch.zeros(t.shape, dtype=torch.float64, device="cuda") for t in (q, q, k, v)]
    for i in range(b):
        for head in range(h):
            x, y, z, g = (t[i, :, n].double() for t, n in ((q, head), (k, head // group), (v, head // group), (dout, head)))
            scores = x @ y.T / d ** 0.5
            if causal:
                scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            p = scores.softmax(1)
            out = p @ z
            ds = p * (g @ z.T - (out * g).sum(1, keepdim=True)) / d ** 0.5
            results[0][i, :, head] = out
            results[1][i, :, head] = ds @ y
            results[2][i, :, head // group] += ds.T @ x
            results[3][i, :, head // group] += p.T @ g
    return results


def torch_peer(kind, q, k, v, dout, causal):
    tensors = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(kind):
        out = F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])
    gradients = torch.autograd.grad(out, tensors, dout.transpose(1, 2))
    return [t.transpose(1, 2) for t in (out.detach(), *gradients)]


def fa3_peer(q, k, v, dout, causal):
    with tempfile.TemporaryDirectory() as folder:
        bits = {n: t.view(torch.int16).cpu().numpy() for n, t in zip(("q", "k", "v", "dout"), (q, k, v, dout))}
        numpy.savez(f"{folder}/in.npz", causal=causal, **bits)
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run([sys.executable, "-c", FA3, f"{folder}/in.npz", f"{folder}/out.npz"], env=env, capture_output=True, text=True)
        if done.returncode:
            print("no FlashAttention-3:", done.stderr.strip().splitlines()[-1:], file=sys.stderr)
            return None
        data = numpy.load(f"{folder}/out.npz")
        return [torch.from_numpy(data[n]).cuda() for n in NAMES]


def ours(driver, program, shape, q, k, v, dout):
    b, h, hk, s, d, causal = shape
    spec = dict(dtype="bf16", batch=b, q_rows=s, k_rows=s, heads=h, kv_heads=hk, head_dim=d, aligned=1)
    case = Case(driver, program, spec, [[i, 0, s, 0, s, -NONE, 0 if causal else NONE, 0, 0, 1, 1] for i in range(b)])
    out, lse, delta = torch.empty_like(q), *(torch.empty(b, s, h, 1, device="cuda") for _ in range(2))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    case.forward(q, k, v, out, lse)
    case.prepare(out, dout, lse, None, delta)
    if "dq" in case.kernels:
        case.backward(q, k, v, dout, lse, delta, dq, dk, dv)
    else:
        sums = torch.zeros(b, s, h, d, device="cuda")
        case.backward(q, k, v, dout, lse, delta, sums, dk, dv)
        case.round_dq(dq, sums)
    return out, dq, dk, dv


def main():
    program, driver = sys.argv[1], Driver()
    print(torch.cuda.get_device_name(), torch.__version__)
    print(f"{'B  H HK    S   D':17}{'mask':7}{'data':9}{'':4}{'ours':>10}{'fa3':>10}{'cudnn':>10}{'fa2':>10}  ratio")
    for shape in SHAPES:
        b, h, hk, s, d, causal = shape
        for outliers in (False, True):
            data = draw(shape, outliers, 7 + outliers)
            truth = exact(*data, causal)
            sides = [ours(driver, program, shape, *data), fa3_peer(*data, causal) if d <= 128 else None]
            sides += [torch_peer(kind, *data, causal) for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)]
            for i, name in enumerate(NAMES):
                error = [None if x is None else (x[i].double() - truth[i]).square().mean().sqrt().item() for x in sides]
                words = "".join(f"{'-':>10}" if e is None else f"{e:10.2e}" for e in error)
                beside = error[1] or min(error[2:])
                print(f"{b} {h:2} {hk:2} {s:5} {d:3} {'causal' if causal else 'full  '} {'outliers' if outliers else 'normal  '} {name:3}"
                      f"{words}  {error[0] / beside:.3f}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
