"""Launchers of the Triton kernels of an adapter site with a norm behind it: one launch over the rows each way.

    s = scale*(act(own(x) w_down^T + b_down) w_up^T + b_up) + (x if add_x) + res1 + res2,  n = norm(s)

The kernels are in site_kernels.py, their tile sizes in adapter_config.py. A bottleneck too wide for one launch is
served by the launchers of adapter.py and residual_norm.py, one after the other. Without a GPU all run in Triton's
interpreter (TRITON_INTERPRET=1). `verify` says whether a call can be served, and if not, why.
"""

from __future__ import annotations

import torch

from . import adapter, adapter_config, launching, residual_norm
from . import site_kernels as K
from .adapter_config import Config

ADAPTER = 127  # the bits of needs that are adapter_backward's


def verify(
    x: torch.Tensor, d: int | None = None, r: int | None = None, dtype: torch.dtype | None = None
) -> tuple[bool, str]:
    """Semantics: (True, "") if the kernels can serve x [..., d] with bottleneck r, else (False, why)."""
    d = x.shape[-1] if d is None else d
    if d > residual_norm.WIDEST:
        return False, f"the Triton site takes a hidden width of 1 to {residual_norm.WIDEST}, got {d}"
    return adapter.verify(x, d, r, dtype)


def site_forward(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, tail_weight, tail_bias, add_x, eps,
                 activation, scale, tail, tail_eps, emit_s, save, *, config: Config | None = None,
                 fits: bool = False, mixed: bool = False):  # fmt: skip
    """Semantics: s[i] = scale*(act(own(x[i]) w_down^T + b_down) w_up^T + b_up) + (x[i] if add_x) + res1[i] + res2[i],
    n[i] = norm(s[i]).

    x, res1, res2 [rows, d]; w_down [r, d]; w_up [d, r]; b_down [r]; the other vectors [d]. All contiguous and of one
    dtype. own is LayerNorm iff norm_weight is given; norm is LayerNorm (tail 1) or RMSNorm (tail 2) of the rounded s;
    activation as in adapter_forward, as is what is rounded. b_down, b_up, norm_bias, res1, res2, tail_bias may be None.
    Returns (s, n, z, stats, tail_stats): s unless neither emit_s nor save asks for it; with `save` z [rows, r], the
    pre-activation, and fp32 [rows, 2] (mean, rstd) of x (with norm_weight) and of s (mean 0 for RMSNorm). What is not
    asked for has no elements, and may be one tensor. `config` overrides the table's choice (tuning and tests).
    `fits`: who calls has seen to all of this, and x, the residuals, s and n may have any number of dimensions in place
    of rows. mixed: as in adapter_forward, s as y there, n of the wider of s's dtype and tail_weight's.
    """
    name = "site_forward"
    rows, d, r = adapter._sizes(name, x, w_down, fits)
    fits or adapter._check(
        name, x,
        (("w_down", w_down, (r, d)), ("b_down", b_down, (r,)), ("w_up", w_up, (d, r)), ("b_up", b_up, (d,)),
         ("norm_weight", norm_weight, (d,)), ("norm_bias", norm_bias, (d,)), ("res1", res1, (rows, d)),
         ("res2", res2, (rows, d)), ("tail_weight", tail_weight, (d,)), ("tail_bias", tail_bias, (d,))),
        mixed,
    )  # fmt: skip
    fits and d <= residual_norm.WIDEST or _check_tail(name, d, tail, tail_weight)
    cfg = config or adapter_config.select(adapter._KIND[w_down.dtype], name, d, r, rows)
    if cfg.split:
        s, z, stats = adapter.adapter_forward(
            x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, add_x, eps, activation, scale, save,
            config=config, fits=fits, mixed=mixed,
        )  # fmt: skip
        tails = tail_weight, tail_bias, None, None, tail, residual_norm.NORM, tail_eps, 0.0
        _, n, tail_stats = residual_norm.residual_norm_forward(s.view(rows, d), None, *tails, save, mixed=mixed)
        return s if emit_s or save else x.new_empty(0), n.view(x.shape), z, stats, tail_stats
    dtypes = (x.dtype,) * 3
    if mixed:
        s_dtype = adapter._sum_dtype(x, w_down, res1, res2, add_x)
        dtypes = s_dtype, launching.widest(tail_weight, dtype=s_dtype), w_down.dtype
    n, s, z, stats, tail_stats = _results(x, rows, r, emit_s, save, norm_weight is not None, *dtypes)
    if rows == 0:
        return s, n, z, stats, tail_stats
    with launching.on_device(x):
        down, norm_kind = adapter._down(cfg, x, w_down, b_down, norm_weight, norm_bias)
        saved = z if save else None, stats if save and norm_weight is not None else None, tail_stats if save else None
        grid = (launching.cdiv(rows, cfg.block_m),)
        launching.launch(
            K.site_forward, grid, x, *down, w_up, b_up, res1, res2, tail_weight, tail_bias,
            s if s.numel() else n, n, *saved, rows, float(eps), float(scale), float(tail_eps),
            D=d, R=r, R2=cfg.r2, BK=cfg.block_k, BN=cfg.block_n, ACT=activation, NORM=norm_kind, ADD_X=bool(add_x),
            TAIL=tail, **adapter._tile(cfg),
        )  # fmt: skip
    return s, n, z, stats, tail_stats


def site_backward(g_s, g_n, s, tail_stats, tail_weight, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x,
                  activation, scale, tail, needs, *, config: Config | None = None, fits: bool = False,
                  mixed: torch.dtype | None = None, low: bool = False):  # fmt: skip
    """Semantics: (g, dx, dw_down, db_down, dw_up, db_up, dnorm_weight, dnorm_bias, dtail_weight, dtail_bias) of
    site_forward, from g_s = dL/ds (None: s was not used) and g_n = dL/dn.

    g = g_s + the gradient of s through the tail, rounded: always given, it is the gradient of res1 and res2 too. The
    other nine come back with 0 elements (and may be one tensor) where their bit of `needs` (0 ... 8, in this order) is
    not set. s, tail_stats, z and stats are site_forward's, `fits` is as there. Sums in fp32, no atomics: the same bits
    every time. mixed, low: as in adapter_backward; low is g in the weights' dtype.
    """
    name = "site_backward"
    rows, d, r = adapter._sizes(name, x, w_down, fits)
    fits or adapter._check(
        name, x,
        (("g_s", g_s, (rows, d)), ("g_n", g_n, (rows, d)), ("s", s, (rows, d)), ("tail_weight", tail_weight, (d,)),
         ("z", z, (rows, r)), ("w_down", w_down, (r, d)), ("w_up", w_up, (d, r)), ("norm_weight", norm_weight, (d,)),
         ("norm_bias", norm_bias, (d,))), mixed,
    )  # fmt: skip
    fits and d <= residual_norm.WIDEST or _check_tail(name, d, tail, tail_weight)
    both = ("tail_stats", tail_stats), ("stats", stats if norm_weight is not None else tail_stats)
    for what, t in () if fits else both:
        launching.check_tensor(name, what, t, (rows, 2), torch.float32, x.device, "x and w_down")
    cfg = config or adapter_config.select(adapter._KIND[w_down.dtype], name, d, r, rows)
    mine, behind = needs & ADAPTER, needs >> 7
    if cfg.split or not rows or not mine & ~adapter.DB_UP:  # without the adapter's products a row fits into registers
        wants = residual_norm.DX | (behind << 2)
        flat = [None if t is None else t.view(rows, d) for t in (g_s, g_n, s)]
        dtypes = () if mixed is None else (s.dtype, s.dtype, tail_weight.dtype, tail_weight.dtype)
        g, _, *behind = residual_norm.residual_norm_backward(
            *flat, tail_stats, tail_weight, None, None, tail, 0.0, wants, mixed=dtypes
        )
        g = g.view(x.shape)
        rest = adapter.adapter_backward(g, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x, activation, scale,
                                        mine, config=config, fits=fits, mixed=mixed, low=low)  # fmt: skip
        return (g, *rest[:7], *behind, *rest[7:])
    g, tiles = torch.empty_like(s), launching.cdiv(rows, cfg.block_m)
    part = x.new_empty(tiles, 2, d, dtype=torch.float32) if behind else None
    tails = [tail_weight.new_empty(d) if behind & bit else None for bit in (1, 2)]

    def over_rows(args, shape, h_width):
        launching.launch(
            K.site_backward, (tiles,), g_s, g_n, s, tail_stats, tail_weight, part, *args, R2=cfg.r2, BK=cfg.block_k,
            BN=cfg.block_n, HLD=h_width, ADD_X=bool(add_x), TAIL=tail, BIAS=bool(behind & 2), **shape,
            **adapter._tile(cfg),
        )  # fmt: skip

    rest = adapter._gradients(
        cfg, g, x, z, stats, w_down, w_up, norm_weight, norm_bias, activation, scale, mine, over_rows, mixed, low
    )
    if behind:
        with launching.on_device(x):
            residual_norm._sum_parts(part, *tails)
    if behind != 3:
        nothing = x.new_empty(0)
        tails = [nothing if t is None else t for t in tails]
    return (g, *rest[:7], *tails, *rest[7:])


def _results(x, rows, r, emit_s, save, norm, s_dtype, n_dtype, z_dtype):
    """site_forward's (n, s, z, stats, tail_stats), uninitialised; one tensor stands for all that is not asked for: each
    costs as long as a check. s is there, asked for or not, where n is not of its dtype and cannot hold it meanwhile.
    """
    n = torch.empty_like(x, dtype=n_dtype)
    s = torch.empty_like(x, dtype=s_dtype) if emit_s or save or n_dtype is not s_dtype else x.new_empty(0)
    if not save:
        nothing = x.new_empty(0) if emit_s else s
        return n, s, nothing, nothing, nothing
    tail_stats = x.new_empty((rows, 2), dtype=torch.float32)
    stats = x.new_empty((rows, 2) if norm else 0, dtype=torch.float32)
    return n, s, x.new_empty((rows, r), dtype=z_dtype), stats, tail_stats


def _check_tail(function, d, tail, tail_weight):
    if tail not in (1, 2):
        raise ValueError(f"{function}: tail is {tail!r}, expected 1 (LayerNorm) or 2 (RMSNorm)")
    if tail_weight is None:
        raise ValueError(f"{function}: tail_weight is None, expected a tensor of shape ({d},)")
    if d > residual_norm.WIDEST:
        raise ValueError(f"{function}: x has {d} columns, expected 1 to {residual_norm.WIDEST}")
