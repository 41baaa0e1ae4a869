#!/usr/bin/env python3
"""Executes compiled kernels on a CPU, in tinygrad's emulator of AMD machine code, and compares with attention in f64.

    git clone https://github.com/tinygrad/tinygrad            # its emulator is in the repository, not in the package
    pip install numpy
    CC=clang-19 python3 kernels/ci/run_amd.py TINYGRAD [--arch gfx942|gfx1100] [--case NAME] [--clang PROGRAM]

By hand: a case takes minutes. Needs cargo (it runs the example `emit`) and clang with lld, as compile_amd.py does.
"""

import argparse
import ctypes
import os
import struct
import subprocess
import sys
import tempfile
import time

import numpy

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from compile import ROOT, parse  # noqa: E402

# What the emulator calls them.
ARCHES = {"gfx942": "cdna", "gfx1100": "rdna3"}
# What a case is where it says nothing; `window`: keys that a query sees, up to its own; `more`: other keys of `emit`.
PLAIN = {"dtype": "bf16", "batch": 1, "q_rows": 20, "k_rows": 36, "heads": 1, "kv_heads": 1, "dim": 16, "window": None, "softcap": 0.0,
         "alibi": False, "more": ""}
CASES = {
    "bf16": {"q_rows": 40, "k_rows": 40, "heads": 2, "dim": 32, "window": 1 << 20},
    "f16": {"dtype": "f16", "q_rows": 33, "k_rows": 70, "dim": 64},
    "gqa": {"dtype": "f16", "heads": 4, "kv_heads": 2, "dim": 24},
    "band": {"dtype": "f16", "q_rows": 40, "k_rows": 40, "dim": 48, "window": 9},
    "softcap": {"heads": 2, "kv_heads": 2, "softcap": 2.0},
    "alibi": {"dtype": "f16", "heads": 2, "window": 1 << 20, "alibi": True},
    "deterministic": {"q_rows": 40, "k_rows": 40, "heads": 2, "dim": 32, "window": 1 << 20, "more": "deterministic=1"},
    "d96": {"q_rows": 17, "k_rows": 33, "dim": 96},
    "d256": {"dtype": "f16", "q_rows": 16, "k_rows": 20, "dim": 256},
    "f32": {"dtype": "f32", "k_rows": 24, "window": 1 << 20},
}


class Case:
    def __init__(self, name):
        self.__dict__.update(PLAIN | CASES[name])
        self.slopes = numpy.float32(0.25) / (1 + numpy.arange(self.heads, dtype=numpy.float32))
        draw = numpy.random.default_rng(7)
        of = lambda rows, heads: self.rounded(draw.standard_normal((self.batch, rows, heads, self.dim)))
        self.q, self.dout = of(self.q_rows, self.heads), of(self.q_rows, self.heads)
        self.k, self.v = of(self.k_rows, self.kv_heads), of(self.k_rows, self.kv_heads)

    def rounded(self, x):
        """To the dtype's bits."""
        x = x.astype(numpy.float32)
        if self.dtype == "f32":
            return x
        if self.dtype == "f16":
            return x.astype(numpy.float16)
        bits = x.view(numpy.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(numpy.uint16)

    def exact(self, x):
        if self.dtype == "bf16" and x.dtype == numpy.uint16:
            return (x.astype(numpy.uint32) << 16).view(numpy.float32).astype(numpy.float64)
        return x.astype(numpy.float64)

    def emit_lines(self):
        lo, hi = (1 - self.window, 0) if self.window else (-(1 << 29), 1 << 29)
        options = f"softcap={self.softcap} " * bool(self.softcap) + "alibi=1 " * self.alibi + self.more
        return (f"case c dtype={self.dtype} batch={self.batch} q_rows={self.q_rows} k_rows={self.k_rows} heads={self.heads} "
                f"kv_heads={self.kv_heads} head_dim={self.dim} accumulate=1 {options}\n"
                f"slice 0 0 {self.q_rows} 0 {self.k_rows} {lo} {hi} 0 0 1 1\n")

    def oracle(self):
        """out, lse, delta, dq, dk, dv in f64."""
        group = self.heads // self.kv_heads
        q, dout = self.exact(self.q), self.exact(self.dout)
        k, v = (numpy.repeat(self.exact(x), group, axis=2) for x in (self.k, self.v))
        scale = numpy.float64(numpy.float32(1 / numpy.sqrt(self.dim)))
        x0 = scale * numpy.einsum("brhd,bchd->bhrc", q, k)
        bend = 1.0
        x = x0
        if self.softcap:
            t = numpy.tanh(x0 / self.softcap)
            x, bend = self.softcap * t, 1 - t * t
        behind = numpy.arange(self.q_rows)[:, None] - numpy.arange(self.k_rows)
        if self.alibi:
            x = x - self.slopes[:, None, None].astype(numpy.float64) * numpy.abs(behind)
        if self.window:
            x = numpy.where((behind >= 0) & (behind < self.window), x, -numpy.inf)
        m = x.max(-1, keepdims=True)
        lse = (m + numpy.log(numpy.exp(x - m).sum(-1, keepdims=True)))[..., 0]
        p = numpy.exp(x - lse[..., None])
        out = numpy.einsum("bhrc,bchd->brhd", p, v)
        dp = numpy.einsum("brhd,bchd->bhrc", dout, v)
        delta = (dout * out).sum(-1).transpose(0, 2, 1)
        ds = p * (dp - delta[..., None]) * bend
        dq = scale * numpy.einsum("bhrc,bchd->brhd", ds, k)
        over = lambda y: y.reshape(self.batch, self.k_rows, self.kv_heads, group, self.dim).sum(3)
        dk = scale * over(numpy.einsum("bhrc,brhd->bchd", ds, q))
        dv = over(numpy.einsum("bhrc,brhd->bchd", p, dout))
        return out, lse.transpose(0, 2, 1), delta.transpose(0, 2, 1), dq, dk, dv


class Object:
    """A code object: its segments in memory, and a kernel's descriptor."""

    def __init__(self, path):
        data = open(path, "rb").read()
        phoff, shoff = struct.unpack_from("<QQ", data, 32)
        phsize, phnum, shsize, shnum, _ = struct.unpack_from("<5H", data, 54)
        loads = [struct.unpack_from("<IIQQQQQQ", data, phoff + i * phsize) for i in range(phnum)]
        loads = [p for p in loads if p[0] == 1]
        self.memory = ctypes.create_string_buffer(max(p[3] + p[6] for p in loads) + 8192)
        self.base = (ctypes.addressof(self.memory) + 4095) // 4096 * 4096
        for _, _, offset, address, _, in_file, _, _ in loads:
            ctypes.memmove(self.base + address, data[offset : offset + in_file], in_file)
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, shoff + i * shsize) for i in range(shnum)]
        self.symbols = {}
        for s in sections:
            if s[1] not in (2, 11):
                continue
            names = sections[s[6]]
            for at in range(s[4], s[4] + s[5], 24):
                name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", data, at)
                start = names[4] + name
                self.symbols[data[start : data.index(b"\0", start)].decode()] = value

    def run(self, emulate, arch, name, grid, threads, shared, params):
        descriptor = self.base + self.symbols[name + ".kd"]
        raw = ctypes.string_at(descriptor, 64)
        scratch = struct.unpack_from("<I", raw, 4)[0]
        entry = descriptor + struct.unpack_from("<q", raw, 16)[0]
        rsrc2, properties = struct.unpack_from("<I", raw, 52)[0], struct.unpack_from("<H", raw, 56)[0]
        # Shared memory is asked for at the launch.
        rsrc2 = rsrc2 & ~(0x1FF << 15) | -(-shared // 512) << 15
        buffer = ctypes.create_string_buffer(params + bytes(1024), len(params) + 1024)
        kernarg = ctypes.addressof(buffer)
        user = []
        for bit, words in enumerate([[0] * 4, [0, 0], [0, 0], [kernarg & 0xFFFFFFFF, kernarg >> 32], [0, 0], [0, 0], [scratch]]):
            if properties >> bit & 1:
                user += words
        emulate(entry, 0, grid, 1, 1, threads, 1, 1, kernarg, rsrc2, scratch, ARCHES[arch], user)


def address(array):
    return array.ctypes.data


def tensor(array):
    """The kernels' Tensor of a dense [batch, row, head, ...] array."""
    batch, row, head = (s // array.itemsize for s in array.strides[:3])
    return struct.pack("<Qqqq", address(array), batch, row, head)


NONE = struct.pack("<Qqqq", 0, 0, 0, 0)


def problem(case, tiles, pieces, kernel):
    slopes = tensor(case.slopes[None, None, :, None]) if case.alibi else NONE
    return (struct.pack("<QQ", address(tiles), address(pieces)) + slopes + struct.pack("<QQ", 0, 0)
            + struct.pack("<10I", kernel.tiles, case.heads, case.kv_heads, kernel.section, 0, case.heads // case.kv_heads, 0, 0,
                          case.dim, case.dim)
            + struct.pack("<fffI", 1 / numpy.sqrt(case.dim), case.softcap or 1.0, 1.0, 0))


def prepare(case, folder, arch, clang):
    """The case's kernels: kind to (line of emit, code object, tiles, pieces)."""
    command = ["cargo", "run", "-q", "-p", "longspan-kernels", "--example", "emit", "--", folder, arch]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, input=case.emit_lines()).stdout
    kernels = {}
    for kernel in map(parse, lines.splitlines()):
        if kernel.kind not in ("forward", "backward", "dq"):
            continue
        path = f"{folder}/{kernel.kind}.co"
        subprocess.run(
            [clang, "-x", "hip", "--cuda-device-only", f"--offload-arch={arch}", "-O3", "-std=c++17", "-nogpulib", "-nogpuinc",
             "--no-gpu-bundle-output", *[f"-D{d}" for d in kernel.defines], f"{folder}/{kernel.key}.cu", "-o", path], check=True)
        lists = [numpy.fromfile(f"{folder}/c.{kernel.kind}.{what}", numpy.uint8) for what in ("tiles", "pieces")]
        kernels[kernel.kind] = (kernel, Object(path), *lists)
    return kernels


def judge(case, found, wanted):
    """Lines of (name, largest error, allowed): the dtype's unit roundoff times what is added up, three times."""
    unit = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-20}[case.dtype]
    fine = True
    for name, got in found.items():
        want = wanted[name]
        error, allowed = numpy.abs(case.exact(got) - want).max(), 3 * unit * numpy.abs(want).max()
        fine &= bool(error <= allowed)
        print(f"  {name}: largest error {error:.2e}, allowed {allowed:.2e}, of values up to {numpy.abs(want).max():.2e}")
    return fine


def run(case, emulate, arch, clang):
    with tempfile.TemporaryDirectory() as folder:
        kernels = prepare(case, folder, arch, clang)
        out, lse, delta, dq, dk, dv = case.oracle()
        wanted = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        results = {"out": numpy.zeros_like(case.q), "lse": numpy.zeros(lse.shape, numpy.float32)}
        results |= {n: numpy.zeros(wanted[n].shape, numpy.float32) for n in ("dq", "dk", "dv")}
        stats = {n: numpy.ascontiguousarray(x.astype(numpy.float32)) for n, x in (("lse", lse), ("delta", delta))}
        rows = lambda x: tensor(x[..., None])
        kernel, code, tiles, pieces = kernels["forward"]
        params = problem(case, tiles, pieces, kernel) + b"".join(map(tensor, (case.q, case.k, case.v, results["out"])))
        params += rows(results["lse"]) + NONE * 4 + struct.pack("<II", 0, 0)
        code.run(emulate, arch, "attention_forward", kernel.tiles * case.heads, kernel.threads, kernel.shared, params)
        inputs = b"".join(map(tensor, (case.q, case.k, case.v, case.dout))) + rows(stats["lse"]) + rows(stats["delta"])
        gradients = b"".join(tensor(results[n]) for n in ("dq", "dk", "dv")) + struct.pack("<II", 0, 0)
        for kind, name, heads in (("backward", "attention_backward", case.kv_heads), ("dq", "attention_backward_dq", case.heads)):
            if kind not in kernels:
                continue
            kernel, code, tiles, pieces = kernels[kind]
            params = problem(case, tiles, pieces, kernel) + inputs + gradients
            code.run(emulate, arch, name, kernel.tiles * heads, kernel.threads, kernel.shared, params)
        return judge(case, results, wanted)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("tinygrad")
    options.add_argument("--arch", choices=list(ARCHES), default="gfx942")
    options.add_argument("--case", choices=list(CASES))
    options.add_argument("--clang", default="clang++-19")
    args = options.parse_args()
    sys.path[:0] = [args.tinygrad]
    from test.mockgpu.amd.emu import run_asm

    failed = 0
    for name in [args.case] if args.case else CASES:
        start = time.time()
        print(f"{name}: {CASES[name]}", flush=True)
        fine = run(Case(name), run_asm, args.arch, args.clang)
        failed += not fine
        print(f"  {'ok' if fine else 'WRONG'} in {time.time() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
