"""Which children a fused module may read past their `forward`, checked when patching and again, cheaply, at every call.

A fused block takes `child.weight` and never calls the child. That is right only while the child is exactly the class
the block was written for, with nobody listening: hooks, PEFT wrappers, quantised, parametrised or sharded weights all
live in the call.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from fastpetl._autocast import autocast_dtype

_PLAIN = (nn.Parameter, torch.Tensor)  # DTensor, quantised and other tensor subclasses are not read behind their backs
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Inlined:
    """One inlined child: the exact classes it may have, its own children (name -> Inlined), and those of them that
    are called.
    """

    __slots__ = ("called", "children", "classes")

    def __init__(self, classes: type | tuple[type, ...], children: Mapping[str, Inlined] | None = None, called=()):
        self.classes = classes if isinstance(classes, tuple) else (classes,)
        self.children = dict(children or {})
        self.called = frozenset(called)


def listened(module: nn.Module) -> bool:
    """Semantics: would calling it do more than its class's forward: hooks, or a forward of the instance's own?"""
    state = module.__dict__
    for hooks in HOOKS:
        if state[hooks]:
            return True
    return "forward" in state


def structure(**children: type | Inlined) -> dict[str, Inlined]:
    """Semantics: name -> Inlined for each child; a bare class is a child without children."""
    return {name: c if isinstance(c, Inlined) else Inlined(c) for name, c in children.items()}


def structure_reason(
    module: nn.Module, expected: Mapping[str, Inlined], dtype=None, device=None, prefix: str = ""
) -> str | None:
    """Semantics: None if `module`'s children are exactly `expected`, unhooked, with plain tensors (of dtype and
    device, if given); else the reason, naming the child.
    """
    children = module._modules
    for name, inlined in expected.items():
        child = children.get(name)
        kind = type(child)
        if kind not in inlined.classes:
            return f"{prefix}{name} is {_class_name(kind)}, expected {_class_name(inlined.classes[0])}"
        state = child.__dict__
        for hooks in HOOKS:
            if state[hooks]:
                return f"{prefix}{name} has {hooks.strip('_').replace('_', ' ')}, which a fused block would not call"
        if "forward" in state:
            return f"{prefix}{name}.forward was replaced on the instance (accelerate's offloading does this)"
        for key, value in state["_parameters"].items():
            reason = tensor_reason(value, dtype, device)
            if reason is not None:
                return f"{prefix}{name}.{key} {reason}"
        if len(state["_modules"]) != len(inlined.children):
            extra = sorted(set(state["_modules"]) - set(inlined.children) - inlined.called)
            if extra:
                return f"{prefix}{name} has a child {extra[0]!r}, which {_class_name(kind)} does not have"
        if inlined.children:
            reason = structure_reason(child, inlined.children, dtype, device, f"{prefix}{name}.")
            if reason is not None:
                return reason
    return None


def call_reason(
    module: nn.Module, expected: Mapping[str, Inlined], x: torch.Tensor, any_linear: bool = False
) -> str | None:
    """Semantics: why this call must take the original forward, or None. any_linear: torch reads the linears' tensors as
    their own forward would, be they what they may.
    """
    reason = around_reason(x)
    if reason is not None or not expected:
        return reason
    dtype, device = read_dtype(x), x.device
    if not torch.compiler.is_compiling() and as_expected(module, expected, dtype, device, any_linear):
        return None
    return structure_reason(module, expected, dtype, device)


def as_expected(module, expected, dtype, device, any_linear: bool = False) -> bool:
    """Semantics: whether `structure_reason` is None, in less time; any_linear: as in `call_reason`."""
    children = module._modules
    for name, inlined in expected.items():
        child = children.get(name)
        kind, inner = type(child), inlined.children
        if kind not in inlined.classes:
            return False
        state = child.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]:
            return False
        if state["_backward_pre_hooks"] or "forward" in state or len(state["_modules"]) != len(inner):
            return False
        if not (any_linear and kind is nn.Linear):
            for t in state["_parameters"].values():
                if t is None:
                    continue
                if type(t) not in _PLAIN or t.device != device or (dtype is not None and t.dtype is not dtype):
                    return False
        if inner and not as_expected(child, inner, dtype, device, any_linear):
            return False
    return True


def around_reason(x: torch.Tensor) -> str | None:
    """Semantics: why no call on x is to be fused at the moment, or None."""
    if not torch.compiler.is_compiling():
        if nn_module._has_any_global_hook():
            return "global module hooks are registered"
        if torch._C._is_tracing():
            return "torch.jit tracing"
        if torch._C._are_functorch_transforms_active():
            return "torch.func transform"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation"
    return None


def read_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Semantics: the dtype of what a call on x may read: x's; None, any, under autocast, which casts."""
    return x.dtype if autocast_dtype(x) is None else None


def weight_and_bias(module: nn.Module) -> tuple:
    """Semantics: (module.weight, module.bias), in a tenth of the time."""
    own = module._parameters
    return (own["weight"], own["bias"]) if own else (module.weight, module.bias)  # a DataParallel replica has none


def note_fallback(module: nn.Module, reason: str) -> None:
    """Remember why the last call was composed, for `fastpetl.report`. Not under torch.compile, where it would be a
    side effect.
    """
    if not torch.compiler.is_compiling() and module.__dict__.get("_fastpetl_fallback") != reason:
        module.__dict__["_fastpetl_fallback"] = reason


def tensor_reason(value, dtype=None, device=None) -> str | None:
    """Semantics: why a parameter, be it None, cannot be read (a replica's is a plain tensor), or None."""
    if value is None:
        return None
    if type(value) not in _PLAIN:
        return f"is a {_class_name(type(value))}, expected a plain tensor (not sharded, quantised or wrapped)"
    if dtype is not None and value.dtype is not dtype:
        return f"has dtype {value.dtype}, the input {dtype}"
    if device is not None and value.device != device:
        return f"is on {value.device}, the input on {device}"
    return None


def _class_name(cls: type) -> str:
    if cls is type(None):
        return "missing"
    module = cls.__module__
    return cls.__qualname__ if module == "builtins" else f"{module}.{cls.__qualname__}"
