"""What the rules for research code that people copy share: is it copied, what it has, which tasks it knows."""

from __future__ import annotations

import inspect

import torch
from torch import nn


def is_copied(module: nn.Module) -> bool:
    """Semantics: is its class of somebody's own? Ours, torch's and transformers' have rules of their own or none."""
    return type(module).__module__.partition(".")[0] not in ("fastpetl", "torch", "transformers")


def has(module: nn.Module, name: str) -> bool:
    """Semantics: has it the child or attribute, be it None?"""
    return name in module.__dict__ or name in module._modules


def tasks(module: nn.Module) -> list:
    """Semantics: the tasks of the first AdapterController in it; [None] where there is none."""
    controllers = (m for m in module.modules() if isinstance(m._modules.get("adapters"), nn.ModuleDict))
    return next((list(m.adapters) for m in controllers), [None])


def told(module: nn.Module) -> dict:
    """Semantics: the argument `task` of a call, where its forward takes one: the first it knows."""
    return {"task": tasks(module)[0]} if "task" in inspect.signature(module.forward).parameters else {}


def mask(batch: int, queries: int, keys: int, device) -> torch.Tensor:
    """Semantics: an additive mask [batch, 1, queries, keys] that hides the first sample's last two keys."""
    made = torch.zeros(batch, 1, queries, keys, device=device)
    made[0, ..., keys - 2 :] = torch.finfo(torch.float32).min
    return made
