"""Tensors derived from parameters (PHM weights, generated weights), kept while the parameters stay the same."""

from __future__ import annotations

import contextlib

import torch

from .._autocast import autocast_dtype
from ._common import needs_grad
from ._pack import Sample, as_made, state

__all__ = ["WeightCache"]


class WeightCache:
    """Semantics: `get(key, sources, make)` is `make()`, computed again only when one of `sources` has changed.

    For weights that are a function of parameters: `cache.get("vqa", parameters, lambda: hyper_weights(...))`. One entry
    per key (a task's name, say). Nothing is kept, and `make` runs as it is, where autograd would record it (grad mode
    is on and a source requires grad), in compiled code, and for tensors made in inference mode. A source counts as
    changed when its storage, shape, strides, dtype, device or version counter does: an optimizer step, load_state_dict,
    `.to()`, `p.data = t`, any in-place operation. Writes that bypass the version counter (`p.data.mul_()`) are noticed
    on the CPU by a sample of the values; on other devices, where looking would wait for the device, and after writes of
    single elements, call `clear()`. The entry keeps its sources' storage alive, so a new tensor never takes an old
    one's address. Not part of a state_dict, empty again after copy, deepcopy and pickle.
    """

    def __init__(self):
        self._held = {}

    def get(self, key, sources, make):
        sources = [t for t in sources if t is not None]
        if not sources or torch.compiler.is_compiling() or needs_grad(*sources):
            return make()
        try:
            now = state(sources)
        except RuntimeError:  # tensors made in inference mode have no version counter: nothing says when they change
            return make()
        held = self._held.get(key)
        if held is None or held[0] != now or not held[1].same():
            self._held.pop(key, None)  # free the old one first
            # Normal tensors of their own dtype, whatever mode this call is in: they may meet another in a later one.
            first = sources[0]
            cast = autocast_dtype(first) is not None
            apart = torch.autocast(first.device.type, enabled=False) if cast else contextlib.nullcontext()
            with torch.inference_mode(False), torch.no_grad(), apart:
                held = (now, Sample(sources), as_made(make()), [t.detach() for t in sources])
            self._held[key] = held
        return held[2]

    def held(self, key):
        """Semantics: what is kept under `key`, or None: (the sources' state, their sample, what was made, ...)."""
        return self._held.get(key)

    def clear(self) -> None:
        """Semantics: forget everything."""
        self._held.clear()

    def __len__(self) -> int:
        return len(self._held)

    def __copy__(self):
        return WeightCache()

    def __deepcopy__(self, memo):
        return WeightCache()

    def __reduce__(self):
        return WeightCache, ()
