"""The Triton kernels of the PHM weights. Their launchers are in phm.py.

H[c Q + q, a K + k] = sum_i rule[i, a, c] W[i, k, q], K = in', Q = out'. program_id(1) is the layer, program_id(0) a
tile of BK x BQ of its W, which the program takes for all a and c. `table` has FIELDS int64 a layer: addresses of rule
and W, n, K, Q, first element of its H, of its W's gradient, of its partial sums. Elements count in 64 bits.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)


@triton.jit
def layer(table_ptr, like_ptr, BK: tl.constexpr, BQ: tl.constexpr):
    """What a program needs of its layer: addresses, sizes, offsets, and the k and q of its tile."""
    table_ptr += tl.program_id(1) * FIELDS
    rule = tl.load(table_ptr).to(like_ptr.dtype)
    weight = tl.load(table_ptr + 1).to(like_ptr.dtype)
    n = tl.load(table_ptr + 2).to(tl.int32)
    K = tl.load(table_ptr + 3).to(tl.int32)
    Q = tl.load(table_ptr + 4).to(tl.int32)
    tiles_q = tl.cdiv(Q, BQ)
    tile = tl.program_id(0)
    k = (tile // tiles_q) * BK + tl.arange(0, BK)
    q = (tile % tiles_q) * BQ + tl.arange(0, BQ)
    return rule, weight, n, K, Q, k, q, K.to(tl.int64) * Q


@triton.jit
def forward(table_ptr, like_ptr, h_ptr, BK: tl.constexpr, BQ: tl.constexpr):
    rule, weight, n, K, Q, k, q, KQ = layer(table_ptr, like_ptr, BK, BQ)
    h_ptr += tl.load(table_ptr + tl.program_id(1) * FIELDS + 5)
    inside = (k < K)[None, :] & (q < Q)[:, None]
    offset = k.to(tl.int64)[None, :] * Q + q[:, None]
    if tl.program_id(0) < tl.cdiv(K, BK) * tl.cdiv(Q, BQ):
        for ac in range(0, n * n):
            a, c = ac // n, ac % n
            h = tl.zeros((BQ, BK), tl.float32)
            for i in range(0, n):
                w = tl.load(weight + (i * KQ + offset), mask=inside, other=0.0)
                h += tl.load(rule + (i * n * n + ac)).to(tl.float32) * w.to(tl.float32)
            at = (c * Q + q).to(tl.int64)[:, None] * (n * K) + (a * K + k)[None, :]
            tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward(table_ptr, like_ptr, g_ptr, part_ptr, dw_ptr, BK: tl.constexpr, BQ: tl.constexpr):
    """dW[i, k, q] = sum_ac rule[i, a, c] g[c, q, a, k], and this tile's part of
    drule[i, a, c] = sum_kq g[c, q, a, k] W[i, k, q]."""
    rule, weight, n, K, Q, k, q, KQ = layer(table_ptr, like_ptr, BK, BQ)
    table_ptr += tl.program_id(1) * FIELDS
    g_ptr += tl.load(table_ptr + 5)
    inside = (k < K)[None, :] & (q < Q)[:, None]
    offset = k.to(tl.int64)[None, :] * Q + q[:, None]
    if tl.program_id(0) < tl.cdiv(K, BK) * tl.cdiv(Q, BQ):
        for i in range(0, n):
            at_w = i * KQ + offset
            dw = tl.zeros((BQ, BK), tl.float32)
            if part_ptr is not None:
                w = tl.load(weight + at_w, mask=inside, other=0.0).to(tl.float32)
            for ac in range(0, n * n):
                a, c = ac // n, ac % n
                at = (c * Q + q).to(tl.int64)[:, None] * (n * K) + (a * K + k)[None, :]
                g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
                if dw_ptr is not None:
                    dw += tl.load(rule + (i * n * n + ac)).to(tl.float32) * g
                if part_ptr is not None:
                    mine = tl.load(table_ptr + 7) + tl.program_id(0) * n * n * n
                    tl.store(part_ptr + mine + (i * n * n + ac), tl.sum(tl.sum(g * w, 1), 0))
            if dw_ptr is not None:
                start = dw_ptr + tl.load(table_ptr + 6)
                tl.store(start + at_w, dw.to(dw_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_parts(table_ptr, part_ptr, drule_ptr, BT: tl.constexpr, BC: tl.constexpr):
    """The tiles' parts of one rule's gradient added up in their order; program_id(1): the rule. Its table has 4 int64:
    first part, tiles, elements of the rule, first element of its gradient."""
    table_ptr += tl.program_id(1) * 4
    part_ptr += tl.load(table_ptr)
    tiles = tl.load(table_ptr + 1).to(tl.int32)
    columns = tl.load(table_ptr + 2).to(tl.int32)
    drule_ptr += tl.load(table_ptr + 3)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    t = tl.arange(0, BT)
    total = tl.zeros((BT, BC), tl.float32)
    for t0 in range(0, tiles, BT):
        at = (t0 + t)[:, None] * columns + c[None, :]
        total += tl.load(part_ptr + at, mask=(t0 + t < tiles)[:, None] & (c < columns)[None, :], other=0.0)
    tl.store(drule_ptr + c, tl.sum(total, 0).to(drule_ptr.dtype.element_ty), mask=c < columns)
