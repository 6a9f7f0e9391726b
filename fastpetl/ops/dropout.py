"""Dropout, alone and behind a ReLU: the backward needs one bit an element."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from ._common import check_input, first_order, needs_grad, number, rows, through_dispatcher, unflatten

__all__ = ["dropout", "dropout_reference", "relu_dropout", "relu_dropout_reference"]
_RELU = 1  # csrc/cpu's name for it


def dropout(x, p, *, backend="auto"):
    """Semantics: y = drop(x): elements are dropped with probability p, by the draws F.dropout makes for the global
    generator's seed, and the rest scaled by 1 / (1 - p).

    Arguments and gradients as for `relu_dropout`; torch keeps a mask as large as x.
    """
    p = _check("dropout", x, p)
    if not _bits(x, backend) or p in (0, 1):
        return dropout_reference(x, p)
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        keep = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)  # as torch's own
        _, bits = torch.ops.fastpetl.cpu_activation_forward(rows(keep), _RELU, True)
        ctx.save_for_backward(bits)
        ctx.scale = 1 / (1 - p)
        return keep.mul_(x)

    @staticmethod
    @first_order("dropout")
    def backward(ctx, grad):
        return _kept_part(ctx, grad), None


def dropout_reference(x, p):
    """Semantics: y = drop(x): elements are dropped with probability p, and the rest scaled by 1 / (1 - p).

    Plain torch, the contract of `dropout`: same arguments. Gradients: torch's own.
    """
    return F.dropout(x, p) if p > 0 else x


def relu_dropout(x, p=0.0, *, backend="auto"):
    """Semantics: y = drop(relu(x)): elements are dropped with probability p, by the draws F.dropout makes for the
    global generator's seed, and the rest scaled by 1 / (1 - p); p = 0 drops nothing.

    x of any shape, dtype kept. backend: "cpp", "torch" or "reference"; "auto" is "cpp" where it serves.
    Gradients: of x; the C++ kernels keep one bit an element for them (torch keeps y, and with dropout a mask as large),
    and are not differentiable twice. Compiled code is plain torch.
    """
    p = _check("relu_dropout", x, p)
    return _ReluDropout.apply(x, p) if _bits(x, backend) else relu_dropout_reference(x, p)


def _check(function, x, p) -> float:
    check_input(function, "x", x)
    p = number(function, "p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"{function}: p is {p}, expected a probability")
    return p


def _bits(x, backend) -> bool:
    """Whether a backward will follow, for which the C++ kernels keep a bit an element."""
    if backend != "auto":
        backends.resolve("dropout", backend, x)  # raises where it cannot serve, whoever does so then
    if not needs_grad(x) or through_dispatcher(x) or x.numel() == 0:
        return False
    return backends.resolve("dropout", backend, x).name == "cpp"


def _kept_part(ctx, grad):
    """The gradient where the bits say so, scaled, as grad's shape."""
    (bits,) = ctx.saved_tensors
    return torch.ops.fastpetl.cpu_activation_backward(rows(grad), bits, _RELU, ctx.scale).view(grad.shape)


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        y, bits = torch.ops.fastpetl.cpu_activation_forward(rows(x), _RELU, False)
        y = unflatten(y, x.shape)
        if p > 0:  # what was dropped is zero as well
            y = F.dropout(y, p)
            _, bits = torch.ops.fastpetl.cpu_activation_forward(rows(y), _RELU, True)
        ctx.save_for_backward(bits)
        ctx.scale = 1 / (1 - p) if p < 1 else 0.0
        return y

    @staticmethod
    @first_order("relu_dropout")
    def backward(ctx, grad):
        return _kept_part(ctx, grad), None


def relu_dropout_reference(x, p=0.0):
    """Semantics: y = drop(relu(x)): elements are dropped with probability p, and the rest scaled by 1 / (1 - p).

    Plain torch, the contract of `relu_dropout`: same arguments. Rounds after the dropout. Gradients: torch's own.
    """
    y = F.relu(x)
    return F.dropout(y, p) if p > 0 else y
