"""Multiply-accumulates of one layer, from a copy of it without weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


def weightless(layer: nn.Module) -> nn.Module:
    """Semantics: a copy of the layer on the meta device."""
    tensors = [*layer.parameters(), *layer.buffers()]
    memo = {id(t): nn.Parameter(torch.empty_like(t, device="meta"), t.requires_grad) for t in tensors}
    return copy.deepcopy(layer, memo)


def layer_macs(layer: nn.Module, given: dict | tuple) -> int:
    """Semantics: those of layer(**given) or layer(*given), a layer without weights; of its first task, if it has
    several.
    """
    from fastpetl.count import count

    task = next((module.tasks[0] for module in layer.modules() if getattr(module, "tasks", None)), None)
    if hasattr(layer, "_fastpetl_task") and isinstance(given, dict):
        given = {**given, "task": task}
    return count(layer, given).macs
