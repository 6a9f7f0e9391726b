"""The fused adapter site: LayerNorm, down projection, activation, up projection, scale and residuals in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from ..spec import activation_code
from . import _mixed
from ._adapter import ACT, eager_backward, eager_forward, split_residuals
from ._casts import cast
from ._common import (
    _PLAIN,
    alike,
    autocast_dtype,
    check_input,
    check_like,
    dense,
    first_order,
    fits,
    grad_mask,
    needs_grad,
    number,
    rows,
    through_dispatcher,
)
from ._measured import choose, rows_class, steady

__all__ = ["adapter", "adapter_reference"]


def adapter(
    x,
    w_down,
    b_down,
    w_up,
    b_up,
    *,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    activation="relu",
    scale=1.0,
    residuals=(),
    backend="auto",
):
    """Semantics: y = scale * (act(n(x) w_down^T + b_down) w_up^T + b_up) + sum(residuals); n: LayerNorm or nothing.

    Shapes: x and every residual [..., d]; w_down [r, d]; w_up [d, r]; b_down [r], b_up, norm_weight and norm_bias [d],
    each may be None.
    residuals: at most two tensors like x, beside x itself, which is recognised by identity: `residuals=(x, f)` gives x
    + f + A(x).
    activation: identity, relu, gelu (erf), gelu_tanh or silu. backend: see `fastpetl.backends`.
    Dtypes: all tensors of one dtype. Under torch.autocast what the products read is cast to its dtype, as F.linear
    casts it, behind the norm; residuals keep their own dtype and y has the widest, so a float32 residual stream stays
    float32. The Triton kernel does all of that itself; with other backends, and in compiled code, the norm, the cast
    and residuals of other dtypes are torch's.
    Rounds: the fused backends keep statistics, sums and everything between x and y in fp32 except the pre-activation
    kept for backward; see `adapter_reference` for where plain torch rounds.
    Gradients: for every tensor argument, computed only where wanted, deterministic; not differentiable twice except
    with backend="reference".
    backend: "auto" on the CPU measures "cpp" and "reference" once per process and shape class, in eager fp32 code
    (`fastpetl.backends.tuned()`; FASTPETL_TUNE=0 turns it off).
    """
    code = activation_code(activation)
    mine = x, w_down, b_down, w_up, b_up, norm_weight, norm_bias
    res = _usual(*mine, residuals)
    if res is not None and type(eps) is float and type(scale) is float:
        add_x, fused = res
        return _call((*mine, *fused, *_NONE[len(fused) :]), add_x, eps, code, scale, backend)
    eps, scale = number("adapter", "eps", eps), number("adapter", "scale", scale)
    residuals = _residuals(residuals)
    y = _mixed.adapter(x, mine[1:], residuals, eps, code, scale, backend)
    if y is not None:
        return y
    stream = x
    dtype = autocast_dtype(x) if isinstance(x, torch.Tensor) else None
    if dtype is not None:
        w_down, b_down, w_up, b_up = (cast(t, dtype) for t in (w_down, b_down, w_up, b_up))
        x, norm_weight, norm_bias = _cast_input(x, norm_weight, norm_bias, eps, dtype)
    _check(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias)
    add_x, fused, late = False, [], []
    for i, r in enumerate(residuals):
        dtype is None and fits(r, stream.shape, x) or check_like(
            "adapter",
            f"residuals[{i}]",
            r,
            stream.shape,
            f"{tuple(stream.shape)} to match x",
            stream,
            dtype=_dtype(r, stream, dtype),
        )
        if r.dtype != x.dtype:
            late.append(r)
        elif r is x and not add_x:
            add_x = True
        else:
            fused.append(r)
    if len(fused) > 2:
        raise ValueError(f"adapter: residuals has {len(fused)} tensors beside x, expected at most 2")
    tensors = (x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, *fused, *(None,) * (2 - len(fused)))
    y = _call(tensors, add_x, eps, code, scale, backend)
    for r in late:
        y = y + r
    return y


def _cast_input(x, weight, bias, eps, dtype):
    """x in autocast's dtype, behind its norm if there is one, and the norm that is left to do."""
    if weight is not None and all(_is_row(t, x) for t in (weight, bias) if t is not None):
        return cast(F.layer_norm(x, weight.shape, weight, bias, eps), dtype), None, None
    return cast(x, dtype), cast(weight, dtype), cast(bias, dtype)  # no norm, or one that `_check` refuses


def _is_row(t, x) -> bool:
    return isinstance(t, torch.Tensor) and t.shape == x.shape[-1:] and t.is_floating_point() and x.is_floating_point()


_NONE = (None, None)


def _usual(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, residuals):
    """(is x a residual, the others), or None where not all is plain, of one dtype, on one device and shaped as it
    should be: what it is, `adapter` then asks piece by piece.
    """
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or torch._C._is_any_autocast_enabled():
        return None
    if type(w_down) not in _PLAIN or w_down.dim() != 2 or type(residuals) is not tuple or not x.is_floating_point():
        return None
    d, r = x.shape[-1:], w_down.shape[0]
    if not d or not r or w_up is None or (norm_weight is None) != (norm_bias is None):
        return None
    split = split_residuals(x, residuals)
    if split is None:
        return None
    mine = w_down, w_up, b_down, b_up, norm_weight, norm_bias
    shapes = (r, *d), (*d, r), (r,), d, d, d, *(x.shape,) * len(split[1])
    return split if alike(x, (*mine, *split[1]), shapes) else None


def _residuals(residuals) -> tuple:
    if isinstance(residuals, torch.Tensor) or not isinstance(residuals, (tuple, list)):
        raise TypeError(f"adapter: residuals is a {type(residuals).__name__}, expected a tuple of tensors")
    return tuple(residuals)


def _dtype(r, stream, autocast):
    """The dtype a residual must have: x's own, or under autocast any floating dtype (it is added with promotion)."""
    if autocast is None or not isinstance(r, torch.Tensor) or not r.is_floating_point():
        return stream.dtype
    return r.dtype


def _check(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias) -> None:
    check_input("adapter", "x", x)
    if not isinstance(w_down, torch.Tensor):
        raise TypeError(f"adapter: w_down is a {type(w_down).__name__}, expected a torch.Tensor")
    d = x.shape[-1]
    if w_down.dim() != 2 or w_down.shape[1] != d or w_down.shape[0] == 0:
        raise ValueError(
            f"adapter: w_down has shape {tuple(w_down.shape)}, expected (bottleneck, hidden={d}) to match x"
        )
    r = w_down.shape[0]
    fits(w_down, (r, d), x) or check_like("adapter", "w_down", w_down, (r, d), "", x)
    if not fits(w_up, (d, r), x):
        check_like("adapter", "w_up", w_up, (d, r), f"(hidden={d}, bottleneck={r}) to match w_down", x)
    if b_down is not None and not fits(b_down, (r,), x):
        check_like("adapter", "b_down", b_down, (r,), f"(bottleneck={r},) to match w_down", x)
    for name, t in (("b_up", b_up), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t is not None and not fits(t, (d,), x):
            check_like("adapter", name, t, (d,), f"(hidden={d},) to match x", x)
    if norm_bias is not None and norm_weight is None:
        raise ValueError("adapter: norm_bias is given without norm_weight, expected both or norm_weight alone")


def _call(tensors, add_x, eps, code, scale, backend):
    x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2 = tensors
    compiled = through_dispatcher(x)
    if compiled:
        name = backends.resolve_constant("adapter", backend, x.device.type, x.dtype).name
    else:
        name = backends.resolve("adapter", backend, x).name
    grad = needs_grad(*tensors)
    if name == "cpp" and backend == "auto" and not compiled:
        name = _choose(tensors, add_x, eps, code, scale, grad)
    if name == "reference":
        return _plain(tensors, add_x, eps, code, scale)
    if compiled:
        flat = [None if t is None else rows(t) for t in (res1, res2)]
        y = torch.ops.fastpetl.adapter(
            rows(x), w_down, b_down, w_up, b_up, norm_weight, norm_bias, *flat, add_x, eps, code, scale, grad, name
        )[0]
        return y.view(x.shape)
    if grad:
        return _Adapter.apply(*tensors, add_x, eps, code, scale, name)
    return eager_forward(name, dense(x), *tensors[1:], add_x, eps, code, scale, False)[0]


def _plain(tensors, add_x, eps, code, scale):
    *mine, res1, res2 = tensors
    residuals = [r for r in (mine[0] if add_x else None, res1, res2) if r is not None]
    return _formula(*mine, eps, code, scale, residuals)


def _choose(tensors, add_x, eps, code, scale, grad) -> str:
    x, w_down = tensors[:2]
    if x.dtype != torch.float32 or x.numel() == 0:  # in other dtypes the fused kernel rounds less: not the same numbers
        return "cpp"

    def one(name, tensors):
        if name == "reference":
            return _plain(tensors, add_x, eps, code, scale)
        if grad:
            return _Adapter.apply(*tensors, add_x, eps, code, scale, name)
        return eager_forward(name, dense(x), *tensors[1:], add_x, eps, code, scale, False)[0]

    names = backends.serving("adapter", "auto", x.device.type, x.dtype)
    if len(names) == 1:
        return names[0]
    names = steady("adapter", names, x.numel() // x.shape[-1])
    there = tuple([t is not None for t in tensors[2:]])
    wanted = tuple([t is not None and t.requires_grad for t in tensors]) if grad else None
    key = (rows_class(x), w_down.shape, code, add_x, scale != 1, there, wanted)
    # Both are true fp32: the tolerance is for a ReLU that a rounding switches.
    return choose("adapter", "cpp", names, key, one, tensors, grad, "reference", 1e-2)


class _Adapter(torch.autograd.Function):
    """The eager door: straight to the launcher."""

    @staticmethod
    def forward(ctx, x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, add_x, eps, code, scale, name):
        ctx.needs = grad_mask(ctx.needs_input_grad[:7])
        ctx.config = (add_x, code, scale, name)
        x = dense(x)
        tensors = w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2
        y, z, stats = eager_forward(name, x, *tensors, add_x, eps, code, scale, ctx.needs != 0)
        if ctx.needs:
            ctx.save_for_backward(x, z, stats, w_down, w_up, norm_weight, norm_bias)
        return y

    @staticmethod
    @first_order("adapter")
    def backward(ctx, grad):
        grads, needs = [None] * 7, ctx.needs
        if needs:
            add_x, code, scale, name = ctx.config
            grads = eager_backward(name, grad, *ctx.saved_tensors, add_x, code, scale, needs)
            if needs != 127:
                grads = [g if needs >> i & 1 else None for i, g in enumerate(grads)]
        res = [grad if needed else None for needed in ctx.needs_input_grad[7:9]]
        return (*grads, *res, None, None, None, None, None)


# --- reference: the contract ------------------------------------------------------------------------------------------


def adapter_reference(
    x,
    w_down,
    b_down,
    w_up,
    b_up,
    *,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    activation="relu",
    scale=1.0,
    residuals=(),
):
    """Semantics: y = scale * (act(n(x) w_down^T + b_down) w_up^T + b_up) + sum(residuals); n: LayerNorm or nothing.

    Plain torch, the contract of `adapter`: same arguments and shapes, any floating dtype including float64.
    Rounds to x's dtype after the norm, after each projection, after the activation, after the scale and after each
    residual.
    Gradients: torch's own, any order. Source: DAS `Adapter_Layer` (vision_transformer_PA.py), whose `scale` is a Python
    float.
    """
    code = activation_code(activation, "adapter_reference")
    return _formula(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, eps, code, scale, residuals)


def _formula(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, eps, code, scale, residuals):
    h = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    y = F.linear(ACT[code](F.linear(h, w_down, b_down)), w_up, b_up)
    if scale != 1:
        y = y * scale
    for r in residuals:
        y = y + r
    return y
