"""Which eager calls torch's own functions serve, as on a GPU all linears are: they are called at once there.

One look-up each: what asks this may take no longer than the call.
"""

from __future__ import annotations

import os

import torch

from . import backends

__all__ = ["by_torch", "eager", "norm_by_torch"]
_FOUND: dict[tuple, tuple] = {}
_FORCED = os.environ.encodekey("FASTPETL_BACKEND")
_TORCH = ("torch",)

# Elements from which one Triton kernel beats torch's two: it saves 2.4 us a million on an H200 (benchmarks/NOTES.md),
# but calling it takes 50 us longer, and below this Python is what a model of such layers waits for.
SMALL = 1 << 24


def eager(op: str, backend: str, x: torch.Tensor) -> tuple[str, ...]:
    """Semantics: the backends one of which serves an eager call of `op` on x (`backends.serving`); () in compiled code
    and for tensor subclasses.
    """
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return ()
    key = op, backend, x.device, x.dtype, os.environ._data.get(_FORCED)
    found = _FOUND.get(key)
    if found is None:
        found = _FOUND[key] = backends.serving(op, backends.for_op(op, backend), x.device.type, x.dtype)
    return found


def by_torch(op: str, backend: str, x: torch.Tensor) -> bool:
    """Semantics: is it torch's own function that serves an eager call of `op` on x, whatever its size?"""
    return eager(op, backend, x) == _TORCH


def norm_by_torch(backend: str, x: torch.Tensor) -> bool:
    """Semantics: are a sum and its norm over x, nothing dropped or skipped, torch's own calls in eager code?"""
    names = eager("residual_norm", backend, x)
    if names == _TORCH:  # whose statistics on the CPU are of x's dtype
        return not x.is_cpu or x.dtype in (torch.float32, torch.float64)
    return names[:1] == ("triton",) and len(names) > 1 and x.numel() < SMALL
