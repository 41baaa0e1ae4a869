"""Compiles and launches the kernels through libnvrtc and libcuda, over torch tensors: what backends/gpu does in Rust."""

import concurrent.futures
import ctypes
import multiprocessing
import os
import struct
import subprocess
import sys
import tempfile
import time

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "ci"))
from compile import Nvrtc, parse  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LOAD, STORE = 1, 2  # ForwardParams.stage
# As for the library: flash2 keeps a Hopper from its own kernels.
KERNEL = {"kernel": os.environ["LONGSPAN_KERNEL"]} if "LONGSPAN_KERNEL" in os.environ else {}


def arch_name(arch):
    return f"sm_{arch}" + ("a" if arch >= 90 else "")


def compile_one(job):
    path, key, arch, defines = job
    with open(path, "rb") as f:
        return Nvrtc(os.environ.get("NVRTC")).compile(f.read(), key + ".cu", arch, defines)


class Driver:
    """libcuda through ctypes, in torch's context."""

    def __init__(self):
        torch.zeros(1, device="cuda")
        self.lib = ctypes.CDLL("libcuda.so.1")
        self.nvrtc = Nvrtc(os.environ.get("NVRTC"))
        self.modules, self.cubins = {}, {}
        major, minor = torch.cuda.get_device_capability()
        self.arch = major * 10 + minor
        self.units = torch.cuda.get_device_properties(0).multi_processor_count
        self.compile_seconds = 0.0

    def call(self, name, *args):
        status = getattr(self.lib, name)(*args)
        if status:
            raise RuntimeError(f"{name}: error {status}")

    def compile_all(self, cases):
        """Compiles what `cases` need, on all cores."""
        begin, jobs = time.time(), {}
        for case in cases:
            for k in case.kernels.values():
                if (k.key, tuple(k.defines)) not in self.cubins:
                    jobs[k.key, tuple(k.defines)] = (f"{case.folder}/{k.key}.cu", k.key, arch_name(self.arch), k.defines)
        fork = multiprocessing.get_context("fork")  # the children touch NVRTC only
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=fork) as pool:
            for identity, (cubin, log) in zip(jobs, pool.map(compile_one, jobs.values())):
                if cubin is None:
                    raise RuntimeError(log)
                self.cubins[identity] = cubin
        self.compile_seconds += time.time() - begin

    def function(self, source, key, defines, entry, shared):
        identity = (key, tuple(defines), entry)
        if identity not in self.modules:
            begin = time.time()
            cubin, log = self.cubins.get(identity[:2]), ""
            if cubin is None:
                cubin, log = self.nvrtc.compile(source, key + ".cu", arch_name(self.arch), defines)
            self.compile_seconds += time.time() - begin
            if cubin is None:
                raise RuntimeError(log)
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(module), cubin)
            self.call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
            if shared > 48 << 10:
                self.call("cuFuncSetAttribute", function, 8, shared)
            self.modules[identity] = function
        return self.modules[identity]

    def tensor_map(self, t, rows, columns=64):
        types = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
        size, b, s, h, d = t.element_size(), *t.shape
        order, step = [d, s, h, b], [t.stride(i) * size if t.shape[i] > 1 else -(-d * size // 16) * 16 for i in (1, 2, 0)]
        array = lambda kind, values: (kind * len(values))(*values)
        raw = (ctypes.c_uint64 * 32)()
        at = (ctypes.addressof(raw) + 127) // 128 * 128
        self.call("cuTensorMapEncodeTiled", ctypes.c_void_p(at), types[t.dtype], 4, ctypes.c_void_p(t.data_ptr()),
                  array(ctypes.c_uint64, order), array(ctypes.c_uint64, step), array(ctypes.c_uint32, [columns, rows, 1, 1]),
                  array(ctypes.c_uint32, [1, 1, 1, 1]), 0, 3, 3, 0)
        return ctypes.string_at(at, 128)

    def launch(self, function, grid, threads, shared, params):
        raw = ctypes.create_string_buffer(len(params) + 64)  # tensor maps lie at multiples of 64 bytes
        at = (ctypes.addressof(raw) + 63) // 64 * 64
        ctypes.memmove(at, params, len(params))
        pointer = (ctypes.c_void_p * 1)(at)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        x, y = grid if isinstance(grid, tuple) else (grid, 1)
        self.call("cuLaunchKernel", function, x, y, 1, threads, 1, 1, shared, stream, pointer, None)


def tensor(t):
    """struct Tensor of a [batch, row, head, dim] tensor (or [.., heads] row statistics without dim)."""
    if t is None:
        return struct.pack("<Qqqq", 0, 0, 0, 0)
    return struct.pack("<Qqqq", t.data_ptr(), *t.stride()[:3])


def per_head(t):
    return struct.pack("<Qqqq", 0 if t is None else t.data_ptr(), 0, 0, 1)


class Case:
    """One problem: its spec as a dict of `emit`'s keys, its slices, and the kernels for both."""

    def __init__(self, driver, emit_program, spec, slices):
        self.driver, self.spec = driver, spec
        self.folder = tempfile.mkdtemp()
        words = " ".join(f"{k}={v}" for k, v in (spec | KERNEL).items())
        text = "\n".join([f"case c {words}"] + ["slice " + " ".join(map(str, s)) for s in slices]) + "\n"
        done = subprocess.run([emit_program, self.folder, str(driver.arch)], input=text, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        self.kernels = {k.kind: k for k in map(parse, done.stdout.splitlines())}
        self.lists = {}
        for kind in ("forward", "backward", "dq"):
            if kind in self.kernels:
                parts = [open(f"{self.folder}/c.{kind}.{what}", "rb").read() for what in ("tiles", "pieces")]
                self.lists[kind] = [torch.frombuffer(bytearray(b or bytes(8)), dtype=torch.uint8).cuda() for b in parts]
        self.functions = {}
        self.counter = torch.zeros(1, dtype=torch.int32, device="cuda")

    def number(self, key, default=0):
        return self.spec.get(key, default)

    def scale(self):
        return self.number("scale", 1 / self.number("head_dim") ** 0.5)

    def launch(self, kind, grid, params, entry=0):
        k = self.kernels[kind]
        name = k.entries[entry] if isinstance(entry, int) else entry
        if (kind, name) not in self.functions:
            with open(f"{self.folder}/{k.key}.cu", "rb") as f:
                source = f.read()
            self.functions[kind, name] = self.driver.function(source, k.key, k.defines, name, k.shared)
        self.driver.launch(self.functions[kind, name], grid, k.threads, k.shared, params)

    def problem(self, kind, slopes, seed):
        n, k = self.number, self.kernels[kind]
        heads, group = n("heads"), n("group", n("heads") // n("kv_heads"))
        drop = float(n("dropout", 0.0))
        below = int(struct.unpack("f", struct.pack("f", drop))[0] * 4294967296.0)
        tiles, pieces = self.lists[kind]
        return (
            struct.pack("<QQ", tiles.data_ptr(), pieces.data_ptr()) + per_head(slopes) + struct.pack("<QQ", 0, seed)
            + struct.pack("<10I", k.tiles, heads, n("kv_heads"), k.section, n("head_first"), group,
                          n("head_first") // group, n("batch_first"), n("head_dim"), n("head_dim_v", n("head_dim")))
            + struct.pack("<fffI", self.scale(), n("softcap", 1.0), 1 / (1 - drop), below)
        )

    def maps(self, *boxes):
        """CUtensorMaps of [batch, row, head, dim] tensors of 16-bit elements, each with its box's rows."""
        return b"".join(self.driver.tensor_map(t, rows) for t, rows in boxes)

    def forward(self, q, k, v, out=None, lse=None, partial=None, stage=0, slopes=None, sinks=None, seed=0):
        params = self.problem("forward", slopes, seed)
        params += b"".join(map(tensor, [q, k, v, out, lse, *(partial or [None] * 3)])) + per_head(sinks)
        params += struct.pack("<II", stage, 0)
        kernel = self.kernels["forward"]
        blocks = kernel.tiles * self.number("heads")
        if kernel.box_rows:
            result = self.maps((out, 64)) if out is not None else bytes(128)
            params = self.maps((q, kernel.rows), (k, kernel.box_rows), (v, kernel.box_rows)) + result + params
            params += struct.pack("<4Q", self.counter.data_ptr(), 0, 0, 0)
            blocks = min(blocks, self.driver.units)
        self.launch("forward", blocks, params)

    def prepare(self, out, dout, lse, dlse, delta, sinks=None, dsinks=None):
        batch, rows, heads, dim = out.shape
        params = b"".join(map(tensor, [out, dout, lse, dlse, delta])) + per_head(sinks) + per_head(dsinks)
        params += struct.pack("<6I", batch, rows, heads, dim, self.number("head_first"), 0)
        self.launch("prepare", -(-batch * rows * heads // 16), params, "prepare_delta")
        if sinks is not None:
            self.launch("prepare", heads, params, "prepare_dsinks")

    def backward(self, q, k, v, dout, lse, delta, dq, dk, dv, add=0, slopes=None, seed=0):
        """dq is f32 and added to, unless the case has a kernel `dq`; with a kernel `round` it is what that one takes."""
        params = b"".join(map(tensor, [q, k, v, dout, lse, delta, dq, dk, dv])) + struct.pack("<II", add, 0)
        def mapped(kernel, queries, keys, call):
            sums = self.driver.tensor_map(dq, queries, 32) if "dq" not in self.kernels else bytes(128)
            counter = struct.pack("<4Q", self.counter.data_ptr(), 0, 0, 0)
            return self.maps((q, queries), (k, keys), (v, keys), (dout, queries)) + sums + call + counter

        kernel = self.kernels["backward"]
        call = self.problem("backward", slopes, seed) + params
        blocks = kernel.tiles * self.number("kv_heads")
        if kernel.box_rows:
            call = mapped(kernel, kernel.box_rows, kernel.rows, call)
            blocks = min(blocks, self.driver.units)
        self.launch("backward", blocks, call, "attention_backward")
        if "dq" in self.kernels:
            kernel = self.kernels["dq"]
            call = self.problem("dq", slopes, seed) + params
            if kernel.box_rows:
                call = mapped(kernel, kernel.rows, kernel.box_rows, call)
            self.launch("dq", kernel.tiles * self.number("heads"), call, "attention_backward_dq")

    def accumulate(self, into, terms):
        params = tensor(into) + b"".join(map(tensor, terms)) + bytes(32 * (32 - len(terms)))
        params += struct.pack("<6I", *into.shape, len(terms), width([into, *terms]))
        self.launch("accumulate", 132 * 8, params)

    def round_dq(self, dq, sums):
        """dq of the f32 sums that `backward` leaves."""
        if "round" not in self.kernels:
            return self.accumulate(dq, [sums])
        params = tensor(dq) + tensor(sums) + struct.pack("<4IfI", *dq.shape, self.scale(), width([dq, sums]) // 4)
        self.launch("round", 132 * 8, params, "round_dq")

    def fill(self, to, value, kind="fill"):
        params = tensor(to) + struct.pack("<4I", *to.shape) + struct.pack("<fI", value, width([to]))
        self.launch(kind, 132 * 8, params)

    def copy(self, pairs):
        params = b"".join(tensor(a) + tensor(b) + struct.pack("<4I", *a.shape) for a, b in pairs)
        self.launch("copy", (132, len(pairs)), params + bytes(80 * (16 - len(pairs))))


def width(tensors):
    whole = all(t.data_ptr() % 16 == 0 and t.shape[3] % 4 == 0 and all(s % 4 == 0 for s in t.stride()[:3]) for t in tensors)
    return 4 if whole else 1
