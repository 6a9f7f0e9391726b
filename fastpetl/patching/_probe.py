"""Proof by numbers that a class known only by its children computes what its fused forward computes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastpetl.patching.registry import CopiedRule

TOLERANCE = 1e-4  # of the largest output, in fp32


def probe_reason(rule, module: nn.Module) -> str | None:
    """Semantics: None if on a copy of `module`, in fp32 and eval mode, the fused forward of a CopiedRule gives the
    original's output in each of the rule's calls; else what it did. A Rule needs no probe.

    The copy's weights are perturbed: what an initialisation leaves at zero counts as well.
    """
    if not isinstance(rule, CopiedRule):
        return None
    if any(p.is_meta for p in module.parameters()):
        return "its weights are on the meta device: nothing can be compared before they are loaded"
    fused = rule.replacement_class(module)
    original = fused.__bases__[1]
    try:
        trial = copy.deepcopy(module).float().eval().requires_grad_(False)
    except Exception as error:
        return f"it cannot be copied for the probe ({type(error).__name__}: {error})"
    trial.__dict__.pop("_fastpetl_fallback", None)
    device = next(trial.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), torch.autocast(device.type, enabled=False):
        torch.manual_seed(0)
        for parameter in trial.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for args, kwargs in rule.probe(trial):
            trial.__class__ = original
            try:
                want = original.forward(trial, *args, **kwargs)
            except Exception as error:
                return f"its forward does not take the original's call ({type(error).__name__}: {error})"
            trial.__class__ = fused
            try:
                got = fused.forward(trial, *args, **kwargs)
            except Exception as error:
                return f"it lacks what the fused forward reads ({type(error).__name__}: {error})"
            reason = trial.__dict__.get("_fastpetl_fallback") or _difference(want, got, rule.omits)
            if reason is not None:
                return reason
    return None


def _difference(want, got, omits) -> str | None:
    if isinstance(want, torch.Tensor) != isinstance(got, torch.Tensor) or isinstance(want, dict):
        return f"its forward gives a {type(want).__name__}, expected a {type(got).__name__}"
    want, got = _flat(want), _flat(got)
    if len(want) != len(got):
        return f"its forward gives {len(want)} values, expected {len(got)}"
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        if b is None and (a is None or i in omits):
            continue
        if a is None or a.shape != b.shape:
            return f"output {i} of its forward is {None if a is None else tuple(a.shape)}, expected {tuple(b.shape)}"
        error = ((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item()
        if not error <= TOLERANCE:
            return f"its forward is not the original's: output {i} differs by {error:.1e} of its largest value"
    return None


def _flat(out) -> list:
    """Tensors and None's, tuples within tuples (a layer's keys and values) one after the other."""
    if not isinstance(out, tuple | list):
        return [out]
    return [t for part in out for t in (_flat(part) if isinstance(part, tuple | list) else [part])]
