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
            key = (kind, *((w.data_ptr(), w._version, w.dtype, w.shape, w.stride()) for w in weights))
        except RuntimeError:  # tensors made in inference mode have no version counter: nothing says when they change
            return make()
        sample = torch.cat([_sample(w) for w in weights])
        if self._held is None or self._held[0] != key or not torch.equal(self._held[1], sample):
            self._held = None  # free the old one first
            self._held = (key, sample, make(), [w.detach() for w in weights])
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


def _sample(w):
    """Some 64 values spread over w, as bits (NaN would never compare equal)."""
    step = max(1, w.numel() // _SAMPLES) | 1  # odd, so that it does not walk down one column
    bits = torch.int32 if w.element_size() == 4 else torch.int16
    return w.detach().reshape(-1)[::step].clone().view(bits).to(torch.int32)
