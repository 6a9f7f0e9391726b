"""The adapter on each backend: C++, CUDA, Triton and plain torch, behind one signature (that of the raw C++ ops)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .. import backends
from ..spec import ACTIVATIONS
from . import _cuda
from ._common import all_dense, dense, rows, unflatten, wide

ACT = {
    0: lambda z: z,
    1: F.relu,
    2: F.gelu,
    3: lambda z: F.gelu(z, approximate="tanh"),
    4: F.silu,
}
_ACT_BACKWARD = {
    0: lambda g, z: g,
    1: lambda g, z: g * (z > 0),
    2: lambda g, z: torch.ops.aten.gelu_backward(g, z, approximate="none"),
    3: lambda g, z: torch.ops.aten.gelu_backward(g, z, approximate="tanh"),
    4: torch.ops.aten.silu_backward,
}
assert set(ACT) == set(ACTIVATIONS.values())


def split_residuals(x, residuals):
    """(is x itself one of them, the others), or None where a kernel does not take them: one is None, or too many."""
    add_x, fused = False, []
    for t in residuals:
        if t is x and not add_x:
            add_x = True
        elif t is None:
            return None
        else:
            fused.append(t)
    return (add_x, fused) if len(fused) <= 2 else None


@functools.cache
def _launchers(name: str):
    if name == "cpp":
        return torch.ops.fastpetl.cpu_adapter_forward.default, torch.ops.fastpetl.cpu_adapter_backward.default
    if name == "cuda":
        return _cuda.adapter_forward, _cuda.adapter_backward
    if name == "triton":
        from fastpetl.kernels import adapter as kernels

        return kernels.adapter_forward, kernels.adapter_backward
    return reference_forward, reference_backward


def run_forward(name, x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, add_x, eps, code, scale, save):
    """Semantics: (y [rows, d], z [rows, r], stats [rows, 2]) by backend `name`; z and stats are empty unless save."""
    parameters = all_dense(w_down, b_down, w_up, b_up, norm_weight, norm_bias)
    x, res1, res2 = rows(x), None if res1 is None else rows(res1), None if res2 is None else rows(res2)
    if x.shape[0] == 0:
        return torch.empty_like(x), *_saved(x, w_down.shape[0], norm_weight, save)
    name = backends.of_size("adapter", name, x, w_down.shape[0])
    return _launchers(name)[0](x, *parameters, res1, res2, add_x, eps, code, scale, save)


def run_backward(name, grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x, code, scale, needs):
    """Semantics: the seven gradients by backend `name`; bit i of `needs` asks for the i-th, others are empty."""
    if x.shape[0] == 0:
        r, d = w_down.shape
        shapes = ((0, d), (r, d), (r,), (d, r), (d,), (d,), (d,))
        return tuple(x.new_zeros(s if needs >> i & 1 else 0) for i, s in enumerate(shapes))
    parameters = [dense(t) for t in (w_down, w_up, norm_weight, norm_bias)]
    name = backends.of_size("adapter", name, x, w_down.shape[0], True)
    return tuple(_launchers(name)[1](rows(grad), x, z, stats, *parameters, add_x, code, scale, needs))


def eager_forward(name, x, *args):
    """Semantics: `run_forward` of an x that is dense and tensors of shapes, dtype and device that are known to fit, so
    that nothing has to be looked at again; y has x's shape.
    """
    *tensors, add_x, eps, code, scale, save = args
    name = backends.of_size("adapter", name, x, tensors[0].shape[0])
    if name == "triton" and x.numel():
        return _launchers(name)[0](x, *all_dense(*tensors), add_x, eps, code, scale, save, fits=True)
    y, *saved = run_forward(name, x, *args)
    return unflatten(y, x.shape), *saved


def eager_backward(name, grad, x, z, stats, *args):
    """Semantics: `run_backward` for what `eager_forward` was given; dx has x's shape."""
    *parameters, add_x, code, scale, needs = args
    name = backends.of_size("adapter", name, x, parameters[0].shape[0], True)
    if name == "triton" and x.numel():
        made = x, z, stats, *all_dense(*parameters)
        return _launchers(name)[1](dense(grad), *made, add_x, code, scale, needs, fits=True)
    dx, *rest = run_backward(name, grad, rows(x), z, stats, *args)
    return (dx.view(x.shape) if needs & 1 else dx), *rest


def _saved(x, r, norm_weight, save):
    z = x.new_empty((x.shape[0], r) if save else 0)
    return z, x.new_empty((x.shape[0], 2) if save and norm_weight is not None else 0, dtype=wide(x))


def _normalised(x, stats, norm_weight, norm_bias):
    """(x̂, n) in fp32 or wider from the saved statistics."""
    hat = (x.to(stats.dtype) - stats[:, :1]) * stats[:, 1:]
    n = hat * norm_weight
    return hat, n if norm_bias is None else n + norm_bias


def reference_forward(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, add_x, eps, code, scale, save):
    """Semantics: what every launcher's forward returns, in plain torch; rounds where `adapter_reference` does."""
    stats = x.new_empty(0, dtype=wide(x))
    h = x
    if norm_weight is not None:
        wide_x = x.to(stats.dtype)
        var, mean = torch.var_mean(wide_x, -1, correction=0, keepdim=True)
        stats = torch.cat([mean, torch.rsqrt(var + eps)], -1)
        h = _normalised(x, stats, norm_weight, norm_bias)[1].to(x.dtype)
    z = F.linear(h, w_down, b_down)
    y = F.linear(ACT[code](z), w_up, b_up) * scale
    for r in (x if add_x else None, res1, res2):
        y = y if r is None else y + r
    return (y, z, stats) if save else (y, *_saved(x, 0, None, False))


def reference_backward(grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x, code, scale, needs):
    """Semantics: what every launcher's backward returns, in plain torch: gradients in x's dtype, sums in fp32."""
    acc = wide(x)
    g, zw, up = grad.to(acc), z.to(acc), w_up.to(acc)
    hat, n = (None, x.to(acc)) if norm_weight is None else _normalised(x, stats, norm_weight, norm_bias)
    dz = _ACT_BACKWARD[code](scale * (g @ up), zw)
    dn = dz @ w_down.to(acc)
    dx = dn
    if norm_weight is not None:
        e = dn * norm_weight
        dx = stats[:, 1:] * (e - e.mean(-1, keepdim=True) - hat * (e * hat).mean(-1, keepdim=True))
    if add_x:
        dx = dx + g
    makers = (
        lambda: dx,
        lambda: dz.t() @ n,
        lambda: dz.sum(0),
        lambda: scale * (g.t() @ ACT[code](zw)),
        lambda: scale * g.sum(0),
        lambda: (dn * hat).sum(0),
        lambda: dn.sum(0),
    )
    return tuple(make().to(x.dtype) if needs >> i & 1 else x.new_empty(0) for i, make in enumerate(makers))
