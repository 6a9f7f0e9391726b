"""Compaction: the rows (or samples) that are kept, gathered, and put back. Copies of torch's, with a count as data."""

from __future__ import annotations

import torch

from ._common import check_input, check_like

__all__ = ["gather_rows", "scatter_rows"]


def gather_rows(x, index, count=None):
    """Semantics: y[i] = x[index[i]] for i < count, 0 behind; all of them without a count.

    x [n, ...] of any floating dtype; index int64 [m], each entry in [0, n), also those behind count; count: int64
    tensor of one element on x's device, data and not a shape: nothing waits for it and nothing recompiles. Returns [m,
    ...]. m = 0 gives no rows; to keep all rows needs no call. Gradients: of x, zero where a row was not kept; repeated
    entries add up.
    """
    _check("gather_rows", x, index, count)
    y = x.index_select(0, index)
    return y if count is None else torch.where(_valid(index, count, y), y, 0)


def scatter_rows(base, rows, index, count=None):
    """Semantics: y = base, but y[index[i]] = rows[i] for i < count; all of them without a count.

    base [n, ...]; rows [m, ...] of base's dtype; index int64 [m] of distinct entries in [0, n); count as in
    `gather_rows`. Out of place. Gradients: of base, zero in replaced rows; of rows, zero behind count.
    """
    _check("scatter_rows", base, index, count, "base")
    want = (index.shape[0], *base.shape[1:])
    check_like("scatter_rows", "rows", rows, want, f"{want} to match index and base", base, "base")
    if count is not None:
        rows = torch.where(_valid(index, count, rows), rows, base.index_select(0, index))
    return base.index_copy(0, index, rows)


def _valid(index, count, like):
    keep = torch.arange(index.shape[0], device=index.device) < count
    return keep.view(-1, *(1,) * (like.dim() - 1))


def _check(function, x, index, count, name="x") -> None:
    check_input(function, name, x)
    for what, t in (("index", index), ("count", count)):
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{function}: {what} is a {type(t).__name__}, expected an int64 tensor")
        if t.dtype != torch.int64 or t.device != x.device:
            got = f"{str(t.dtype).removeprefix('torch.')} on {t.device}"
            raise ValueError(f"{function}: {what} is {got}, expected int64 on {x.device} to match {name}")
    if index.dim() != 1:
        raise ValueError(f"{function}: index has shape {tuple(index.shape)}, expected one dimension")
    if count is not None and count.numel() != 1:
        raise ValueError(f"{function}: count has shape {tuple(count.shape)}, expected one element")
