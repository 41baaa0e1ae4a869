#!/usr/bin/env python3
"""Hybrid USP on the GPUs of one machine: checks every cut, times them, and says which cut wins where, within ten minutes.

    ci/gpu.sh build target/gpu                                     # on a machine with Rust
    python3 ci/hybrid.py --program target/gpu/longspan --out FOLDER   # on the machine with the GPUs: needs nothing else

In this order, as far as --budget seconds go; what no time was left for is listed, not left out silently:

    check    every U x R of the ranks, both placements, zigzag and stripe: forward and backward against attention in f64
    cuts     every U x R, placement, layout, way of exchange, and head groups as chosen or one at the shorter lengths; fewer of them
             at the longer ones
    longest  the best cut alone at 512k and 1M tokens

A peer's measurements on the same machine stand beside ours with --peers FILE: a JSON list of objects with `name`, `H`, `HK`, `S`,
`fwd_ms`, `fwdbwd_ms`, and perhaps `peak_gib`.

Writes FOLDER/hybrid.json (every report of `longspan bench`; docs/bench.md describes them) and FOLDER/hybrid.html (the first of them,
with heat maps), and prints tables. The exit code is 1 if
a check failed or nothing could be measured.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time

# Operations a second of a device, to foretell how long a measurement takes, and passes that `longspan bench` makes of a step.
RATE, PASSES = 4.5e14, 16
Shape = collections.namedtuple("Shape", "heads kv_heads mask")
Run = collections.namedtuple("Run", "shape seqs cut layout placement exchange groups repeat")


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--program", default="target/release/longspan")
    options.add_argument("--backend", default="cuda")
    options.add_argument("--ranks", type=int, help="default: as many as nvidia-smi lists GPUs")
    options.add_argument("--scale", type=int, default=1, help="divides all lengths: for machines that are no match for them")
    options.add_argument("--budget", type=float, default=540, metavar="SECONDS")
    options.add_argument("--peers", metavar="FILE")
    options.add_argument("--out", default="target/hybrid")
    args = options.parse_args()
    os.makedirs(args.out, exist_ok=True)
    ranks = args.ranks or len(subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout.splitlines())
    hybrid = Hybrid(args, ranks)
    hybrid.check()
    for run in hybrid.runs():
        hybrid.measure(run)
    hybrid.longest()
    hybrid.write()
    return 1 if hybrid.failed or not hybrid.rows else 0


def cuts(ranks):
    return [(u, ranks // u) for u in range(1, ranks + 1) if ranks % u == 0]


class Hybrid:
    def __init__(self, args, ranks):
        self.args, self.ranks, self.start = args, ranks, time.monotonic()
        self.reports, self.rows, self.failed, self.left = [], [], [], []
        self.peers = json.load(open(args.peers, encoding="utf-8")) if args.peers else []

    def left_seconds(self):
        return self.args.budget - (time.monotonic() - self.start)

    def longspan(self, *words):
        command = [self.args.program, *map(str, words)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(self.left_seconds(), 1))
        except subprocess.TimeoutExpired:
            return None, "no time left"
        return done.returncode == 0, done.stdout + done.stderr

    def check(self):
        """Every cut against the oracle; replicated KV heads and uneven runs where there are many ranks."""
        lists = [(u, r, p, l) for u, r in cuts(self.ranks) for p in ("ulysses-inner", "ring-inner") for l in ("zigzag", "stripe")]
        # A placement is one where there is nothing to place, and so is a layout of one block.
        lists = [c for c in lists if (c[2] == "ulysses-inner" or min(c[:2]) > 1) and (c[3] == "zigzag" or c[1] > 1)]
        for u, r, placement, layout in lists:
            name = f"check U{u} R{r} {placement} {layout}"
            good, text = self.longspan(
                "run", "--backend", self.args.backend, "--synthetic", "1,2050,12,2,64", "--dtype", "bf16", "--mask", "causal",
                "--layout", layout, "--placement", placement, "--ulysses", u, "--ring", r, "--backward", "--verify",
            )  # fmt: skip
            print(name + ": " + {True: "ok", False: "FAILED", None: "not run, no time left"}[good], flush=True)
            if good is False:
                self.failed.append(name)
                print(text)
            elif good is None:
                self.left.append(name)

    def runs(self):
        """What to measure, most telling first."""
        causal, wide, dit = Shape(32, 8, "causal"), Shape(64, 8, "causal"), Shape(24, 24, "full")
        exchanges = ["peer", "nccl"] if self.args.backend.split(":")[0] in ("cuda", "rocm") else [None]
        own, other = exchanges[0], exchanges[-1]
        run = lambda shape, *k, layout="zigzag", placement="ulysses-inner", exchange=own, groups=None, repeat=3: Run(
            shape, tuple((k << 10) // self.args.scale for k in k), None, layout, placement, exchange, groups, repeat
        )
        yield run(causal, 64, 128)
        yield run(dit, 16, 64, layout="contiguous")
        yield run(wide, 64)
        yield run(causal, 64, groups=1)
        yield run(causal, 64, layout="stripe")
        yield run(causal, 64, placement="ring-inner")
        if other != own:
            yield run(causal, 64, exchange=other)
        yield run(wide, 128)
        yield run(causal, 256)
        yield run(dit, 16, 64, layout="contiguous", groups=1)
        yield run(wide, 64, groups=1)
        if other != own:
            yield run(causal, 128, exchange=other)
        yield run(causal, 128, placement="ring-inner")
        yield run(causal, 128, layout="stripe")
        yield run(dit, 32, layout="contiguous")
        yield run(wide, 256)
        yield run(causal, 64, layout="stripe", placement="ring-inner")

    def seconds(self, run):
        """A guess of how long a run takes."""
        pairs = sum(seq**2 for seq in run.seqs) / (2 if run.shape.mask == "causal" else 1)
        step = 3.5 * 4 * run.shape.heads * pairs * 128 / self.ranks / RATE
        return 4 * len(run.seqs) + (1 if run.cut else len(cuts(self.ranks))) * step * PASSES * (run.repeat + 1) / 4

    def measure(self, run):
        seqs = ",".join(map(str, run.seqs))
        name = f"bench H{run.shape.heads}:{run.shape.kv_heads} {run.shape.mask} S={seqs} {run.layout} {run.placement} {run.exchange or ''}"
        name += f" {run.groups} groups" if run.groups else ""
        name += f" U{run.cut[0]} R{run.cut[1]}" if run.cut else ""
        if self.seconds(run) > self.left_seconds():
            self.left.append(name)
            return
        file = os.path.join(self.args.out, "bench.json")
        cut = ["--ulysses", run.cut[0], "--ring", run.cut[1]] if run.cut else ["--ranks", self.ranks]
        exchange = ["--exchange", run.exchange] if run.exchange else []
        groups = ["--head-groups", run.groups] if run.groups else []
        # The first is the widest sweep: its page has heat maps.
        page = [] if self.reports else ["--html", os.path.join(self.args.out, "hybrid.html")]
        good, text = self.longspan(
            "bench", "--backend", self.args.backend, *exchange, "--seq", seqs, *cut, "--heads", run.shape.heads, "--kv-heads",
            run.shape.kv_heads, *groups, "--mask", run.shape.mask, "--layout", run.layout, "--placement", run.placement, "--backward",
            "--repeat", run.repeat, "--json", file, *page,
        )  # fmt: skip
        print(f"{name}: " + {True: "ok", False: "FAILED", None: "not done, no time left"}[good], flush=True)
        if good is None:
            self.left.append(name)
            return
        if not good:
            self.failed.append(name)
            print(text)
        if os.path.exists(file):
            with open(file, encoding="utf-8") as source:
                report = json.load(source)
            os.remove(file)
            self.reports.append(report)
            self.rows += [(run, row) for row in report["rows"] if row["pass"] != "backward"]

    def longest(self):
        """The cut that was best at the longest length so far, at twice and four times 256k."""
        for k in (512, 1024):
            steps = [(run, row) for run, row in self.rows if row["pass"] == "step" and run.shape == Shape(32, 8, "causal")]
            if not steps:
                return
            most = max(row["seq"] for _, row in steps)
            run, row = max((x for x in steps if x[1]["seq"] == most), key=lambda x: x[1]["flops_per_second"])
            self.measure(run._replace(seqs=((k << 10) // self.args.scale,), cut=(row["ulysses"], row["ring"]), repeat=1))

    def write(self):
        with open(os.path.join(self.args.out, "hybrid.json"), "w", encoding="utf-8") as file:
            json.dump({"ranks": self.ranks, "reports": self.reports, "peers": self.peers, "failed": self.failed, "not_run": self.left}, file, indent=1)
        if self.reports:
            print("\n" + "; ".join(str(self.reports[0][k]) for k in ("date", "machine", "devices")))
        for name, what in (("forward", "fwd_ms"), ("step", "fwdbwd_ms")):
            self.table(name, what)
        for name in self.left:
            print("not run, no time left:", name)
        print(f"{len(self.rows)} rows, {len(self.failed)} failed, {len(self.left)} not run, {time.monotonic() - self.start:.0f} s")

    def table(self, name, what):
        """The best cut of each shape and length in every way of cutting, beside the same work alone and the best peer."""
        best = {}
        for run, row in self.rows:
            if row["pass"] == name:
                key = (run.shape, row["seq"])
                best.setdefault(key, []).append((row["median_s"], run, row))
        if not best:
            return
        print(f"\n{name}: TFLOP/s a device, of every U x R the best layout, placement, exchange and head groups; overlap: the same work alone / the best")
        print("| H:HK | mask | S | best cut | ms | " + " | ".join(f"U{u} R{r}" for u, r in cuts(self.ranks)) + " | overlap | peak GiB | best peer ms | ours / peer |")
        print("|" + "---|" * (9 + len(cuts(self.ranks))))
        for (shape, seq), all_ in sorted(best.items()):
            seconds, run, row = min(all_, key=lambda x: x[0])
            cells = []
            for cut in cuts(self.ranks):
                of = [x[2]["flops_per_second"] for x in all_ if (x[2]["ulysses"], x[2]["ring"]) == cut]
                cells.append(f"{max(of) / self.ranks / 1e12:.3g}" if of else "-")
            overlap = row["overlap_efficiency"]
            peers = [p[what] for p in self.peers if (p.get("H"), p.get("HK"), p.get("S")) == (shape.heads, shape.kv_heads, seq) and what in p and not p["name"].startswith("ideal")]
            peer = f"{min(peers):.3g} | {min(peers) / seconds / 1e3:.2f}x" if peers else "- | -"
            how = f"U{row['ulysses']} R{row['ring']} {run.layout} {run.placement} {run.exchange or ''}".strip()
            how += f", {row['head_groups']} head groups" if row["head_groups"] > 1 else ""
            print(
                f"| {shape.heads}:{shape.kv_heads} | {shape.mask} | {seq} | {how} | {seconds * 1e3:.4g} | " + " | ".join(cells)
                + f" | {'-' if overlap is None else f'{100 * overlap:.1f} %'} | {row['peak_bytes'] / 2**30:.2f} | {peer} |"
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
