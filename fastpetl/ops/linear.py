"""Frozen linears side by side, with the layer norm or GELU before them, on the fastest true-fp32 GEMM of this machine.

In PETL the backbone's linears are frozen: they need dx and nothing else, several of them read the same input (q, k, v),
and their input is a layer norm or a GELU that need not be stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from . import _linear as lb
from ._casts import cast
from ._common import (
    autocast_dtype,
    check_input,
    check_like,
    first_order,
    fits,
    needs_grad,
    number,
    rows,
    through_dispatcher,
    unflatten,
)
from ._measured import as_part
from ._pack import PackCache

__all__ = ["PackCache", "linear", "linear_reference"]

PROLOGUES = {None: lb.NONE, "gelu": lb.GELU}


def linear(x, weights, biases=None, *, norm=None, activation=None, backend="auto", cache=None, overwrite=False):
    """Semantics: y = p(x) [W_1; W_2; ...]^T + [b_1, b_2, ...], p = LayerNorm, gelu (erf) or nothing.

    Shapes: x [..., K]; weights a tensor or a sequence of tensors [N_i, K]; biases None, or as many as weights, [N_i]; y
    [..., sum N_i].
    norm: None or (weight [K], bias [K] or None, eps). activation: None or "gelu". At most one of the two.
    Dtypes: all tensors of one dtype. Under torch.autocast what the product reads is cast to its dtype, as F.linear
    casts, behind a norm, which is torch's there; y has that dtype.
    backend: "auto" measures the serving backends once per process and shape class, on these tensors, and keeps the
    fastest whose result is true fp32 (`fastpetl.backends.tuned()` shows it; FASTPETL_TUNE=0 turns it off).
    overwrite: x is the caller's and may be written to: where no gradient is recorded, a GELU then needs no memory.
    cache: a `PackCache`; used only where no gradient is recorded, to keep the weights in the GEMM's own layout.
    Gradients: of every argument. The fast path is the frozen one, which computes dx only. A norm or a bias that wants a
    gradient goes through torch's own norm or sum beside it; a weight that wants one makes plain torch serve the whole
    call, and is refused where an explicit backend cannot.
    Kept for the backward: nothing without norm and activation; x with a norm; with gelu on the CPU in eager fp32 its
    derivative in 20 bits an element (rounded to 1.2e-6), elsewhere x.
    """
    if type(weights) is tuple and len(weights) == 1 and isinstance(x, torch.Tensor) and not x.is_cpu:
        y = _direct(x, weights[0], biases, norm, activation, backend, overwrite)
        if y is not None:
            return y
    weights, biases = _tuple("weights", weights), () if biases is None else _tuple("biases", biases)
    weight, bias, eps = _norm(norm)
    if activation not in (None, "gelu"):
        raise ValueError(f"linear: activation is {activation!r}, expected None or 'gelu'")
    if norm is not None and activation is not None:
        raise ValueError("linear: norm and activation are both given, expected at most one of them before the linear")
    prologue = PROLOGUES[activation] if norm is None else lb.NORM
    dtype = autocast_dtype(x) if isinstance(x, torch.Tensor) else None
    if dtype is not None:
        if prologue == lb.NORM:
            _check_norm(x, weight, bias, mixed=True)
            x, prologue, weight, bias = F.layer_norm(x, x.shape[-1:], weight, bias, eps), lb.NONE, None, None
        x = cast(x, dtype)
        weights, biases = tuple(cast(w, dtype) for w in weights), tuple(cast(b, dtype) for b in biases)
    _check(x, weights, biases, weight, bias)
    if cache is not None and not isinstance(cache, PackCache):
        raise TypeError(f"linear: cache is a {type(cache).__name__}, expected a fastpetl.ops.PackCache")
    if prologue == lb.NORM and not x.is_cpu:  # no kernel of ours has the norm inside: torch's own saves what it needs
        x, prologue, weight, bias = F.layer_norm(x, x.shape[-1:], weight, bias, eps), lb.NONE, None, None
    return _call(x, weights, biases, prologue, weight, bias, eps, backend, cache, overwrite)


def _direct(x, weight, biases, norm, activation, backend, overwrite):
    """Torch's own linear where nothing else serves, as on a GPU: there a layer's checks may take longer than its
    kernels. None where that is not so, or where torch refuses: the checks then say why.
    """
    if activation not in (None, "gelu") or norm and activation or torch.compiler.is_compiling():
        return None
    if backends.resolve("linear", backend, x).name != "torch":
        return None
    try:
        if norm:
            x = F.layer_norm(x, x.shape[-1:], *norm)
        elif activation:
            inplace = overwrite and not torch.is_grad_enabled() and autocast_dtype(x) is None
            x = torch.ops.aten.gelu_(x) if inplace else F.gelu(x)
        bias = biases[0] if biases else None
        dtype = autocast_dtype(x)
        return F.linear(x, weight, bias) if dtype is None else F.linear(*(cast(t, dtype) for t in (x, weight, bias)))
    except (RuntimeError, TypeError):
        return None


def _tuple(name, value):
    if isinstance(value, torch.Tensor):
        return (value,)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"linear: {name} is a {type(value).__name__}, expected a tensor or a sequence of tensors")
    return tuple(value)


def _norm(norm):
    if norm is None:
        return None, None, 0.0
    if not isinstance(norm, (tuple, list)) or len(norm) != 3 or norm[0] is None:
        raise TypeError("linear: norm is not a triple, expected None or (weight, bias or None, eps)")
    return norm[0], norm[1], number("linear", "eps", norm[2])


def _check(x, weights, biases, weight, bias) -> None:
    check_input("linear", "x", x)
    if not weights:
        raise ValueError("linear: weights is empty, expected at least one tensor")
    if biases and len(biases) != len(weights):
        raise ValueError(f"linear: biases has {len(biases)} tensors, expected {len(weights)} to match weights, or None")
    k = x.shape[-1]
    for i, w in enumerate(weights):
        if type(w) in (torch.Tensor, torch.nn.Parameter) and w.dim() == 2 and fits(w, (w.shape[0], k), x):
            continue
        if not isinstance(w, torch.Tensor):
            raise TypeError(f"linear: weights[{i}] is a {type(w).__name__}, expected a torch.Tensor")
        if w.dim() != 2 or w.shape[1] != k:
            raise ValueError(
                f"linear: weights[{i}] has shape {tuple(w.shape)}, expected (out_features, in_features={k}) to match x"
            )
        check_like("linear", f"weights[{i}]", w, w.shape, "", x)
    for i, b in enumerate(biases):
        n = weights[i].shape[0]
        fits(b, (n,), x) or check_like("linear", f"biases[{i}]", b, (n,), f"({n},) to match weights[{i}]", x)
    _check_norm(x, weight, bias)


def _check_norm(x, weight, bias, mixed=False) -> None:
    """mixed: dtypes are autocast's business."""
    k = x.shape[-1]
    for name, t in (("norm weight", weight), ("norm bias", bias)):
        if t is not None and not fits(t, (k,), x):
            dtype = getattr(t, "dtype", None) if mixed else None
            check_like("linear", name, t, (k,), f"({k},) to match x", x, dtype=dtype)


def _call(x, weights, biases, prologue, weight, bias, eps, backend, cache, overwrite=False):
    # In training even calls that record nothing (the first layer's) keep no pack: it would raise the peak memory of the
    # step.
    cache = None if torch.is_grad_enabled() else cache
    mine = (x, weights, biases, prologue, weight, bias, eps)
    coded = needs_grad(x) and not through_dispatcher(x) and lb.codes(backend, x, prologue)
    if len(weights) == 1 and not coded and not through_dispatcher(x) and not needs_grad(*weights):
        name = backends.resolve("linear", backend, x).name  # raises where an explicit one cannot serve
        if name != "reference" and lb.is_torch(backend, *mine, cache, needs_grad(x)):
            if overwrite and prologue == lb.GELU and not torch.is_grad_enabled():
                mine = (torch.ops.aten.gelu_(x), weights, biases, lb.NONE, None, None, eps)
            return _formula(*mine)  # keeps no more than _Linear does, and costs fewer calls
    if prologue == lb.NORM and needs_grad(weight, bias):
        x, prologue, weight, bias = F.layer_norm(x, x.shape[-1:], weight, bias, eps), lb.NONE, None, None
    if biases and needs_grad(*biases):
        y = _call(x, weights, (), prologue, weight, bias, eps, backend, cache)
        return y + (biases[0] if len(biases) == 1 else torch.cat(biases))
    compiled = through_dispatcher(x)
    if compiled:
        name = backends.resolve_constant("linear", backend, x.device.type, x.dtype).name
    else:
        name = backends.resolve("linear", backend, x).name
    trainable = needs_grad(*weights)
    if trainable and backend not in ("auto", "reference", "torch"):
        raise RuntimeError(
            f"linear: backend is {backend!r}, which cannot serve this call: it computes dx only and a weight "
            "requires grad; expected frozen weights or backend='auto'"
        )
    if trainable or name == "reference":
        return _formula(x, weights, biases, prologue, weight, bias, eps)
    grad = needs_grad(x)
    if compiled:
        y, _ = torch.ops.fastpetl.linear(rows(x), weights, biases, prologue, weight, bias, eps, backend)
        return y.view(*x.shape[:-1], y.shape[-1])
    if grad:
        return _Linear.apply(x, weights, biases, lb.CODED if coded else prologue, weight, bias, eps, backend)
    y, _ = lb.run_forward(backend, rows(x), weights, biases, prologue, weight, bias, eps, cache)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Linear(torch.autograd.Function):
    """The eager door. Only x can want a gradient here; weights come in a tuple, which autograd does not look into."""

    @staticmethod
    def forward(ctx, x, weights, biases, prologue, weight, bias, eps, backend):
        x2 = rows(x)
        if prologue == lb.CODED:
            stats = None
            y, x2 = lb.run_forward_coded(backend, x2, weights, biases)
        else:
            y, stats = lb.run_forward(backend, x2, weights, biases, prologue, weight, bias, eps)
        ctx.config = (prologue, backend, x.shape)
        ctx.backward_of = as_part(lb.run_backward)  # its choice is for the batch that this is a part of, too
        # Without a prologue dx does not depend on x: not keeping it is the saving of a frozen linear.
        ctx.save_for_backward(x2 if prologue else None, stats, weight, *weights)
        return unflatten(y, x.shape)

    @staticmethod
    @first_order("linear")
    def backward(ctx, grad):
        x2, stats, weight, *weights = ctx.saved_tensors
        prologue, backend, shape = ctx.config
        dx = ctx.backward_of(backend, rows(grad), x2, stats, weights, prologue, weight)
        return dx.view(shape), None, None, None, None, None, None, None


def linear_reference(x, weights, biases=None, *, norm=None, activation=None):
    """Semantics: y = p(x) [W_1; W_2; ...]^T + [b_1, b_2, ...], p = LayerNorm, gelu (erf) or nothing.

    Plain torch, the contract of `linear`: same arguments and shapes, any floating dtype including float64. Rounds to
    x's dtype after the prologue and after the linear. Gradients: torch's own, of every argument, any order.
    """
    weights, biases = _tuple("weights", weights), () if biases is None else _tuple("biases", biases)
    weight, bias, eps = _norm(norm)
    return _formula(x, weights, biases, PROLOGUES[activation] if norm is None else lb.NORM, weight, bias, eps)


def _formula(x, weights, biases, prologue, weight, bias, eps):
    if prologue == lb.NORM:
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    elif prologue == lb.GELU:
        x = F.gelu(x)
    if len(weights) == 1:
        return F.linear(x, weights[0], biases[0] if biases else None)
    return F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
