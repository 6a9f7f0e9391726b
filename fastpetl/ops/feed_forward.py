"""A frozen feed-forward block: two linears and the activation between them, which is computed where the first one's
results are, so that the second reads its input in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _linear as lb
from ._common import dense, first_order, fits, needs_grad, rows, unflatten
from ._measured import choose, rows_class
from .activated_linear import check_activation, forward_then, packed_weight, relu_of, servers, takes
from .linear import PackCache, linear, linear_reference

__all__ = ["feed_forward", "feed_forward_reference"]


def feed_forward(x, w1, b1, w2, b2, *, norm=None, activation="gelu", backend="auto", caches=(None, None)):
    """Semantics: y = act(p(x) w1^T + b1) w2^T + b2, p = LayerNorm or nothing, act = "gelu" (by erf) or "relu".

    Shapes: x [..., K]; w1 [M, K]; b1 [M] or None; w2 [N, M]; b2 [N] or None; y [..., N].
    norm, backend, dtypes, gradients: as for `linear`, of which all but the following is made; caches: its `cache`, of
    w1 and of w2.
    Eager fp32 on the CPU, w1 and w2 frozen and M a multiple of 32: the C++ kernel has the activation behind the first
    product, a ReLU where no gradient is recorded; of a GELU it keeps the derivative in 20 bits an element (rounded to
    1.2e-6). "auto" measures that against the two linears once per process and shape class, forward and backward
    together.
    """
    check_activation("feed_forward", activation)
    if not isinstance(caches, (tuple, list)):
        raise TypeError(f"feed_forward: caches is a {type(caches).__name__}, expected a pair")
    if len(caches) != 2 or any(c is not None and not isinstance(c, PackCache) for c in caches):
        kinds = ", ".join(type(c).__name__ for c in caches)
        raise TypeError(f"feed_forward: caches is ({kinds}), expected two, each None or a fastpetl.ops.PackCache")
    tensors = (x, w1, b1, w2, b2, *(norm[:2] if _is_norm(norm) else (None, None)))
    if _fits(x, w1, b1, w2, b2, norm) and not needs_grad(w1, w2) and x.numel():
        if needs_grad(*tensors[5:]):
            x, norm = F.layer_norm(x, x.shape[-1:], *norm), None
            tensors = (x, *tensors[1:5], None, None)
        names = servers(backend, x, activation, needs_grad(x, b1, b2))
        name = names[0] if len(names) == 1 else _choose(names, tensors, norm, activation, caches)
        if name == "cpp":
            return _joined(tensors, norm, activation, caches)
    return _composed(tensors, norm, activation, backend, caches)


def _is_norm(norm) -> bool:
    return isinstance(norm, (tuple, list)) and len(norm) == 3


def _fits(x, w1, b1, w2, b2, norm) -> bool:
    """Whether the C++ kernels could take these; what they could not, `linear` computes or refuses."""
    if not takes(x, w1, b1) or not isinstance(w2, torch.Tensor) or w2.dim() != 2:
        return False
    (m, k), n = w1.shape, w2.shape[0]
    wanted = ((w2, (n, m)), (b2, (n,)))
    if norm is not None:
        if not _is_norm(norm) or norm[0] is None:
            return False
        wanted += ((norm[0], (k,)), (norm[1], (k,)))
    return all(t is None or fits(t, shape, x) for t, shape in wanted)


def _choose(names, tensors, norm, activation, caches) -> str:
    x, w1, b1, w2, b2, *_ = tensors
    grad = needs_grad(x, b1, b2)
    packed = not grad and not torch.is_grad_enabled() and caches[0] is not None
    own = {name: (PackCache(), PackCache()) if packed else (None, None) for name in names}

    def one(name, tensors):
        if name == "cpp":
            return _joined(tensors, norm, activation, own[name])
        return _composed(tensors, norm, activation, "auto", own[name])

    biases = (b1 is None, b2 is None, *(needs_grad(t) for t in (x, b1, b2)))
    key = (rows_class(x), w1.shape, w2.shape, norm is not None, activation, packed, *biases)
    return choose("feed_forward", "cpp", names, key, one, tensors, grad, "composed", 1e-5)


def _composed(tensors, norm, activation, backend, caches):
    x, w1, b1, w2, b2, *affine = tensors
    norm = (*affine, norm[2]) if _is_norm(norm) else norm
    h = linear(x, w1, None if b1 is None else (b1,), norm=norm, backend=backend, cache=caches[0])
    options = {"backend": backend, "cache": caches[1], "overwrite": True}
    if activation == "relu":
        h = relu_of(h, backend)
    else:
        options["activation"] = "gelu"
    return linear(h, w2, None if b2 is None else (b2,), **options)


def _joined(tensors, norm, activation, caches):
    x, w1, b1, w2, b2, weight, bias = (dense(t) for t in tensors)
    eps = 0.0 if norm is None else float(norm[2])
    if needs_grad(x, b1, b2):
        return _FeedForward.apply(x, w1, b1, w2, b2, weight, bias, eps)
    if torch.is_grad_enabled():  # a training pass that records nothing keeps no packs: they would raise its peak
        caches = (None, None)
    y, _, _ = _forward(rows(x), w1, b1, w2, b2, (weight, bias, eps), activation, caches, False)
    return unflatten(y, x.shape)


def _forward(x2, w1, b1, w2, b2, norm, activation, caches, keep):
    h, stats, code = forward_then(x2, w1, b1, norm, activation, caches[0], keep)
    second, pack = ([] if b2 is None else [b2]), packed_weight(caches[1], w2)
    y, _ = torch.ops.fastpetl.cpu_linear_forward(h, [w2], second, lb.NONE, None, None, 0.0, pack)
    return y, stats, code


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, weight, bias, eps):
        x2 = rows(x)
        y, stats, code = _forward(x2, w1, b1, w2, b2, (weight, bias, eps), "gelu", (None, None), True)
        ctx.shape = x.shape
        ctx.save_for_backward(None if weight is None else x2, stats, code, w1, w2, weight)
        return unflatten(y, x.shape)

    @staticmethod
    @first_order("feed_forward")
    def backward(ctx, grad):
        x2, stats, code, w1, w2, weight = ctx.saved_tensors
        ops = torch.ops.fastpetl
        wants_x, _, wants_b1, _, wants_b2, *_ = ctx.needs_input_grad
        g, dx, db1 = rows(grad), None, None
        db2 = g.sum(0) if wants_b2 else None
        if wants_x or wants_b1:
            dz = ops.cpu_linear_backward_coded(g, code, [w2])
            db1 = dz.sum(0) if wants_b1 else None
        if wants_x:
            prologue = lb.NONE if weight is None else lb.NORM
            x2 = dz.new_empty(0) if x2 is None else x2
            dx = ops.cpu_linear_backward(dz, x2, stats, [w1], prologue, weight, None).view(ctx.shape)
        return dx, None, db1, None, db2, None, None, None


def feed_forward_reference(x, w1, b1, w2, b2, *, norm=None, activation="gelu"):
    """Semantics: y = act(p(x) w1^T + b1) w2^T + b2, p = LayerNorm or nothing, act = "gelu" (by erf) or "relu".

    Plain torch, the contract of `feed_forward`: same arguments and shapes, any floating dtype including float64. Rounds
    to x's dtype after each step. Gradients: torch's own, of every argument, any order.
    """
    h = linear_reference(x, w1, None if b1 is None else (b1,), norm=norm)
    return F.linear(F.gelu(h) if activation == "gelu" else F.relu(h), w2, b2)
