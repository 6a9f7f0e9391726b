"""`bench skip`: how much of the multiply-accumulates that skipping saves turns into time saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .plan import MODES, wants
from .timing import Refused, interleave
from .variant import DTYPES, Variant
from .workloads import WORKLOADS

# setting -> share of the saved MACs that must turn into time saved, and what a mask that skips nothing may cost
SHARES = {"static": 0.95, "masks": 0.92}
MOST_OVERHEAD = 0.02
PASSES = {"vilt": 0.92}  # one pass over 3 candidates against three passes
PLAN = (4, 6, 8, 10)
CANDIDATES = ((1, 4, 6, 9), (2, 4, 7, 10), (0, 5, 8, 11))


@dataclass(frozen=True)
class Plan:
    """What to run: `only` are substrings of mode/setting, empty for everything."""

    model: str = "vilt"
    tiny: bool = False
    rounds: int = 9
    only: tuple[str, ...] = ()
    patience: float = 120.0

    def settings(self, mode: str) -> list[str]:
        names = [name for name in ("static", "masks", "keep-all masks") if wants(self.only, mode, name)]
        return ["nothing skipped", *names] if names else []

    def passes(self) -> list[str]:
        return ["three passes", "one pass"] if wants(self.only, "scoring", "one pass") else []


def steps(plan: Plan) -> int:
    """Semantics: how often `measure` reports progress."""
    groups = [plan.settings(mode) for mode in MODES] + [plan.passes()]
    return sum(len(names) * (1 + plan.rounds) for names in groups)


def measure(plan: Plan, progress=lambda what: None) -> dict:
    """Semantics: rows, ratios and checks, fp32, of the patched model with DAS adapters, everything taken in turns."""
    work = WORKLOADS[plan.model]
    base = work.build(plan.tiny)
    batch = work.batch(base, plan.tiny, DTYPES["fp32"], **({} if plan.tiny else {"batch": 16}))
    subject = Variant("patched", work, base, batch)
    settings = _settings(subject, batch)
    rows, found = [], []
    for mode in MODES:
        names = plan.settings(mode)
        if not names:
            continue
        calls = {name: _call(subject, settings[name], mode) for name in names}
        timed = _timed(plan, mode, calls, progress)
        rows += [_row(plan, mode, name, timing) for name, timing in timed.items()]
        found += _shares(plan, mode, {name: t.row()["ms"] for name, t in timed.items()}, subject, settings)
    if plan.passes():
        calls, difference = _scoring(subject)
        timed = _timed(plan, "scoring", calls, progress)
        rows += [_row(plan, "scoring", name, timing) for name, timing in timed.items()]
        ratio = timed["one pass"].row()["ms"] / timed["three passes"].row()["ms"]
        bar = None if plan.tiny else PASSES[plan.model]
        note = f"one pass over three; largest difference of the logits {difference:.0e}"
        found.append(_found(plan, "scoring", "one pass", note, ratio, bar, ratio <= (bar or ratio)))
    return {"rows": rows, "ratios": found, "checks": []}


def _timed(plan, mode, calls, progress):
    return interleave(
        calls, rounds=plan.rounds, patience=plan.patience, progress=lambda what: progress(f"{mode}: {what}")
    )


def _settings(subject, batch) -> dict:
    """Setting -> what skip is given."""
    import fastpetl

    n, size = len(fastpetl.blocks(subject.model)), next(iter(batch.values())).shape[0]
    generator = torch.Generator().manual_seed(0)
    plan = fastpetl.SkipPlan(tuple(i for i in PLAN if i < n) or (n - 1,))
    half = torch.stack([torch.randperm(n, generator=generator) < n // 2 for _ in range(size)])
    return {
        "nothing skipped": None,
        "static": plan,
        "masks": half,
        "keep-all masks": torch.zeros(size, n, dtype=torch.bool),
    }


def _call(subject, setting, mode):
    import fastpetl

    run = subject.infer if mode == "inference" else subject.step

    def call():
        with fastpetl.skip(subject.model, setting):
            return run()

    return call


def _scoring(subject):
    """One pass over three candidates and three passes, as functions; and how much their logits differ."""
    import fastpetl
    from fastpetl.skip.policies import Candidates

    n = len(fastpetl.blocks(subject.model))
    sets = torch.zeros(3, n, dtype=torch.bool)
    for row, chosen in zip(sets, CANDIDATES, strict=True):
        row[[i % n for i in chosen]] = True

    def forward():
        torch.manual_seed(0)  # ViLT orders its patches by the global generator
        return subject.infer()

    def one():
        with fastpetl.skip(subject.model, Candidates(sets)):
            return forward()

    def three():
        found = []
        for row in sets:
            with fastpetl.skip(subject.model, row):
                found.append(forward())
        return torch.cat(found)

    want = three()
    difference = ((one() - want).abs().max() / want.abs().max()).item()
    if difference > 1e-4:
        raise Refused(f"bench skip: one pass over the candidates differs from three by {difference:.1e}, expected 1e-4")
    return {"three passes": three, "one pass": one}, difference


def _shares(plan, mode, ms, subject, settings) -> list[dict]:
    whole, found = _macs(subject, settings["nothing skipped"]), []
    for name in ("static", "masks"):
        if name in ms:
            saved = 1 - _macs(subject, settings[name]) / whole
            time_saved = 1 - ms[name] / ms["nothing skipped"]
            bar = None if plan.tiny else SHARES[name]
            share, note = (
                time_saved / saved,
                f"{100 * time_saved:.1f} % of the time saved / {100 * saved:.1f} % of the MACs",
            )
            found.append(_found(plan, mode, name, note, share, bar, share >= (bar or share)))
    if "keep-all masks" in ms:
        over = ms["keep-all masks"] / ms["nothing skipped"] - 1
        bar = None if plan.tiny else MOST_OVERHEAD
        found.append(_found(plan, mode, "keep-all masks", "time over no mask", over, bar, over <= (MOST_OVERHEAD)))
    return found


def _macs(subject, setting) -> int:
    """MACs of the whole forward with `setting`."""
    import fastpetl

    with fastpetl.skip(subject.model, setting):
        return fastpetl.count(subject.model, subject.work.for_inference(subject.batch)).macs


def _found(plan, mode, setting, what, value, bar, met) -> dict:
    return {"model": plan.model, "mode": mode, "setting": setting, "what": what, "value": value, "bar": bar, "met": met}


def _row(plan, mode, name, timing) -> dict:
    return {"model": plan.model, "dtype": "fp32", "mode": mode, "variant": name, "status": "ok", **timing.row()}
