"""Parameters in autocast's dtype, kept while they stay the same.

torch.autocast casts a parameter again in every call; only where it wants a gradient is the copy kept, until the context
ends. In PETL nearly all want none.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ._cache import WeightCache
from ._common import needs_grad
from ._pack import made_by_cache

_KEPT = WeakIdKeyDictionary()  # tensor -> the WeightCache of its copies


def cast(t, dtype):
    """Semantics: `t.to(dtype)` where autocast casts t, else t: not float64, not None. Of a parameter that wants no
    gradient, and of what a `WeightCache` made, the copy is kept as `WeightCache` keeps things, as long as t lives.
    """
    if not isinstance(t, torch.Tensor) or t.dtype is dtype or not t.is_floating_point() or t.dtype is torch.float64:
        return t
    if torch.compiler.is_compiling() or needs_grad(t) or not (type(t) is torch.nn.Parameter or made_by_cache(t)):
        return t.to(dtype)
    cache = _KEPT.get(t)
    if cache is None:
        cache = _KEPT[t] = WeightCache()
    return cache.get(dtype, (t,), lambda: t.detach().to(dtype))


def forget(tensors) -> None:
    """Semantics: the copies of these are freed."""
    for t in tensors:
        _KEPT.pop(t, None)
