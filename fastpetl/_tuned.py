"""Which backend was fastest on a GPU, by size: data in tuned.json, measured there by benchmarks/tune.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

__all__ = ["PATH", "has", "lookup", "size_class"]
PATH = Path(__file__).with_name("tuned.json")


@functools.cache
def table() -> dict:
    """Semantics: {architecture: {op: {dtype: {width class: {rows class: backend}}}}}, as in tuned.json; op: "site" for
    its forward, "site_backward", ..."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def size_class(n: int) -> int:
    """Semantics: n rounded up to a power of two."""
    return 1 << max(n - 1, 0).bit_length()


def has(op: str, dtype: torch.dtype) -> bool:
    """Semantics: is there a measurement of `op` in that dtype on any architecture. Queries no device."""
    return any(_short(dtype) in ops.get(op, {}) for ops in table().values())


def _short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lookup(op: str, x: torch.Tensor, width: int) -> str | None:
    """Semantics: the backend measured fastest for `op` on the GPU of x [..., d], or None where nothing is known.

    width: the bottleneck, of ops without one the row's. Its class is the smallest measured that holds it: a kernel
    that fits a narrow bottleneck says nothing about a wider one. Rows: likewise, or the largest measured.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    return _lookup(op, _architecture(x.device.index or 0), x.dtype, width, rows)


@functools.cache
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.lru_cache(maxsize=1024)
def _lookup(op, architecture, dtype, width, rows) -> str | None:
    widths = table().get(architecture, {}).get(op, {}).get(_short(dtype), {})
    holds = sorted(int(w) for w in widths if int(w) >= width)
    if not holds:
        return None
    by_rows = widths[str(holds[0])]
    classes = sorted(map(int, by_rows))
    return by_rows[str(next((c for c in classes if c >= rows), classes[-1]))]
