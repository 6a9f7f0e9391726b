"""Launchers of the Triton kernels of adapters of several tasks in one batch.

    y[i] = scale*(act(n(x[i]) w_down[t]^T + b_down[t]) w_up[t]^T + b_up[t]) + (x[i] if add_x) + res1[i] + res2[i]

with t the task of row i. One launch forward, one over the rows backward, then two for the parameters' gradients. The
host never learns which rows are whose, so nothing waits for the device and a CUDA graph can be captured. The kernels
are in multi_adapter_kernels.py, the tiles those of the single adapter (adapter_config.py).
"""

from __future__ import annotations

import torch

from . import adapter_config, launching
from . import multi_adapter_kernels as K
from .adapter import DB_DOWN, DB_UP, DNORM_BIAS, DNORM_WEIGHT, DW_DOWN, DW_UP, DX

_KIND = {torch.float32: "float", torch.bfloat16: "half", torch.float16: "half"}
# columns of d and of the bottleneck, rows per step, warps, stages of the products over the rows of a task; 64 rows a
# step spill on sm_80. Compiled for each architecture by tests/kernels/test_aot.py; speeds have not been measured.
PRODUCTS_TILE = {"half": (64, 64, 32, 4, 3), "float": (32, 32, 32, 4, 2)}
# A task's rows are summed in slices of about this many, at most MOST_SLICES: of few tasks the (task, tile of d) alone
# would not fill a GPU. Not measured.
SLICE, MOST_SLICES = 2048, 8
MOST_TASKS, MOST_COLUMNS = 1024, 1 << 22


def verify(dtype: torch.dtype, d: int, r: int, tasks: int) -> tuple[bool, str]:
    """Semantics: (True, "") if the kernels can serve these sizes, else (False, why). The device is not looked at."""
    kind = _KIND.get(dtype)
    if kind is None:
        return False, f"the Triton multi_adapter takes float32, bfloat16 or float16, got {dtype}"
    widest = min(adapter_config.TABLE[kind, way][0][-1][0] for way in ("forward", "backward"))
    if r > widest:
        return False, f"the Triton multi_adapter takes a bottleneck of at most {widest} in this dtype, got {r}"
    if d > MOST_COLUMNS:
        return False, f"the Triton multi_adapter takes a hidden width of at most {MOST_COLUMNS}, got {d}"
    if tasks > MOST_TASKS:
        return False, f"the Triton multi_adapter takes at most {MOST_TASKS} tasks, got {tasks}"
    return True, ""


def sort_by_task(task_ids, tasks: int):
    """Semantics: (order [n] int64, bounds [tasks + 1] int32) of flat ids [n], n > 0: order[bounds[t]:bounds[t + 1]] are
    the places of task t, ascending. Nothing waits for the device; an id out of range is a device-side assertion."""
    found, order = torch.sort(task_ids, stable=True)
    torch._assert_async((found[0] >= 0) & (found[-1] < tasks), f"multi_adapter: task_ids outside 0 to {tasks - 1}")
    ends = torch.arange(tasks + 1, device=task_ids.device, dtype=task_ids.dtype)
    return order, torch.searchsorted(found, ends, out_int32=True)


def multi_adapter_forward(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, order, bounds, res1, res2, add_x, eps,
                          activation, scale, save):  # fmt: skip
    """Semantics: (y, z, stats) as adapter_forward's, each row with its task's weights.

    x, res1, res2 [rows, d] contiguous; w_down [T, r, d], b_down [T, r], w_up [T, d, r], b_up, norm_weight and norm_bias
    [T, d]: dense in each task, any stride from task to task, 1 in front: shared. order, bounds: sort_by_task's, of
    rows or of samples of equally many rows. Rounds as adapter_forward without folding.
    """
    rows, d, r, tasks = _check("multi_adapter_forward", x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, order,
                               bounds)  # fmt: skip
    for name, t in (("res1", res1), ("res2", res2)):
        if t is not None:
            launching.check_tensor("multi_adapter_forward", name, t, (rows, d), x.dtype, x.device)
    norm = norm_weight is not None
    cfg = adapter_config.select(_KIND[x.dtype], "forward", d, r, rows)
    y = torch.empty_like(x)
    z = x.new_empty((rows, r) if save else (0,))
    stats = x.new_empty((rows, 2) if save and norm else (0,), dtype=torch.float32)
    strides = map(_stride, (w_down, b_down, norm_weight, norm_bias, w_up, b_up))
    with launching.on_device(x):
        launching.launch(K.forward, (launching.cdiv(rows, cfg.block_m) + tasks,), x, w_down, b_down, norm_weight,
                norm_bias, w_up, b_up, res1, res2, y, z if save else None, stats if save and norm else None,
                order, bounds, rows // order.shape[0], tasks, *strides, float(eps), float(scale),
                TP=launching.power_of_two(tasks), ACT=activation, NORM=int(norm), ADD_X=bool(add_x),
                **_options(cfg, d, r))  # fmt: skip
    return y, z, stats


def multi_adapter_backward(grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, order, bounds, add_x, activation,
                           scale, needs, shared):  # fmt: skip
    """Semantics: the seven gradients as adapter_backward's, those of the parameters with T in front (1 where all tasks
    share one: bit i of `shared`), zeros for a task without rows; 0 elements where `needs` does not ask.

    Sums in fp32 in a fixed order, no atomics: the same bits every time.
    """
    name = "multi_adapter_backward"
    rows, d, r, tasks = _check(name, x, w_down, None, w_up, None, norm_weight, norm_bias, order, bounds)
    launching.check_tensor(name, "grad", grad, (rows, d), x.dtype, x.device)
    launching.check_tensor(name, "z", z, (rows, r), x.dtype, x.device)
    norm = norm_weight is not None
    if norm:
        launching.check_tensor(name, "stats", stats, (rows, 2), torch.float32, x.device)
    else:
        needs &= ~(DNORM_WEIGHT | DNORM_BIAS)
    if norm_bias is None:
        needs &= ~DNORM_BIAS
    kind = _KIND[x.dtype]
    cfg = adapter_config.select(kind, "backward", d, r, rows)
    tiles = launching.cdiv(rows, cfg.block_m) + tasks
    dx = torch.empty_like(x) if needs & DX else None
    q = x.new_empty(rows, r) if needs & (DW_DOWN | DNORM_WEIGHT) else None
    part = None
    if needs & (DB_DOWN | DNORM_BIAS) or (q is not None and norm_bias is not None):
        part = x.new_empty(tiles, r, dtype=torch.float32)
    st, where = stats if norm else None, (order, bounds, rows // order.shape[0], tasks)
    common = dict(TP=launching.power_of_two(tasks), ACT=activation, NORM=int(norm))
    with launching.on_device(x):
        if dx is not None or q is not None or part is not None:
            launching.launch(K.backward, (tiles,), grad, x, z, st, w_down, w_up, norm_weight, dx, q, part, *where,
                    _stride(w_down), _stride(norm_weight), _stride(w_up), float(scale), ADD_X=bool(add_x),
                    **common, **_options(cfg, d, r))  # fmt: skip
        sums = _products(kind, cfg.block_m, grad, x, z, st, q, part, where, needs, common)
        rest = _weight_gradients(sums, w_down, norm_weight, norm_bias, tasks, scale, needs, shared)
    return (x.new_empty(0) if dx is None else dx, *rest)


def _products(kind, block_m, grad, x, z, st, q, part, where, needs, common):
    """(gd [T, r, d], gu [T, d, width], column sums of dz [T, r]) in fp32, None where nothing needs them."""
    (rows, d), r, tasks = x.shape, z.shape[1], where[-1]
    columns, bottleneck, step, warps, stages = PRODUCTS_TILE[kind]
    width, slices = (r // 16 + 1) * 16, min(max(rows // SLICE, 1), MOST_SLICES)
    gd = x.new_empty(slices, tasks, r, d, dtype=torch.float32) if q is not None else None
    gu = x.new_empty(slices, tasks, d, width, dtype=torch.float32) if needs & (DW_UP | DB_UP) else None
    sums = None if part is None else x.new_empty(tasks, r, dtype=torch.float32)
    if gd is not None or gu is not None or sums is not None:
        grid = launching.cdiv(d, columns), launching.cdiv(r, bottleneck), tasks * slices
        launching.launch(K.products, grid, grad, x, z, st, q, part, gd, gu, sums, *where, D=d, R=r, HLD=width,
                BM=block_m, BD=columns, BR=bottleneck, BK=step, SLICES=slices, NS=stages, num_warps=warps,
                num_stages=stages, **common)  # fmt: skip
    return (*(t if t is None else t[0] if slices == 1 else t.sum(0) for t in (gd, gu)), sums)


def _weight_gradients(sums, w_down, norm_weight, norm_bias, tasks, scale, needs, shared):
    """The six parameter gradients in one launch; those of shared ones in fp32, added up over the tasks after it."""
    (_, r, d), dtype = w_down.shape, w_down.dtype
    shapes = (r, d), (r,), (d, r), (d,), (d,), (d,)
    outputs = [
        w_down.new_empty(tasks, *shape, dtype=torch.float32 if shared >> i & 1 else dtype) if needs >> i & 1 else None
        for i, shape in enumerate(shapes, 1)
    ]
    if any(t is not None for t in outputs):
        columns, bottleneck = adapter_config.WEIGHT_GRADS_TILE
        launching.launch(K.task_weight_grads, (launching.cdiv(d, columns), tasks), *sums, w_down, norm_weight,
                norm_bias, *outputs, _stride(w_down), _stride(norm_weight), _stride(norm_bias), float(scale), D=d, R=r,
                HLD=(r // 16 + 1) * 16, BD=columns, BR=bottleneck, num_warps=4)  # fmt: skip
    return tuple(
        w_down.new_empty(0) if t is None else t.sum(0, keepdim=True).to(dtype) if shared >> i & 1 else t
        for i, t in enumerate(outputs, 1)
    )


def _options(cfg, d, r):
    # 64-bit row numbers take registers: 4 warps have none to spare, nor 8 at r = 192 on sm_80 with steps of 64
    tall = cfg.block_m >= 64
    warps, step = max(cfg.num_warps, 8 * tall), min(cfg.block_k, 32 if tall and cfg.r2 >= 64 else cfg.block_k)
    return dict(D=d, R=r, R1=cfg.r1, R2=cfg.r2, BM=cfg.block_m, BK=step, BN=cfg.block_n, NS=cfg.num_stages,
                num_warps=warps, num_stages=cfg.num_stages)  # fmt: skip


def _stride(t) -> int:
    """Elements from one task's tensor to the next one's; 0: shared."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def _check(function, x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, order, bounds):
    launching.check_matrix(function, "x", x)
    if w_down.dim() != 3:
        raise ValueError(f"{function}: w_down has shape {tuple(w_down.shape)}, expected (tasks or 1, r, d)")
    (rows, d), r, tasks = x.shape, w_down.shape[1], bounds.shape[0] - 1
    for name, t, shape in (("w_down", w_down, (r, d)), ("b_down", b_down, (r,)), ("w_up", w_up, (d, r)),
                           ("b_up", b_up, (d,)), ("norm_weight", norm_weight, (d,)),
                           ("norm_bias", norm_bias, (d,))):  # fmt: skip
        if t is None:
            continue
        if t.dim() != len(shape) + 1 or t.shape[0] not in (1, tasks):
            raise ValueError(f"{function}: {name} has shape {tuple(t.shape)}, expected {(tasks, *shape)} or 1 in front")
        launching.check_tensor(function, f"{name}[0]", t[0], shape, x.dtype, x.device, "x and w_down")
    if rows == 0 or order.dim() != 1 or order.shape[0] == 0 or rows % order.shape[0]:
        raise ValueError(f"{function}: order has shape {tuple(order.shape)}, expected {rows} rows or samples of them")
    if rows >= 1 << 31:
        raise ValueError(f"{function}: x has {rows} rows, expected fewer than 2^31")
    launching.check_tensor(function, "order", order, order.shape, torch.int64, x.device)
    launching.check_tensor(function, "bounds", bounds, (tasks + 1,), torch.int32, x.device)
    return rows, d, r, tasks
