#!/usr/bin/env python3
"""Compiles every kernel specialization with NVRTC, on any CPU, and fails on an error, a warning, a spill of more than 16 bytes, or
warpgroup products that the compiler serialises. With nvdisasm it looks into the plain Hopper kernels: warpgroup products and bulk
copies there, local memory not. (16 bytes: two pointers parked once a block, outside of the products; see kernels/README.md.)

    pip install nvidia-cuda-nvrtc==13.0.88          # in any environment; or name the library with --nvrtc
    python3 kernels/ci/compile.py [--arch 80,89,90,100] [--filter TEXT] [--nvrtc PATH] [--jobs N]

Needs cargo (it runs the example `emit`) and nothing else but libnvrtc. Prints registers, spills and shared memory of each kernel.

A whole list takes some ten minutes of a core, so `compiled.txt` beside this file holds a digest of each list (sources, flags and
compiler) that was compiled without a fault. With `--sample N` only every N-th kernel of such a list is compiled again; a list that
has no digest there, or another one, is compiled whole. `--note` writes the digests of the lists that this run compiled whole.
"""

import argparse
import collections
import concurrent.futures
import ctypes
import glob
import hashlib
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ARCHES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100a"}
COMPILED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "compiled.txt")
ALLOWED_SPILL = 16
# What still spills, and how much at most; see "What falls short" in kernels/README.md. A spill anywhere else, or a larger one, fails.
KNOWN_SPILLS = [
    ({"backward", "HEAD_DIM=128", "HEAD_DIM_V=128", "SOFTCAP=1", "DQ=1", "BLOCK_N=128"}, 28),
    ({"backward", "HEAD_DIM=128", "HEAD_DIM_V=128", "DROPOUT=1", "DQ=1", "BLOCK_N=128"}, 24),
    ({"backward", "HEAD_DIM=256", "HEAD_DIM_V=256", "EXACT=0"}, 64),
    ({"backward", "HEAD_DIM=256", "HEAD_DIM_V=256", "DROPOUT=1"}, 48),
    ({"backward", "HEAD_DIM=192", "HEAD_DIM_V=128", "DROPOUT=1"}, 120),
    ({"sm_80", "backward", "HEAD_DIM=192", "HEAD_DIM_V=128", "DROPOUT=1"}, 140),
    ({"sm_90a", "backward", "HEAD_DIM=128", "HEAD_DIM_V=256", "DROPOUT=1"}, 60),
    ({"sm_100a", "backward", "HEAD_DIM=128", "HEAD_DIM_V=128"}, 40),
    ({"sm_100a", "backward", "HEAD_DIM=192", "HEAD_DIM_V=128", "DROPOUT=1"}, 144),
    ({"sm_100a", "dq", "HEAD_DIM=128", "HEAD_DIM_V=128", "SOFTCAP=1", "DROPOUT=1"}, 40),
    ({"sm_100a", "dq", "IO_F32=1", "HEAD_DIM=192"}, 68),
    ({"sm_100a", "dq", "IO_F32=1", "HEAD_DIM=256"}, 56),
]
Kernel = collections.namedtuple("Kernel", "case kind key shared threads rows box_rows tiles section entries defines")


def parse(line):
    case, kind, key, shared, threads, rows, box_rows, tiles, section, entries, *defines = line.split()
    numbers = [int(x) for x in (shared, threads, rows, box_rows, tiles, section)]
    return Kernel(case, kind, key, *numbers, entries.split(","), defines)


class Nvrtc:
    """libnvrtc through ctypes."""

    def __init__(self, path=None):
        self.lib = self._load(path)

    @staticmethod
    def _load(path):
        folders = [p for p in sys.path if p] + [os.path.join(sys.prefix, "lib", "python*", "site-packages")]
        wheels = [f for p in folders for f in glob.glob(os.path.join(p, "nvidia", "*", "lib", "libnvrtc.so.1?"))]
        tried = [path] if path else wheels + ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
        for name in tried:
            for builtins in glob.glob(os.path.join(os.path.dirname(name), "libnvrtc-builtins.so.1?.?")):
                ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
        raise SystemExit("libnvrtc not found; pip install nvidia-cuda-nvrtc==13.0.88, or --nvrtc PATH")

    def _text(self, program, what):
        size = ctypes.c_size_t()
        getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(max(size.value, 1))
        getattr(self.lib, f"nvrtcGet{what}")(program, text)
        return text.raw[: size.value]

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, source, name, arch, defines):
        """(cubin or None, log)"""
        options = [f"--gpu-architecture={arch}", "-std=c++17", "--ptxas-options=-v"] + [f"-D{d}" for d in defines]
        array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
        program = ctypes.c_void_p()
        self.lib.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None)
        status = self.lib.nvrtcCompileProgram(program, len(options), array)
        log = self._text(program, "ProgramLog").rstrip(b"\0").decode()
        cubin = self._text(program, "CUBIN") if status == 0 else None
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        return cubin, log


def machine_code(cubin, disassembler):
    """What is wrong with a Hopper kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        code = subprocess.run([disassembler, "-c", f.name], check=True, capture_output=True, text=True).stdout
    absent = [word for word in ("HGMMA", "UTMALDG", "SYNCS") if word not in code]
    local = [word for word in ("LDL", "STL") if re.search(rf"\b{word}\b", code)]
    return [f"no {word}" for word in absent] + [f"{word} there" for word in local]


def is_plain(kernel):
    return kernel.box_rows and {"EXACT=1", "TRANSFORM=0", "DROPOUT=0", "PARTIAL=0"} <= {"PARTIAL=0", *kernel.defines}


def check(job):
    arch, kernel, folder, path, disassembler = job
    source = open(f"{folder}/{kernel.key}.cu", "rb").read()
    cubin, log = Nvrtc(path).compile(source, kernel.key + ".cu", ARCHES[arch], kernel.defines)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    words = {ARCHES[arch], kernel.kind, *kernel.defines}
    allowed = max([ALLOWED_SPILL] + [most for which, most in KNOWN_SPILLS if which <= words])
    said = cubin is None or "warning" in log or "(C75" in log
    wrong = machine_code(cubin, disassembler) if cubin and disassembler and is_plain(kernel) and spills == 0 else []
    return arch, kernel, registers, spills, said or spills > allowed or bool(wrong), (log if said else "") + " ".join(wrong)


def emit(arch, folder):
    command = ["cargo", "run", "-q", "-p", "longspan-kernels", "--example", "emit", "--", folder, str(arch), "every"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return {(k.key, tuple(k.defines)): k for k in map(parse, lines)}.values()


def digest(nvrtc, arch, kernels, folder):
    """Of everything that decides what the compiler makes of a list."""
    sums = []
    for kernel in kernels:
        with open(f"{folder}/{kernel.key}.cu", "rb") as source:
            sums.append(hashlib.sha256(repr((kernel.kind, kernel.defines)).encode() + source.read()).hexdigest())
    return hashlib.sha256(" ".join([nvrtc.version(), ARCHES[arch], *sorted(sums)]).encode()).hexdigest()[:32]


def compiled():
    """Architecture to digest, of lists that were compiled without a fault."""
    with open(COMPILED, encoding="utf-8") as file:
        return {line.split()[0]: line.split()[1] for line in file if not line.startswith("#")}


def note(lists):
    """Writes the digests of lists."""
    with open(COMPILED, encoding="utf-8") as file:
        head = [line for line in file if line.startswith("#")]
    with open(COMPILED, "w", encoding="utf-8") as file:
        file.writelines(head + [f"{arch} {text}\n" for arch, text in sorted(lists.items())])


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--arch", default="80,89,90,100")
    options.add_argument("--filter", default="")
    options.add_argument("--nvrtc")
    options.add_argument("--nvdisasm")
    options.add_argument("--sample", type=int, default=1, metavar="N", help="every N-th of lists in compiled.txt, and all plain Hopper kernels")
    options.add_argument("--note", action="store_true", help="write compiled.txt")
    options.add_argument("--jobs", type=int, default=2)
    args = options.parse_args()
    nvrtc, known = Nvrtc(args.nvrtc), compiled()
    failures, count, whole = collections.Counter(), collections.Counter(), {}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        jobs = []
        for arch in map(int, args.arch.split(",")):
            kernels = list(emit(arch, folder))
            text = digest(nvrtc, arch, kernels, folder)
            same = known.get(ARCHES[arch]) == text
            print(f"{ARCHES[arch]}: {len(kernels)} specializations, digest {text}, " + ("compiled before" if same else "not compiled before"))
            step = args.sample if same else 1
            if step == 1 and not args.filter:
                whole[ARCHES[arch]] = text
            jobs += [
                (arch, kernel, folder, args.nvrtc, args.nvdisasm)
                for index, kernel in enumerate(kernels)
                if (index % step == 0 or is_plain(kernel)) and args.filter in f"{kernel.kind} {' '.join(kernel.defines)}"
            ]
        for arch, kernel, registers, spills, bad, log in pool.map(check, jobs):
            count[ARCHES[arch]] += 1
            failures[ARCHES[arch]] += bad
            on = " ".join(d[:-2] if d.endswith("=1") else d for d in kernel.defines if not d.endswith("=0"))
            print(f"{'BAD ' if bad else 'ok  '} {ARCHES[arch]} {kernel.kind} registers {registers} spills {spills} {on}")
            if log:
                print(log)
    fine = {arch: text for arch, text in whole.items() if not failures[arch] and known.get(arch) != text}
    if args.note:
        note(known | fine)
    elif fine:
        print(f"compiled whole and not noted in compiled.txt: {fine}; --note does it")
    print(f"{count.total()} specializations compiled, {failures.total()} bad")
    return 1 if failures.total() or not count.total() else 0


if __name__ == "__main__":
    sys.exit(main())
