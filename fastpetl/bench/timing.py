"""Interleaved samples: every variant once per round, the order reversed every other round, loaded samples redone."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .machine import Load

FOREIGN = 0.1  # CPUs that others may keep busy during a sample; plus two ticks of /proc/stat, which is that coarse
_TICKS = 0.02
_ATTEMPTS = 3


class Refused(RuntimeError):
    """A variant computes something else than eager does: it is not timed, and the benchmark fails."""


@dataclass
class Timing:
    """Samples of one variant, milliseconds per call."""

    clean: list[float] = field(default_factory=list)
    loaded: list[tuple[float, float]] = field(default_factory=list)  # (foreign CPUs, milliseconds): thrown away
    wanted: int = 1

    @property
    def samples(self) -> list[float]:
        """The clean ones; where fewer than half could be had, filled up with the least loaded."""
        missing = max(0, math.ceil(self.wanted / 2) - len(self.clean))
        return self.clean + [ms for _, ms in sorted(self.loaded)[:missing]]

    def row(self) -> dict:
        """Semantics: ms (median), spread (interquartile range / median), samples, thrown_away, loaded (was it filled
        up with samples during which others ran).
        """
        samples = self.samples
        used_loaded = len(samples) - len(self.clean)
        median = statistics.median(samples)
        quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [median] * 3
        return {
            "ms": median,
            "spread": (quartiles[2] - quartiles[0]) / median,
            "samples": [round(ms, 4) for ms in samples],
            "thrown_away": len(self.loaded) - used_loaded,
            "loaded": used_loaded > 0,
        }


def interleave(
    calls: dict[str, Callable[[], object]],
    *,
    rounds: int,
    sample_seconds: float = 0.06,
    warmups: int = 1,
    patience: float = 120.0,
    progress: Callable[[str], None] = lambda what: None,
    helper: int | None = None,
) -> dict[str, Timing]:
    """Semantics: `rounds` samples of each call, taken in turns; before, `warmups` calls and one to see how long.

    A sample is as many calls as fill `sample_seconds`. One during which other processes used more than `FOREIGN` CPUs
    is thrown away and redone, up to twice, after a wait for quiet; all waits together end after `patience` seconds, and
    then nothing is redone. `progress` is told of every step. `helper`: the process in which some of the calls do
    their work.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(warmups):
            call()
            progress(f"warm-up {name}")
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(sample_seconds / max(time.perf_counter() - start, 1e-6)))
    found = {name: Timing(wanted=rounds) for name in calls}
    load = Load(helper)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in reversed(calls) if turn % 2 else calls:
                patience -= _sample(calls[name], repeats[name], found[name], load, patience)
                progress(name)
            gc.collect()
    finally:
        gc.enable()
    return found


def _sample(call, repeats: int, timing: Timing, load: Load, patience: float) -> float:
    """One sample, clean if that can be had; returns the seconds it cost to wait and to redo."""
    begin = time.perf_counter()
    for _ in range(_ATTEMPTS):
        load.start()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wall = time.perf_counter() - start
        foreign = load.foreign()
        if foreign <= FOREIGN + _TICKS / wall:
            timing.clean.append(1e3 * wall / repeats)
            break
        timing.loaded.append((foreign, 1e3 * wall / repeats))
        if time.perf_counter() - begin >= patience:
            break
        load.wait_idle(min(2.0, patience))
    return max(0.0, time.perf_counter() - begin - wall)
