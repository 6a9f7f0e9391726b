"""What a search found: a skip plan that knows how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastpetl.skip.plan import SkipPlan


@dataclass(frozen=True)
class SearchedPlan(SkipPlan):
    """Semantics: a SkipPlan; besides, names of the skipped blocks, the gates of all blocks, the MACs one sample saves,
    the seed, the versions that made it, and the rounds: [{step, sets, losses, gates}, ...].
    """

    names: tuple[str, ...] = ()
    gates: tuple[float, ...] = ()
    macs_saved: int = 0
    seed: int = 0
    versions: dict = field(default_factory=dict)
    rounds: tuple[dict, ...] = ()

    def plot(self, path) -> Path:
        """Semantics: a PNG: each gate over the rounds, and for each block the rewards of the sets that skip it."""
        from matplotlib.figure import Figure  # not pyplot: the backend is the caller's

        figure = Figure(figsize=(11, 4.2))
        left, right = figure.subplots(1, 2)
        steps = [0, *(r["step"] for r in self.rounds)]
        for i in range(len(self.gates)):
            skipped = i in self.blocks
            values = [0.0, *(r["gates"][i] for r in self.rounds)]
            style = {"linewidth": 2.0 if skipped else 0.8, "color": f"C{i % 10}" if skipped else "0.7"}
            left.plot(steps, values, label=f"block {i}" if skipped else None, **style)
        left.set(xlabel="training step", ylabel="gate", title="gates (skipped blocks in colour)")
        if self.blocks:
            left.legend(fontsize=8)
        earned = _advantages(self.rounds)
        right.boxplot([earned.get(i, [0.0]) for i in range(len(self.gates))], positions=range(len(self.gates)))
        right.axhline(0, color="0.7", linewidth=0.8)
        right.set(xlabel="block", ylabel="reward above the round's mean", title="sets that skip the block")
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        return Path(path)


def _advantages(rounds) -> dict[int, list[float]]:
    import math

    found: dict[int, list[float]] = {}
    for r in rounds:
        rewards = [math.exp(-loss) for loss in r["losses"]]
        mean = sum(rewards) / len(rewards)
        for chosen, reward in zip(r["sets"], rewards, strict=True):
            for i in chosen:
                found.setdefault(i, []).append(reward - mean)
    return found
