"""`bench ops`: each op of the kernel family against the same formula in torch: eager, compiled, routed to oneDNN."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from .cases import CASES, GRADS, Built, Case, Maker, Size
from .machine import copy_bandwidth, fma_peak
from .plan import wants, with_eager
from .timing import Refused, interleave
from .variant import DTYPES, route, route_reason

MODES = ("forward", GRADS)
BASELINES = ("eager", "compile", "routed")


@dataclass(frozen=True)
class Plan:
    """What to run: `only` are substrings of dtype/case/mode/variant, empty for everything."""

    size: Size = Size()
    rounds: int = 15
    only: tuple[str, ...] = ()
    patience: float = 120.0  # seconds spent on waiting for a quiet machine, per group of variants

    def variants(self, case: Case, dtype: str, mode: str) -> list[str]:
        names = [*(("eager", "compile", "routed") if dtype == "fp32" else ("eager", "compile")), *fused(case, dtype)]
        return with_eager([n for n in names if wants(self.only, dtype, case.name, mode, n)])


def fused(case: Case, dtype: str, device: str = "cpu") -> list[str]:
    """Semantics: the backends of ours that serve the case."""
    from fastpetl import backends

    names = backends.candidates(case.op, device, DTYPES[dtype])
    return [n for n in names if n not in ("reference", "torch")]


def selected(plan: Plan) -> list[tuple[str, Case, str, list[str]]]:
    found = [(d, c, m, plan.variants(c, d, m)) for c in CASES for d in DTYPES for m in MODES]
    return [each for each in found if each[3]]


def steps(plan: Plan) -> int:
    """Semantics: how often `measure` reports progress."""
    return sum(1 + len(names) * (1 + plan.rounds) for *_, names in selected(plan))


# --- one workload -----------------------------------------------------------------------------------------------------


def tensors(out) -> tuple[torch.Tensor, ...]:
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def cotangents(built: Built, seed: int = 7) -> tuple[torch.Tensor, ...]:
    """Semantics: one random gradient per output of the formula."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        outs = tensors(built.formula(*built.inputs))
    return tuple(torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outs)


def results(function, inputs, grads=None) -> tuple[torch.Tensor, ...]:
    """Semantics: the outputs and, given their gradients, the gradients of all inputs that want one."""
    if grads is None:
        with torch.no_grad():
            return tensors(function(*inputs))
    outs = tensors(function(*inputs))
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    found = torch.autograd.grad(outs, wanted, grads)
    return (*(o.detach() for o in outs), *found)


def implementation(built: Built, name: str):
    """Semantics: the function of a variant: eager, compile, routed, or a backend of the op."""
    if name == "eager":
        return built.formula
    if name == "compile":
        return torch.compile(built.formula, dynamic=False)
    return _routed(built.formula) if name == "routed" else built.fused(name)


def _routed(formula):
    def run(*inputs):
        with route():
            return formula(*inputs)

    return run


def slack(name: str, dtype: torch.dtype) -> float:
    """Semantics: what a result may be off beyond twice eager's error. torch.compile sums over rows one by one, which
    costs it a digit of fp32 in the biases' gradients; it is a baseline, not ours to judge.
    """
    if dtype is not torch.float32:
        return 1e-3
    return 1e-5 if name in BASELINES else 5e-7


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def doubled(t):
    """Semantics: a float64 copy of a floating-point tensor; anything else as it is."""
    if not isinstance(t, torch.Tensor) or not t.is_floating_point():
        return t
    return t.detach().double().requires_grad_(t.requires_grad)


def verify(built: Built, functions: dict, grads, what: str) -> list[dict]:
    """Semantics: each variant's error against float64 is at most twice eager's; raises Refused otherwise."""
    exact = None if grads is None else tuple(g.double() for g in grads)
    want = results(built.formula, tuple(doubled(t) for t in built.inputs), exact)

    def errors(name, function):
        context = route() if name == "routed" else contextlib.nullcontext()
        with context:
            return [distance(got, w) for got, w in zip(results(function, built.inputs, grads), want, strict=True)]

    noise, checks = errors("eager", built.formula), []
    for name, function in functions.items():
        if name == "eager":
            continue
        found = errors(name, function)
        for i, (error, own) in enumerate(zip(found, noise, strict=True)):
            if not error <= 2 * own + slack(name, built.inputs[0].dtype):
                raise Refused(
                    f"bench: {name} ({what}): result {i} is {error:.1e} away from float64, expected at most twice "
                    f"eager's {own:.1e}; nothing was timed"
                )
        checks.append({"case": what, "variant": name, "error": max(found), "eager_error": max(noise), "met": True})
    return checks


# --- all of them ------------------------------------------------------------------------------------------------------


def measure(plan: Plan, progress=lambda what: None, implement=implementation) -> dict:
    """Semantics: rows and checks of every case; each case verified, then timed in turns."""
    found = {"rows": [], "checks": [], "copy_gbs": copy_bandwidth(), "fma_gflops": fma_peak()}
    for dtype, case, mode, names in selected(plan):
        what = f"{dtype} {case.name} {mode}"
        progress(f"{what}: compare")
        torch._dynamo.reset()  # a fresh compile per case: no recompile limit, static shapes
        built, grads, functions, checks = prepare(plan, case, dtype, mode, names, implement, what)
        found["checks"] += checks
        calls = {n: call(n, f, built, grads) for n, f in functions.items()}
        timed = interleave(
            calls, rounds=plan.rounds, patience=plan.patience, progress=lambda n, what=what: progress(f"{what}: {n}")
        )
        for name, timing in timed.items():
            head = {"dtype": dtype, "case": case.name, "mode": mode, "variant": name, "status": "ok"}
            found["rows"].append({**head, **timing.row(), **floors(built, plan.size, mode)})
    for row in found["rows"]:
        row["gflops"] = row["gflop"] / row["ms"] * 1e3
        row["floor_gbs"] = row["floor_mib"] * 2**20 / row["ms"] / 1e6
    return found


def prepare(plan: Plan, case: Case, dtype: str, mode: str, names, implement, what: str):
    """Semantics: (workload, output gradients, functions by name, checks), verified; Refused if a variant is wrong.

    Drawn anew up to twice: where a pre-activation is within rounding of zero, ReLU's derivative is a matter of luck,
    and one such element is 2e-3 of a gradient's norm. What is wrong is wrong for every draw. A routed eager that is not
    true fp32 for this shape is no baseline; its check says so.
    """
    for seed in range(3):
        built = case.build(plan.size, Maker(DTYPES[dtype], "cpu", seed=seed))
        grads, unrouted = None if mode == "forward" else cotangents(built), []
        functions = {n: implement(built, n) for n in names}
        try:
            if "routed" in functions and (why := route_reason() or _refusal(built, functions, grads, what)):
                del functions["routed"]
                unrouted = [{"case": what, "variant": "routed", "met": False, "why": why}]
            return built, grads, functions, [*unrouted, *verify(built, functions, grads, what)]
        except Refused as error:
            refused = error
    raise refused


def _refusal(built, functions, grads, what) -> str | None:
    try:
        verify(built, {"routed": functions["routed"]}, grads, what)
    except Refused as error:
        return str(error)
    return None


def call(name: str, function, built: Built, grads):
    """Semantics: a call without arguments of one variant, for timing."""
    if name != "routed":
        return lambda: results(function, built.inputs, grads)

    def routed():
        with route():  # its backward too
            return results(built.formula, built.inputs, grads)

    return routed


def floors(built: Built, size: Size, mode: str) -> dict:
    """Semantics: gflop (three times the forward's with gradients) and floor_mib of one call."""
    item, passes = built.inputs[0].element_size(), 1 if mode == "forward" else 2
    activations = sum(built.reads_writes[:passes]) * size.rows * size.hidden * item
    flop = built.flop * (1 if mode == "forward" else 3)
    return {"gflop": flop / 1e9, "floor_mib": (activations + passes * built.extra_bytes) / 2**20}


def ratios(rows: list[dict]) -> list[dict]:
    """Semantics: each fused backend against the baselines of its case: ratio of medians, the bar, met or not."""
    bars = {case.name: case.bars for case in CASES}
    groups: dict = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["case"], row["mode"]), {})[row["variant"]] = row["ms"]
    found = []
    for (dtype, name, mode), ms in groups.items():
        wanted = bars.get(name, {}).get(mode, (None, None)) if dtype == "fp32" else (None, None)
        for base, bar in zip(BASELINES, (*wanted, None), strict=True):
            for variant in (n for n in ms if n not in BASELINES and base in ms):
                ratio = ms[base] / ms[variant]
                met = None if bar is None else ratio >= bar
                head = {"dtype": dtype, "case": name, "mode": mode, "variant": variant}
                found.append({**head, "against": base, "ratio": ratio, "bar": bar, "met": met})
    return found
