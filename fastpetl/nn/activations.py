"""Which activation somebody's module has: torch's and transformers' by what they are, a project's own by numbers."""

from __future__ import annotations

import dis
import types
import weakref

import torch
from torch import nn
from torch.nn import functional as F

from fastpetl.nn.adapter import ACTIVATIONS
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


# --- adapters' activations: modules of anybody's class ----------------------------------------------------------------

# activation -> (its state, its name, what keeps the ids in it its own). Never read while Dynamo traces: it would guard
# on all models there are, each new one would recompile those before it, and one that dies meanwhile would break it.
_names: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_alike: dict[tuple, str | None] = {}  # what an activation is made of -> its name
_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (str, int, float, types.NoneType, types.FunctionType, types.BuiltinFunctionType)


def activation_name(activation: nn.Module) -> str | None:
    """Semantics: which of ACTIVATIONS it is, told by its values (its class is anybody's), or None. Under torch.compile,
    where there are no values: what one made alike was found to be, and None if there was none.
    """
    if torch.compiler.is_compiling():
        return _found_alike(_parts(activation))
    held = [v for m in activation.modules() for k, v in (*m.__dict__.items(), *m._modules.items()) if k[0] != "_"]
    state = [v if isinstance(v, str | int | float | None) else id(v) for v in held]
    found = _names.get(activation)
    if found is None or found[0] != state:
        found = _names[activation] = (state, _name_by_values(activation), held)
        key = _key(_parts(activation))
        if key is not _Unlike:
            _alike[key] = found[1]
    return found[1]


def _name_by_values(activation) -> str | None:
    with torch.no_grad():
        x = torch.linspace(-6, 6, 97)
        y = activation(x)
        names = [n for n, f in ACTIVATIONS.items() if y.shape == x.shape and (f(x) - y).abs().max() <= 2e-6]
    return names[0] if names else None


class _Unlike:
    """In place of what may differ from its like: a tensor, an object, a function with a closure."""


def _parts(activation) -> tuple:
    """Its modules' classes and attributes, as far as Dynamo hands them to a function as constants. The guards are then
    on these, which other instances share, and on no instance.
    """
    found = []
    for name, module in activation.named_modules():
        own = [(k, _part(v)) for k, v in module.__dict__.items() if k not in _OF_MODULES]
        trained = _Unlike if module._parameters or module._buffers else None
        found.append((name, type(module), trained, *own))
    return tuple(found)


def _part(value):
    if isinstance(value, dict):
        return dict, *[(k, _part(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), *[_part(v) for v in value]
    return value if isinstance(value, _PLAIN) else _Unlike


def _found_alike(parts: tuple) -> str | None:
    return _alike.get(_key(parts))


_found_alike._dynamo_marked_constant = True


def _key(part):
    """Semantics: equal for parts that compute the same; `_Unlike` where that is not known. Keeps no function alive."""
    if isinstance(part, tuple):
        keys = tuple(_key(value) for value in part)
        return _Unlike if any(key is _Unlike for key in keys) else keys
    if isinstance(part, types.FunctionType):
        if part.__closure__ is not None or part.__kwdefaults__ is not None:
            return _Unlike
        return _key((types.FunctionType, part.__module__, part.__code__, part.__defaults__))
    return part if isinstance(part, (*_PLAIN, type, types.CodeType)) else _Unlike
