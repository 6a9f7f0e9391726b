"""A site in one launch on each backend: C++, CUDA, Triton and plain torch, behind one signature (that of the raw ops).

s = scale * (act(own(x) w_down^T + b_down) w_up^T + b_up) + (x if add_x) + res1 + res2        n = tail(s)
"""

from __future__ import annotations

import functools

import torch

from .. import backends
from . import _adapter, _cuda, _residual_norm
from ._common import all_dense, dense, rows, unflatten, wide

ADAPTER = (1 << 7) - 1  # the bits of `needs` that ask for the adapter's gradients, as in adapter_backward
TAIL_WEIGHT, TAIL_BIAS = 1 << 7, 1 << 8


@functools.cache
def _launchers(name: str):
    if name == "cpp":
        return torch.ops.fastpetl.cpu_site_forward.default, torch.ops.fastpetl.cpu_site_backward.default
    if name == "cuda":
        return _cuda.site_forward, _cuda.site_backward
    if name == "triton":
        from fastpetl.kernels import site as kernels

        return kernels.site_forward, kernels.site_backward
    if name == "composed":
        return composed_forward, composed_backward
    return reference_forward, reference_backward


def run_forward(name, x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, tail_weight, tail_bias, add_x,
                eps, code, scale, tail, tail_eps, emit_s, save):  # fmt: skip
    """Semantics: (s, n, z, stats, tail_stats) by backend `name`; n = tail(s) of the s rounded to the dtype.

    tail: 1 LayerNorm, 2 RMSNorm. s [rows, d]: empty (0 elements) unless emit_s or save; n [rows, d]; z [rows, r], the
    pre-activation, stats [rows, 2] fp32 (mean, rstd) of x, only with norm_weight, and tail_stats [rows, 2] those of s
    (mean 0 for RMSNorm): empty unless save. Launchers get dense tensors of one dtype and rows > 0.
    """
    x, res1, res2 = rows(x), None if res1 is None else rows(res1), None if res2 is None else rows(res2)
    if x.shape[0] == 0:
        return empty(x, w_down.shape[0], norm_weight, emit_s, save)
    *parameters, tail_weight, tail_bias = all_dense(
        w_down, b_down, w_up, b_up, norm_weight, norm_bias, tail_weight, tail_bias
    )
    name = backends.of_size("site", name, x, w_down.shape[0])
    return tuple(
        _launchers(name)[0](
            x, *parameters, res1, res2, tail_weight, tail_bias, add_x, eps, code, scale, tail, tail_eps, emit_s, save
        )
    )  # fmt: skip


def run_backward(name, g_s, g_n, s, tail_stats, tail_weight, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x,
                 code, scale, tail, needs, *s_is_n):  # fmt: skip
    """Semantics: (g, dx, dw_down, db_down, dw_up, db_up, dnorm_weight, dnorm_bias, dtail_weight, dtail_bias) by `name`.

    g = g_s + (the gradient of s through the tail), rounded to the dtype: always there, and the gradient of res1 and
    res2; g_s or g_n may be None. Bits 0 to 8 of `needs` ask for the others, in that order; what is not asked for is
    empty. dx includes g iff add_x. s_is_n, for "cpp" only: (the tail's bias, True) where s is the forward's n instead.
    """
    g_s, g_n = (None if g is None else rows(g) for g in (g_s, g_n))
    d, name = x.shape[1], backends.of_size("site", name, x, w_down.shape[0], True)
    mine = [dense(t) for t in (w_down, w_up, norm_weight, norm_bias)]
    if x.shape[0] == 0 or g_n is None:  # the tail was not used: what is left is the adapter
        part = {"composed": _part("adapter", x)}.get(name, name)
        g = x.new_empty(x.shape) if x.shape[0] == 0 else g_s
        out = _adapter.run_backward(part, g, x, z, stats, *mine, add_x, code, scale, needs & ADAPTER)
        return g, *out, *(x.new_zeros(d if needs & bit else 0) for bit in (TAIL_WEIGHT, TAIL_BIAS))
    saved = s, tail_stats, dense(tail_weight), x, z, stats
    return tuple(_launchers(name)[1](g_s, g_n, *saved, *mine, add_x, code, scale, tail, needs, *s_is_n))


def eager_forward(name, x, *args):
    """Semantics: `run_forward` of an x that is dense and tensors of shapes, dtype and device that are known to fit, so
    that nothing has to be looked at again; s and n have x's shape.
    """
    *tensors, add_x, eps, code, scale, tail, tail_eps, emit_s, save = args
    name = backends.of_size("site", name, x, tensors[0].shape[0])
    if name == "triton" and x.numel():
        config = add_x, eps, code, scale, tail, tail_eps, emit_s, save
        return _launchers(name)[0](x, *all_dense(*tensors), *config, fits=True)
    s, n, *saved = run_forward(name, x, *args)
    return (unflatten(s, x.shape) if emit_s or save else s), unflatten(n, x.shape), *saved


def eager_backward(name, g_s, g_n, s, tail_stats, tail_weight, x, z, stats, *args, s_is_n=()):
    """Semantics: `run_backward` for what `eager_forward` was given; g and dx have x's shape."""
    *mine, add_x, code, scale, tail, needs = args
    name = backends.of_size("site", name, x, mine[0].shape[0], True)
    if name == "triton" and x.numel() and g_n is not None:
        saved = dense(s), tail_stats, dense(tail_weight), x, z, stats, *all_dense(*mine)
        return _launchers(name)[1](dense(g_s), dense(g_n), *saved, add_x, code, scale, tail, needs, fits=True)
    saved = rows(s), tail_stats, tail_weight, rows(x), z, stats
    g, dx, *rest = run_backward(name, g_s, g_n, *saved, *args, *s_is_n)
    return g.view(x.shape), (dx.view(x.shape) if needs & 1 else dx), *rest


def empty(x, r, norm_weight, emit_s, save):
    """The forward's outputs, uninitialised."""
    count = x.shape[0]
    s = x.new_empty(x.shape if emit_s or save else 0)
    z = x.new_empty((count, r) if save else 0)
    stats = x.new_empty((count, 2) if save and norm_weight is not None else 0, dtype=wide(x))
    return s, x.new_empty(x.shape), z, stats, x.new_empty((count, 2) if save else 0, dtype=wide(x))


# --- two launches behind the same signature ---------------------------------------------------------------------------


def _part(op: str, x) -> str:
    """The launcher of `op` that "auto" means on x; plain torch is the reference launcher here."""
    name = backends.resolve_for(op, "auto", x.device.type, x.dtype).name
    return "reference" if name == "torch" else name


def composed_forward(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, tail_weight, tail_bias, add_x,
                     eps, code, scale, tail, tail_eps, emit_s, save, parts=None):  # fmt: skip
    """Semantics: what every launcher's forward returns, by the adapter's and then residual_norm's launchers."""
    adapter, norm = parts or (_part("adapter", x), _part("residual_norm", x))
    mine = w_down, b_down, w_up, b_up, norm_weight, norm_bias
    s, z, stats = _adapter.run_forward(adapter, x, *mine, res1, res2, add_x, eps, code, scale, save)
    tails = tail_weight, tail_bias, None, None, tail, _residual_norm.NORM, tail_eps, 0.0
    _, n, tail_stats = _residual_norm.run_forward(norm, s, None, *tails, save)
    return s if emit_s or save else s.new_empty(0), n, z, stats, tail_stats


def composed_backward(g_s, g_n, s, tail_stats, tail_weight, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x,
                      code, scale, tail, needs, parts=None):  # fmt: skip
    """Semantics: what every launcher's backward returns, by residual_norm's and then the adapter's launchers."""
    adapter, norm = parts or (_part("adapter", x), _part("residual_norm", x))
    wanted = 1 | (needs & (TAIL_WEIGHT | TAIL_BIAS)) >> 5
    tails = tail_weight, None, None, tail, 0.0
    g, _, dweight, dbias = _residual_norm.run_backward(norm, g_s, g_n, s, tail_stats, *tails, wanted)
    out = (x.new_empty(0),) * 7
    if needs & ADAPTER:
        mine = w_down, w_up, norm_weight, norm_bias
        out = _adapter.run_backward(adapter, g, x, z, stats, *mine, add_x, code, scale, needs & ADAPTER)
    return g, *out, dweight, dbias


# --- reference: the launchers' contract -------------------------------------------------------------------------------


def reference_forward(*args):
    """Semantics: what every launcher's forward returns, in plain torch: rounds s as the adapter's reference, n once."""
    return composed_forward(*args, parts=("reference", "reference"))


def reference_backward(*args):
    """Semantics: what every launcher's backward returns, in plain torch: g rounded to x's dtype, sums in fp32."""
    return composed_backward(*args, parts=("reference", "reference"))
