"""Multiply-accumulates of one layer, from a copy of it without weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def without_hooks(copied: nn.Module) -> nn.Module:
    """Semantics: `copied`, a copy for a trial, of whose calls nobody is told."""
    for module in copied.modules():
        for name in _HOOKS:
            module.__dict__[name].clear()
    return copied


def weightless(layer: nn.Module) -> nn.Module:
    """Semantics: a copy of the layer on the meta device, without hooks."""
    tensors = [t for module in _with_nets(layer) for t in (*module.parameters(), *module.buffers())]
    memo = {id(t): nn.Parameter(torch.empty_like(t, device="meta"), t.requires_grad) for t in tensors}
    return without_hooks(copy.deepcopy(layer, memo))


def _with_nets(module: nn.Module) -> list[nn.Module]:
    """Semantics: the module and those that its parts hold without having registered them: Hyperformer's networks."""
    found = [module]
    for one in found:
        held = (value for part in one.modules() for value in part.__dict__.values() if isinstance(value, nn.Module))
        found += [value for value in held if not any(value is other for other in found)]
    return found


def layer_macs(layer: nn.Module, given: dict | tuple) -> int:
    """Semantics: those of layer(**given) or layer(*given), a layer without weights; of its first task, if it has
    several.
    """
    from fastpetl.count import count

    task = next((module.tasks[0] for module in layer.modules() if getattr(module, "tasks", None)), None)
    if hasattr(layer, "_fastpetl_task") and isinstance(given, dict):
        given = {**given, "task": task}
    return count(layer, given).macs
