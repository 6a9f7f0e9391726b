"""Adapters and sites under torch.autocast by the Triton kernels, which take every tensor in its own dtype.

The residual stream, what is added to it, the biases and the norms' parameters stay as they are (float32, as a rule);
the two matrices are cast, to what autocast casts to, and their gradients come back uncast. Beside those casts nothing
is launched: what else is rounded to autocast's dtype (a norm's rows, the pre-activation, the activation) is rounded
inside the kernel, where eager autocast rounds it; the biases and the up projection's result are not.
"""

from __future__ import annotations

import functools

import torch

from .. import backends
from ..spec import AdapterSpec
from ._adapter import split_residuals
from ._casts import cast
from ._common import _PLAIN, all_dense, autocast_dtype, dense, first_order, grad_mask, needs_grad

FLOATS = torch.float32, torch.bfloat16, torch.float16


@functools.cache
def _kernels():
    from fastpetl.kernels import adapter, launching, site

    return adapter, site, launching.widest


def serves(op: str, x, backend: str) -> torch.dtype | None:
    """Semantics: autocast's dtype where the kernels of `op` serve an eager call on x under autocast, else None: what
    autocast does around the op is torch's then.
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or x.dtype not in FLOATS:
        return None
    dtype = autocast_dtype(x)
    if dtype not in (torch.bfloat16, torch.float16) or not backends.takes_mixed(op, backend, x.device.type):
        return None
    return dtype


def norm_dtype(x, f, dtype=None) -> torch.dtype:
    """Semantics: under autocast that of a norm of x + f and what is of `dtype`: on CUDA it has norms in float32."""
    return torch.float32 if x.is_cuda else _kernels()[2](x, f, dtype=dtype)


def adapter(x, mine, residuals, eps, code, scale, backend):
    """Semantics: `ops.adapter` under autocast; None where the kernels do not serve, or anything is not as it should be,
    which the long way sees to. mine: w_down, b_down, w_up, b_up, norm_weight, norm_bias.
    """
    dtype = serves("adapter", x, backend)
    split = None if dtype is None else split_residuals(x, residuals)
    if split is None:
        return None
    add_x, fused = split
    w_down, norm_weight, norm_bias = mine[0], *mine[4:]
    if type(w_down) not in _PLAIN or w_down.dim() != 2 or not x.dim():
        return None
    d, r = x.shape[-1:], w_down.shape[0]
    if not d[0] or not r or mine[2] is None or (norm_weight is None and norm_bias is not None):
        return None
    shapes = (r, *d), (r,), (*d, r), d, d, d, *(x.shape,) * len(fused)
    if not _fit(x, (*mine, *fused), shapes):
        return None
    tensors = (x, *mine, *fused, *(None,) * (2 - len(fused)))
    weights, config = _weights(mine, dtype), (add_x, eps, code, scale)
    if needs_grad(*tensors):
        return _Adapter.apply(*tensors, (weights, *config))
    x, norm_weight, norm_bias, *fused = all_dense(x, norm_weight, norm_bias, *tensors[7:])
    forward = _kernels()[0].adapter_forward
    return forward(x, *weights, norm_weight, norm_bias, *fused, *config, False, fits=True, mixed=True)[0]


def site(spec, x, f, normed, mine, tail_weight, tail_bias, backend):
    """Semantics: (s, n) of a site without dropout and mask under autocast, by one launch, s None where the spec does
    not emit it; None as for `adapter`.
    """
    from ._fused import _arranged

    dtype = serves("site", x, backend)
    if dtype is None or type(spec) is not AdapterSpec or spec.tail is None or spec.placement != "inside":
        return None
    there = f is not None or spec.input != "sublayer", (normed is not None) == (spec.input == "normalised")
    if spec.dropout or not x.dim() or x.shape[-1] != spec.hidden or not all(there):
        return None
    if tail_weight is None or (tail_bias is not None and spec.tail != "layernorm"):
        return None
    if any((t is None) != (shape is None) for t, shape in zip(mine, spec.shapes, strict=True)):
        return None
    d = (spec.hidden,)
    tensors = (f, normed, *mine, tail_weight, tail_bias)
    if not _fit(x, tensors, (x.shape, x.shape, *spec.shapes, d, d)):
        return None
    wide = norm_dtype(x, f, dtype=dtype)
    tensors = _arranged(spec, (x, *tensors[:-2], cast(tail_weight, wide), cast(tail_bias, wide)))
    weights = _weights(mine, dtype)
    if needs_grad(*tensors):
        return _Site.apply(*tensors, (weights, spec.config))
    u, *rest = all_dense(tensors[0], *tensors[5:])
    s, n, *_ = _kernels()[1].site_forward(u, *weights, *rest, *spec.config, False, fits=True, mixed=True)
    return (s if spec.emit == "both" else None), n


def _fit(x, tensors, shapes) -> bool:
    """Whether each of the tensors is None, or plain, of a dtype that the kernels take, on x's device, of its shape."""
    device = x.device
    for t, shape in zip(tensors, shapes, strict=True):
        if t is None or type(t) in _PLAIN and t.dtype in FLOATS and t.shape == shape and t.device == device:
            continue
        return False
    return True


def _weights(mine, dtype) -> list:
    """w_down, b_down, w_up and b_up, dense, the matrices in autocast's dtype: apart from autograd, for who calls has
    their gradients.
    """
    made = list(mine[:4])
    for i in (0, 2):
        t = made[i]
        if t.dtype is not dtype:
            made[i] = t.detach().to(dtype) if t.requires_grad and torch.is_grad_enabled() else cast(t, dtype)
    return all_dense(*made)


def _of_residuals(ctx, wanted, g, low):
    """The gradients of res1 and res2 from that of the sum, which `low` is as well, rounded to the weights' dtype."""
    kinds = ctx.residuals
    return [None if not w else low if kind is not g.dtype and low is not None and kind is low.dtype else g
            for w, kind in zip(wanted, kinds, strict=True)]  # fmt: skip


def _wants_low(ctx, wanted, g, dtype) -> bool:
    """Whether a residual of the weights' dtype wants its gradient, and has not that dtype's already."""
    return g.dtype is not dtype and any(w and t is dtype for w, t in zip(wanted, ctx.residuals, strict=True))


def _kinds(*residuals):
    return [None if t is None else t.dtype for t in residuals]


class _Adapter(torch.autograd.Function):
    """The eager door: straight to the launcher."""

    @staticmethod
    def forward(ctx, x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, config):
        weights, add_x, eps, code, scale = config
        ctx.needs, ctx.residuals = grad_mask(ctx.needs_input_grad[:7]), _kinds(res1, res2)
        ctx.config = add_x, code, scale, w_down.dtype, weights[0].dtype
        x, norm_weight, norm_bias, res1, res2 = all_dense(x, norm_weight, norm_bias, res1, res2)
        rest = norm_weight, norm_bias, res1, res2, add_x, eps, code, scale, ctx.needs != 0
        y, z, stats = _kernels()[0].adapter_forward(x, *weights, *rest, fits=True, mixed=True)
        if ctx.needs:
            ctx.save_for_backward(x, z, stats, weights[0], weights[2], norm_weight, norm_bias)
        return y

    @staticmethod
    @first_order("adapter")
    def backward(ctx, grad):
        add_x, code, scale, made, dtype = ctx.config
        grads, wanted, low, needs = [None] * 7, ctx.needs_input_grad[7:9], None, ctx.needs
        if needs:
            rest = add_x, code, scale, needs
            lower = _wants_low(ctx, wanted, grad, dtype)
            out = _kernels()[0].adapter_backward(
                dense(grad), *ctx.saved_tensors, *rest, fits=True, mixed=made, low=lower
            )
            grads = [g if needs >> i & 1 else None for i, g in enumerate(out[:7])]
            low = out[7] if lower else None
        return (*grads, *_of_residuals(ctx, wanted, grad, low), None)


class _Site(torch.autograd.Function):
    """The eager door: straight to the launcher."""

    @staticmethod
    def forward(ctx, x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, tail_weight, tail_bias, config):
        weights, spec = config
        add_x, _, code, scale, tail, _, emit_s = spec
        ctx.config = add_x, code, scale, tail, w_down.dtype, weights[0].dtype
        ctx.residuals = _kinds(res1, res2)
        ctx.set_materialize_grads(False)
        rows = all_dense(norm_weight, norm_bias, res1, res2, tail_weight, tail_bias)
        x = dense(x)
        out = _kernels()[1].site_forward(x, *weights, *rows, *spec, True, fits=True, mixed=True)
        s, n, z, stats, tail_stats = out
        # Where s is an output, what is saved is that output: autograd then counts it once and sees writes to it.
        ctx.save_for_backward(s, tail_stats, rows[4], x, z, stats, weights[0], weights[2], *rows[:2])
        return (s if emit_s else None), n

    @staticmethod
    @first_order("adapter_residual_norm")
    def backward(ctx, g_s, g_n):
        from ._fused import asked, placed

        if g_s is None and g_n is None:
            return (None,) * 12
        *config, made, dtype = ctx.config
        needs, wanted = asked(ctx.needs_input_grad), ctx.needs_input_grad[7:9]
        s, *saved = ctx.saved_tensors
        g_s, g_n = dense(g_s), dense(g_n)
        lower = _wants_low(ctx, wanted, s, dtype)
        options = dict(fits=True, mixed=made, low=lower)
        if g_n is None:  # the tail was not used: what is left is the adapter
            rest = *config[:3], needs & 127
            out = g_s, *_kernels()[0].adapter_backward(g_s, *saved[2:], *rest, **options)
            zeros = (saved[1].new_zeros(saved[1].shape if needs >> i & 1 else 0) for i in (7, 8))
            out = *out[:8], *zeros, *out[8:]
        else:
            out = _kernels()[1].site_backward(g_s, g_n, s, *saved, *config, needs, **options)
        grads = placed(out[:10], needs, ctx.needs_input_grad)
        grads[7:9] = _of_residuals(ctx, wanted, out[0], out[10] if lower else None)
        return (*grads, None)
