"""Choosing between several serving backends by measuring them once per process and shape class (`backends.pick`)."""

from __future__ import annotations

import os
import threading
import time
from typing import NamedTuple

import torch

__all__ = ["Tuned", "forget", "pick", "picked", "tuned"]


class Tuned(NamedTuple):
    """What one measurement found: the winner, milliseconds of each true candidate, why the others were rejected."""

    name: str
    milliseconds: dict
    rejected: dict


_TUNED: dict[tuple, Tuned] = {}
_TUNING = threading.RLock()
_NOISE = 1.03  # what another backend must be faster than torch's by, or than our C++ kernels, and for torch's
_CALL = 0.02  # so many milliseconds besides: its own calls cost least around them
_CACHE = 32 << 20  # bytes written between two runs: more than a core's caches
_ROWS = 256  # rows compared with the baseline: a wrong or low-precision kernel is wrong in all of them


def tuned() -> dict[tuple, Tuned]:
    """Semantics: every measurement of this process, keyed by shape class; a copy."""
    return dict(_TUNED)


def forget() -> None:
    """Semantics: drop all measurements; the next call of each shape class measures again."""
    _TUNED.clear()


def picked(key: tuple) -> str | None:
    """Semantics: what `pick` found for `key`, None if nothing has been measured or measuring is turned off."""
    found = _TUNED.get(key)
    return None if found is None else found.name


def pick(key: tuple, runs: dict, baseline: str, tolerance: float) -> str:
    """Semantics: the fastest of `runs` (name -> function returning a tensor), measured once per `key` and process.

    Every candidate must agree with `runs[baseline]` to `tolerance` (relative Frobenius error over the first rows), or
    it is rejected. FASTPETL_TUNE=0: the first of `runs`, nothing measured. Data with infinities or NaN judge nobody:
    first of `runs`, not remembered. "torch", where it is among them, is taken unless another is 3 % and 20 us faster:
    less than that is the measurement's noise, and torch's own calls cost least around them. Else "cpp" is, unless
    another is 3 % faster: its kernels copy no weights, and no row of theirs depends on how many rows there are.
    """
    found = _TUNED.get(key)
    if found is not None:
        return found.name
    first = next(iter(runs))
    if len(runs) == 1 or os.environ.get("FASTPETL_TUNE") == "0":
        return first
    with _TUNING, torch.no_grad():
        found = _TUNED.get(key) or _measure(runs, baseline, tolerance)
        if found is None:
            return first
        _TUNED[key] = found
    return found.name


def _measure(runs, baseline, tolerance):
    want = runs[baseline]().reshape(-1)[: _ROWS * 1024].float().clone()
    norm = want.norm().item()
    if not norm < float("inf"):  # also true for NaN
        return None
    times, rejected = {}, {}
    for name in sorted(runs, key=lambda n: n != baseline):
        try:
            error = (runs[name]().reshape(-1)[: want.numel()].float() - want).norm().item()  # this run is the warm-up
        except RuntimeError as failure:
            rejected[name] = f"failed: {failure}"
            continue
        if not error <= tolerance * norm:
            rejected[name] = f"differs from {baseline} by {error / max(norm, 1e-30):.1e}, allowed {tolerance:.1e}"
            continue
        times[name] = [_once(runs[name])]
    milliseconds = _cold({name: runs[name] for name in times}, times)
    best = min(milliseconds, key=milliseconds.get)
    enough = _NOISE * milliseconds[best]
    if milliseconds.get("torch", float("inf")) <= enough + _CALL:
        best = "torch"
    elif milliseconds.get("cpp", float("inf")) <= enough:
        best = "cpp"
    return Tuned(best, milliseconds, rejected)


def _once(run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _cold(runs, times) -> dict:
    """Semantics: name -> milliseconds, the smallest of three rounds through all candidates. Between runs the caches are
    filled with something else, as in a model, where a layer's weights were last read a whole step ago; not where the
    runs are over in less than it takes to notice. A clear loser keeps its first time.
    """
    best = min(t[0] for t in times.values())
    other = torch.ones(_CACHE // 4) if best > 0.2 else None
    close = {name: run for name, run in runs.items() if times[name][0] <= 2 * best}
    if other is not None:
        times = times | {name: [] for name in close}
    for _ in range(3 if len(close) > 1 else 0):
        for name, run in close.items():
            if other is not None:
                other.add_(1)
            times[name].append(_once(run))
    return {name: min(t or [best]) for name, t in times.items()}
