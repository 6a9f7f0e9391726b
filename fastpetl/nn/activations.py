"""Which activation somebody's module has: torch's and transformers' by what they are, a project's own by numbers."""

from __future__ import annotations

import dis
import types
import weakref

import torch
from torch import nn
from torch.nn import functional as F

from fastpetl.nn.inline import HOOKS
from fastpetl.nn.parts import inlined

_found: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # function -> is it GELU
_TOLERANCE = 1e-12  # of the larger of 1 and |x|, in float64; GELU by tanh is 5e-4 away


def recognised(activation) -> str | None:
    """Semantics: the activation's name for `ops.activated_linear`; None: it is to be called, as a module is whose calls
    somebody listens to.
    """
    if isinstance(activation, nn.Module):
        state = activation.__dict__
        if "forward" in state or any(state[hooks] for hooks in HOOKS):
            return None
    return inlined(activation) or ("gelu" if own_gelu(activation) else None)


def own_gelu(activation) -> bool:
    """Semantics: is it a plain function that is x * Phi(x), to the rounding of float64, and does nothing else? Research
    code has one: transformers had, before torch did. Asked once per function.
    """
    if type(activation) is not types.FunctionType:
        return False
    found = _found.get(activation)
    if found is None:
        found = _found[activation] = _closed(activation) and _is_gelu(activation)
    return found


def _closed(function) -> bool:
    """Whether it reads modules, numbers and library functions alone: neither what it does nor who is told may change
    from call to call.
    """
    if function.__closure__ is not None:
        return False
    for step in dis.get_instructions(function):
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME", "MAKE_FUNCTION"):
            return False
        if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
            continue
        value = function.__globals__.get(step.argval)  # None for Python's own: print, say
        library = isinstance(value, types.BuiltinFunctionType) and value.__module__ != "builtins"
        if not library and not isinstance(value, types.ModuleType | int | float):
            return False
    return True


def _is_gelu(function) -> bool:
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        near = torch.linspace(-9, 9, 1021, dtype=torch.float64, device="cpu")
        x = torch.cat([near, near * 11, near * 1e-6, near.sign() * near.abs().exp() * 100]).view(1, 4, -1)
        want = F.gelu(x)
        try:
            got = function(x.clone())
        except Exception:
            return False
    if not isinstance(got, torch.Tensor) or got.dtype != x.dtype or got.shape != x.shape:
        return False
    return bool(((got - want).abs() <= _TOLERANCE * x.abs().clamp_min(1)).all())
