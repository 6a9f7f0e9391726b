"""The Triton kernels of adapters of several tasks. Their launchers are in multi_adapter.py.

A row's task is data: `order` holds the samples (UNIT rows each) sorted by task, bounds[t] ... bounds[t + 1] are task
t's among them, both on the device. A tile is BM sorted rows of one task. There are ceil(N/BM) + T programs, whatever
the ids are: each finds its task from the bounds, those past the last tile do nothing. Rows are read and written where
they lie, through `order`; the device functions of adapter_tiles.py take such row numbers as they take any others.
Weights have a stride from task to task, 0 where all tasks share them.
"""

import triton
import triton.language as tl

from .adapter_kernels import load_statistics, product_w_down, weight_grads
from .adapter_tiles import (
    activate,
    emit_bottleneck,
    grad_bottleneck,
    load_rows,
    load_weight,
    project_down,
    store_dx,
    store_output,
    store_rows,
)


@triton.jit
def tile_ends(bounds_ptr, UNIT, T, TP: tl.constexpr, BM: tl.constexpr):
    """Of each task: its number, its first sorted row, the row behind its last, its tiles, the tile behind its last."""
    i = tl.arange(0, TP)
    low = tl.load(bounds_ptr + i, mask=i < T, other=0) * UNIT
    high = tl.load(bounds_ptr + i + 1, mask=i < T, other=0) * UNIT
    tiles = ((high - low + (BM - 1)) // BM).to(tl.int32)
    return i, low, high, tiles, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(bounds_ptr, tile, UNIT, T, TP: tl.constexpr, BM: tl.constexpr):
    """(task, first sorted row, row behind the task's last) of a tile; a tile past the end has task T or more."""
    i, low, high, tiles, ends = tile_ends(bounds_ptr, UNIT, T, TP, BM)
    task = tl.sum((ends <= tile).to(tl.int32), 0)
    mine = i == task
    first = tl.sum(tl.where(mine, low + (tile - (ends - tiles)) * BM, 0), 0)
    return task, first, tl.sum(tl.where(mine, high, 0), 0)


@triton.jit
def row_numbers(order_ptr, position, mm, UNIT):
    """Where the sorted rows lie, in 64 bits."""
    return tl.load(order_ptr + position // UNIT, mask=mm, other=0) * UNIT + position % UNIT


@triton.jit(do_not_specialize=["UNIT", "T"])
def forward(x_ptr, wd_ptr, bd_ptr, gamma_ptr, beta_ptr, wu_ptr, bu_ptr, res1_ptr, res2_ptr, y_ptr, z_ptr, st_ptr,
            order_ptr, bounds_ptr, UNIT, T, SWD, SBD, SGA, SBE, SWU, SBU, eps, scale,
            D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, TP: tl.constexpr, BM: tl.constexpr,
            BK: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, ADD_X: tl.constexpr,
            NS: tl.constexpr):  # fmt: skip
    """adapter_kernels.forward_fused for BM rows of one task, norm never folded."""
    task, first, end = find_tile(bounds_ptr, tl.program_id(0), UNIT, T, TP, BM)
    if task < T:
        t = task.to(tl.int64)
        wd_ptr += t * SWD
        wu_ptr += t * SWU
        if bd_ptr is not None:
            bd_ptr += t * SBD
        if bu_ptr is not None:
            bu_ptr += t * SBU
        if gamma_ptr is not None:
            gamma_ptr += t * SGA
        if beta_ptr is not None:
            beta_ptr += t * SBE
        at = first + tl.arange(0, BM)
        mm = at < end
        rm = row_numbers(order_ptr, at, mm, UNIT)
        z1, z2, mean, rstd = project_down(
            x_ptr, wd_ptr, bd_ptr, None, gamma_ptr, beta_ptr, rm, mm, 0, eps, D, R, R1, R2, R1 <= R, BM, BK, NORM, NS
        )
        q1 = tl.arange(0, R1)
        q2 = R1 + tl.arange(0, R2 if R2 > 0 else 16)
        if z_ptr is not None:
            store_rows(z_ptr, rm, q1, mm, z1, R, R, R1 <= R)
            if R2 > 0:
                store_rows(z_ptr, rm, q2, mm, z2, R, R, R1 + R2 <= R)
        if st_ptr is not None:
            tl.store(st_ptr + rm * 2, mean, mask=mm)
            tl.store(st_ptr + rm * 2 + 1, rstd, mask=mm)
        h1 = activate(z1.to(tl.float32), ACT).to(z1.dtype)
        h2 = activate(z2.to(tl.float32), ACT).to(z2.dtype)
        EVEN: tl.constexpr = D % BN == 0
        for d0 in tl.range(0, D, BN, num_stages=NS):
            rd = d0 + tl.arange(0, BN)
            u = tl.dot(h1, load_weight(wu_ptr, q1, rd, R, D, 1, R, R1 <= R, EVEN), input_precision="ieee")
            if R2 > 0:
                w = load_weight(wu_ptr, q2, rd, R, D, 1, R, R1 + R2 <= R, EVEN)
                u = tl.dot(h2, w, u, input_precision="ieee")
            store_output(y_ptr, x_ptr, res1_ptr, res2_ptr, bu_ptr, u, rm, rd, mm, scale, D, EVEN, ADD_X)


@triton.jit(do_not_specialize=["UNIT", "T"])
def backward(g_ptr, x_ptr, z_ptr, st_ptr, wd_ptr, wu_ptr, gamma_ptr, dx_ptr, q_ptr, part_ptr, order_ptr, bounds_ptr,
             UNIT, T, SWD, SGA, SWU, scale,
             D: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, TP: tl.constexpr, BM: tl.constexpr,
             BK: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, ADD_X: tl.constexpr,
             NS: tl.constexpr):  # fmt: skip
    """adapter_kernels.backward_fused for BM rows of one task: dz to q, its column sums to part, and dx."""
    task, first, end = find_tile(bounds_ptr, tl.program_id(0), UNIT, T, TP, BM)
    if task < T:
        t = task.to(tl.int64)
        wd_ptr += t * SWD
        wu_ptr += t * SWU
        if gamma_ptr is not None:
            gamma_ptr += t * SGA
        if part_ptr is not None:
            part_ptr += tl.program_id(0).to(tl.int64) * R
        at = first + tl.arange(0, BM)
        mm = at < end
        rm = row_numbers(order_ptr, at, mm, UNIT)
        mean, rstd = load_statistics(st_ptr, 0, rm, mm, NORM)
        a1, a2 = grad_bottleneck(g_ptr, None, wu_ptr, rm, mm, 0, D, R, R1, R2, R1 <= R, BM, BK, NS)
        r1 = tl.arange(0, R1)
        p1 = emit_bottleneck(a1, z_ptr, q_ptr, None, part_ptr, rm, mm, r1, mean, rstd, scale, R, R1 <= R, R, ACT, False)
        p2 = p1
        if R2 > 0:
            r2 = R1 + tl.arange(0, R2)
            NE2: tl.constexpr = R1 + R2 <= R
            p2 = emit_bottleneck(a2, z_ptr, q_ptr, None, part_ptr, rm, mm, r2, mean, rstd, scale, R, NE2, R, ACT, False)
        if dx_ptr is not None:
            EVEN: tl.constexpr = D % BN == 0
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
                store_dx(dx_ptr, g_ptr, x_ptr, None, gn, s1 / D, s2 / D, mean, rstd, rm, rd, mm,
                         D, EVEN, NORM, False, ADD_X)  # fmt: skip


@triton.jit
def sum_parts(part_ptr, sum_ptr, bounds_ptr, task, r, UNIT, T, R: tl.constexpr, TP: tl.constexpr, BM: tl.constexpr):
    """The column sums of dz of a task: its tiles' parts in their order."""
    i, _, _, tiles, ends = tile_ends(bounds_ptr, UNIT, T, TP, BM)
    last = tl.sum(tl.where(i == task, ends, 0), 0)
    first = last - tl.sum(tl.where(i == task, tiles, 0), 0)
    part_ptr += first.to(tl.int64) * R
    total = tl.zeros(r.shape, tl.float32)
    for _ in range(first, last):
        total += tl.load(part_ptr + r, mask=r < R, other=0.0)
        part_ptr += R
    tl.store(sum_ptr + task * R + r, total, mask=r < R)


@triton.jit(do_not_specialize=["UNIT", "T"])
def products(g_ptr, x_ptr, z_ptr, st_ptr, q_ptr, part_ptr, gd_ptr, gu_ptr, sum_ptr, order_ptr, bounds_ptr, UNIT, T,
             D: tl.constexpr, R: tl.constexpr, HLD: tl.constexpr, TP: tl.constexpr, BM: tl.constexpr,
             BD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, ACT: tl.constexpr,
             NORM: tl.constexpr, NS: tl.constexpr):  # fmt: skip
    """What weight_grads needs of one of SLICES equal parts of a task's rows, in their sorted order, fp32:
    gd [slice, task, R, D] = dz^T xhat (dz^T x without a norm), gu [slice, task, D, HLD] = grad^T [act(z) | 1].
    The first slice's programs of the first columns of d also add up the task's parts."""
    task = tl.program_id(2) // SLICES
    piece = tl.program_id(2) % SLICES
    rd = tl.program_id(0) * BD + tl.arange(0, BD)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    if sum_ptr is not None:
        if (tl.program_id(0) == 0) & (piece == 0):
            sum_parts(part_ptr, sum_ptr, bounds_ptr, task, r, UNIT, T, R, TP, BM)
    low = tl.load(bounds_ptr + task) * UNIT
    high = tl.load(bounds_ptr + task + 1) * UNIT
    step = ((high - low + (SLICES * BK - 1)) // (SLICES * BK)) * BK
    low += piece * step
    high = tl.minimum(high, low + step)
    down = tl.zeros((BR, BD), tl.float32)
    up = tl.zeros((BD, BR), tl.float32)
    ones = tl.zeros((BD,), tl.float32)
    EVEN: tl.constexpr = D % BD == 0
    NE: tl.constexpr = R % BR == 0
    for p in tl.range(low, high, BK, num_stages=NS):
        at = p + tl.arange(0, BK)
        mm = at < high
        rm = row_numbers(order_ptr, at, mm, UNIT)
        if gd_ptr is not None:
            x = load_rows(x_ptr, rm, rd, mm, D, EVEN)
            if NORM:
                mean, rstd = load_statistics(st_ptr, 0, rm, mm, NORM)
                x = ((x.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(x_ptr.dtype.element_ty)
                if not EVEN:
                    x = tl.where((rd < D)[None, :], x, 0.0)
            q = load_rows(q_ptr, rm, r, mm, R, NE)
            down = tl.dot(tl.trans(q), x, down, input_precision="ieee")
        if gu_ptr is not None:
            g = load_rows(g_ptr, rm, rd, mm, D, EVEN)
            h = activate(load_rows(z_ptr, rm, r, mm, R, NE).to(tl.float32), ACT).to(z_ptr.dtype.element_ty)
            up = tl.dot(tl.trans(g), h, up, input_precision="ieee")
            ones += tl.sum(g.to(tl.float32), 0)
    mine = (piece * T + task).to(tl.int64)
    if gd_ptr is not None:
        store_rows(gd_ptr + mine * R * D, r, rd, r < R, down, D, D, EVEN)
    if gu_ptr is not None:
        gu_ptr += mine * D * HLD
        store_rows(gu_ptr, rd, r, rd < D, up, HLD, R, NE)
        if tl.program_id(1) == 0:
            tl.store(gu_ptr + rd * HLD + R, ones, mask=rd < D)


@triton.jit
def task_weight_grads(gd_ptr, gu_ptr, sum_ptr, wd_ptr, gamma_ptr, beta_ptr, dwd_ptr, dbd_ptr, dwu_ptr, dbu_ptr,
                      dgamma_ptr, dbeta_ptr, SWD, SGA, SBE, scale,
                      D: tl.constexpr, R: tl.constexpr, HLD: tl.constexpr, BD: tl.constexpr,
                      BR: tl.constexpr):  # fmt: skip
    """adapter_kernels.weight_grads of task program_id(1); every gradient has a place for each task."""
    t = tl.program_id(1).to(tl.int64)
    wd_ptr += t * SWD
    if gd_ptr is not None:
        gd_ptr += t * (R * D)
    if gu_ptr is not None:
        gu_ptr += t * (D * HLD)
    if sum_ptr is not None:
        sum_ptr += t * R
    if gamma_ptr is not None:
        gamma_ptr += t * SGA
    if beta_ptr is not None:
        beta_ptr += t * SBE
    if dwd_ptr is not None:
        dwd_ptr += t * (R * D)
    if dbd_ptr is not None:
        dbd_ptr += t * R
    if dwu_ptr is not None:
        dwu_ptr += t * (R * D)
    if dbu_ptr is not None:
        dbu_ptr += t * D
    if dgamma_ptr is not None:
        dgamma_ptr += t * D
    if dbeta_ptr is not None:
        dbeta_ptr += t * D
    weight_grads(
        gd_ptr, gu_ptr, sum_ptr, wd_ptr, gamma_ptr, beta_ptr, dwd_ptr, dbd_ptr, dwu_ptr, dbu_ptr, dgamma_ptr,
        dbeta_ptr, scale, D, R, HLD, BD, BR, False,
    )  # fmt: skip
