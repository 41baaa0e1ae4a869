#!/usr/bin/env python3
"""Compiles kernel specializations for AMD GPUs with clang, on any CPU, and fails on an error, a warning, a spill, too many
registers or too much shared memory, or on an attention kernel without matrix instructions.

    apt-get install clang-19 lld-19
    python3 kernels/ci/compile_amd.py [--arch gfx90a,gfx942,gfx1100] [--filter TEXT] [--sample N] [--clang PROGRAM] [--jobs N]

Needs cargo (it runs the example `emit`) and clang with lld; neither HIP's headers nor its device libraries. `--sample N` takes
every N-th specialization, of each architecture others. Prints registers, spills and shared memory of each kernel.
"""

import argparse
import collections
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile

from compile import ROOT, emit

# Vector registers of a lane: VGPRs and AGPRs together on CDNA, VGPRs on RDNA. Shared memory of a workgroup.
MOST_REGISTERS = {"gfx90a": 512, "gfx942": 512, "gfx1100": 256}
MOST_LDS = 64 << 10
MATRIX = {"gfx90a": "v_mfma_f32_16x16x16", "gfx942": "v_mfma_f32_16x16x16", "gfx1100": "v_wmma_f32_16x16x16"}
# What still spills, and how many registers at most; see kernels/README.md. A spill anywhere else, or a larger one, fails.
KNOWN_SPILLS = [
    ({"gfx1100", "dq", "HEAD_DIM=256"}, 69),
    ({"gfx1100", "dq", "HEAD_DIM=256", "SOFTCAP=1", "ALIBI=1", "DROPOUT=1"}, 74),
    ({"gfx1100", "dq", "HEAD_DIM=192", "DROPOUT=1"}, 5),
    ({"gfx1100", "forward", "HEAD_DIM_V=256"}, 16),
]
Figures = collections.namedtuple("Figures", "vgprs agprs scratch spills lds occupancy matrix")


def figures(remarks, assembly, arch):
    """The figures of every kernel of one file."""
    number = lambda what, text: int((re.search(what + r"[^:]*: (\d+)", text) or [0, 0])[1])
    parts = remarks.split("Function Name: ")[1:]
    return {
        part.split(" ", 1)[0]: Figures(
            number(r" VGPRs", part), number(" AGPRs", part), number("ScratchSize", part),
            number("VGPRs Spill", part), number("LDS Size", part), number("Occupancy", part),
            len(re.findall(MATRIX[arch], assembly)))
        for part in parts
    }


def check(job):
    arch, kernel, folder, clang = job
    command = [clang, "-x", "hip", "--cuda-device-only", f"--offload-arch={arch}", "-O3", "-std=c++17", "-nogpulib", "-nogpuinc",
               "--no-gpu-bundle-output", "-Wall", "-Rpass-analysis=kernel-resource-usage"]
    command += [f"-D{d}" for d in kernel.defines] + [f"{folder}/{kernel.key}.cu", "-S", "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return arch, kernel, {}, ["does not compile"], done.stderr
    found = figures(done.stderr, done.stdout, arch)
    words = {kernel.kind, arch, *kernel.defines}
    allowed = max([0] + [most for which, most in KNOWN_SPILLS if which <= words])
    tensor = kernel.kind in ("forward", "backward", "dq") and "IO_F32=1" not in kernel.defines
    wrong = [] if set(kernel.entries) <= set(found) else ["entries are missing"]
    for name, f in found.items():
        wrong += [f"{name} spills {f.spills} registers"] if f.spills > allowed else []
        wrong += [f"{name} takes {f.scratch} bytes of scratch"] if f.scratch > 4 * allowed + 8 * bool(allowed) else []
        wrong += [f"{name} takes too many registers"] if f.vgprs + f.agprs > MOST_REGISTERS[arch] else []
        wrong += [f"{name} takes too much shared memory"] if f.lds + kernel.shared > MOST_LDS else []
        wrong += [f"{name} has no matrix products"] if tensor and not f.matrix else []
    warnings = [line for line in done.stderr.splitlines() if "warning:" in line]
    return arch, kernel, found, wrong + warnings, ""


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--arch", default="gfx90a,gfx942,gfx1100")
    options.add_argument("--filter", default="")
    options.add_argument("--sample", type=int, default=1)
    options.add_argument("--clang", default="clang++-19")
    options.add_argument("--jobs", type=int, default=os.cpu_count())
    args = options.parse_args()
    failures, count = 0, 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            (arch, kernel, folder, args.clang)
            for first, arch in enumerate(args.arch.split(","))
            for kernel in [k for k in emit(arch, folder) if args.filter in f"{k.kind} {' '.join(k.defines)}"][first::args.sample]
        ]
        for arch, kernel, found, wrong, log in pool.map(check, jobs):
            count, failures = count + 1, failures + bool(wrong)
            on = " ".join(d[:-2] if d.endswith("=1") else d for d in kernel.defines if not d.endswith("=0"))
            for name, f in found.items():
                print(f"{'BAD ' if wrong else 'ok  '} {arch} {name} vgprs {f.vgprs} agprs {f.agprs} spills {f.spills} "
                      f"scratch {f.scratch} lds {f.lds + kernel.shared} occupancy {f.occupancy} matrix {f.matrix} {on}")
            for line in wrong:
                print(f"BAD  {arch} {kernel.kind} {on}: {line}")
            if log:
                print(log)
    print(f"{count} specializations, {failures} bad")
    return 1 if failures or not count else 0


if __name__ == "__main__":
    sys.exit(main())
