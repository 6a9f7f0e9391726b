"""The site in one launch: which calls it takes, the eager door, and the door of compiled code."""

from __future__ import annotations

import torch

from .. import backends
from ..spec import AdapterSpec, site_config
from ._adapter import eager_forward as adapter_forward
from ._common import alike, autocast_dtype, dense, first_order, grad_mask, needs_grad, rows, through_dispatcher
from ._measured import choose, rows_class
from ._site import eager_backward, eager_forward

KEEPS = ("sum", "norm", "inputs")
_NO_MORE = (None,) * 4


def one_launch(spec, x, f, normed, mine, tail_weight, tail_bias, backend, composed, keep="sum"):
    """Semantics: (s, n) of a site without dropout and mask by one launch, s None where the spec does not emit it;
    None where it is to be composed: no norm behind the adapter, mixed dtypes, or a backend without such a kernel.
    keep: see `adapter_residual_norm`.

    composed(tensors): the same site by several ops, what eager fp32 calls on the CPU are measured against.
    """
    tensors = (x, f, normed, *mine, tail_weight, tail_bias)
    if spec.tail is None or spec.placement != "inside" or not _of_one_kind(spec, *tensors):
        return None
    compiled = through_dispatcher(x)
    serves = backends.if_served_constant if compiled else backends.if_served
    name = serves("site", backend, x.device.type, x.dtype)
    if name in (None, "composed"):
        return None
    grad = needs_grad(*tensors)
    if not compiled and backend == "auto" and name == "cpp" and x.dtype == torch.float32 and x.numel():
        name = _choose(spec, tensors, grad, composed)
    if name == "composed":
        return None
    return _compiled(spec, tensors, grad, name) if compiled else _eager(spec, tensors, grad, name, keep)


def at_once(spec, x, f, mine, tail_weight, tail_bias, backend, keep):
    """Semantics: as `adapter_residual_norm` without seed and mask, with no more checks than the launch needs; None
    where anything is not as it usually is: the long way then serves, or says what is wrong.
    """
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or torch._C._is_any_autocast_enabled():
        return None  # first of all: Dynamo would guard what it sees of the spec
    if type(spec) is not AdapterSpec or spec.tail is None or spec.placement != "inside" or spec.dropout or not x.dim():
        return None
    device, dtype = x.device.type, x.dtype
    name = backends.if_served("site", backend, device, dtype)
    if backend == "auto" and name == "cpp" and dtype == torch.float32:
        if len(backends.serving("site", backend, device, dtype)) > 1:
            return None  # to be measured
    if name in (None, "composed") or keep not in KEEPS or spec.input == "normalised":
        return None
    if not _usual(spec, x, f, mine, tail_weight, tail_bias):
        return None
    tensors = (x, f, None, *mine, tail_weight, tail_bias)
    s, n = _eager(spec, tensors, needs_grad(*tensors), name, keep)
    return (s, n) if spec.emit == "both" else n


def _usual(spec, x, f, mine, tail_weight, tail_bias) -> bool:
    """Whether all tensors are there, plain, of x's dtype, on its device and shaped as the spec says."""
    d = (spec.hidden,)
    if x.shape[-1:] != d or f is None or tail_weight is None or (tail_bias is not None and spec.tail != "layernorm"):
        return False
    for t, shape in zip(mine, spec.shapes, strict=True):
        if (t is None) != (shape is None):
            return False
    return alike(x, (f, *mine, tail_weight, tail_bias), (x.shape, *spec.shapes, d, d))


def _kept(spec, tensors, name, keep) -> str:
    """`keep` where it can be had: by the C++ kernel, of a sum that nobody else keeps."""
    x, weight, bias = tensors[0], *tensors[-2:]
    if keep == "sum" or name != "cpp" or spec.emit != "norm" or x.dtype != torch.float32 or x.numel() == 0:
        return "sum"
    return keep if keep == "inputs" or spec.tail == "layernorm" and _invertible(weight, bias) else "sum"


def _invertible(weight, bias) -> bool:
    """Whether a norm's input can be told from its output: dividing by a gain must not magnify the rounding much."""
    gain = weight.detach().abs()
    if bias is None:
        return bool((gain > 1e-20).all())
    return bool((gain * 16 >= bias.detach().abs().clamp(min=1e-20)).all())


def _of_one_kind(spec, x, f, normed, *parameters) -> bool:
    """Whether all is of x's dtype and shaped as the spec says; what is not, the composed ops cast or refuse."""
    if autocast_dtype(x) not in (None, x.dtype):
        return False
    d, r = (spec.hidden,), (spec.bottleneck,)
    shapes = (x.shape, x.shape, r + d, r, d + r, *(d,) * 5)
    return all(t is None or _like(t, shape, x) for t, shape in zip((f, normed, *parameters), shapes, strict=True))


def _like(t, shape, x) -> bool:
    return isinstance(t, torch.Tensor) and t.shape == shape and t.dtype == x.dtype and t.device == x.device


def _arranged(spec, tensors):
    """The launcher's eleven tensors: what the adapter reads, its parameters, what is added, the tail's."""
    x, f, normed, *mine, tail_weight, tail_bias = tensors
    if spec.input == "residual":
        u, res1, res2 = x, f, None
    elif spec.input == "sublayer":
        u, res1, res2 = f, x, None
    else:
        u, res1, res2 = normed, x, f
    return u, *mine, res1, res2, tail_weight, tail_bias


def _eager(spec, tensors, grad, name, keep="sum"):
    x, *others = _arranged(spec, tensors)
    config = spec.config
    if grad:
        return _Site.apply(x, *others, (*config, name, _kept(spec, tensors, name, keep)))
    s, n, *_ = eager_forward(name, dense(x), *others, *config, False)
    return (s if spec.emit == "both" else None), n


def _compiled(spec, tensors, grad, name):
    u, *mine, res1, res2, tail_weight, tail_bias = _arranged(spec, tensors)
    flat = [None if t is None else rows(t) for t in (res1, res2)]
    out = torch.ops.fastpetl.site(rows(u), *mine, *flat, tail_weight, tail_bias, *site_config(spec), grad, name)
    return (out[0].view(u.shape) if spec.emit == "both" else None), out[1].view(u.shape)


def _choose(spec, tensors, grad, composed) -> str:
    def one(name, tensors):
        return composed(tensors) if name == "composed" else _eager(spec, tensors, grad, name)

    x = tensors[0]
    names = backends.serving("site", "auto", x.device.type, x.dtype)
    if len(names) == 1:
        return names[0]
    there = tuple([t is not None for t in tensors])
    wanted = tuple([t is not None and t.requires_grad for t in tensors]) if grad else None
    key = (rows_class(x), spec.hidden, spec.bottleneck, spec.code, spec.input, spec.scale != 1, spec.tail, spec.emit)
    # Both are true fp32: the tolerance is for a ReLU that a rounding switches.
    return choose("site", "cpp", names, (*key, there, wanted), one, tensors, grad, "composed", 1e-2)


class _Site(torch.autograd.Function):
    """The eager door: straight to the launcher."""

    @staticmethod
    def forward(ctx, x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, tail_weight, tail_bias, config):
        *config, name, keep = config  # one argument: each costs time
        add_x, eps, code, scale, tail, _, emit_s = config
        mine = w_down, b_down, w_up, b_up, norm_weight, norm_bias
        x = dense(x)
        s, n, z, stats, tail_stats = eager_forward(name, x, *mine, res1, res2, tail_weight, tail_bias, *config, True)
        ctx.config = add_x, code, scale, tail, name, keep, eps
        ctx.set_materialize_grads(False)
        # Where s or n is an output, what is saved is that output: autograd then counts it once and sees writes to it.
        kept, again = s, _NO_MORE
        if keep == "norm":
            kept, again = n, (tail_bias, None, None, None)
        elif keep == "inputs":
            kept, z, stats, again = None, None, None, (b_down, b_up, res1, res2)
        saved = tail_stats, tail_weight, x, z, stats, w_down, w_up, norm_weight, norm_bias
        ctx.save_for_backward(kept, *saved, *again)
        return (s if emit_s else None), n

    @staticmethod
    @first_order("adapter_residual_norm")
    def backward(ctx, g_s, g_n):
        if g_s is None and g_n is None:
            return (None,) * 12
        s, *saved, one, two, res1, res2 = ctx.saved_tensors
        add_x, code, scale, tail, name, keep, eps = ctx.config
        more = (one, True) if keep == "norm" else ()
        if keep == "inputs":
            _, _, x, _, _, w_down, w_up, *norms = saved
            inputs = x, w_down, one, w_up, two, *norms, res1, res2
            s, saved[3], saved[4] = adapter_forward(name, *inputs, add_x, eps, code, scale, True)
        needs = asked(ctx.needs_input_grad)
        out = eager_backward(name, g_s, g_n, s, *saved, add_x, code, scale, tail, needs, s_is_n=more)
        return (*placed(out, needs, ctx.needs_input_grad), None)


def asked(needs_input_grad) -> int:
    """The launcher's `needs` from those of the site's eleven tensors."""
    return grad_mask((*needs_input_grad[:7], *needs_input_grad[9:11]))


def placed(out, needs, needs_input_grad) -> list:
    """The launcher's gradients in the order of the site's eleven tensors, None where none is wanted."""
    g, *rest = out
    rest = [t if needs >> i & 1 else None for i, t in enumerate(rest)]
    res1, res2 = needs_input_grad[7:9]
    return [*rest[:7], g if res1 else None, g if res2 else None, *rest[7:]]
