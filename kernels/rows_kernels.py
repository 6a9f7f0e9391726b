"""The Triton kernels of gather_rows and scatter_rows. Their launchers are in rows.py.

Rows are D wide, which is data too: a whole sample is one row, and its length changes. program_id(0): BM rows,
program_id(1): BD columns. `count` is one int64 in memory, or absent: all. No index, however wrong, leaves the tensors.
"""

import triton
import triton.language as tl


@triton.jit
def at(ptr, row, cols, D):
    return ptr + row.to(tl.int64)[:, None] * D + cols[None, :]


@triton.jit
def tile(rows, BM: tl.constexpr, BD: tl.constexpr):
    """(first row in 64 bits, rows of the tile, which exist, columns)."""
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    return row0, rm, rm < (rows - row0), tl.program_id(1) * BD + tl.arange(0, BD)


@triton.jit
def how_many(count_ptr, rows):
    if count_ptr is not None:
        n = tl.load(count_ptr)
    else:
        n = tl.full((), 1, tl.int64) * rows
    return n


@triton.jit(do_not_specialize=["M", "N"])
def gather(x_ptr, index_ptr, count_ptr, y_ptr, M, N, D, BM: tl.constexpr, BD: tl.constexpr):
    """y[i] = x[index[i]] for i < count, 0 behind."""
    row0, rm, mm, cols = tile(M, BM, BD)
    row, inside = row0 + rm, (cols < D)[None, :]
    valid = mm & (row < how_many(count_ptr, M))
    index = tl.load(index_ptr + row, mask=valid, other=0)
    valid = valid & (index >= 0) & (index < N)
    y = tl.load(at(x_ptr, index, cols, D), mask=valid[:, None] & inside, other=0.0)
    tl.store(at(y_ptr, row, cols, D), y, mask=mm[:, None] & inside)


@triton.jit(do_not_specialize=["M", "N"])
def invert(index_ptr, count_ptr, inverse_ptr, M, N, BM: tl.constexpr):
    """inverse[index[i]] = i for i < count; the rest keeps what it had. index must be distinct."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = (i < M) & (i < how_many(count_ptr, M))
    index = tl.load(index_ptr + i, mask=valid, other=0)
    tl.store(inverse_ptr + index, i.to(tl.int32), mask=valid & (index >= 0) & (index < N))


@triton.jit(do_not_specialize=["N"])
def merge(base_ptr, rows_ptr, inverse_ptr, y_ptr, N, D, BM: tl.constexpr, BD: tl.constexpr):
    """y[j] = base[j] where inverse[j] < 0, else rows[inverse[j]] (0 without rows)."""
    row0, rm, mm, cols = tile(N, BM, BD)
    row, inside = row0 + rm, (cols < D)[None, :]
    inverse = tl.load(inverse_ptr + row, mask=mm, other=-1)
    own = inverse < 0
    y = tl.load(at(base_ptr, row, cols, D), mask=(mm & own)[:, None] & inside, other=0.0)
    if rows_ptr is not None:
        theirs = tl.load(at(rows_ptr, inverse, cols, D), mask=(mm & (own == 0))[:, None] & inside, other=0.0)
        y = tl.where(own[:, None], y, theirs)
    tl.store(at(y_ptr, row, cols, D), y, mask=mm[:, None] & inside)


@triton.jit
def sum_rows(g_ptr, order_ptr, starts_ptr, dx_ptr, D, BD: tl.constexpr):
    """dx[j] = sum of g[order[t]] for starts[j] <= t < starts[j + 1], in that order."""
    j = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    begin = tl.load(starts_ptr + j).to(tl.int32)
    end = tl.load(starts_ptr + j + 1).to(tl.int32)
    total = tl.zeros((BD,), tl.float32)
    for t in range(begin, end):
        row = tl.load(order_ptr + t)
        total += tl.load(g_ptr + row * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(dx_ptr + j * D + cols, total.to(dx_ptr.dtype.element_ty), mask=cols < D)
