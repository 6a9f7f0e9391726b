"""The adapter's Triton kernels. Their launchers are in adapter.py, the tile arithmetic in adapter_tiles.py.

Row counts are neither constexprs nor specialised on: a new batch size compiles nothing. Optional tensors are None.
"""

import triton
import triton.language as tl

from .adapter_tiles import (
    activate,
    emit_bottleneck,
    grad_bottleneck,
    load_rows,
    load_statistics,
    load_vector,
    load_weight,
    project_down,
    store_dx,
    store_ones,
    store_output,
    store_rows,
    store_statistics,
)


@triton.jit
def fold_weights(wd_ptr, bd_ptr, gamma_ptr, beta_ptr, wc_ptr, ws_ptr, c_ptr,
                 D: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """wc = w_down*gamma, each row centred, rounded; ws = the row sums that rounding left; c = b_down + w_down beta."""
    rr = tl.program_id(0) * BR + tl.arange(0, BR)
    mr = rr < R
    EVEN: tl.constexpr = D % BD == 0
    total = tl.zeros((BR,), tl.float32)
    c = tl.zeros((BR,), tl.float32)
    for d0 in range(0, D, BD):
        rd = d0 + tl.arange(0, BD)
        w = load_rows(wd_ptr, rr, rd, mr, D, EVEN).to(tl.float32)
        total += tl.sum(w * load_vector(gamma_ptr, rd, D, EVEN)[None, :], 1)
        if beta_ptr is not None:
            c += tl.sum(w * load_vector(beta_ptr, rd, D, EVEN)[None, :], 1)
    if bd_ptr is not None:
        c += tl.load(bd_ptr + rr, mask=mr, other=0.0).to(tl.float32)
    tl.store(c_ptr + rr, c, mask=mr)
    left = tl.zeros((BR,), tl.float32)
    for d0 in range(0, D, BD):
        rd = d0 + tl.arange(0, BD)
        w = load_rows(wd_ptr, rr, rd, mr, D, EVEN).to(tl.float32) * load_vector(gamma_ptr, rd, D, EVEN)[None, :]
        wc = (w - (total / D)[:, None]).to(wc_ptr.dtype.element_ty)
        if not EVEN:
            wc = tl.where((rd < D)[None, :], wc, 0.0)
        store_rows(wc_ptr, rr, rd, mr, wc, D, D, EVEN)
        left += tl.sum(wc.to(tl.float32), 1)
    tl.store(ws_ptr + rr, left, mask=mr)


@triton.jit
def bottleneck(x_ptr, wd_ptr, bd_ptr, ws_ptr, gamma_ptr, beta_ptr, z_ptr, st_ptr, row0, rm, mm, eps,
               D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr,
               BK: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """act(z) of the whole bottleneck for BM rows, to keep in registers; z and the statistics to memory if asked for."""
    z1, z2, mean, rstd = project_down(
        x_ptr, wd_ptr, bd_ptr, ws_ptr, gamma_ptr, beta_ptr, rm, mm, 0, eps, D, R, R1, R2, R1 <= R, BM, BK, NORM, NS
    )
    q1 = tl.arange(0, R1)
    q2 = R1 + tl.arange(0, R2 if R2 > 0 else 16)
    if z_ptr is not None:
        z_ptr += row0 * R
        store_rows(z_ptr, rm, q1, mm, z1, R, R, R1 <= R)
        if R2 > 0:
            store_rows(z_ptr, rm, q2, mm, z2, R, R, R1 + R2 <= R)
    if st_ptr is not None:
        store_statistics(st_ptr, row0, rm, mm, mean, rstd)
    return activate(z1.to(tl.float32), ACT).to(z1.dtype), activate(z2.to(tl.float32), ACT).to(z2.dtype)


@triton.jit
def up_chunk(y_ptr, x_ptr, res1_ptr, res2_ptr, wu_ptr, bu_ptr, h1, h2, rm, rd, mm, scale,
             D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, EVEN: tl.constexpr,
             ADD_X: tl.constexpr):  # fmt: skip
    """The columns rd of y from a bottleneck in registers; returns them as stored."""
    q1 = tl.arange(0, R1)
    u = tl.dot(h1, load_weight(wu_ptr, q1, rd, R, D, 1, R, R1 <= R, EVEN), input_precision="ieee")
    if R2 > 0:
        q2 = R1 + tl.arange(0, R2)
        u = tl.dot(h2, load_weight(wu_ptr, q2, rd, R, D, 1, R, R1 + R2 <= R, EVEN), u, input_precision="ieee")
    return store_output(y_ptr, x_ptr, res1_ptr, res2_ptr, bu_ptr, u, rm, rd, mm, scale, D, EVEN, ADD_X)


@triton.jit(do_not_specialize=["M"])
def forward_fused(x_ptr, wd_ptr, bd_ptr, ws_ptr, gamma_ptr, beta_ptr, wu_ptr, bu_ptr, res1_ptr, res2_ptr,
                  y_ptr, z_ptr, st_ptr, M, eps, scale,
                  D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr,
                  BK: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, ADD_X: tl.constexpr,
                  NS: tl.constexpr):  # fmt: skip
    """Whole adapter for BM rows: down product, activation kept in registers, up product with bias and residuals."""
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    mm = rm < (M - row0)
    x_ptr += row0 * D
    h1, h2 = bottleneck(x_ptr, wd_ptr, bd_ptr, ws_ptr, gamma_ptr, beta_ptr, z_ptr, st_ptr, row0, rm, mm, eps,
                        D, R, R1, R2, BM, BK, ACT, NORM, NS)  # fmt: skip
    y_ptr += row0 * D
    if res1_ptr is not None:
        res1_ptr += row0 * D
    if res2_ptr is not None:
        res2_ptr += row0 * D
    EVEN: tl.constexpr = D % BN == 0
    for d0 in tl.range(0, D, BN, num_stages=NS):  # num_stages here: else loads that feed no dot are not pipelined
        rd = d0 + tl.arange(0, BN)
        up_chunk(y_ptr, x_ptr, res1_ptr, res2_ptr, wu_ptr, bu_ptr, h1, h2, rm, rd, mm, scale,
                 D, R, R1, R2, EVEN, ADD_X)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def forward_down(x_ptr, wd_ptr, bd_ptr, ws_ptr, gamma_ptr, beta_ptr, z_ptr, st_ptr, M, eps,
                 D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
                 NORM: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """z for BM rows and R1 columns of the bottleneck; the programs of the first columns also write the statistics."""
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    mm = rm < (M - row0)
    r0 = tl.program_id(1) * R1
    x_ptr += row0 * D
    z, _, mean, rstd = project_down(
        x_ptr, wd_ptr, bd_ptr, ws_ptr, gamma_ptr, beta_ptr, rm, mm, r0, eps, D, R, R1, 0, R % R1 == 0, BM, BK, NORM, NS
    )
    store_rows(z_ptr + row0 * R, rm, r0 + tl.arange(0, R1), mm, z, R, R, R % R1 == 0)
    if st_ptr is not None:
        if r0 == 0:
            store_statistics(st_ptr, row0, rm, mm, mean, rstd)


@triton.jit(do_not_specialize=["M"])
def forward_up(z_ptr, x_ptr, wu_ptr, bu_ptr, res1_ptr, res2_ptr, y_ptr, M, scale,
               D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               ACT: tl.constexpr, ADD_X: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """y for BM rows and BN columns from z."""
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    mm = rm < (M - row0)
    rd = tl.program_id(1) * BN + tl.arange(0, BN)
    EVEN: tl.constexpr = D % BN == 0
    NE: tl.constexpr = R % R1 == 0
    z_ptr += row0 * R
    u = tl.zeros((BM, BN), tl.float32)
    for r0 in tl.range(0, R, R1, num_stages=NS):
        r = r0 + tl.arange(0, R1)
        z = load_rows(z_ptr, rm, r, mm, R, NE)
        h = activate(z.to(tl.float32), ACT).to(z.dtype)
        u = tl.dot(h, load_weight(wu_ptr, r, rd, R, D, 1, R, NE, EVEN), u, input_precision="ieee")
    if res1_ptr is not None:
        res1_ptr += row0 * D
    if res2_ptr is not None:
        res2_ptr += row0 * D
    store_output(y_ptr + row0 * D, x_ptr + row0 * D, res1_ptr, res2_ptr, bu_ptr, u, rm, rd, mm, scale, D, EVEN, ADD_X)


@triton.jit
def product_w_down(p1, p2, wd_ptr, gamma_ptr, rd, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, D: tl.constexpr,
                   EVEN: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """The gradient of the normalised x (of x without a norm) for the columns rd, bottleneck in registers."""
    q1 = tl.arange(0, R1)
    gn = tl.dot(p1, load_weight(wd_ptr, q1, rd, R, D, D, 1, R1 <= R, EVEN), input_precision="ieee")
    if R2 > 0:
        q2 = R1 + tl.arange(0, R2)
        gn = tl.dot(p2, load_weight(wd_ptr, q2, rd, R, D, D, 1, R1 + R2 <= R, EVEN), gn, input_precision="ieee")
    if NORM:
        gn = gn * load_vector(gamma_ptr, rd, D, EVEN)[None, :]
    return gn


@triton.jit
def backward_rest(a1, a2, g_ptr, x_ptr, z_ptr, wd_ptr, gamma_ptr, dx_ptr, q_ptr, h_ptr, part_ptr, hat_ptr,
                  mean, rstd, row0, rm, mm, scale,
                  D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, HLD: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr,
                  QSCALE: tl.constexpr, ADD_X: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """From a = grad w_up of BM rows: dz (stays in registers), what the weight gradients need of it, and dx.

    A norm needs two row means of its input's gradient before the first column of dx is known; that gradient is
    multiplied out twice rather than kept (BM x D does not fit) or stored (it would be rounded). g_ptr is moved to
    the first row, the other pointers are not. hat, only with dx: what the product for dw_down reads in place of x.
    """
    z_ptr += row0 * R
    if q_ptr is not None:
        q_ptr += row0 * R
    if h_ptr is not None:
        h_ptr += row0 * HLD
    if part_ptr is not None:
        part_ptr += tl.program_id(0).to(tl.int64) * (2 * R if QSCALE else R)
    r1 = tl.arange(0, R1)
    p1 = emit_bottleneck(a1, z_ptr, q_ptr, h_ptr, part_ptr, rm, mm, r1, mean, rstd, scale, R, R1 <= R, HLD, ACT, QSCALE)
    p2 = p1
    if R2 > 0:
        r2 = R1 + tl.arange(0, R2)
        NE2: tl.constexpr = R1 + R2 <= R
        p2 = emit_bottleneck(a2, z_ptr, q_ptr, h_ptr, part_ptr, rm, mm, r2, mean, rstd, scale, R, NE2, HLD, ACT, QSCALE)
    if h_ptr is not None:
        store_ones(h_ptr, rm, mm, R, HLD)
    if dx_ptr is not None:
        EVEN: tl.constexpr = D % BN == 0
        x_ptr += row0 * D
        dx_ptr += row0 * D
        if hat_ptr is not None:
            hat_ptr += row0 * D
        s1 = tl.zeros((BM,), tl.float32)
        s2 = tl.zeros((BM,), tl.float32)
        if NORM:
            for d0 in tl.range(0, D, BN, num_stages=NS):
                rd = d0 + tl.arange(0, BN)
                gn = product_w_down(p1, p2, wd_ptr, gamma_ptr, rd, R, R1, R2, D, EVEN, NORM)
                x = load_rows(x_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
                s1 += tl.sum(gn, 1)
                s2 += tl.sum(gn * ((x - mean[:, None]) * rstd[:, None]), 1)
        for d0 in tl.range(0, D, BN, num_stages=NS):
            rd = d0 + tl.arange(0, BN)
            gn = product_w_down(p1, p2, wd_ptr, gamma_ptr, rd, R, R1, R2, D, EVEN, NORM)
            store_dx(dx_ptr, g_ptr, x_ptr, hat_ptr, gn, s1 / D, s2 / D, mean, rstd, rm, rd, mm,
                     D, EVEN, NORM, QSCALE, ADD_X)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def backward_fused(g_ptr, x_ptr, z_ptr, st_ptr, wd_ptr, wu_ptr, gamma_ptr, dx_ptr, q_ptr, h_ptr, part_ptr, low_ptr,
                   hat_ptr, M, scale,
                   D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr,
                   BK: tl.constexpr, BN: tl.constexpr, HLD: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr,
                   QSCALE: tl.constexpr, ADD_X: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """For BM rows all that backward_rest gives, from grad; low: grad as it is multiplied."""
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    mm = rm < (M - row0)
    g_ptr += row0 * D
    if low_ptr is not None:
        low_ptr += row0 * D
    mean, rstd = load_statistics(st_ptr, row0, rm, mm, NORM)
    a1, a2 = grad_bottleneck(g_ptr, low_ptr, wu_ptr, rm, mm, 0, D, R, R1, R2, R1 <= R, BM, BK, NS)
    backward_rest(a1, a2, g_ptr, x_ptr, z_ptr, wd_ptr, gamma_ptr, dx_ptr, q_ptr, h_ptr, part_ptr, hat_ptr,
                  mean, rstd, row0, rm, mm, scale, D, R, R1, R2, BM, BN, HLD, ACT, NORM, QSCALE, ADD_X, NS)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def backward_dz(g_ptr, z_ptr, st_ptr, wu_ptr, q_ptr, h_ptr, part_ptr, low_ptr, M, scale,
                D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
                HLD: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, QSCALE: tl.constexpr,
                NS: tl.constexpr):  # fmt: skip
    """backward_fused's first half for R1 columns of the bottleneck."""
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    mm = rm < (M - row0)
    r0 = tl.program_id(1) * R1
    r = r0 + tl.arange(0, R1)
    mean, rstd = load_statistics(st_ptr, row0, rm, mm, NORM)
    if low_ptr is not None:
        low_ptr += row0 * D
    a, _ = grad_bottleneck(g_ptr + row0 * D, low_ptr, wu_ptr, rm, mm, r0, D, R, R1, 0, R % R1 == 0, BM, BK, NS)
    if q_ptr is not None:
        q_ptr += row0 * R
    if h_ptr is not None:
        h_ptr += row0 * HLD
    if part_ptr is not None:
        part_ptr += tl.program_id(0).to(tl.int64) * (2 * R if QSCALE else R)
    emit_bottleneck(
        a, z_ptr + row0 * R, q_ptr, h_ptr, part_ptr, rm, mm, r, mean, rstd, scale,
        R, R % R1 == 0, HLD, ACT, QSCALE,
    )  # fmt: skip
    if h_ptr is not None:
        if r0 == 0:
            store_ones(h_ptr, rm, mm, R, HLD)


@triton.jit
def product_w_down_split(q_ptr, wd_ptr, gamma_ptr, rm, rd, mm, R: tl.constexpr, R1: tl.constexpr, D: tl.constexpr,
                         BM: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """product_w_down with the bottleneck read back from memory."""
    EVEN: tl.constexpr = D % BN == 0
    NE: tl.constexpr = R % R1 == 0
    gn = tl.zeros((BM, BN), tl.float32)
    for r0 in tl.range(0, R, R1, num_stages=NS):
        r = r0 + tl.arange(0, R1)
        q = load_rows(q_ptr, rm, r, mm, R, NE)
        gn = tl.dot(q, load_weight(wd_ptr, r, rd, R, D, D, 1, NE, EVEN), gn, input_precision="ieee")
    if NORM:
        gn = gn * load_vector(gamma_ptr, rd, D, EVEN)[None, :]
    return gn


@triton.jit(do_not_specialize=["M"])
def backward_dx(q_ptr, g_ptr, x_ptr, st_ptr, wd_ptr, gamma_ptr, dx_ptr, hat_ptr, M,
                D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                NORM: tl.constexpr, QSCALE: tl.constexpr, ADD_X: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """backward_fused's second half: dx for BM rows from q."""
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    mm = rm < (M - row0)
    q_ptr += row0 * R
    x_ptr += row0 * D
    g_ptr += row0 * D
    dx_ptr += row0 * D
    if hat_ptr is not None:
        hat_ptr += row0 * D
    mean, rstd = load_statistics(st_ptr, row0, rm, mm, NORM)
    EVEN: tl.constexpr = D % BN == 0
    s1 = tl.zeros((BM,), tl.float32)
    s2 = tl.zeros((BM,), tl.float32)
    if NORM:
        for d0 in range(0, D, BN):
            rd = d0 + tl.arange(0, BN)
            gn = product_w_down_split(q_ptr, wd_ptr, gamma_ptr, rm, rd, mm, R, R1, D, BM, BN, NORM, NS)
            x = load_rows(x_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
            s1 += tl.sum(gn, 1)
            s2 += tl.sum(gn * ((x - mean[:, None]) * rstd[:, None]), 1)
    for d0 in range(0, D, BN):
        rd = d0 + tl.arange(0, BN)
        gn = product_w_down_split(q_ptr, wd_ptr, gamma_ptr, rm, rd, mm, R, R1, D, BM, BN, NORM, NS)
        store_dx(dx_ptr, g_ptr, x_ptr, hat_ptr, gn, s1 / D, s2 / D, mean, rstd, rm, rd, mm,
                 D, EVEN, NORM, QSCALE, ADD_X)  # fmt: skip


@triton.jit
def weight_grads(gd_ptr, gu_ptr, sum_ptr, wd_ptr, gamma_ptr, beta_ptr,
                 dwd_ptr, dbd_ptr, dwu_ptr, dbu_ptr, dgamma_ptr, dbeta_ptr, scale,
                 D: tl.constexpr, R: tl.constexpr, HLD: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
                 QSCALE: tl.constexpr):  # fmt: skip
    """All parameter gradients for BD columns of d, from two matrix products and the column sums of dz; no row is read.

    gd [R, D] = q^T x (QSCALE) or q^T xhat (q^T x without a norm), gu [D, HLD] = grad^T [act(z) | 1], both fp32;
    sum [2, R] = column sums of dz and of q*mean. With t = gd - sum[1]:
    dw_down = t*gamma + sum[0] beta^T, dgamma = sum_r t*w_down, dbeta = w_down^T sum[0], dw_up = scale*gu.
    """
    rd = tl.program_id(0) * BD + tl.arange(0, BD)
    md = rd < D
    dgamma = tl.zeros((BD,), tl.float32)
    dbeta = tl.zeros((BD,), tl.float32)
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        mr = r < R
        if sum_ptr is not None:
            dc = tl.load(sum_ptr + r, mask=mr, other=0.0)
            if dbd_ptr is not None:
                if tl.program_id(0) == 0:
                    tl.store(dbd_ptr + r, dc.to(dbd_ptr.dtype.element_ty), mask=mr)
        if dgamma_ptr is not None or dbeta_ptr is not None:
            w = load_rows(wd_ptr, r, rd, mr, D, False).to(tl.float32)
        if dbeta_ptr is not None:
            dbeta += tl.sum(w * dc[:, None], 0)
        if gd_ptr is not None:
            t = load_rows(gd_ptr, r, rd, mr, D, False)
            if QSCALE:
                t -= tl.load(sum_ptr + R + r, mask=mr, other=0.0)[:, None]
            if dgamma_ptr is not None:
                dgamma += tl.sum(w * t, 0)
            if dwd_ptr is not None:
                if gamma_ptr is not None:
                    t = t * load_vector(gamma_ptr, rd, D, False)[None, :]
                if beta_ptr is not None:
                    t += dc[:, None] * load_vector(beta_ptr, rd, D, False)[None, :]
                store_rows(dwd_ptr, r, rd, mr, t, D, D, False)
        if dwu_ptr is not None:
            u = tl.load(gu_ptr + rd[:, None] * HLD + r[None, :], mask=md[:, None] & mr[None, :], other=0.0)
            store_rows(dwu_ptr, rd, r, md, u * scale, R, R, False)
    if dbu_ptr is not None:
        u = tl.load(gu_ptr + rd * HLD + R, mask=md, other=0.0)
        tl.store(dbu_ptr + rd, (u * scale).to(dbu_ptr.dtype.element_ty), mask=md)
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + rd, dgamma.to(dgamma_ptr.dtype.element_ty), mask=md)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + rd, dbeta.to(dbeta_ptr.dtype.element_ty), mask=md)
