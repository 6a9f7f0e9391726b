"""The Triton kernels of residual_norm. Their launchers are in residual_norm.py.

A program holds BM whole rows in registers, BD (a power of two) >= D columns wide: one pass over memory. Row counts,
samples and dropout are neither constexprs nor specialised on: no new batch compiles anything. Absent tensors are None.
TAIL: 0 none, 1 LayerNorm, 2 RMSNorm. Each tensor is of its own dtype; s, where it is not kept, of x's if f has it too,
else fp32.
"""

import triton
import triton.language as tl

from .adapter_tiles import load_rows, load_vector, store_rows


@triton.jit
def keep_factor(seed_ptr, row0, rm, threshold, factor, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """[BM, BD]: `factor` where element e = row*D + column survives dropout, else 0.

    Philox-4x32-10 of the quad e >> 2 under the 64-bit seed; the word e & 3 is compared. Where rows start at a whole
    quad a draw serves four columns, else each element makes its own and uses a quarter of it.
    """
    seed = tl.load(seed_ptr)
    limit = threshold.to(tl.uint32, bitcast=True)
    if D % 4 == 0:
        quad = ((row0 + rm) * (D // 4))[:, None] + tl.arange(0, BD // 4)[None, :]
        low, high = quad.to(tl.uint32), (quad >> 32).to(tl.uint32)
        a, b, c, d = tl.philox(seed, low, high, high * 0, high * 0)
        word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        e = ((row0 + rm) * D)[:, None] + tl.arange(0, BD)[None, :]
        low, high = (e >> 2).to(tl.uint32), (e >> 34).to(tl.uint32)
        a, b, c, d = tl.philox(seed, low, high, high * 0, high * 0)
        at = (e & 3).to(tl.int32)
        word = tl.where(at < 2, tl.where(at == 0, a, b), tl.where(at == 2, c, d))
    return tl.where(word >= limit, factor, 0.0)


@triton.jit
def skipped_rows(mask_ptr, row0, rm, mm, sample):
    """Which of the rows belong to skipped samples: `sample` rows each, one byte of mask each."""
    return tl.load(mask_ptr + (row0 + rm) // sample, mask=mm, other=0) != 0


@triton.jit(do_not_specialize=["M", "sample", "threshold"])
def forward(x_ptr, f_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr, s_ptr, n_ptr, st_ptr,
            M, sample, threshold, factor, eps,
            D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """s = x + drop(f) rounded, n = norm(s): each read and written once."""
    SAME: tl.constexpr = f_ptr is None or f_ptr.dtype.element_ty == x_ptr.dtype.element_ty
    ST: tl.constexpr = x_ptr.dtype.element_ty if SAME else tl.float32
    row0 = tl.program_id(0).to(tl.int64) * BM
    rm = tl.arange(0, BM)
    mm = rm < (M - row0)
    cols = tl.arange(0, BD)
    EVEN: tl.constexpr = D == BD
    x = load_rows(x_ptr + row0 * D, rm, cols, mm, D, EVEN)
    if f_ptr is not None:
        read = mm
        if mask_ptr is not None:
            skip = skipped_rows(mask_ptr, row0, rm, mm, sample)
            read = mm & (skip == 0)  # what a skipped sample's f holds is never read
        f = load_rows(f_ptr + row0 * D, rm, cols, read, D, EVEN)
        if seed_ptr is not None:
            keep = keep_factor(seed_ptr, row0, rm, threshold, factor, D, BM, BD)
            f = (f.to(tl.float32) * keep).to(f.dtype)  # rounds where torch's dropout does
        s = (x.to(tl.float32) + f.to(tl.float32)).to(ST)
        if mask_ptr is not None:
            s = tl.where(skip[:, None], x.to(ST), s)
        if s_ptr is not None:
            store_rows(s_ptr + row0 * D, rm, cols, mm, s, D, D, EVEN)
    else:
        s = x
    if TAIL != 0:
        row = s.to(tl.float32)
        mean = tl.zeros((BM,), tl.float32)
        centred = row
        if TAIL == 1:
            mean = tl.sum(row, 1) / D
            centred = row - mean[:, None]
            if not EVEN:
                centred = tl.where((cols < D)[None, :], centred, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        if st_ptr is not None:
            tl.store(st_ptr + (row0 + rm) * 2, mean, mask=mm)
            tl.store(st_ptr + (row0 + rm) * 2 + 1, rstd, mask=mm)
        if n_ptr is not None:
            n = centred * rstd[:, None] * load_vector(gamma_ptr, cols, D, EVEN)[None, :]
            if beta_ptr is not None:
                n += load_vector(beta_ptr, cols, D, EVEN)[None, :]
            store_rows(n_ptr + row0 * D, rm, cols, mm, n, D, D, EVEN)


@triton.jit(do_not_specialize=["M", "sample", "threshold", "tiles", "programs"])
def backward(gs_ptr, gn_ptr, s_ptr, st_ptr, gamma_ptr, mask_ptr, seed_ptr, dx_ptr, df_ptr, part_ptr,
             M, sample, threshold, factor, tiles, programs,
             D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """dx = g_s + norm's gradient, df = dx through dropout and the mask, this program's sums for weight (and bias).

    Program p takes the tiles p, p + programs, ...: its sums, part[p, 2, D], do not depend on who runs when.
    """
    rm = tl.arange(0, BM)
    cols = tl.arange(0, BD)
    step = tl.full((), BM, tl.int64)  # rows are counted in 64 bits
    EVEN: tl.constexpr = D == BD
    dgamma = tl.zeros((BM, BD), tl.float32)
    dbeta = tl.zeros((BM, BD), tl.float32)
    if gn_ptr is not None:
        gamma = load_vector(gamma_ptr, cols, D, EVEN)
    for tile in range(tl.program_id(0), tiles, programs):
        row0 = tile * step
        mm = rm < (M - row0)
        g = tl.zeros((BM, BD), tl.float32)
        if gn_ptr is not None:
            gn = load_rows(gn_ptr + row0 * D, rm, cols, mm, D, EVEN).to(tl.float32)
            hat = load_rows(s_ptr + row0 * D, rm, cols, mm, D, EVEN).to(tl.float32)
            rstd = tl.load(st_ptr + (row0 + rm) * 2 + 1, mask=mm, other=0.0)
            if TAIL == 1:
                hat -= tl.load(st_ptr + (row0 + rm) * 2, mask=mm, other=0.0)[:, None]
            hat *= rstd[:, None]
            if part_ptr is not None:
                dgamma += gn * hat
                if BIAS:
                    dbeta += gn
            if dx_ptr is not None or df_ptr is not None:
                e = gn * gamma[None, :]
                g = e - hat * (tl.sum(e * hat, 1) / D)[:, None]
                if TAIL == 1:
                    g -= (tl.sum(e, 1) / D)[:, None]
                g *= rstd[:, None]
        if dx_ptr is not None or df_ptr is not None:
            if gs_ptr is not None:
                g += load_rows(gs_ptr + row0 * D, rm, cols, mm, D, EVEN).to(tl.float32)
            if dx_ptr is not None:
                store_rows(dx_ptr + row0 * D, rm, cols, mm, g, D, D, EVEN)
            if df_ptr is not None:
                if seed_ptr is not None:
                    g *= keep_factor(seed_ptr, row0, rm, threshold, factor, D, BM, BD)
                if mask_ptr is not None:
                    g = tl.where(skipped_rows(mask_ptr, row0, rm, mm, sample)[:, None], 0.0, g)
                store_rows(df_ptr + row0 * D, rm, cols, mm, g, D, D, EVEN)
    if part_ptr is not None:
        part_ptr += tl.program_id(0).to(tl.int64) * (2 * D)
        tl.store(part_ptr + cols, tl.sum(dgamma, 0), mask=cols < D)
        if BIAS:
            tl.store(part_ptr + D + cols, tl.sum(dbeta, 0), mask=cols < D)


@triton.jit(do_not_specialize=["programs"])
def sum_parts(part_ptr, dgamma_ptr, dbeta_ptr, programs, D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """The programs' sums added up, in their order, BD columns at a time; program_id(1): weight or bias."""
    which = tl.program_id(1)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    rows = tl.arange(0, BP)
    part_ptr += which * D
    total = tl.zeros((BP, BD), tl.float32)
    for p0 in range(0, programs, BP):
        total += load_rows(part_ptr + p0 * (2 * D), rows * 2, cols, rows < programs - p0, D, False)
    value = tl.sum(total, 0)
    if which == 0:
        if dgamma_ptr is not None:
            tl.store(dgamma_ptr + cols, value.to(dgamma_ptr.dtype.element_ty), mask=cols < D)
    else:
        if dbeta_ptr is not None:
            tl.store(dbeta_ptr + cols, value.to(dbeta_ptr.dtype.element_ty), mask=cols < D)
