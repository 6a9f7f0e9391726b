"""Compaction: the rows (or samples) that are kept, gathered, and put back, with a count that is data."""

from __future__ import annotations

import torch

from .. import backends
from . import _rows
from ._common import check_input, check_like, needs_grad, through_dispatcher

__all__ = ["gather_rows", "scatter_rows"]


def gather_rows(x, index, count=None, *, backend="auto"):
    """Semantics: y[i] = x[index[i]] for i < count, 0 behind; all of them without a count.

    x [n, ...] of any floating dtype; index int64 [m], entries in [0, n), anything behind count; count: int64
    tensor of one element on x's device, data and not a shape: nothing waits for it and nothing recompiles. Returns [m,
    ...]. m = 0 gives no rows; to keep all rows needs no call. Gradients: of x, zero where a row was not kept; repeated
    entries add up, in fp32 and in their order with backend "triton" or "cuda", which are not differentiable twice.
    backend "reference": torch.
    """
    _check("gather_rows", x, index, count)
    name = _serves(x, backend)
    if name != "reference":
        return _launch("gather_rows", _rows.Gather, _rows.gather, (x, index, count, name))
    if count is None:
        return x.index_select(0, index)
    valid = torch.arange(index.shape[0], device=index.device) < count
    y = x.index_select(0, torch.where(valid, index, 0))
    return torch.where(valid.view(-1, *(1,) * (y.dim() - 1)), y, 0)


def scatter_rows(base, rows, index, count=None, *, backend="auto"):
    """Semantics: y = base, but y[index[i]] = rows[i] for i < count; all of them without a count.

    base [n, ...]; rows [m, ...] of base's dtype; index int64 [m], distinct entries in [0, n), anything behind count;
    count and backend as in `gather_rows`. Out of place. Gradients: of base, zero in replaced rows; of rows, zero behind
    count.
    """
    _check("scatter_rows", base, index, count, "base")
    want = (index.shape[0], *base.shape[1:])
    check_like("scatter_rows", "rows", rows, want, f"{want} to match index and base", base, "base")
    name = _serves(base, backend)
    if name != "reference":
        return _launch("scatter_rows", _rows.Scatter, _rows.scatter, (base, rows, index, count, name))
    if count is None:
        return base.index_copy(0, index, rows)
    n = base.shape[0]  # what lies behind count goes to a spare row
    index = torch.where(torch.arange(index.shape[0], device=index.device) < count, index, n)
    return torch.cat([base, base.new_zeros(1, *base.shape[1:])]).index_copy(0, index, rows)[:n]


def _serves(x, backend) -> str:
    if through_dispatcher(x):
        return backends.resolve_constant("rows", backend, x.device.type, x.dtype).name
    return backends.resolve("rows", backend, x).name


def _launch(op, function, launcher, arguments):
    if through_dispatcher(arguments[0]):
        return getattr(torch.ops.fastpetl, op)(*arguments)
    if needs_grad(*arguments[:-3]):
        return function.apply(*arguments)
    return launcher(*arguments)


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
