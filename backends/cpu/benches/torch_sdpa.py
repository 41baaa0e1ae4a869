"""torch's scaled_dot_product_attention on CPU, the shapes and the format of benches/attention.rs: to run beside it.

    python backends/cpu/benches/torch_sdpa.py [--threads N] [--runs N] [--filter TEXT]

Any torch with CPU support; no GPU is used. The peak is not measured here: divide by the one that the bench prints, from the
same run on the same machine. Inputs are [batch, heads, seq, dim] as torch wants them (views of [batch, seq, heads, dim]),
on the flash path, which is refused loudly where torch has none for the arguments. A row's figure is the best of its runs.
"""

import argparse
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS = 8


def measure(dtype, dim, seq, causal, backward, runs):
    """Best GFLOP/s of the runs."""
    torch.manual_seed(1)
    make = lambda: (torch.rand(1, seq, HEADS, dim) * 2 - 1).to(dtype).transpose(1, 2).requires_grad_(backward)
    q, k, v = make(), make(), make()
    dout = (torch.rand(1, seq, HEADS, dim) * 2 - 1).to(dtype).transpose(1, 2)
    flops = 4 * HEADS * seq * seq * dim * (0.5 if causal else 1) * (2.5 if backward else 1)
    best = float("inf")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for _ in range(runs + 1):
            start = time.perf_counter()
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            if backward:
                start = time.perf_counter()
                torch.autograd.grad(out, (q, k, v), dout)
            best = min(best, time.perf_counter() - start)
    return flops / best / 1e9


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--filter", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads")
    for dtype, word in [(torch.float32, "f32"), (torch.bfloat16, "bf16")]:
        for dim in (64, 128):
            for mask, seq in (("full", 2048), ("causal", 4096)):
                for direction in ("fwd", "bwd"):
                    name = f"{word} d{dim} {mask} {direction}"
                    if args.filter in name:
                        rate = measure(dtype, dim, seq, mask == "causal", direction == "bwd", args.runs)
                        print(f"{name:<28} {seq:>6} {rate:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
