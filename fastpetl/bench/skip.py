"""`bench skip`: how much of the multiply-accumulates that skipping saves turns into time saved."""

from __future__ import annotations

import copy
import gc
import math
from dataclasses import dataclass
from itertools import cycle

import torch

from . import variant as vm
from .plan import MODES, skip_passes, skip_settings
from .timing import Refused, interleave
from .variant import DTYPES, Variant
from .workloads import WORKLOADS

MOST_OVERHEAD = 0.02  # of a mask that skips nothing
DRAWS = 64  # of candidates: every sample has its own


@dataclass(frozen=True)
class Case:
    """What is asked of a model: the blocks of the static plan, samples a batch, the share of the saved MACs that must
    become time saved by setting, and what one pass over three candidates may take of three passes. convention: the
    field of `fastpetl.Count` by which MACs are counted.
    """

    plan: tuple[int, ...]
    batch: int
    shares: dict
    passes: float
    convention: str = "macs"


CASES = {
    "vilt": Case((4, 6, 8, 10), 16, {"static": 0.95, "masks": 0.92}, 0.92),
    # two text and two image layers, as the paper's -11.97 %, which is against the model without adapters
    "meter": Case((2, 4, 8, 10), 2, {"static": 0.95, "no adapters": 0.95}, 0.6, "macs_fvcore"),
}


@dataclass(frozen=True)
class Plan:
    """What to run: `only` are substrings of model/mode/setting, empty for everything."""

    model: str = "vilt"
    tiny: bool = False
    rounds: int = 9
    only: tuple[str, ...] = ()
    patience: float = 120.0

    def settings(self, mode: str) -> list[str]:
        return skip_settings(self.only, self.model, mode)

    def passes(self) -> list[str]:
        return skip_passes(self.only, self.model)


def steps(plan: Plan) -> int:
    """Semantics: how often `measure` reports progress."""
    groups = [plan.settings(mode) for mode in MODES]
    return sum(len(names) * (1 + plan.rounds) + bool(names) for names in groups) + len(plan.passes()) * (
        1 + plan.rounds
    )


def measure(plan: Plan, progress=lambda what: None) -> dict:
    """Semantics: rows, ratios and checks, fp32, of the patched model with DAS adapters, everything taken in turns.

    Raises Refused, before timing, if a setting computes something else patched than eagerly, or one pass over the
    candidates something else than three.
    """
    work, case = WORKLOADS[plan.model], CASES[plan.model]
    base = work.build(plan.tiny)
    batch = work.batch(base, plan.tiny, DTYPES["fp32"], **({} if plan.tiny else {"batch": case.batch}))
    eager = Variant("eager", work, copy.deepcopy(base), batch) if any(map(plan.settings, MODES)) else None
    subject = Variant("patched", work, base, batch)
    settings = _settings(case, subject, batch)
    rows, found, checks = [], [], []
    for mode in MODES:
        names = plan.settings(mode)
        if not names:
            continue
        progress(f"{mode}: compare")
        checks += _verify(plan, mode, {n: settings[n] for n in names if n in settings}, eager, subject)
        calls = {name: _call(subject, settings[name], mode) for name in names if name in settings}
        if "no adapters" in names:
            bare = _bare(work, eager, batch)
            calls["no adapters"] = bare.infer
        timed = _timed(plan, mode, calls, progress)
        rows += [_row(plan, mode, name, timing) for name, timing in timed.items()]
        ms = {name: t.row()["ms"] for name, t in timed.items()}
        found += _shares(plan, case, mode, ms, subject, settings)
        if "no adapters" in ms:
            found += _against_bare(plan, case, mode, ms, subject, settings["static"], bare)
            del bare, calls
    del eager
    gc.collect()
    if plan.passes():
        calls, difference = scoring(subject)
        timed = _timed(plan, "scoring", calls, progress)
        rows += [_row(plan, "scoring", name, timing) for name, timing in timed.items()]
        ratio = timed["one pass"].row()["ms"] / timed["three passes"].row()["ms"]
        bar = None if plan.tiny else case.passes
        note = f"one pass over three; largest difference of the logits {difference:.0e}"
        found.append(_found(plan, "scoring", "one pass", note, ratio, bar, ratio <= (bar or ratio)))
    return {"rows": rows, "ratios": found, "checks": checks}


def _verify(plan, mode, settings, eager, subject) -> list[dict]:
    """A check for each setting and quantity: patched against eager, with the same blocks skipped."""
    import fastpetl

    found = []
    for name, setting in settings.items():
        with fastpetl.skip(eager.model, setting), fastpetl.skip(subject.model, setting):
            try:
                checks = vm.verify({"eager": eager, "patched": subject}, "fp32", mode, eager)
            except Refused as error:
                raise Refused(f"{error} ({plan.model}, {name})") from error
        found += [{"model": plan.model, "setting": name, **check} for check in checks]
    return found


def _bare(work, eager, batch):
    """The patched model without adapters, nothing skipped."""
    import fastpetl

    plain = copy.deepcopy(eager.model)
    return Variant("patched", work, fastpetl.detach(plain), batch)


def _timed(plan, mode, calls, progress):
    return interleave(
        calls, rounds=plan.rounds, patience=plan.patience, progress=lambda what: progress(f"{mode}: {what}")
    )


def _settings(case, subject, batch) -> dict:
    """Setting -> what skip is given."""
    import fastpetl

    n, size = len(fastpetl.blocks(subject.model)), next(iter(batch.values())).shape[0]
    generator = torch.Generator().manual_seed(0)
    plan = fastpetl.SkipPlan(tuple(i for i in case.plan if i < n) or (n - 1,))
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


def scoring(subject):
    """Semantics: ({"three passes": function, "one pass": function} of three candidates, other ones at every call but
    for both the same, how much the first's logits differ) of a Variant; raises Refused if that is more than fp32's
    rounding, or twice bf16's.
    """
    import fastpetl
    from fastpetl.skip.policies import Candidates

    draws = _candidates(len(fastpetl.blocks(subject.model)))

    def forward():
        torch.manual_seed(0)  # ViLT orders its patches by the global generator
        return subject.infer()

    def one(sets):
        with fastpetl.skip(subject.model, Candidates(sets)):
            return forward()

    def three(sets):
        found = []
        for row in sets:
            with fastpetl.skip(subject.model, row):
                found.append(forward())
        return torch.cat(found)

    def each(run):
        turns = cycle(draws)
        return lambda: run(next(turns))

    want = three(draws[0])
    difference = vm.largest(one(draws[0]), want)
    limit = 1e-4 if want.dtype == torch.float32 else 5e-2
    if difference > limit:
        raise Refused(
            f"bench skip: one pass over the candidates differs from three by {difference:.1e}, expected {limit:.0e}"
        )
    return {"three passes": each(three), "one pass": each(one)}, difference


def _candidates(n: int) -> list[torch.Tensor]:
    """Semantics: DRAWS times three sets of a third of n blocks (4 of 12), as a search draws its first: [3, n] each."""
    from fastpetl.das.gates import Fill, draw_distinct

    generator, made, k = torch.Generator().manual_seed(0), [], max(1, n // 3)
    for _ in range(DRAWS):
        sets = torch.zeros(3, n, dtype=torch.bool)
        drawn = draw_distinct(torch.zeros(n), Fill(n, k), min(3, math.comb(n, k)), generator)
        for row, chosen in zip(sets, cycle(drawn), strict=False):  # a tiny model's are fewer than three
            row[list(chosen)] = True
        made.append(sets)
    return made


def _shares(plan, case, mode, ms, subject, settings) -> list[dict]:
    whole, found = _macs(subject, case, None), []
    for name in ("static", "masks"):
        if name in ms:
            saved = 1 - _macs(subject, case, settings[name]) / whole
            found.append(_share(plan, case, mode, name, 1 - ms[name] / ms["nothing skipped"], saved, ""))
    if "keep-all masks" in ms:
        over = ms["keep-all masks"] / ms["nothing skipped"] - 1
        bar = None if plan.tiny else MOST_OVERHEAD
        found.append(_found(plan, mode, "keep-all masks", "time over no mask", over, bar, over <= MOST_OVERHEAD))
    return found


def _against_bare(plan, case, mode, ms, subject, setting, bare) -> list[dict]:
    """The plan against the model that has no adapters: what they cost is taken off what skipping saves, in both."""
    if "static" not in ms:
        return []
    saved = 1 - _macs(subject, case, setting) / _macs(bare, case, None)
    note = " of the model without adapters"
    return [_share(plan, case, mode, "no adapters", 1 - ms["static"] / ms["no adapters"], saved, note)]


def _share(plan, case, mode, name, time_saved, saved, of) -> dict:
    bar = None if plan.tiny else case.shares[name]
    what = f"{100 * time_saved:.1f} % of the time saved / {100 * saved:.2f} % of the MACs{of}"
    share = time_saved / saved
    return _found(plan, mode, name, what, share, bar, share >= (bar or share))


def _macs(subject, case, setting) -> int:
    """MACs of the whole forward with `setting`, by the case's convention."""
    import fastpetl

    inputs = subject.work.for_inference(subject.batch)
    if setting is None:
        return getattr(fastpetl.count(subject.model, inputs), case.convention)
    with fastpetl.skip(subject.model, setting):
        return getattr(fastpetl.count(subject.model, inputs), case.convention)


def _found(plan, mode, setting, what, value, bar, met) -> dict:
    return {"model": plan.model, "mode": mode, "setting": setting, "what": what, "value": value, "bar": bar, "met": met}


def _row(plan, mode, name, timing) -> dict:
    return {"model": plan.model, "dtype": "fp32", "mode": mode, "variant": name, "status": "ok", **timing.row()}
