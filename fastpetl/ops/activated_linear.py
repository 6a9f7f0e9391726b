"""A frozen linear and the activation behind it, which the C++ kernel computes where the product's results are."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from . import _linear as lb
from ._common import (
    autocast_dtype,
    check_input,
    check_like,
    dense,
    first_order,
    fits,
    needs_grad,
    rows,
    through_dispatcher,
    unflatten,
)
from ._measured import choose, rows_class
from .dropout import relu_dropout
from .linear import PackCache, linear, linear_reference

__all__ = ["activated_linear", "activated_linear_reference"]
CODES = {"gelu": 2, "relu": 1}  # the ABI of csrc/cpu


def activated_linear(x, w, b, *, activation="gelu", backend="auto", cache=None):
    """Semantics: y = act(x w^T + b), act = "gelu" (by erf) or "relu".

    Shapes: x [..., K]; w [M, K]; b [M] or None; y [..., M].
    backend, dtypes, cache, gradients: as for `linear`, of which and of torch's activation all but the following is
    made. Eager fp32 on the CPU, w frozen and M a multiple of 32: the C++ kernel has the activation behind the product,
    a ReLU where no gradient is recorded; of a GELU it keeps the derivative in 20 bits an element (rounded to 1.2e-6).
    "auto" measures that against the two once per process and shape class, forward and backward together.
    """
    check_activation("activated_linear", activation)
    if cache is not None and not isinstance(cache, PackCache):
        raise TypeError(f"activated_linear: cache is a {type(cache).__name__}, expected a fastpetl.ops.PackCache")
    _check(x, w, b)
    if takes(x, w, b) and not needs_grad(w) and x.numel():
        names = servers(backend, x, activation, needs_grad(x, b))
        name = names[0] if len(names) == 1 else _choose(names, (x, w, b), activation, cache)
        if name == "cpp":
            return _joined(x, w, b, activation, cache)
    return _composed(x, w, b, activation, backend, cache)


def check_activation(function, activation) -> None:
    if activation not in CODES:
        raise ValueError(f"{function}: activation is {activation!r}, expected one of {', '.join(CODES)}")


def _check(x, w, b) -> None:
    check_input("activated_linear", "x", x)
    if not isinstance(w, torch.Tensor):
        raise TypeError(f"activated_linear: w is a {type(w).__name__}, expected a torch.Tensor")
    if w.dim() != 2 or w.shape[1] != x.shape[-1]:
        expected = f"(out_features, in_features={x.shape[-1]}) to match x"
        raise ValueError(f"activated_linear: w has shape {tuple(w.shape)}, expected {expected}")
    if autocast_dtype(x) is not None:  # dtypes are `linear`'s business, who casts
        return
    m = w.shape[0]
    fits(w, w.shape, x) or check_like("activated_linear", "w", w, w.shape, "", x)
    b is None or fits(b, (m,), x) or check_like("activated_linear", "b", b, (m,), f"({m},) to match w", x)


# --- what this op and `feed_forward` have in common -------------------------------------------------------------------


def takes(x, w, b) -> bool:
    """Semantics: could the C++ kernel take these? What it could not, `linear` computes or refuses."""
    plain = isinstance(x, torch.Tensor) and not through_dispatcher(x) and x.is_cpu and x.dtype == torch.float32
    if not plain or x.dim() < 1 or autocast_dtype(x) is not None or not isinstance(w, torch.Tensor) or w.dim() != 2:
        return False
    m, k = w.shape
    return x.shape[-1] == k and m % 32 == 0 and fits(w, (m, k), x) and (b is None or fits(b, (m,), x))


def servers(backend, x, activation, grad: bool) -> tuple:
    """Semantics: of "cpp" and "composed" those that the backend asked for allows, the one to take unmeasured first.
    grad: one is recorded.
    """
    if activation == "relu" and grad:
        return ("composed",)
    serving = backends.serving("linear", backend, "cpu", x.dtype)
    if "cpp" not in serving:
        return ("composed",)
    return ("cpp",) if len(serving) == 1 else ("cpp", "composed")


def packed_weight(cache, w):
    """Semantics: w as the C++ kernel has it, kept in `cache`; None without one."""
    return None if cache is None else cache.get("cpp", (w,), lambda: torch.ops.fastpetl.cpu_linear_pack([w], False))


def forward_then(x2, w, b, norm, activation, cache, keep):
    """Semantics: (act(p(x) w^T + b), statistics, code of a GELU's derivative if `keep`); norm: (weight, bias, eps)."""
    weight, bias, eps = norm
    prologue = lb.NONE if weight is None else lb.NORM
    given, pack, then = ([] if b is None else [b]), packed_weight(cache, w), CODES[activation]
    return torch.ops.fastpetl.cpu_linear_forward_then(x2, [w], given, prologue, weight, bias, eps, pack, then, keep)


def relu_of(h, backend):
    """Semantics: relu(h), h the caller's own: a bit an element is kept, without gradients no memory needed."""
    if torch.is_grad_enabled():
        return relu_dropout(h, backend=backends.for_op("dropout", backend))
    return torch.relu_(h)


# --- this op ----------------------------------------------------------------------------------------------------------

_NO_NORM = (None, None, 0.0)


def _choose(names, tensors, activation, cache) -> str:
    x, w, b = tensors
    grad = needs_grad(x, b)
    packed = not grad and not torch.is_grad_enabled() and cache is not None
    own = {name: PackCache() if packed else None for name in names}

    def one(name, tensors):
        if name == "cpp":
            return _joined(*tensors, activation, own[name])
        return _composed(*tensors, activation, "auto", own[name])

    key = (rows_class(x), w.shape, b is None, activation, packed, needs_grad(x), needs_grad(b))
    return choose("activated_linear", "cpp", names, key, one, tensors, grad, "composed", 1e-5)


def _composed(x, w, b, activation, backend, cache):
    h = linear(x, w, None if b is None else (b,), backend=backend, cache=cache)
    if activation == "relu":
        return relu_of(h, backend)
    return F.gelu(h) if torch.is_grad_enabled() else torch.ops.aten.gelu_(h)


def _joined(x, w, b, activation, cache):
    w, b = dense(w), dense(b)
    if needs_grad(x, b):
        return _ActivatedLinear.apply(x, w, b)
    if torch.is_grad_enabled():  # a training pass that records nothing keeps no pack: it would raise its peak
        cache = None
    y, _, _ = forward_then(rows(x), w, b, _NO_NORM, activation, cache, False)
    return unflatten(y, x.shape)


class _ActivatedLinear(torch.autograd.Function):
    """With a GELU; x is not kept."""

    @staticmethod
    def forward(ctx, x, w, b):
        y, stats, code = forward_then(rows(x), w, b, _NO_NORM, "gelu", None, True)
        ctx.shape = x.shape
        ctx.save_for_backward(stats, code, w)
        return unflatten(y, x.shape)

    @staticmethod
    @first_order("activated_linear")
    def backward(ctx, grad):
        stats, code, w = ctx.saved_tensors
        ops = torch.ops.fastpetl
        dh = ops.cpu_activation_backward(rows(grad), code, CODES["gelu"], 1.0)
        db = dh.sum(0) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, None, db
        dx = ops.cpu_linear_backward(dh, dh.new_empty(0), stats, [w], lb.NONE, None, None)
        return dx.view(ctx.shape), None, db


def activated_linear_reference(x, w, b, *, activation="gelu"):
    """Semantics: y = act(x w^T + b), act = "gelu" (by erf) or "relu".

    Plain torch, the contract of `activated_linear`: same arguments and shapes, any floating dtype including float64.
    Rounds to x's dtype after each step. Gradients: torch's own, of every argument, any order.
    """
    h = linear_reference(x, w, None if b is None else (b,))
    return F.gelu(h) if activation == "gelu" else F.relu(h)
