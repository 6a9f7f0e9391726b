"""Weights in a GEMM library's own layout, kept between inference calls while the weights stay the same."""

from __future__ import annotations

import torch

_SAMPLES = 64


class PackCache:
    """Semantics: `get(kind, weights, make)` is `make()`, computed again only when one of `weights` has changed.

    Owned by the module whose weights it packs; not part of a state_dict, empty again after copy, deepcopy and pickle. A
    weight counts as changed when its storage, shape, dtype or version counter does, or a sample of its values: writes
    through `.data` (EMA swaps) leave the version counter as it is. Holds one pack: another kind takes its place. Keeps
    its weights' storage alive, so a new tensor (LoRA merged anew) never takes an old one's address.
    """

    def __init__(self):
        self._held = None

    def get(self, kind, weights, make):
        try:
            key = (kind, *state(weights))
        except RuntimeError:  # tensors made in inference mode have no version counter: nothing says when they change
            return make()
        if self._held is None or self._held[0] != key or not self._held[1].same():
            self._held = None  # free the old one first
            self._held = (key, Sample(weights), make(), [w.detach() for w in weights])
        return self._held[2]

    def clear(self) -> None:
        """Semantics: free the pack."""
        self._held = None

    def __len__(self) -> int:
        return 0 if self._held is None else 1

    @property
    def nbytes(self) -> int:
        """Bytes the pack holds, as far as its tensor says."""
        return 0 if self._held is None else self._held[2].numel() * self._held[2].element_size()

    def __copy__(self):
        return PackCache()

    def __deepcopy__(self, memo):
        return PackCache()

    def __reduce__(self):
        return PackCache, ()


def state(tensors) -> list:
    """Semantics: what is another one where a tensor is another, or was written to; RuntimeError for one made in
    inference mode.
    """
    return [(t.data_ptr(), t._version, t.dtype, t.shape, t.stride(), t.device) for t in tensors]


class Sample:
    """Semantics: some 64 values spread over each tensor on the CPU, as they were; `same()`: as they are.

    For as long as the tensors' `state` stays: they are read where they lie, in one operation for all. What a
    `WeightCache` made is nobody's to write to, and not looked at.
    """

    __slots__ = ("_read", "_values")

    def __init__(self, tensors):
        self._read = [_spread(t) for t in tensors if t.device.type == "cpu" and t.numel() and not made_by_cache(t)]
        self._values = self._now()

    def _now(self):
        if not self._read:
            return None
        return torch.cat([t if dense else t.reshape(-1)[:: _step(t)].view(_BITS[t.element_size()])
                          for t, dense in self._read])  # fmt: skip

    def same(self) -> bool:
        return self._values is None or torch.equal(self._values, self._now())


def as_made(made):
    """Semantics: `made`, a tensor or some, known as what a cache made from others."""
    for t in (made,) if isinstance(made, torch.Tensor) else made:
        if isinstance(t, torch.Tensor):
            setattr(t, _MADE, True)
    return made


_MADE = "_fastpetl_made"


def made_by_cache(t) -> bool:
    """Semantics: is it known by `as_made`?"""
    return hasattr(t, _MADE)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # as numbers NaN would never be equal


def _step(t) -> int:
    return max(1, t.numel() // _SAMPLES) | 1  # odd, so that it does not walk down one column


def _spread(t) -> tuple:
    """(the values, True), or (the tensor, False) where they have to be copied out of it first."""
    t = t.detach()
    if not t.is_contiguous():
        return t, False
    return t.view(-1)[:: _step(t)].view(_BITS[t.element_size()]), True
