"""Device functions of the adapter kernels: masked tile loads, LayerNorm statistics, activations, the two long products.

Names: rows of x are D wide, the bottleneck is R wide and cut into tiles R1 + R2 (R2 = 0: one tile). A kernel works on
BM rows at a time; pointers arrive moved to the first of them (64-bit), so that offsets inside a tile fit 32 bits.
Masked lanes read 0. Arithmetic is fp32; operands of a dot have the weights' type, which those of d-wide rows need not
have: under autocast the residual stream is fp32 where the weights are bf16 or fp16.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, rm, cols, mm, LD: tl.constexpr, EVEN: tl.constexpr):
    """[BM, len(cols)] of a row-major matrix LD wide; EVEN: every column exists."""
    p = ptr + rm[:, None] * LD + cols[None, :]
    if EVEN:
        t = tl.load(p, mask=mm[:, None], other=0.0)
    else:
        t = tl.load(p, mask=mm[:, None] & (cols < LD)[None, :], other=0.0)
    return t


@triton.jit
def store_rows(ptr, rm, cols, mm, value, LD: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr):
    p = ptr + rm[:, None] * LD + cols[None, :]
    v = value.to(ptr.dtype.element_ty)
    if EVEN:
        tl.store(p, v, mask=mm[:, None])
    else:
        tl.store(p, v, mask=mm[:, None] & (cols < N)[None, :])


@triton.jit
def load_vector(ptr, i, N: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        v = tl.load(ptr + i)
    else:
        v = tl.load(ptr + i, mask=i < N, other=0.0)
    return v.to(tl.float32)


@triton.jit
def load_weight(ptr, k, n, K: tl.constexpr, N: tl.constexpr, SK: tl.constexpr, SN: tl.constexpr,
                KE: tl.constexpr, NE: tl.constexpr):  # fmt: skip
    """[len(k), len(n)] of the matrix whose element (k, n) lies at k*SK + n*SN; KE, NE: no index is out of range."""
    p = ptr + k[:, None] * SK + n[None, :] * SN
    if KE and NE:
        t = tl.load(p)
    elif KE:
        t = tl.load(p, mask=(n < N)[None, :], other=0.0)
    elif NE:
        t = tl.load(p, mask=(k < K)[:, None], other=0.0)
    else:
        t = tl.load(p, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
    return t


@triton.jit
def activate(z, ACT: tl.constexpr):
    """0 identity, 1 relu, 2 gelu (erf), 3 gelu_tanh, 4 silu. tanh(t) is written 2*sigmoid(2t) - 1."""
    if ACT == 1:
        h = tl.where(z <= 0.0, 0.0, z)  # keeps NaN, as torch does
    elif ACT == 2:
        h = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACT == 3:
        h = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == 4:
        h = z * tl.sigmoid(z)
    else:
        h = z
    return h


@triton.jit
def activate_grad(z, ACT: tl.constexpr):
    """d act(z) / dz."""
    if ACT == 1:
        g = tl.where(z > 0.0, 1.0, 0.0)
    elif ACT == 2:
        g = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == 3:
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        g = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACT == 4:
        s = tl.sigmoid(z)
        g = s * (1.0 + z * (1.0 - s))
    else:
        g = tl.full(z.shape, 1.0, tl.float32)
    return g


@triton.jit
def merge_statistics(xf, cols, d0, mean, m2, D: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """Mean and sum of squared deviations after one more chunk (Chan's merge: no E[x^2] - mean^2, which cancels)."""
    new = tl.minimum(D - d0, BK) * 1.0
    total = d0 + new
    chunk_mean = tl.sum(xf, 1) / new
    c = xf - chunk_mean[:, None]
    if not EVEN:
        c = tl.where((cols < D)[None, :], c, 0.0)
    delta = chunk_mean - mean
    mean += delta * (new / total)
    m2 += tl.sum(c * c, 1) + delta * delta * (d0 * new / total)
    return mean, m2


@triton.jit
def store_statistics(st_ptr, row0, rm, mm, mean, rstd):
    """(mean, rstd) of BM rows to [rows, 2]."""
    p = st_ptr + row0 * 2 + rm * 2
    tl.store(p, mean, mask=mm)
    tl.store(p + 1, rstd, mask=mm)


@triton.jit
def load_statistics(st_ptr, row0, rm, mm, NORM: tl.constexpr):
    """(mean, rstd) of BM rows from [rows, 2]; zeros without a norm."""
    if NORM:
        p = st_ptr + row0 * 2 + rm * 2
        mean = tl.load(p, mask=mm, other=0.0)
        rstd = tl.load(p + 1, mask=mm, other=0.0)
    else:
        mean = tl.zeros(rm.shape, tl.float32)
        rstd = tl.zeros(rm.shape, tl.float32)
    return mean, rstd


@triton.jit
def finish_z(acc, mean, rstd, bd_ptr, ws_ptr, r, R: tl.constexpr, NE: tl.constexpr, NORM: tl.constexpr):
    """The folded norm's row factors (NORM 2) and the bias on one tile of the down product."""
    if NORM == 2:
        acc = (acc - mean[:, None] * load_vector(ws_ptr, r, R, NE)[None, :]) * rstd[:, None]
    if bd_ptr is not None:
        acc += load_vector(bd_ptr, r, R, NE)[None, :]
    return acc


@triton.jit
def project_down(x_ptr, wd_ptr, bd_ptr, ws_ptr, gamma_ptr, beta_ptr, rm, mm, r0, eps,
                 D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, NE1: tl.constexpr,
                 BM: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """z = n(x) w_down^T + b_down for the bottleneck's columns r0 ... r0 + R1 + R2, rounded to the weights' type.

    NORM 0: no norm. 1: statistics first, then x is read again and normalised before the dot (as torch rounds).
    2: one pass, z = rstd (x wd^T - mean ws) + bd with wd, ws, bd from fold_weights; x of the weights' type.
    """
    EVEN: tl.constexpr = D % BK == 0
    R2P: tl.constexpr = R2 if R2 > 0 else 16
    NE2: tl.constexpr = R1 + R2 <= R
    DT: tl.constexpr = wd_ptr.dtype.element_ty
    q1 = r0 + tl.arange(0, R1)
    q2 = r0 + R1 + tl.arange(0, R2P)
    z1 = tl.zeros((BM, R1), tl.float32)
    z2 = tl.zeros((BM, R2P), tl.float32)
    mean = tl.zeros((BM,), tl.float32)
    m2 = tl.zeros((BM,), tl.float32)
    rstd = tl.zeros((BM,), tl.float32)
    if NORM == 1:
        for d0 in tl.range(0, D, BK, num_stages=NS):
            rd = d0 + tl.arange(0, BK)
            xf = load_rows(x_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
            mean, m2 = merge_statistics(xf, rd, d0, mean, m2, D, BK, EVEN)
        rstd = tl.rsqrt(m2 / D + eps)
    for d0 in tl.range(0, D, BK, num_stages=NS):
        rd = d0 + tl.arange(0, BK)
        x = load_rows(x_ptr, rm, rd, mm, D, EVEN)
        if NORM == 1:
            n = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * load_vector(gamma_ptr, rd, D, EVEN)[None, :]
            if beta_ptr is not None:
                n += load_vector(beta_ptr, rd, D, EVEN)[None, :]
            x = n
        x = x.to(DT)
        z1 = tl.dot(x, load_weight(wd_ptr, rd, q1, D, R, 1, D, EVEN, NE1), z1, input_precision="ieee")
        if R2 > 0:
            z2 = tl.dot(x, load_weight(wd_ptr, rd, q2, D, R, 1, D, EVEN, NE2), z2, input_precision="ieee")
        if NORM == 2:
            mean, m2 = merge_statistics(x.to(tl.float32), rd, d0, mean, m2, D, BK, EVEN)
            # Triton (to 3.9) gives a tile that goes to registers and to an asynchronous dot one buffer too few (issue
            # 6691): on Hopper the copy of a later tile would meet a dot that still reads. Looking at the sums waits
            # for the dot; rows that do not exist have zeros there anyway.
            if tl.target_info.cuda_capability_geq(9, 0) and not tl.target_info.cuda_capability_geq(10, 0):
                z1 = tl.where(mm[:, None], z1, 0.0)
                if R2 > 0:
                    z2 = tl.where(mm[:, None], z2, 0.0)
    if NORM == 2:
        rstd = tl.rsqrt(m2 / D + eps)
    z1 = finish_z(z1, mean, rstd, bd_ptr, ws_ptr, q1, R, NE1, NORM)
    if R2 > 0:
        z2 = finish_z(z2, mean, rstd, bd_ptr, ws_ptr, q2, R, NE2, NORM)
    return z1.to(DT), z2.to(DT), mean, rstd


@triton.jit
def store_output(y_ptr, x_ptr, res1_ptr, res2_ptr, bu_ptr, u, rm, rd, mm, scale,
                 D: tl.constexpr, EVEN: tl.constexpr, ADD_X: tl.constexpr):  # fmt: skip
    """y = scale*(u + b_up) + x + res1 + res2 for one chunk of columns, rounded once; returned as stored."""
    if bu_ptr is not None:
        u += load_vector(bu_ptr, rd, D, EVEN)[None, :]
    y = u * scale
    if ADD_X:
        y += load_rows(x_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
    if res1_ptr is not None:
        y += load_rows(res1_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
    if res2_ptr is not None:
        y += load_rows(res2_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    store_rows(y_ptr, rm, rd, mm, y, D, D, EVEN)
    return y


@triton.jit
def to_product(t, low_ptr, w_ptr, rm, rd, mm, D: tl.constexpr, EVEN: tl.constexpr):
    """t in the type of the weights it is multiplied by; to memory as well, where a product over the rows reads it."""
    t = t.to(w_ptr.dtype.element_ty)
    if low_ptr is not None:
        store_rows(low_ptr, rm, rd, mm, t, D, D, EVEN)
    return t


@triton.jit
def add_bottleneck_grad(a1, a2, g, wu_ptr, rd, q1, q2, D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr,
                        R2: tl.constexpr, EVEN: tl.constexpr, NE1: tl.constexpr):  # fmt: skip
    """a + g w_up for the columns rd of g; those beyond D are zero."""
    a1 = tl.dot(g, load_weight(wu_ptr, rd, q1, D, R, R, 1, EVEN, NE1), a1, input_precision="ieee")
    if R2 > 0:
        a2 = tl.dot(g, load_weight(wu_ptr, rd, q2, D, R, R, 1, EVEN, R1 + R2 <= R), a2, input_precision="ieee")
    return a1, a2


@triton.jit
def grad_bottleneck(g_ptr, low_ptr, wu_ptr, rm, mm, r0, D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr,
                    R2: tl.constexpr, NE1: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
                    NS: tl.constexpr):  # fmt: skip
    """grad w_up for the bottleneck's columns r0 ... r0 + R1 + R2; low: grad as it is multiplied, from the first."""
    EVEN: tl.constexpr = D % BK == 0
    R2P: tl.constexpr = R2 if R2 > 0 else 16
    q1 = r0 + tl.arange(0, R1)
    q2 = r0 + R1 + tl.arange(0, R2P)
    a1 = tl.zeros((BM, R1), tl.float32)
    a2 = tl.zeros((BM, R2P), tl.float32)
    for d0 in tl.range(0, D, BK, num_stages=NS):
        rd = d0 + tl.arange(0, BK)
        g = load_rows(g_ptr, rm, rd, mm, D, EVEN)
        g = to_product(g, low_ptr, wu_ptr, rm, rd, mm & (rm + r0 == rm), D, EVEN)
        a1, a2 = add_bottleneck_grad(a1, a2, g, wu_ptr, rd, q1, q2, D, R, R1, R2, EVEN, NE1)
    return a1, a2


@triton.jit
def emit_bottleneck(a, z_ptr, q_ptr, h_ptr, part_ptr, rm, mm, r, mean, rstd, scale, R: tl.constexpr, NE: tl.constexpr,
                    HLD: tl.constexpr, ACT: tl.constexpr, QSCALE: tl.constexpr):  # fmt: skip
    """From a = grad w_up: q = dz (times rstd with QSCALE) and h = act(z) to memory, and this tile's two column sums
    (dz, and q*mean with QSCALE). Returns q in the storage type."""
    z = load_rows(z_ptr, rm, r, mm, R, NE).to(tl.float32)
    dz = scale * a * activate_grad(z, ACT)
    if QSCALE:
        q = (dz * rstd[:, None]).to(z_ptr.dtype.element_ty)
    else:
        q = dz.to(z_ptr.dtype.element_ty)
    if q_ptr is not None:
        store_rows(q_ptr, rm, r, mm, q, R, R, NE)
    if h_ptr is not None:
        store_rows(h_ptr, rm, r, mm, activate(z, ACT), HLD, R, NE)
    if part_ptr is not None:
        tl.store(part_ptr + r, tl.sum(dz, 0), mask=r < R)
        if QSCALE:
            tl.store(part_ptr + R + r, tl.sum(q.to(tl.float32) * mean[:, None], 0), mask=r < R)
    return q


@triton.jit
def store_ones(h_ptr, rm, mm, R: tl.constexpr, HLD: tl.constexpr):
    """Columns R ... HLD of h: a one, then zeros, so that grad^T h carries the column sums of grad."""
    c = R + tl.arange(0, 16)
    one = tl.where(c == R, 1.0, 0.0)[None, :] + tl.zeros(rm.shape, tl.float32)[:, None]
    store_rows(h_ptr, rm, c, mm, one, HLD, HLD, False)


@triton.jit
def store_dx(dx_ptr, g_ptr, x_ptr, hat_ptr, gn, m1, m2, mean, rstd, rm, rd, mm, D: tl.constexpr, EVEN: tl.constexpr,
             NORM: tl.constexpr, QSCALE: tl.constexpr, ADD_X: tl.constexpr):  # fmt: skip
    """One chunk of dx from gn, the gradient of the normalised x (no norm: of x); m1, m2: means of gn, gn*xhat. hat:
    xhat (no norm: x) as the product over the rows reads it."""
    if NORM:
        xhat = (load_rows(x_ptr, rm, rd, mm, D, EVEN).to(tl.float32) - mean[:, None]) * rstd[:, None]
        if hat_ptr is not None:
            store_rows(hat_ptr, rm, rd, mm, xhat, D, D, EVEN)
        gn = gn - m1[:, None] - xhat * m2[:, None]
        if not QSCALE:
            gn = gn * rstd[:, None]
    elif hat_ptr is not None:
        store_rows(hat_ptr, rm, rd, mm, load_rows(x_ptr, rm, rd, mm, D, EVEN), D, D, EVEN)
    if ADD_X:
        gn += load_rows(g_ptr, rm, rd, mm, D, EVEN).to(tl.float32)
    store_rows(dx_ptr, rm, rd, mm, gn, D, D, EVEN)
