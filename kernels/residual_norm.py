"""Launchers of the Triton residual_norm kernels; same arguments and results as the C++ ops cpu_residual_norm_*.

    s = x + drop(f), n = norm(s); s = x in the rows of skipped samples

Floor: x and f read once, s and n written once; backward g_s, g_n and s read, dx and df written. The kernels are in
residual_norm_kernels.py. Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import functools

import torch

from . import launching
from . import residual_norm_kernels as K

SUM, NORM = 1, 2  # bits of emit
DX, DF, DWEIGHT, DBIAS = (1 << i for i in range(4))  # bits of needs
WIDEST = 1 << 17  # a row is one tile: what Triton takes; above 8192 registers spill: right, but slow

# (widest block, elements of a tile, warps), forward and backward: 16 elements a thread; the backward holds three times
# as many values of each, and its weight sums besides. Compiled for each architecture by tests/kernels/test_aot.py,
# which looks at spills; speeds have not been measured.
FORWARD = ((256, 1024, 2), (1024, 2048, 4), (4096, 4096, 8), (8192, 8192, 16), (WIDEST, 16384, 32))
BACKWARD = ((256, 1024, 2), (1024, 1024, 4), (2048, 2048, 8), (4096, 4096, 16), (WIDEST, 8192, 32))
PROGRAMS = 512  # at most so many partial sums of the weights' gradients; a constant, so that no device changes the bits
SUM_TILE = (32, 32)  # parts x columns of sum_parts


@functools.cache
def tile(table, d: int) -> tuple[int, int, int]:
    """Semantics: (rows, columns, warps) of a program for rows d wide."""
    block = max(16, launching.power_of_two(d))
    elements, warps = next((e, w) for widest, e, w in table if block <= widest)
    return max(1, elements // block), block, warps


def residual_norm_forward(x, f, weight, bias, mask, seed, tail, emit, eps, dropout, save, *, mixed: bool = False):
    """Semantics: (s, n, stats): s[i] = x[i] + drop(f[i]), n[i] = norm(s[i]); s[i] = x[i] in skipped samples.

    x, f [rows, d]; weight, bias [d]; mask bool [batch]; seed int64 [1]; f, weight, bias, mask and seed may be None.
    Dense, of one dtype, or `mixed`: s of the wider of x's and f's (of bf16 and fp16: fp32), n of the wider of s's and
    weight's. tail: 0 none, 1 LayerNorm, 2 RMSNorm; emit: bit 0 wants s, bit 1 n. Statistics in fp32 of the rounded s. s
    has no elements unless f is given and (emit & 1 or (save and tail)), n unless emit & 2, stats [rows, 2] unless save
    and tail.
    """
    name = "residual_norm_forward"
    rows, d = _check(name, x, (("f", f),), (("weight", weight), ("bias", bias)), mask, seed, dropout, mixed=mixed)
    s_dtype = launching.widest(x, f) if mixed else x.dtype
    n_dtype = launching.widest(weight, dtype=s_dtype) if mixed else x.dtype
    s = x.new_empty(x.shape if f is not None and (emit & SUM or save and tail) else 0, dtype=s_dtype)
    n = x.new_empty(x.shape if emit & NORM else 0, dtype=n_dtype)
    stats = x.new_empty((rows, 2) if save and tail else 0, dtype=torch.float32)
    if rows and any(t.numel() for t in (s, n, stats)):
        block_m, block, warps = tile(FORWARD, d)
        with launching.on_device(x):
            launching.launch(
                K.forward, (launching.cdiv(rows, block_m),), x, f, weight, bias,
                *_data(mask if f is not None else None, seed, dropout),
                *(t if t.numel() else None for t in (s, n, stats)),
                rows, *_scalars(rows, mask, dropout), float(eps),
                D=d, BM=block_m, BD=block, TAIL=tail, num_warps=warps,
            )  # fmt: skip
    return s, n, stats


def residual_norm_backward(g_s, g_n, s, stats, weight, mask, seed, tail, dropout, needs, *, mixed: tuple = ()):
    """Semantics: (dx, df, dweight, dbias); bit i of `needs` asks for the i-th, the others have no elements.

    g_s, g_n [rows, d], one of them may be None; s and stats as the forward gave them (s is x where f was None), read
    only with g_n. Sums in fp32 in a fixed order, no atomics: the same bits every time. mixed: the dtypes of dx, df,
    dweight and dbias, where those of the arguments differ; without, all are of one dtype.
    """
    name = "residual_norm_backward"
    like = g_n if g_s is None else g_s
    reads = (("g_s", g_s), ("g_n", g_n), ("s", s if g_n is not None else None))
    rows, d = _check(name, like, reads, (("weight", weight),), mask, seed, dropout, "g_s or g_n", mixed=bool(mixed))
    if g_n is not None:
        launching.check_tensor(name, "stats", stats, (rows, 2), torch.float32, like.device, "g_n")
    x_dtype, f_dtype, *dtypes = mixed or (like.dtype,) * 4
    dx = like.new_empty(like.shape if needs & DX else 0, dtype=x_dtype)
    df = like.new_empty(like.shape if needs & DF else 0, dtype=f_dtype)
    sums = needs & (DWEIGHT | DBIAS)
    fill = like.new_empty if rows and g_n is not None else like.new_zeros
    dweight = fill(d if needs & DWEIGHT else 0, dtype=dtypes[0])
    dbias = fill(d if needs & DBIAS else 0, dtype=dtypes[1])
    if not rows or not (needs & (DX | DF) or sums and g_n is not None):
        return dx, df, dweight, dbias
    block_m, block, warps = tile(BACKWARD, d)
    tiles = launching.cdiv(rows, block_m)
    part, programs = None, tiles
    if sums and g_n is not None:
        programs = min(tiles, PROGRAMS)
        part = like.new_empty(programs, 2, d, dtype=torch.float32)
    with launching.on_device(like):
        norm = (g_n, s, stats, weight) if g_n is not None else (None,) * 4
        launching.launch(
            K.backward, (programs,), g_s, *norm, *_data(mask, seed, dropout),
            dx if needs & DX else None, df if needs & DF else None, part,
            rows, *_scalars(rows, mask, dropout), tiles, programs,
            D=d, BM=block_m, BD=block, TAIL=tail, BIAS=bool(needs & DBIAS), num_warps=warps,
        )  # fmt: skip
        if part is not None:
            _sum_parts(part, dweight if needs & DWEIGHT else None, dbias if needs & DBIAS else None)
    return dx, df, dweight, dbias


def _sum_parts(part, dweight, dbias):
    programs, _, d = part.shape
    rows, columns = SUM_TILE
    grid = (launching.cdiv(d, columns), 1 if dbias is None else 2)
    launching.launch(K.sum_parts, grid, part, dweight, dbias, programs, D=d, BP=rows, BD=columns, num_warps=4)


def _data(mask, seed, dropout):
    """(mask as bytes, seed) as the kernels take them: None where there is nothing to skip or to drop."""
    return None if mask is None else mask.view(torch.uint8), seed if dropout else None


def _scalars(rows, mask, dropout):
    """(rows of a sample, the smallest Philox word that is kept as the bits of an int32, the factor of what is kept)."""
    sample = rows if mask is None else rows // max(mask.numel(), 1)
    threshold = int(dropout * 2**32)
    return sample, threshold - (threshold >> 31 << 32), 1 / (1 - dropout)


def _check(name, x, matrices, vectors, mask, seed, dropout, why="x", mixed=False):
    launching.check_matrix(name, why, x)
    rows, d = x.shape
    if not 1 <= d <= WIDEST:
        raise ValueError(f"{name}: {why} has {d} columns, expected 1 to {WIDEST}")
    for what, t in matrices:
        if t is not None and t is not x:
            launching.check_tensor(name, what, t, (rows, d), None if mixed else x.dtype, x.device, why)
    for what, t in vectors:
        if t is not None:
            launching.check_tensor(name, what, t, (d,), None if mixed else x.dtype, x.device, why)
    if mask is not None:
        launching.check_tensor(name, "mask", mask, mask.shape[:1], torch.bool, x.device, "a batch")
        if rows % max(mask.numel(), 1):
            raise ValueError(f"{name}: mask has {mask.numel()} samples, expected a divisor of the {rows} rows")
    if dropout:
        launching.check_tensor(name, "seed", seed.reshape(-1), (1,), torch.int64, x.device, "one element")
    return rows, d
