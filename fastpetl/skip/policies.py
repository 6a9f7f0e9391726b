"""Which samples skip which blocks: a policy says so anew in each forward. `fastpetl.skip(model, policy)` sets it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["Bandit", "Callback", "Candidates", "Masks", "Policy", "RandomSkip", "Router"]


class Policy:
    """Semantics: `masks(x, n_blocks, training)` -> (mask [B, n_blocks] bool, True = skip; scale [B, n_blocks] or None).

    x [B, tokens, hidden] is what enters the first block. Where a scale is given a kept block gives x + scale *
    (block(x) - x). capacity: None, or how many samples at most run a block: then shapes do not depend on the mask
    (CUDA graphs, torch.compile), and of more samples that keep a block the first `capacity` run it. copies: how many
    copies of the batch the blocks see. pools: `masks` takes a further argument, real [B or 1, tokens] bool or None,
    False at padding.
    """

    capacity: int | None = None
    copies: int = 1
    pools: bool = False

    def masks(self, x: torch.Tensor, n_blocks: int, training: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError(
            f"skip: policy is {type(self).__name__}, which does not define masks, expected a subclass of Policy with "
            "masks(self, x, n_blocks, training) that returns (mask [batch, n_blocks] bool, True = skip; scale or None)"
        )


def _capacity(value, function: str):
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{function}: capacity is {value!r}, expected an integer >= 1 or None")
    return value


class Masks(Policy):
    """Semantics: the mask given, [batch, n_blocks] bools, of one batch."""

    def __init__(self, mask: torch.Tensor, *, capacity: int | None = None):
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"Masks: mask is {got}, expected a bool tensor of shape (batch, n_blocks)")
        # contiguous: compiled code is specialised on strides
        self.mask, self.capacity = mask.contiguous(), _capacity(capacity, "Masks")

    def masks(self, x, n_blocks, training):
        return self.mask, None


class RandomSkip(Policy):
    """Semantics: in training each sample skips each block with probability `rate` (stochastic depth); in eval none.

    scaled: kept blocks are weighted 1 / (1 - rate), so that the expected output is that of all blocks. rate: a
    number, or one per block. Drawn from torch's generator of x's device.
    """

    def __init__(self, rate, *, scaled: bool = True, capacity: int | None = None):
        rates = rate.tolist() if hasattr(rate, "tolist") else rate  # of a tensor or an array
        rates = list(rates) if isinstance(rates, (list, tuple)) else [rates]
        if any(isinstance(r, bool) or not isinstance(r, (int, float)) or not 0 <= r < 1 for r in rates):
            raise ValueError(f"RandomSkip: rate is {rate!r}, expected numbers in [0, 1)")
        self.rate, self.scaled, self.capacity = rate, scaled, _capacity(capacity, "RandomSkip")

    def masks(self, x, n_blocks, training):
        if not training:
            return torch.zeros(x.shape[0], n_blocks, dtype=torch.bool, device=x.device), None
        rate = torch.as_tensor(self.rate, dtype=torch.float32, device=x.device)
        if rate.dim() and rate.shape[0] != n_blocks:
            raise ValueError(f"RandomSkip: rate has {rate.shape[0]} numbers, expected one or n_blocks={n_blocks}")
        mask = torch.rand(x.shape[0], n_blocks, device=x.device) < rate
        return mask, (1 / (1 - rate)).expand(mask.shape) if self.scaled else None


class Bandit(Policy):
    """Semantics: in training each sample skips `n_skip` blocks drawn without replacement by sigmoid(gates); in eval
    all skip the `n_skip` with the highest gates, as the search of DAS ends.

    gates [n_blocks], float64, read at each forward.
    """

    def __init__(self, gates: torch.Tensor, n_skip: int, *, capacity: int | None = None):
        if not isinstance(gates, torch.Tensor) or gates.dim() != 1 or not gates.is_floating_point():
            got = f"{gates.dtype} {tuple(gates.shape)}" if isinstance(gates, torch.Tensor) else type(gates).__name__
            raise ValueError(f"Bandit: gates is {got}, expected floats of shape (n_blocks,)")
        if not isinstance(n_skip, int) or isinstance(n_skip, bool) or not 0 <= n_skip <= gates.numel():
            raise ValueError(f"Bandit: n_skip is {n_skip}, expected 0 to {gates.numel()}, the number of gates")
        self.gates, self.n_skip, self.capacity = gates, n_skip, _capacity(capacity, "Bandit")

    def masks(self, x, n_blocks, training):
        mask = torch.zeros(x.shape[0], n_blocks, dtype=torch.bool, device=self.gates.device)
        if n_blocks != self.gates.numel():
            raise ValueError(
                f"Bandit: the model has {n_blocks} blocks, expected {self.gates.numel()}, one for each gate"
            )
        if self.n_skip == 0 or x.shape[0] == 0:
            return mask, None
        if training:
            p = torch.sigmoid(self.gates).clamp_min(1e-30)  # a gate far below 0 may be drawn, if it must
            chosen = torch.multinomial(p.expand(x.shape[0], -1), self.n_skip)
        else:  # of equals the later, as the search's own plan has it
            chosen = torch.argsort(self.gates, stable=True)[-self.n_skip :].expand(x.shape[0], -1)
        return mask.scatter(1, chosen, True), None


class Router(nn.Module, Policy):
    """A learned router. Semantics: p = sigmoid(W mean_t(x) + b) is the probability of keeping each block; kept is p >
    0.5. The mean is over tokens that are not padding.

    Straight-through: kept blocks are scaled by p - stop_gradient(p) + 1, which is 1, so the loss trains W through
    what the kept blocks add. `penalty` of the last forward, (mean(p) - budget)^2, is to be added to the loss: budget
    is the share of blocks to keep. With capacity the `capacity` samples of the highest p run each block. The router's
    parameters are not the model's: give them to the optimizer, save them.
    """

    pools = True

    def __init__(self, hidden: int, n_blocks: int, *, budget: float = 0.5, capacity: int | None = None):
        super().__init__()
        if not 0 <= budget <= 1:
            raise ValueError(f"Router: budget is {budget!r}, expected a share of blocks in [0, 1]")
        self.gate = nn.Linear(hidden, n_blocks)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 1.0)
        self.budget, self.capacity, self.penalty = budget, _capacity(capacity, "Router"), None

    def masks(self, x, n_blocks, training, real=None):
        if n_blocks != self.gate.out_features:
            raise ValueError(f"Router: the model has {n_blocks} blocks, expected n_blocks={self.gate.out_features}")
        if x.shape[-1] != self.gate.in_features:
            raise ValueError(f"Router: the blocks' width is {x.shape[-1]}, expected hidden={self.gate.in_features}")
        p = torch.sigmoid(self.gate(_mean(x.detach(), real).to(self.gate.weight.dtype)))
        self.penalty = (p.mean() - self.budget) ** 2
        if self.capacity is None or self.capacity >= x.shape[0]:
            mask = p <= 0.5
        else:
            mask = torch.ones_like(p, dtype=torch.bool).scatter(0, p.topk(self.capacity, 0).indices, False)
        return mask.detach(), p - p.detach() + 1  # in this order it is 1 to the bit

    def __getstate__(self):  # a penalty is of its forward's graph, which can neither be copied nor pickled
        return {**self.__dict__, "penalty": None}


def _mean(x, real):
    if real is None:
        return x.mean(1)
    real = real[..., None]
    return torch.where(real, x, 0).sum(1) / real.sum(1).clamp(min=1)


class Callback(Policy):
    """Semantics: mask = function(x, n_blocks), called in each forward."""

    def __init__(self, function: Callable[[torch.Tensor, int], torch.Tensor], *, capacity: int | None = None):
        if not callable(function):
            raise TypeError(
                f"Callback: function is {type(function).__name__}, expected a function (x, n_blocks) -> mask"
            )
        self.function, self.capacity = function, _capacity(capacity, "Callback")

    def masks(self, x, n_blocks, training):
        return self.function(x, n_blocks), None


class Candidates(Policy):
    """Semantics: S skip sets at once: the model's output has S times the batch, copy after copy, copy s with set s.

    sets [S, n_blocks] bools. Two share a block as long as they agree: each distinct beginning is computed once.
    """

    def __init__(self, sets: torch.Tensor):
        if not isinstance(sets, torch.Tensor) or sets.dtype != torch.bool or sets.dim() != 2 or not len(sets):
            got = f"{sets.dtype} {tuple(sets.shape)}" if isinstance(sets, torch.Tensor) else type(sets).__name__
            raise ValueError(f"Candidates: sets is {got}, expected a bool tensor of shape (at least 1, n_blocks)")
        self.sets, self.copies = sets, sets.shape[0]

    def masks(self, x, n_blocks, training):
        return self.sets.repeat_interleave(x.shape[0], 0), None
