"""Launchers of the Triton kernels of gather_rows and scatter_rows: copies of rows whose number only the device knows.

The kernels are in rows_kernels.py. Floor: what is gathered read and written once; a scatter reads and writes its result
once, through the inverse of index. No atomics: repeated entries of a gather's index are summed in their order.
"""

from __future__ import annotations

import torch

from . import launching
from . import rows_kernels as K

# (columns, elements of a tile, warps); speeds have not been measured.
TILE = (1024, 4096, 4)
INVERT = 256  # entries of index per program


def gather(x, index, count):
    """Semantics: y[i] = x[index[i]] for i < count, 0 behind; all of them without a count.

    x [n, d]; index int64 [m], entries in [0, n) below count; count int64 of one element or None. All dense.
    """
    m = _check("gather", x, "x", index, count)
    y = x.new_empty(m, x.shape[1])
    if y.numel():
        _over_rows(K.gather, m, (x, index, count, y), (m, x.shape[0]))
    return y


def gather_backward(grad, index, count, n):
    """Semantics: dx[j] = sum of grad[i] over i < count with index[i] = j, dx [n, d]; sums in fp32, in i's order."""
    m = _check("gather_backward", grad, "grad", index, count, rows=True)
    if count is not None:
        index = torch.where(torch.arange(m, device=index.device) < count, index, n)  # behind count: behind all rows
    ordered, order = torch.sort(index, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(n + 1, device=index.device))
    dx = grad.new_empty(n, grad.shape[1])
    if dx.numel():
        columns, block, warps = _block(dx.shape[1])
        with launching.on_device(grad):
            grid = n, columns
            launching.launch(K.sum_rows, grid, grad, order, starts, dx, dx.shape[1], BD=block, num_warps=warps)
    return dx


def inverse(index, count, n):
    """Semantics: inverse[j] = the i < count with index[i] = j, or -1; int32 [n]. index int64 [m], distinct."""
    found = torch.full((n,), -1, dtype=torch.int32, device=index.device)
    m = index.shape[0]
    if m and n:
        with launching.on_device(index):
            launching.launch(K.invert, (launching.cdiv(m, INVERT),), index, count, found, m, n, BM=INVERT, num_warps=4)
    return found


def merge(base, rows, found):
    """Semantics: y[j] = base[j] where found[j] is -1, else rows[found[j]] (rows None: 0); found is `inverse`'s.

    base [n, d]; rows [m, d] of its dtype. All dense.
    """
    launching.check_matrix("merge", "base", base)
    n, d = base.shape
    launching.check_tensor("merge", "found", found, (n,), torch.int32, base.device, "base")
    if rows is not None:
        launching.check_tensor("merge", "rows", rows, (rows.shape[0], d), base.dtype, base.device, "base")
    y = base.new_empty(n, d)
    if y.numel():
        _over_rows(K.merge, n, (base, rows, found, y), (n,))
    return y


def _block(d: int) -> tuple[int, int, int]:
    """(programs along the columns, columns of each, warps)."""
    widest, _, warps = TILE
    block = max(16, min(widest, launching.power_of_two(d)))
    return launching.cdiv(d, block), block, warps


def _over_rows(kernel, rows, tensors, sizes):
    d = tensors[0].shape[1]
    columns, block, warps = _block(d)
    block_m = max(1, TILE[1] // block)
    with launching.on_device(tensors[0]):
        grid = launching.cdiv(rows, block_m), columns
        launching.launch(kernel, grid, *tensors, *sizes, d, BM=block_m, BD=block, num_warps=warps)


def _check(function, x, name, index, count, rows=False) -> int:
    launching.check_matrix(function, name, x)
    m = index.shape[0]
    launching.check_tensor(function, "index", index, x.shape[:1] if rows else (m,), torch.int64, x.device, name)
    if count is not None:
        launching.check_tensor(function, "count", count.reshape(-1), (1,), torch.int64, x.device, "one element")
    return m
