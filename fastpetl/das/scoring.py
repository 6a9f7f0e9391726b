"""Losses of several skip sets on one validation batch: in one pass where the batch is given, else one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from fastpetl import skip
from fastpetl.skip.policies import Candidates


class Scorer:
    """Semantics: loss(model(**inputs), targets) of every candidate in one pass over S copies of the batch; two
    candidates share the blocks up to the first on which they differ.

    The losses are those of the candidates one by one; what differs is the number of rows that pooler and head see
    (`fastpetl.skip` says where that matters to the bit: on a CPU in batches of less than four).

    batches(round) gives (inputs, targets) of the round's validation batch; inputs hold no labels. loss(outputs,
    targets) is a scalar; outputs are the model's, cut to one candidate's samples.
    """

    def __init__(self, batches: Callable[[int], tuple[Mapping, object]], loss: Callable):
        kinds = "(round) -> (inputs, targets)", "(outputs, targets) -> scalar"
        for name, value, kind in zip(("batches", "loss"), (batches, loss), kinds, strict=True):
            if not callable(value):
                raise TypeError(f"Scorer: {name} is {type(value).__name__}, expected a function {kind}")
        self.batches, self.loss = batches, loss

    def losses(self, model, sets: torch.Tensor, shortcut, round: int) -> torch.Tensor:
        inputs, targets = self.batches(round)
        with skip(model, Candidates(sets), shortcut=shortcut):
            outputs = model(**inputs)
        return torch.stack([_number(self.loss(_cut(outputs, len(sets), s), targets)) for s in range(len(sets))])


def sequential(evaluate: Callable[[int], object], model, sets: torch.Tensor, shortcut, round: int) -> torch.Tensor:
    """Semantics: evaluate(round), a loss, with each candidate set in turn."""
    found = []
    for row in sets:
        with skip(model, row, shortcut=shortcut):
            found.append(_number(evaluate(round)))
    return torch.stack(found)


@contextmanager
def scoring(model: nn.Module, train_mode: bool):
    """No gradients, eval mode (unless the original's train mode is asked for), and afterwards all as it was."""
    training = {module: module.training for module in model.modules()}
    with torch.no_grad():
        try:
            if not train_mode:
                model.eval()
            yield
        finally:
            for module, flag in training.items():
                module.training = flag


def _number(loss) -> torch.Tensor:
    try:
        loss = torch.as_tensor(loss).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"search: evaluate gave a {type(loss).__name__}, expected a loss, one number") from None
    if loss.numel() != 1:
        raise ValueError(f"search: evaluate gave a loss of shape {tuple(loss.shape)}, expected one number")
    return loss.reshape(())


def _cut(outputs, copies: int, copy: int):
    if isinstance(outputs, torch.Tensor):
        return outputs.chunk(copies)[copy] if outputs.dim() and outputs.shape[0] % copies == 0 else outputs
    if isinstance(outputs, Mapping):
        return type(outputs)({key: _cut(value, copies, copy) for key, value in outputs.items()})
    if isinstance(outputs, (tuple, list)):
        return type(outputs)([_cut(value, copies, copy) for value in outputs])
    return outputs
