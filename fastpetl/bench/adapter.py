"""`bench adapter`: one fused site, x + f + A(x), against the same formula in torch, eager and compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .machine import copy_bandwidth
from .plan import wants, with_eager
from .timing import Refused, interleave
from .vilt_model import DTYPES

BARS = {("fp32", 96, "forward"): 2.2, ("fp32", 96, "forward+backward"): 2.3}  # against eager and against compile
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Plan:
    """What to run: `only` are substrings of dtype/r<bottleneck>/mode/variant, empty for everything."""

    rows: int = 2248
    hidden: int = 768
    bottlenecks: tuple[int, ...] = (48, 96, 192, 288)
    rounds: int = 15
    only: tuple[str, ...] = ()
    patience: float = 120.0  # seconds spent on waiting for a quiet machine, per group of variants

    def variants(self, dtype: str, r: int, mode: str) -> list[str]:
        from fastpetl import backends

        fused = [n for n in backends.candidates("adapter", "cpu", DTYPES[dtype]) if n != "reference"]
        names = [n for n in ("eager", "compile", *fused) if wants(self.only, dtype, f"r{r}", mode, n)]
        return with_eager(names)


def cases(plan: Plan) -> list[tuple[str, int, str, list[str]]]:
    found = [(d, r, m, plan.variants(d, r, m)) for d in DTYPES for r in plan.bottlenecks for m in MODES]
    return [case for case in found if case[3]]


def steps(plan: Plan) -> int:
    """Semantics: how often `measure` reports progress."""
    return sum(1 + len(names) * (1 + plan.rounds) for _, _, _, names in cases(plan))


class Site:
    """Inputs and parameters of one site, and ways to compute it."""

    def __init__(self, rows: int, hidden: int, r: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(r)

        def make(*shape, std=1.0, mean=0.0):
            return (torch.randn(shape, generator=g) * std + mean).to(dtype).requires_grad_()

        self.x, self.f, self.grad = make(rows, hidden), make(rows, hidden), make(rows, hidden).detach()
        self.weights = (make(r, hidden, std=0.05), make(r, std=0.1), make(hidden, r, std=0.05), make(hidden, std=0.1))
        self.norm = (make(hidden, std=0.1, mean=1.0), make(hidden, std=0.1))
        self.inputs = (self.x, self.f, *self.weights, *self.norm)

    def calls(self, function) -> dict:
        """Semantics: mode -> a call of `function(x, f, *weights, *norm)` that returns its output or the gradients."""

        def forward():
            with torch.no_grad():
                return (function(*self.inputs),)

        def both():
            y = function(*self.inputs)
            return (y.detach(), *torch.autograd.grad(y, self.inputs, self.grad))

        return {"forward": forward, "forward+backward": both}


def formula(x, f, w_down, b_down, w_up, b_up, norm_weight, norm_bias):
    """Semantics: x + f + A(x) as one writes it in torch."""
    from fastpetl.ops import adapter_reference

    return adapter_reference(
        x, w_down, b_down, w_up, b_up, norm_weight=norm_weight, norm_bias=norm_bias, residuals=(x, f)
    )


def implementation(name: str):
    """Semantics: the function of a variant: eager, compile, or a backend of `fastpetl.ops.adapter`."""
    from fastpetl.ops import adapter

    if name == "eager":
        return formula
    if name == "compile":
        return torch.compile(formula, dynamic=False)

    def fused(x, f, w_down, b_down, w_up, b_up, norm_weight, norm_bias):
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        return adapter(x, w_down, b_down, w_up, b_up, **norm, residuals=(x, f), backend=name)

    return fused


def slack(name: str, dtype: torch.dtype) -> float:
    """Semantics: what a result may be off beyond twice eager's error. torch.compile sums over rows one by one, which
    costs it a digit of fp32 in the biases' gradients; it is a baseline, not ours to judge.
    """
    if dtype is not torch.float32:
        return 1e-3
    return 1e-5 if name == "compile" else 5e-7


def verify(site: Site, calls: dict, mode: str, what: str) -> list[dict]:
    """Semantics: each variant's error against float64 is at most twice eager's; raises Refused otherwise."""
    exact = Site.__new__(Site)
    exact.inputs = tuple(t.detach().double().requires_grad_() for t in site.inputs)
    exact.grad = site.grad.double()
    want = exact.calls(formula)[mode]()

    def errors(call):
        pairs = zip(call(), want, strict=True)
        return [((got.double() - w).norm() / w.norm()).item() for got, w in pairs]

    noise, checks = errors(calls["eager"]), []
    for name, call in calls.items():
        if name == "eager":
            continue
        found = errors(call)
        for i, (error, own) in enumerate(zip(found, noise, strict=True)):
            if not error <= 2 * own + slack(name, site.x.dtype):
                raise Refused(
                    f"bench: {name} ({what}): result {i} is {error:.1e} away from float64, expected at most twice "
                    f"eager's {own:.1e}; nothing was timed"
                )
        checks.append({"case": what, "variant": name, "error": max(found), "eager_error": max(noise), "met": True})
    return checks


def measure(plan: Plan, progress=lambda what: None, implement=implementation) -> dict:
    """Semantics: rows and checks of every case; each case verified, then timed in turns."""
    rows, checks = [], []
    bandwidth = copy_bandwidth()
    for dtype, r, mode, names in cases(plan):
        what = f"{dtype} r={r} {mode}"
        progress(f"{what}: compare")
        torch._dynamo.reset()  # a fresh compile per case: no recompile limit, static shapes
        site = Site(plan.rows, plan.hidden, r, DTYPES[dtype])
        calls = {name: site.calls(implement(name))[mode] for name in names}
        checks += verify(site, calls, mode, what)
        timed = interleave(
            calls,
            rounds=plan.rounds,
            patience=plan.patience,
            progress=lambda n, what=what: progress(f"{what}: {n}"),
        )
        passes = 1 if mode == "forward" else 3
        flop = passes * 2 * 2 * plan.rows * plan.hidden * r
        size = site.x.element_size()
        # forward reads x and f and writes y; backward reads the gradient and x and writes dx (df is the gradient)
        moved = (3 if mode == "forward" else 6) * plan.rows * plan.hidden * size
        for name, timing in timed.items():
            row = {"dtype": dtype, "bottleneck": r, "mode": mode, "variant": name, "status": "ok", **timing.row()}
            row["gflops"] = flop / row["ms"] / 1e6
            row["floor_mib"] = moved / 2**20
            row["floor_gbs"] = moved / row["ms"] / 1e6
            rows.append(row)
    return {"rows": rows, "checks": checks, "copy_gbs": bandwidth}


def ratios(rows: list[dict]) -> list[dict]:
    """Semantics: each fused backend against eager and compile of its case: ratio of medians, the bar, met or not."""
    cases: dict = {}
    for row in rows:
        cases.setdefault((row["dtype"], row["bottleneck"], row["mode"]), {})[row["variant"]] = row["ms"]
    found = []
    for (dtype, r, mode), ms in cases.items():
        bar = BARS.get((dtype, r, mode))
        for base in ("eager", "compile"):
            for name in (n for n in ms if n not in ("eager", "compile") and base in ms):
                ratio = ms[base] / ms[name]
                met = None if bar is None else ratio >= bar
                case = {"dtype": dtype, "bottleneck": r, "mode": mode, "variant": name}
                found.append({**case, "against": base, "ratio": ratio, "bar": bar, "met": met})
    return found
