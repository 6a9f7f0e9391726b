"""The dropout mask that every backend draws alike: Philox-4x32-10 of an element's position under a key of 64 bits."""

from __future__ import annotations

import torch

from ._common import wide

_LOW = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)  # Philox-4x32's multipliers and Weyl steps (Salmon et al., SC 2011)
_STEP = (0x9E3779B9, 0xBB67AE85)


def _halves(a: int, b):
    """High and low 32 bits of a * b; in two products, because int64 holds no 64-bit unsigned one."""
    upper, lower = (b >> 16) * a, (b & 0xFFFF) * a
    upper = upper + (lower >> 16)
    return (upper >> 16) & _LOW, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def dropout_keep(seed, rows: int, d: int, p: float):
    """Semantics: keep[row, col] = philox(key, q)[e & 3] >= floor(p 2^32) with e = row*d + col and q = e >> 2.

    seed: int64 tensor of one element, whose low and high 32 bits are the key; the counter is (q low, q high, 0, 0).
    keep: bool [rows, d], on seed's device. The fused kernels draw the same bits.
    """
    quads = torch.arange(-(-rows * d // 4), device=seed.device)
    key = [seed.reshape(()) & _LOW, seed.reshape(()) >> 32 & _LOW]
    c = [quads & _LOW, quads >> 32, torch.zeros_like(quads), torch.zeros_like(quads)]
    for _ in range(_ROUNDS):
        (hi0, lo0), (hi1, lo1) = _halves(_MULTIPLY[0], c[0]), _halves(_MULTIPLY[1], c[2])
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [key[i] + _STEP[i] & _LOW for i in (0, 1)]
    return (torch.stack(c, -1).reshape(-1)[: rows * d] >= int(p * 2**32)).view(rows, d)


def dropout_factor(seed, rows: int, d: int, p: float, like):
    """Semantics: 1 / (1 - p) where `dropout_keep`, else 0, as [rows, d] in like's wide dtype; None where p is 0."""
    if p == 0:
        return None
    return dropout_keep(seed, rows, d, p).to(wide(like)) * (1 / (1 - p))


def dropped(t, factor):
    """Semantics: t * factor in t's dtype (an infinity or NaN that is dropped gives NaN, as torch's dropout does)."""
    return t if factor is None else (t.to(factor.dtype) * factor).to(t.dtype)
