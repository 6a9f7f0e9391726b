"""Parameters in autocast's dtype, kept while they stay the same.

torch.autocast casts a parameter again in every call; only where it wants a gradient is the copy kept, until the context
ends. In PETL nearly all want none.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ._cache import WeightCache
from ._common import needs_grad
from ._pack import made_by_cache, state

_KEPT = WeakIdKeyDictionary()  # tensor -> the WeightCache of its copies
_LAST: dict[int, tuple] = {}  # a tensor's id -> (the tensor, the dtype last asked for, what is kept of it): quicker


def cast(t, dtype):
    """Semantics: `t.to(dtype)` where autocast casts t, else t: not float64, not None. Of a parameter that wants no
    gradient, and of what a `WeightCache` made, the copy is kept as `WeightCache` keeps things, as long as t lives.
    """
    if t is None:
        return None
    last = None if torch.compiler.is_compiling() else _LAST.get(id(t))
    if last is not None and last[1] is dtype and last[0]() is t:
        was, sample, made, _ = last[2]
        if not (t.requires_grad and torch.is_grad_enabled()) and was == state((t,)) and sample.same():
            return made
    if not isinstance(t, torch.Tensor) or t.dtype is dtype or not t.is_floating_point() or t.dtype is torch.float64:
        return t
    if torch.compiler.is_compiling() or needs_grad(t) or not (type(t) is torch.nn.Parameter or made_by_cache(t)):
        return t.to(dtype)
    cache, at = _KEPT.get(t), id(t)
    if cache is None:
        cache = _KEPT[t] = WeightCache()
    _LAST.pop(at, None)  # it would keep an old copy beside the new one
    made = cache.get(dtype, (t,), lambda: t.detach().to(dtype))
    held = cache.held(dtype)
    if held is not None:
        _LAST[at] = weakref.ref(t, lambda _: _LAST.pop(at, None)), dtype, held
    return made


def forget(tensors) -> None:
    """Semantics: the copies of these are freed."""
    for t in tensors:
        _KEPT.pop(t, None)
        _LAST.pop(id(t), None)
