"""The adapter site's Triton kernels: the adapter, its residuals and the norm behind them. Their launchers: site.py.

Both are the adapter's kernels (adapter_kernels.py) with the norm around them. Rows too wide for registers are written
and read again by the program that wrote them, while they are in L2: a barrier lies between, for it is other threads
that read them.
TAIL: 1 LayerNorm, 2 RMSNorm. Row counts are not specialised on; optional tensors are None.
"""

import triton
import triton.language as tl

from .adapter_kernels import backward_rest, bottleneck, up_chunk
from .adapter_tiles import (
    add_bottleneck_grad,
    load_rows,
    load_statistics,
    load_vector,
    merge_statistics,
    store_rows,
    store_statistics,
    to_product,
)


@triton.jit
def store_normed(n_ptr, s_ptr, gamma_ptr, beta_ptr, mean, rstd, rm, mm, D: tl.constexpr, BN: tl.constexpr,
                 TAIL: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """n = norm(s) for BM rows of s, read from memory; n and s may be one."""
    EVEN: tl.constexpr = D % BN == 0
    for d0 in tl.range(0, D, BN, num_stages=NS):
        rd = d0 + tl.arange(0, BN)
        n = load_rows(s_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
        if TAIL == 1:
            n -= mean[:, None]
        n = n * rstd[:, None] * load_vector(gamma_ptr, rd, D, EVEN)[None, :]
        if beta_ptr is not None:
            n += load_vector(beta_ptr, rd, D, EVEN)[None, :]
        store_rows(n_ptr, rm, rd, mm, n, D, D, EVEN)


@triton.jit(do_not_specialize=["M"])
def site_forward(x_ptr, wd_ptr, bd_ptr, ws_ptr, gamma_ptr, beta_ptr, wu_ptr, bu_ptr, res1_ptr, res2_ptr,
                 tail_gamma_ptr, tail_beta_ptr, s_ptr, n_ptr, z_ptr, st_ptr, tail_st_ptr, M, eps, scale, tail_eps,
                 D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr,
                 BK: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, ADD_X: tl.constexpr,
                 TAIL: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """forward_fused for BM rows of s, whose statistics are gathered on the way (of s as rounded), then n = norm(s).

    s_ptr may be n_ptr, where nobody wants s: it is normalised in place.
    """
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    mm = rm < (M - row0)
    x_ptr += row0 * D
    h1, h2 = bottleneck(x_ptr, wd_ptr, bd_ptr, ws_ptr, gamma_ptr, beta_ptr, z_ptr, st_ptr, row0, rm, mm, eps,
                        D, R, R1, R2, BM, BK, ACT, NORM, NS)  # fmt: skip
    s_ptr += row0 * D
    if res1_ptr is not None:
        res1_ptr += row0 * D
    if res2_ptr is not None:
        res2_ptr += row0 * D
    mean = tl.zeros((BM,), tl.float32)
    m2 = tl.zeros((BM,), tl.float32)
    EVEN: tl.constexpr = D % BN == 0
    for d0 in tl.range(0, D, BN, num_stages=NS):
        rd = d0 + tl.arange(0, BN)
        s = up_chunk(s_ptr, x_ptr, res1_ptr, res2_ptr, wu_ptr, bu_ptr, h1, h2, rm, rd, mm, scale,
                     D, R, R1, R2, EVEN, ADD_X).to(tl.float32)  # fmt: skip
        if TAIL == 1:
            mean, m2 = merge_statistics(s, rd, d0, mean, m2, D, BN, EVEN)
        else:
            m2 += tl.sum(s * s, 1)  # columns beyond the last are zero
    rstd = tl.rsqrt(m2 / D + tail_eps)
    if tail_st_ptr is not None:
        store_statistics(tail_st_ptr, row0, rm, mm, mean, rstd)
    tl.debug_barrier()
    store_normed(n_ptr + row0 * D, s_ptr, tail_gamma_ptr, tail_beta_ptr, mean, rstd, rm, mm, D, BN, TAIL, NS)


@triton.jit
def tail_sums(gn_ptr, s_ptr, gamma_ptr, part_ptr, mean, rstd, rm, mm, D: tl.constexpr, BM: tl.constexpr,
              BK: tl.constexpr, TAIL: tl.constexpr, BIAS: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """The row means of e = gn*gamma (0 for RMSNorm) and of e*hat, hat = s normalised. These rows' sums for the tail's
    weight (and bias) go to part [2, D]."""
    EVEN: tl.constexpr = D % BK == 0
    s1 = tl.zeros((BM,), tl.float32)
    s2 = tl.zeros((BM,), tl.float32)
    for d0 in tl.range(0, D, BK, num_stages=NS):
        rd = d0 + tl.arange(0, BK)
        gn = load_rows(gn_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
        hat = (load_rows(s_ptr, rm, rd, mm, D, EVEN).to(tl.float32) - mean[:, None]) * rstd[:, None]
        if part_ptr is not None:
            tl.store(part_ptr + rd, tl.sum(gn * hat, 0), mask=rd < D)
            if BIAS:
                tl.store(part_ptr + D + rd, tl.sum(gn, 0), mask=rd < D)
        e = gn * load_vector(gamma_ptr, rd, D, EVEN)[None, :]
        if TAIL == 1:
            s1 += tl.sum(e, 1)
        s2 += tl.sum(e * hat, 1)
    return s1 / D, s2 / D


@triton.jit
def tail_grad(gs_ptr, gn_ptr, s_ptr, gamma_ptr, g_ptr, m1, m2, mean, rstd, rm, rd, mm, D: tl.constexpr,
              EVEN: tl.constexpr):  # fmt: skip
    """The columns rd of g, the gradient of s: stored, and returned as stored."""
    gn = load_rows(gn_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
    hat = (load_rows(s_ptr, rm, rd, mm, D, EVEN).to(tl.float32) - mean[:, None]) * rstd[:, None]
    g = (gn * load_vector(gamma_ptr, rd, D, EVEN)[None, :] - m1[:, None] - hat * m2[:, None]) * rstd[:, None]
    if gs_ptr is not None:
        g += load_rows(gs_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
    if not EVEN:
        g = tl.where((rd < D)[None, :], g, 0.0)  # it goes into a product, and fp16 could overflow there
    g = g.to(g_ptr.dtype.element_ty)
    store_rows(g_ptr, rm, rd, mm, g, D, D, EVEN)
    return g


@triton.jit(do_not_specialize=["M"])
def site_backward(gs_ptr, gn_ptr, s_ptr, tail_st_ptr, tail_gamma_ptr, tail_part_ptr,
                  g_ptr, x_ptr, z_ptr, st_ptr, wd_ptr, wu_ptr, gamma_ptr, dx_ptr, q_ptr, h_ptr, part_ptr, low_ptr,
                  hat_ptr, M, scale,
                  D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr,
                  BK: tl.constexpr, BN: tl.constexpr, HLD: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr,
                  QSCALE: tl.constexpr, ADD_X: tl.constexpr, TAIL: tl.constexpr, BIAS: tl.constexpr,
                  NS: tl.constexpr):  # fmt: skip
    """For BM rows: g through the tail norm, each chunk of it multiplied by w_up where it arises (low: as it is
    multiplied), then backward_rest."""
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    mm = rm < (M - row0)
    gn_ptr += row0 * D
    s_ptr += row0 * D
    g_ptr += row0 * D
    if gs_ptr is not None:
        gs_ptr += row0 * D
    if low_ptr is not None:
        low_ptr += row0 * D
    if tail_part_ptr is not None:
        tail_part_ptr += tl.program_id(0).to(tl.int64) * (2 * D)
    tail_mean, tail_rstd = load_statistics(tail_st_ptr, row0, rm, mm, True)
    m1, m2 = tail_sums(gn_ptr, s_ptr, tail_gamma_ptr, tail_part_ptr, tail_mean, tail_rstd, rm, mm,
                       D, BM, BK, TAIL, BIAS, NS)  # fmt: skip
    EVEN: tl.constexpr = D % BK == 0
    R2P: tl.constexpr = R2 if R2 > 0 else 16
    q1 = tl.arange(0, R1)
    q2 = R1 + tl.arange(0, R2P)
    a1 = tl.zeros((BM, R1), tl.float32)
    a2 = tl.zeros((BM, R2P), tl.float32)
    for d0 in tl.range(0, D, BK, num_stages=NS):
        rd = d0 + tl.arange(0, BK)
        g = tail_grad(gs_ptr, gn_ptr, s_ptr, tail_gamma_ptr, g_ptr, m1, m2, tail_mean, tail_rstd, rm, rd, mm, D, EVEN)
        g = to_product(g, low_ptr, wu_ptr, rm, rd, mm, D, EVEN)
        a1, a2 = add_bottleneck_grad(a1, a2, g, wu_ptr, rd, q1, q2, D, R, R1, R2, EVEN, R1 <= R)
    tl.debug_barrier()
    mean, rstd = load_statistics(st_ptr, row0, rm, mm, NORM)
    backward_rest(a1, a2, g_ptr, x_ptr, z_ptr, wd_ptr, gamma_ptr, dx_ptr, q_ptr, h_ptr, part_ptr, hat_ptr,
                  mean, rstd, row0, rm, mm, scale, D, R, R1, R2, BM, BN, HLD, ACT, NORM, QSCALE, ADD_X, NS)  # fmt: skip
