"""The bandit of DAS: drawing sets of blocks to skip, and moving their gates by what the sets earned.

Source: DAS (NeurIPS 2023), section 3.2 and the released code. A high gate says that skipping the block costs little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_REDRAWS = 1000


def update_gates(gates: torch.Tensor, sets: Sequence[Sequence[int]], losses: torch.Tensor, lr: float) -> torch.Tensor:
    """Semantics: gate_i + lr * sum over the sets s with i of (r_s - mean r) * p_i * (1 - p_i), where r = exp(-loss) and
    p = sigmoid(gate).

    gates [n] float64, losses [S]; returns new gates in float64. All sets are weighed with the same, old p.
    """
    p = torch.sigmoid(gates)
    reward = torch.exp(-losses.to(gates))
    member = torch.zeros(len(sets), gates.numel(), dtype=gates.dtype)
    for row, chosen in zip(member, sets, strict=True):
        row[list(chosen)] = 1
    return gates + lr * ((reward - reward.mean()) @ member) * p * (1 - p)


class Fill:
    """How many blocks of an order are skipped: the first `n_skip`, or so many that `budget` MACs are saved."""

    def __init__(self, n_blocks: int, n_skip: int | None, budget: float | None = None, saved: Sequence[int] = ()):
        self.n_blocks, self.n_skip, self.budget, self.saved = n_blocks, n_skip, budget, tuple(saved)

    def __call__(self, order: Sequence[int]) -> tuple[int, ...]:
        """Semantics: the sorted set that the front of `order` makes."""
        if self.n_skip is not None:
            return tuple(sorted(order[: self.n_skip]))
        chosen, total = [], 0
        for i in order:
            if total >= self.budget:
                break
            chosen.append(i)
            total += self.saved[i]
        return tuple(sorted(chosen))

    def best(self, gates: torch.Tensor) -> tuple[int, ...]:
        """Semantics: the set the gates speak for: the highest `n_skip`, or, for a budget, the best ratio of gate to
        MACs saved first, without what the budget does not need.

        A block that saves nothing comes last. Ties go to the later block, as in the original.
        """
        if self.n_skip is not None:
            return self(torch.argsort(gates, stable=True).flip(0).tolist())
        low = gates.min().item()  # gates only rank: shifted, so that a ratio is a benefit per cost
        worth = [(gates[i].item() - low) / s if s > 0 else -math.inf for i, s in enumerate(self.saved)]
        order = sorted(range(self.n_blocks), key=lambda i: (worth[i], self.saved[i], i), reverse=True)
        chosen = list(self(order))
        for i in reversed(order):
            rest = sum(self.saved[j] for j in chosen if j != i)
            if i in chosen and rest >= self.budget:
                chosen.remove(i)
        return tuple(chosen)


def draw(gates: torch.Tensor, fill: Fill, generator: torch.Generator | None) -> tuple[int, ...]:
    """Semantics: one set: blocks drawn one after another without replacement, by sigmoid(gates)."""
    p = torch.sigmoid(gates).clamp_min(1e-30)
    return fill(torch.multinomial(p, gates.numel(), generator=generator).tolist())


def draw_distinct(gates: torch.Tensor, fill: Fill, count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Semantics: `count` different sets. A draw that repeats an earlier one is drawn again, by equal chances after
    1,000 repeats; ValueError if there are not so many sets.
    """
    found: list[tuple[int, ...]] = []
    for weights in (gates, torch.zeros_like(gates)):
        for _ in range(_REDRAWS):
            if len(found) == count:
                return found
            drawn = draw(weights, fill, generator)
            if drawn not in found:
                found.append(drawn)
    if len(found) == count:
        return found
    raise ValueError(f"search: candidates is {count}, but only {len(found)} different sets of blocks were found")


def check_count(fill: Fill, count: int) -> None:
    """Semantics: ValueError if there are not `count` different sets to draw."""
    if fill.n_skip is None:  # how many make up a budget is easiest told by drawing them
        draw_distinct(torch.zeros(fill.n_blocks), fill, count, torch.Generator().manual_seed(0))
        return
    sets = math.comb(fill.n_blocks, fill.n_skip)
    if sets < count:
        raise ValueError(
            f"search: candidates is {count}, expected at most {sets}: so many sets of {fill.n_skip} of "
            f"{fill.n_blocks} blocks exist"
        )
