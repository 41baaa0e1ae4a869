"""Checks the kernels against a float64 oracle, by the project's error rule.

    python3 kernels/bench/check.py EMIT [seed] [count]      EMIT: the example program `emit`, built for this machine

Each case is a random spec (dtype, heads, options, layout, strides) with random slices. What slices do not select holds NaN,
outputs are poisoned. out, lse and every gradient: error at most 2x (softcap 3x) that of plain attention (scores,
probabilities and results rounded to the dtype), plus 1e-5. A small case that misses its bound is held to the largest error of plain
attention over draws of its values, as in the conformance suite (DESIGN.md says why); such cases are listed.
"""

import random
import sys

import numpy as np
import torch

from launch import DTYPES, LOAD, STORE, Case, Driver

NONE = 1 << 40


def random_slices(rng, batch, q_rows, k_rows):
    """Equal or disjoint query ranges, disjoint key ranges within each; causal, windows, full, and unequal steps."""
    slices = []
    for b in range(batch):
        cuts = sorted(rng.sample(range(q_rows + 1), rng.randint(2, 5))) if q_rows > 5 else [0, q_rows]
        for q0, q1 in zip(cuts, cuts[1:]):
            keys = sorted(rng.sample(range(k_rows + 1), rng.choice([2, 4])))
            for k0, k1 in zip(keys[::2], keys[1::2]):
                kind = rng.choice(["full", "causal", "window", "none", "steps"])
                lo, hi, step, k_step = -NONE, NONE, rng.choice([1, 1, 2, 4]), None
                if kind == "causal":
                    hi = rng.randint(-20, k1 - k0)
                elif kind == "window":
                    lo = rng.randint(-(q1 - q0), k1 - k0)
                    hi = lo + rng.randint(0, 60)
                elif kind == "steps":
                    k_step = step + 1
                elif kind == "none":
                    continue
                slices.append([b, q0, q1, k0, k1, lo, hi, rng.randint(0, 500), rng.randint(0, 500), step, k_step or step])
    return slices


def dense(slices, batch, q_rows, k_rows):
    """(mask, qpos, kpos), each [batch, q, k]."""
    mask = torch.zeros(batch, q_rows, k_rows, dtype=torch.bool)
    qpos, kpos = torch.zeros(batch, q_rows, k_rows, dtype=torch.int64), torch.zeros(batch, q_rows, k_rows, dtype=torch.int64)
    for b, q0, q1, k0, k1, lo, hi, qp, kp, qs, ks in slices:
        i, j = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)[None, :]
        seen = (j - i >= lo) & (j - i <= hi)
        for to, values in ((mask, seen), (qpos, qp + qs * i + 0 * j), (kpos, kp + ks * j + 0 * i)):
            part = to[b, q0:q1, k0:k1]
            part[seen] = values[seen]
    return mask.cuda(), qpos.cuda(), kpos.cuda()


def philox(seed, batch, head, qpos, kpos):
    """Word kpos % 4 of Philox4x32-10 with counter (batch, head, qpos, kpos / 4)."""
    u = lambda x: np.asarray(x).astype(np.uint64) & 0xFFFFFFFF
    qpos, kpos = qpos.cpu().numpy(), kpos.cpu().numpy()
    c = [u(np.full_like(qpos, batch)), u(np.full_like(qpos, head)), u(qpos), u(kpos // 4)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), u(b), (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), u(a)]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return torch.from_numpy(np.choose(kpos % 4, c).astype(np.int64)).cuda()


def attention(spec, x, rounded, compute):
    """out, lse and gradients; `rounded` rounds where plain attention stores, `compute` is the dtype of arithmetic."""
    d, group = spec["head_dim"], spec["group"]
    mask, qpos, kpos = x["mask"], x["qpos"], x["kpos"]
    heads, first = spec["heads"], spec["head_first"]
    c = lambda t: torch.nan_to_num(t).to(compute)
    q, k, v, dout = c(x["q"]), c(x["k"]), c(x["v"]), c(x["dout"])
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=compute, device="cuda")
    lse = torch.zeros(q.shape[:3], dtype=compute, device="cuda")
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dsinks, size = (torch.zeros(heads, dtype=compute, device="cuda") for _ in range(2))
    for h in range(heads):
        kv = (first + h) // group - first // group
        logits = spec["scale"] * rounded(q[:, :, h] @ k[:, :, kv].transpose(1, 2))
        bent = torch.ones_like(logits)
        if "softcap" in spec:
            t = torch.tanh(logits / spec["softcap"])
            logits, bent = spec["softcap"] * t, 1 - t * t
        if "alibi" in spec:
            logits = logits - x["slopes"][first + h].to(compute) * (qpos - kpos).abs().to(compute)
        logits = torch.where(mask, logits, -torch.inf)
        all_logits = logits
        if "sinks" in spec:
            sink = x["sinks"][first + h].to(compute)
            all_logits = torch.cat([logits, sink.expand(*logits.shape[:2], 1)], 2)
        lse[:, :, h] = l = torch.logsumexp(all_logits, 2) if all_logits.shape[2] else torch.full(q.shape[:2], -torch.inf)
        p = torch.where(mask, torch.exp(logits - l[:, :, None]), 0.0)
        keep = torch.ones_like(p)
        if "dropout" in spec:
            drop = np.float32(spec["dropout"])
            for b in range(q.shape[0]):
                words = philox(x["seed"], spec["batch_first"] + b, first + h, qpos[b], kpos[b])
                keep[b] = (words >= int(float(drop) * 4294967296.0)).to(compute) / (1 - float(drop))
        out[:, :, h] = o = rounded(rounded(p * keep) @ v[:, :, kv])
        delta = (dout[:, :, h] * o).sum(2) - x["dlse"][:, :, h].to(compute)
        dp = rounded(dout[:, :, h] @ v[:, :, kv].transpose(1, 2))
        ds = rounded(p * (dp * keep - delta[:, :, None]) * bent)
        dq[:, :, h] = spec["scale"] * (ds @ k[:, :, kv])
        dk[:, :, kv] += spec["scale"] * (ds.transpose(1, 2) @ q[:, :, h])
        dv[:, :, kv] += rounded(p * keep).transpose(1, 2) @ dout[:, :, h]
        if "sinks" in spec:
            dsinks[h] = -(torch.exp(sink - l) * delta).sum()
            size[h] = (torch.exp(sink - l) * (dout[:, :, h] * o).abs().sum(2)).sum()
    return dict(dsinks_size=size, out=out, lse=lse, dq=rounded(dq), dk=rounded(dk), dv=rounded(dv), dsinks=dsinks)


def strided(rng, b, s, h, d, dtype, fill, aligned):
    """A [b, s, h, d] view in a random order of axes, with gaps."""
    gap = rng.choice([0, 8]) if aligned else rng.choice([0, 1, 3])
    if rng.random() < 0.5:
        t = torch.full((b, s, h, d + gap), fill, dtype=dtype, device="cuda")[..., :d]
    else:
        t = torch.full((b, h, s, d + gap), fill, dtype=dtype, device="cuda")[..., :d].transpose(1, 2)
    return t


def random_spec(rng, index):
    sizes = [(64, 64), (128, 128), (256, 256), (32, 32), (96, 96), (192, 128), (40, 72), (80, 80), (192, 192), (7, 33), (16, 240)]
    d, dv = sizes[index % len(sizes)]
    heads_total, group = rng.choice([(1, 1), (4, 1), (8, 4), (6, 6), (32, 4)])
    first = rng.randrange(heads_total)
    heads = rng.randint(1, min(6, heads_total - first))
    spec = dict(dtype=rng.choice(["bf16", "bf16", "f16", "f32"]), batch=rng.randint(1, 2), q_rows=rng.choice([1, 40, 130, 296, 704]),
                k_rows=rng.choice([5, 64, 190, 333]), heads=heads, kv_heads=(first + heads - 1) // group + 1 - first // group,
                head_dim=d, head_dim_v=dv, heads_total=heads_total, group=group, head_first=first, batch_first=rng.randrange(3))
    spec["scale"] = rng.choice([1.0, 1.0, 1.0, 2.0, -0.7]) / d**0.5
    for key, value in (("softcap", 2.5), ("alibi", 1), ("sinks", 1), ("dropout", 0.3), ("deterministic", 1), ("partial", 1),
                       ("accumulate", 1)):
        if rng.random() < 0.3:
            spec[key] = value
    spec["aligned"] = int(d % 8 == 0 and dv % 8 == 0 and rng.random() < 0.8)
    return spec


def inputs(rng, spec, slices):
    b, sq, sk, h, hk, d, dv = (spec[k] for k in ("batch", "q_rows", "k_rows", "heads", "kv_heads", "head_dim", "head_dim_v"))
    dtype, aligned, nan = DTYPES[spec["dtype"]], spec["aligned"], float("nan")
    mask, qpos, kpos = dense(slices, b, sq, sk)
    x = dict(mask=mask, qpos=qpos, kpos=kpos, seed=rng.getrandbits(64))
    for name, shape in (("q", (b, sq, h, d)), ("k", (b, sk, hk, d)), ("v", (b, sk, hk, dv)), ("dout", (b, sq, h, dv))):
        x[name] = strided(rng, *shape, dtype, nan, aligned)
        x[name].copy_(torch.randn(*shape, device="cuda"))
    unseen = ~mask.any(2)
    x["q"][unseen] = nan
    x["k"][~mask.any(1)] = nan
    x["v"][~mask.any(1)] = nan
    x["slopes"] = torch.rand(spec["heads_total"], device="cuda") * 0.02
    x["sinks"] = torch.randn(spec["heads_total"], device="cuda")
    x["dlse"] = torch.randn(b, sq, h, device="cuda") * rng.choice([0.0, 1.0])
    return x


def run(driver, program, rng, spec, slices, x):
    b, sq, h, dv = spec["batch"], spec["q_rows"], spec["heads"], spec["head_dim_v"]
    dtype, aligned = DTYPES[spec["dtype"]], spec["aligned"]
    extras = dict(slopes=x["slopes"] if "alibi" in spec else None, seed=x["seed"])
    sinks = x["sinks"] if "sinks" in spec else None
    make = lambda *shape, kind=torch.float32: strided(rng, *shape, kind, 777.0, aligned)
    out, lse = make(b, sq, h, dv, kind=dtype), make(b, sq, h, 1)
    case = Case(driver, program, spec, slices)
    if "partial" in spec:
        rest = slices[:]
        rng.shuffle(rest)
        partial = [make(b, sq, h, dv), make(b, sq, h, 1), make(b, sq, h, 1)]
        for i, stage in enumerate((STORE, LOAD | STORE, LOAD)):
            part = Case(driver, program, spec, rest[i::3])
            part.forward(x["q"], x["k"], x["v"], out, lse, partial, stage, sinks=sinks, **extras)
    else:
        case.forward(x["q"], x["k"], x["v"], out, lse, sinks=sinks, **extras)
    delta, dsinks = make(b, sq, h, 1), torch.full((h,), 777.0, device="cuda")
    case.prepare(out, x["dout"], lse, x["dlse"], delta, sinks, dsinks)
    wide, atomics = "accumulate" in spec, "dq" not in case.kernels
    kind = torch.float32 if wide else dtype
    own_sums = "round" in case.kernels  # from which dq is made, also where gradients are f32
    dq, dk, dv_ = (make(*x[n].shape, kind=dtype if own_sums and n == "q" else kind) for n in "qkv")
    add = rng.randrange(4 if own_sums else 8) if wide else 0
    before = 0.5
    for bit, g in ((1, dk), (2, dv_), (4, dq)):
        if add & bit:
            g.fill_(before)
    sums = dq
    if atomics:
        sums = dq if wide and not own_sums else make(*x["q"].shape)
        if not add & 4:
            sums.zero_()
    case.backward(x["q"], x["k"], x["v"], x["dout"], lse, delta, sums, dk, dv_, add, **extras)
    if sums is not dq:
        case.round_dq(dq, sums)
    torch.cuda.synchronize()
    minus = lambda g, bit: g.double() - (before if add & bit else 0)
    return dict(out=out, lse=lse[..., 0], dq=minus(dq, 4), dk=minus(dk, 1), dv=minus(dv_, 2), dsinks=dsinks)


def problem(index, seed):
    rng = random.Random(seed * 100003 + index)
    spec = random_spec(rng, index)
    return rng, spec, random_slices(rng, spec["batch"], spec["q_rows"], spec["k_rows"])


def check(driver, program, index, seed):
    rng, spec, slices = problem(index, seed)
    torch.manual_seed(seed * 100003 + index)
    state = rng.getstate()
    x = inputs(rng, spec, slices)
    units = driver.units
    driver.units = rng.choice([1, 2, 3, units])  # where blocks fetch tiles, few blocks take many
    got = run(driver, program, rng, spec, slices, x)
    driver.units = units
    exact, rules = answers(spec, x)
    bad, worst, drawn = [], 0.0, None
    for name in rules:
        a, e = got[name].double(), exact[name]
        finite = torch.isfinite(e)
        if not torch.equal(a[~finite], e[~finite]) or not torch.isfinite(a[finite]).all():
            bad.append(f"{name}: not finite where it should be")
            continue
        error = (a - e)[finite].abs().max().item() if finite.any() else 0.0
        bound_of = lambda rule: (3 if "softcap" in spec else 2) * rule + 1e-5
        bound = bound_of(rules[name])
        if error > bound:
            if drawn is None:
                drawn = draws(state, spec, slices)
            bound = bound_of(max([rules[name], *(d[name] for d in drawn)]))
            print(f"case {index}, {name}: error {error:.2e}, bound {bound_of(rules[name]):.2e}, of {len(drawn)} draws more {bound:.2e}")
        worst = max(worst, error / bound)
        if error > bound:
            bad.append(f"{name}: error {error:.2e}, bound {bound:.2e}")
    return spec, bad, worst


def answers(spec, x):
    """The exact results, and the largest error of each in plain attention."""
    dtype = DTYPES[spec["dtype"]]
    exact = attention(spec, x, lambda t: t, torch.float64)
    plain = attention(spec, x, lambda t: t.to(dtype).to(t.dtype), torch.float32)
    rules = {}
    for name in ["out", "lse", "dq", "dk", "dv"] + ["dsinks"] * ("sinks" in spec):
        e = exact[name]
        finite = torch.isfinite(e)
        rules[name] = (plain[name].double() - e)[finite].abs().max().item() if finite.any() else 0.0
        # Few elements may be lucky in the plain computation: never less than one rounding of the largest value.
        size = exact["dsinks_size"] if name == "dsinks" else e[finite].abs()
        if finite.any() and name != "lse":
            rules[name] = max(rules[name], size.max().item() * torch.finfo(dtype).eps / 2)
    return exact, rules


def draws(state, spec, slices):
    """Errors of plain attention over more draws of a case's values: 31 of a small one, none of a large one."""
    work = spec["batch"] * spec["heads"] * spec["q_rows"] * spec["k_rows"] * (spec["head_dim"] + spec["head_dim_v"])
    rng, found = random.Random(), []
    for _ in range(min((1 << 26) // work, 32) - 1):
        rng.setstate(state)  # the same strides and dropout; torch goes on drawing
        found.append(answers(spec, inputs(rng, spec, slices))[1])
    return found


def repeatable(driver, program):
    """Two deterministic runs agree bitwise."""
    rng = random.Random(5)
    spec = dict(random_spec(rng, 1), dtype="bf16", q_rows=300, k_rows=333, deterministic=1, aligned=1)
    for key in ("accumulate", "partial"):
        spec.pop(key, None)
    slices = random_slices(rng, spec["batch"], 300, 333)
    x = inputs(rng, spec, slices)
    a, b = (run(driver, program, random.Random(1), spec, slices, x) for _ in range(2))
    return all(torch.equal(a[n], b[n]) for n in a)


def elementwise(driver, program):
    spec = dict(dtype="bf16", q_rows=4, k_rows=4, heads=1, kv_heads=1, head_dim=32)
    case = Case(driver, program, spec, [])
    terms = [torch.randn(2, 5, 3, 36, device="cuda")[..., :32] for _ in range(4)]
    into = torch.full((2, 3, 5, 33), 7.0, device="cuda", dtype=torch.bfloat16)[..., :32].transpose(1, 2)
    case.accumulate(into, terms)
    good = torch.equal(into, (((terms[0] + terms[1]) + terms[2]) + terms[3]).bfloat16())
    case.accumulate(dense_into := torch.empty(2, 5, 3, 32, device="cuda", dtype=torch.bfloat16), terms[:1])
    good &= torch.equal(dense_into, terms[0].bfloat16())
    case.fill(into, 1.2345)
    good &= bool((into == torch.tensor(1.2345, device="cuda").bfloat16()).all())
    case.fill(dense_into, -2.0)
    good &= bool((dense_into == -2.0).all())
    pairs = [(torch.randn(2, n, 3, 8, device="cuda").bfloat16(), torch.zeros(3, 2, 8, n, device="cuda").bfloat16()) for n in (3, 9)]
    views = [(a, torch.zeros(2, 3, a.shape[1], 8, device="cuda").bfloat16().transpose(1, 2)) for a, _ in pairs]
    case.copy(views)
    return good and all(torch.equal(a, b) for a, b in views)


def main():
    program, seed, count = sys.argv[1], int((sys.argv[2:] or [1])[0]), int((sys.argv[3:] or [120])[0])
    driver, failures, largest = Driver(), 0, 0.0
    driver.compile_all([Case(driver, program, *problem(index, seed)[1:]) for index in range(count)])
    for index in range(count):
        try:
            spec, bad, worst = check(driver, program, index, seed)
        except RuntimeError as e:
            spec, bad, worst = index, [str(e)[:2000]], 0.0
        largest = max(largest, worst)
        if bad:
            failures += 1
            print("FAIL", index, spec, *bad, sep="\n    ", flush=True)
            if "error 7" in str(bad):
                break
    for name, test in (("repeatable", repeatable), ("elementwise", elementwise)):
        good = test(driver, program)
        failures += not good
        print(name, "ok" if good else "FAIL")
    print(f"{count} cases, {failures} failed; largest error / bound {largest:.2f}; {driver.compile_seconds:.0f} s in NVRTC")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
