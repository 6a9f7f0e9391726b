"""Launchers of the Triton adapter kernels; same arguments and results as the C++ ops cpu_adapter_forward/backward.

    y = scale*(act(n(x) w_down^T + b_down) w_up^T + b_up) + (x if add_x) + res1 + res2

The kernels are in adapter_kernels.py, their tile sizes in adapter_config.py. Without a GPU they run in Triton's
interpreter (TRITON_INTERPRET=1). `verify` says whether a call can be served, and if not, why.
"""

from __future__ import annotations

import torch

from . import adapter_config, launching
from . import adapter_kernels as K
from .adapter_config import Config
from .launching import INTERPRETED
from .products import product

_KIND = {torch.float32: "float", torch.bfloat16: "half", torch.float16: "half"}
_WIDEST = 1 << 22  # offsets inside a tile of 128 rows fit 32 bits
DX, DW_DOWN, DB_DOWN, DW_UP, DB_UP, DNORM_WEIGHT, DNORM_BIAS = (1 << i for i in range(7))
EVERYTHING = (1 << 7) - 1


def verify(
    x: torch.Tensor, d: int | None = None, r: int | None = None, dtype: torch.dtype | None = None
) -> tuple[bool, str]:
    """Semantics: (True, "") if the kernels can serve x [..., d] with bottleneck r, else (False, why)."""
    dtype = x.dtype if dtype is None else dtype
    if dtype not in _KIND:
        return False, f"the Triton adapter takes float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    d = x.shape[-1] if d is None else d
    for name, n in (("hidden", d), ("bottleneck", r)):
        if n is not None and not 1 <= n <= _WIDEST:
            return False, f"the Triton adapter takes a {name} width of 1 to {_WIDEST}, got {n}"
    if r is not None and d * r >= 1 << 31:
        return False, f"the Triton adapter takes weights of fewer than 2^31 elements, got {d} x {r}"
    if x.is_cuda:
        if torch.version.hip is not None:
            return False, "the Triton adapter is checked on NVIDIA GPUs only, this torch is built for ROCm"
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 0):
            has = ".".join(map(str, capability))
            return False, f"the Triton adapter needs compute capability 8.0 or newer, {x.device} has {has}"
    elif not (INTERPRETED and x.device.type == "cpu"):
        return False, f"the Triton adapter needs a CUDA tensor (or TRITON_INTERPRET=1 on the CPU), got {x.device.type}"
    return True, ""


def adapter_forward(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, add_x, eps, activation, scale,
                    save, *, config: Config | None = None, fits: bool = False, mixed: bool = False):  # fmt: skip
    """Semantics: y[i] = scale*(act(n(x[i]) w_down^T + b_down) w_up^T + b_up) + (x[i] if add_x) + res1[i] + res2[i].

    x, res1, res2 [rows, d]; w_down [r, d]; w_up [d, r]; n is LayerNorm iff norm_weight is given. All contiguous and of
    one dtype. activation: 0 identity, 1 relu, 2 gelu (erf), 3 gelu_tanh, 4 silu. Statistics and sums in fp32; rounded
    to the dtype: z, act(z), y, and n(x), or with `config.fold` w_down*norm_weight in its place.
    mixed, as under autocast: w_down and w_up are of one dtype, z too, and n(x) and act(z) are rounded to it; all others
    have a dtype of their own, y that of the sum that it is (without residuals that of the weights).
    Returns (y, z, stats): with `save` z [rows, r] is the pre-activation and stats [rows, 2] fp32 are (mean, rstd).
    `config` overrides the table's choice (tuning and tests). `fits`: who calls has seen to all of this, and x, the
    residuals and y may have any number of dimensions in place of rows.
    """
    rows, d, r = _sizes("adapter_forward", x, w_down, fits)
    fits or _check(
        "adapter_forward", x,
        (("w_down", w_down, (r, d)), ("b_down", b_down, (r,)), ("w_up", w_up, (d, r)), ("b_up", b_up, (d,)),
         ("norm_weight", norm_weight, (d,)), ("norm_bias", norm_bias, (d,)), ("res1", res1, (rows, d)),
         ("res2", res2, (rows, d))), mixed,
    )  # fmt: skip
    norm, dtype = norm_weight is not None, w_down.dtype
    cfg = config or adapter_config.select(_KIND[dtype], "forward", d, r, rows)
    y = torch.empty_like(x, dtype=_sum_dtype(x, w_down, res1, res2, add_x)) if mixed else torch.empty_like(x)
    z = x.new_empty((rows, r) if save else (0,), dtype=dtype)
    stats = x.new_empty((rows, 2) if norm else (0,), dtype=torch.float32) if save else z
    if rows == 0:
        return y, z, stats
    with launching.on_device(x):
        down, norm_kind = _down(cfg, x, w_down, b_down, norm_weight, norm_bias)
        st = stats if save and norm else None
        tiles = launching.cdiv(rows, cfg.block_m)
        opt = dict(D=d, R=r, **_tile(cfg))
        if cfg.split:
            z_buffer = z if save else x.new_empty(rows, r, dtype=dtype)
            grid = (tiles, launching.cdiv(r, cfg.r1))
            launching.launch(K.forward_down, grid, x, *down, z_buffer, st, rows, float(eps),
                    BK=cfg.block_k, NORM=norm_kind, **opt)  # fmt: skip
            grid = (tiles, launching.cdiv(d, cfg.block_n))
            launching.launch(K.forward_up, grid, z_buffer, x, w_up, b_up, res1, res2, y, rows, float(scale),
                    BN=cfg.block_n, ACT=activation, ADD_X=bool(add_x), **opt)  # fmt: skip
        else:
            launching.launch(K.forward_fused, (tiles,), x, *down, w_up, b_up, res1, res2, y, z if save else None, st,
                    rows, float(eps), float(scale), R2=cfg.r2, BK=cfg.block_k, BN=cfg.block_n, ACT=activation,
                    NORM=norm_kind, ADD_X=bool(add_x), **opt)  # fmt: skip
    return y, z, stats


def adapter_backward(grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x, activation, scale, needs,
                     *, config: Config | None = None, fits: bool = False, mixed: torch.dtype | None = None,
                     low: bool = False):  # fmt: skip
    """Semantics: (dx, dw_down, db_down, dw_up, db_up, dnorm_weight, dnorm_bias) of adapter_forward, from grad = dL/dy.

    `needs` is a bit mask in that order; what is not needed comes back with 0 elements (and may be one tensor), and
    costs nothing. dx includes grad itself iff add_x. z and stats are adapter_forward's, `fits` is as there. Sums in
    fp32, no atomics: the same bits every time. mixed: dtypes are as there, and this is that of the gradients of w_down,
    b_down, w_up and b_up; others have that of what they are the gradient of. low: one more result, grad in the weights'
    dtype.
    The gradients of the norm's weight and bias come from r x d products, never from a sum over rows:
    dnorm_weight = sum_r (dz^T xhat)*w_down, dnorm_bias = w_down^T (column sums of dz).
    """
    rows, d, r = _sizes("adapter_backward", x, w_down, fits)
    norm = norm_weight is not None
    fits or _check(
        "adapter_backward", x,
        (("grad", grad, (rows, d)), ("z", z, (rows, r)), ("w_down", w_down, (r, d)), ("w_up", w_up, (d, r)),
         ("norm_weight", norm_weight, (d,)), ("norm_bias", norm_bias, (d,))), mixed,
    )  # fmt: skip
    if norm and not fits:
        launching.check_tensor("adapter_backward", "stats", stats, (rows, 2), torch.float32, x.device, "x and w_down")
    cfg = config or adapter_config.select(_KIND[w_down.dtype], "backward", d, r, rows)

    def over_rows(*args):
        _backward_rows(cfg, bool(add_x), *args)

    return _gradients(cfg, grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, activation, scale, needs, over_rows,
                      mixed, low)  # fmt: skip


def _gradients(cfg, grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, activation, scale, needs, over_rows,
               mixed=None, low=False):  # fmt: skip
    """adapter_backward's results. over_rows launches what reads the rows, given its arguments, its sizes and the width
    of h; where only db_up is needed it is not called."""
    (r, d), norm, dtype = w_down.shape, norm_weight is not None, w_down.dtype
    rows = x.numel() // d
    if norm_weight is None:
        needs &= ~(DNORM_WEIGHT | DNORM_BIAS)
    elif norm_bias is None:
        needs &= ~DNORM_BIAS
    # bf16: q = rstd*dz meets the raw x in the weight gradient, and the mean is taken off afterwards (fp32 holds the
    # products exactly). fp32 would lose digits to that difference, fp16 could overflow in q: both multiply dz by xhat.
    qscale = norm and x.dtype == dtype == torch.bfloat16
    q = h = part = sums = g_low = hat = None
    dx = torch.empty_like(x) if needs & DX else None
    h_width = (r // 16 + 1) * 16  # act(z), a column of ones for the sum of grad, zeros up to an aligned width
    if needs & (DW_DOWN | DNORM_WEIGHT) or (needs & DX and cfg.split):
        q = x.new_empty(rows, r, dtype=dtype)
    if needs & DW_UP:
        h = x.new_empty(rows, h_width, dtype=dtype)
    if mixed is not None:  # what a product over the rows reads is of the weights' dtype
        if grad.dtype is not dtype and (low or needs & DW_UP) and needs & ~DB_UP:
            g_low = torch.empty_like(grad, dtype=dtype)
        if x.dtype is not dtype and needs & DX and needs & (DW_DOWN | DNORM_WEIGHT):
            hat = torch.empty_like(x, dtype=dtype)
    if needs & (DB_DOWN | DNORM_BIAS) or (needs & (DW_DOWN | DNORM_WEIGHT) and (qscale or norm_bias is not None)):
        part = x.new_empty(launching.cdiv(rows, cfg.block_m), 2 if qscale else 1, r, dtype=torch.float32)
    with launching.on_device(x):
        if rows and needs & ~DB_UP:
            st = stats if norm else None
            args = grad, x, z, st, w_down, w_up, norm_weight, dx, q, h, part, g_low, hat, rows, float(scale)
            over_rows(args, dict(D=d, R=r, ACT=activation, NORM=norm, QSCALE=qscale), h_width)
        if part is not None:
            sums = part.sum(0)
        rest = _weight_gradients(grad, x, stats, q, h, sums, w_down, w_up, norm_weight, norm_bias, scale, qscale, needs,
                                 mixed or dtype, g_low, hat)  # fmt: skip
    if low:
        rest = *rest, grad.to(dtype) if g_low is None else g_low
    if needs == EVERYTHING:
        return (dx, *rest)
    nothing = x.new_empty(0)
    return tuple([nothing if t is None else t for t in (dx, *rest)])


def _tile(cfg):
    """What every kernel that works on rows takes of a configuration."""
    return dict(num_warps=cfg.num_warps, num_stages=cfg.num_stages, NS=cfg.num_stages, BM=cfg.block_m, R1=cfg.r1)


def _backward_rows(cfg, add_x, args, shape, h_width):
    """Launches what runs over the rows: one kernel, or with a bottleneck too wide for it two that meet at q."""
    grad, x, z, st, w_down, w_up, norm_weight, dx, q, h, part, g_low, hat, rows, scale = args
    tiles = launching.cdiv(rows, cfg.block_m)
    opt = _tile(cfg)
    if not cfg.split:
        launching.launch(K.backward_fused, (tiles,), *args, R2=cfg.r2, BK=cfg.block_k, BN=cfg.block_n,
                         HLD=h_width, ADD_X=add_x, **shape, **opt)  # fmt: skip
        return
    grid = (tiles, launching.cdiv(shape["R"], cfg.r1))
    launching.launch(K.backward_dz, grid, grad, z, st, w_up, q, h, part, g_low, rows, scale,
            BK=cfg.block_k, HLD=h_width, **shape, **opt)  # fmt: skip
    if dx is not None:
        shape = {k: v for k, v in shape.items() if k != "ACT"}
        launching.launch(K.backward_dx, (tiles,), q, grad, x, st, w_down, norm_weight, dx, hat, rows,
                BN=cfg.block_n, ADD_X=add_x, **shape, **opt)  # fmt: skip


def _weight_gradients(grad, x, stats, q, h, sums, w_down, w_up, norm_weight, norm_bias, scale, qscale, needs, dtype,
                      g_low, hat):  # fmt: skip
    """The six parameter gradients, None for what is not needed: two products over the rows (cuBLAS: deterministic,
    bound by memory), one launch. dtype: that of the products' weights' gradients; g_low and hat: grad and normalised x
    as the products read them, where that is known.
    """
    r, d = w_down.shape
    gd = gu = None
    if needs & (DW_DOWN | DNORM_WEIGHT):
        right = (x if hat is None else hat).view(-1, d)
        if hat is None and norm_weight is not None and not qscale:
            right = (right - stats[:, :1]) * stats[:, 1:]
        gd = product(q, right.to(q.dtype))
    if needs & (DW_UP | DB_UP):
        grad = grad.view(-1, d)
    if needs & DW_UP:
        gu = product(grad if g_low is None else g_low.view(-1, d), h)
    there = (DW_DOWN, w_down), (DB_DOWN, None), (DW_UP, w_up), (DB_UP, None), (DNORM_WEIGHT, norm_weight)
    outputs = []
    for bit, t in (*there, (DNORM_BIAS, norm_bias)):
        if not needs & bit:
            outputs.append(None)
        elif t is None:
            outputs.append(x.new_empty(r if bit == DB_DOWN else d, dtype=dtype))
        else:
            outputs.append(torch.empty_like(t, dtype=t.dtype if bit >= DNORM_WEIGHT else dtype))
    made = tuple(outputs)
    if needs & DB_UP and gu is None:
        made[3].copy_(grad.sum(0, dtype=torch.float32) * scale)
        outputs[3] = None
    if needs & ~(DX | DB_UP) or gu is not None:
        columns, bottleneck = adapter_config.WEIGHT_GRADS_TILE
        launching.launch(K.weight_grads, (launching.cdiv(d, columns),), gd, gu, sums, w_down, norm_weight, norm_bias,
                         *outputs, float(scale), D=d, R=r, HLD=(r // 16 + 1) * 16, BD=columns, BR=bottleneck,
                         QSCALE=qscale, num_warps=4)  # fmt: skip
    return made


def _sum_dtype(x, w_down, res1, res2, add_x):
    """y's dtype: that of the adapter's output, which is the weights', and what is added to it, as torch promotes."""
    return launching.widest(x if add_x else None, res1, res2, dtype=w_down.dtype)


def _down(cfg, x, w_down, b_down, norm_weight, norm_bias):
    """(what project_down takes of the down half, its NORM)."""
    if norm_weight is None:
        return (w_down, b_down, None, None, None), 0
    if cfg.fold and x.dtype is w_down.dtype:  # folded, x goes into the product as it is
        return _fold(w_down, b_down, norm_weight, norm_bias), 2
    return (w_down, b_down, None, norm_weight, norm_bias), 1


def _fold(w_down, b_down, norm_weight, norm_bias):
    """The down weights with the LayerNorm's gain and centring folded in, see adapter_kernels.fold_weights."""
    r, d = w_down.shape
    folded = torch.empty_like(w_down)
    row_sums, bias = (w_down.new_empty(r, dtype=torch.float32) for _ in range(2))
    rows, columns = adapter_config.FOLD_TILE
    columns = min(columns, adapter_config.power_of_two(d))
    launching.launch(K.fold_weights, (launching.cdiv(r, rows),), w_down, b_down, norm_weight, norm_bias, folded,
                     row_sums, bias, D=d, R=r, BR=rows, BD=columns, num_warps=4)  # fmt: skip
    return folded, bias, row_sums, None, None


def _sizes(function: str, x, w_down, fits: bool = False):
    if fits:
        r, d = w_down.shape
        return x.numel() // d, d, r
    for name, t in (("x", x), ("w_down", w_down)):
        if t.dim() != 2:
            raise ValueError(f"{function}: {name} has shape {tuple(t.shape)}, expected two dimensions")
    launching.check_matrix(function, "x", x)
    return *x.shape, w_down.shape[0]


_PRODUCTS = ("w_down", "w_up", "z")


def _check(function: str, x, tensors, mixed=None):
    dtype, device = x.dtype, x.device
    weights = next(t.dtype for name, t, _ in tensors if name == "w_down")
    for name, t, shape in tensors:  # what check_tensor asks first, without a call for each
        if mixed:
            dtype = weights if name in _PRODUCTS else None
        if t is None or t.shape == shape and t.dtype is dtype and t.device == device and t.is_contiguous():
            continue
        launching.check_tensor(function, name, t, shape, dtype, device, "x and w_down")
