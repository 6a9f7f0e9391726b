"""ReLU and the dropout behind it, of which the backward needs one bit an element."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from ._common import check_input, first_order, needs_grad, number, rows, through_dispatcher, unflatten

__all__ = ["relu_dropout", "relu_dropout_reference"]
_RELU = 1  # csrc/cpu's name for it


def relu_dropout(x, p=0.0, *, backend="auto"):
    """Semantics: y = drop(relu(x)): elements are dropped with probability p, by the draws F.dropout makes for the
    global generator's seed, and the rest scaled by 1 / (1 - p); p = 0 drops nothing.

    x of any shape, dtype kept. backend: "cpp", "torch" or "reference"; "auto" is "cpp" where it serves.
    Gradients: of x; the C++ kernels keep one bit an element for them (torch keeps y, and with dropout a mask as large),
    and are not differentiable twice. Compiled code is plain torch.
    """
    check_input("relu_dropout", "x", x)
    p = number("relu_dropout", "p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"relu_dropout: p is {p}, expected a probability")
    if not needs_grad(x) or through_dispatcher(x) or x.numel() == 0:
        return relu_dropout_reference(x, p)
    name = backends.resolve("relu_dropout", backend, x).name
    return _ReluDropout.apply(x, p) if name == "cpp" else relu_dropout_reference(x, p)


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
        (bits,) = ctx.saved_tensors
        dx = torch.ops.fastpetl.cpu_activation_backward(rows(grad), bits, _RELU, ctx.scale)
        return dx.view(grad.shape), None


def relu_dropout_reference(x, p=0.0):
    """Semantics: y = drop(relu(x)): elements are dropped with probability p, and the rest scaled by 1 / (1 - p).

    Plain torch, the contract of `relu_dropout`: same arguments. Rounds after the dropout. Gradients: torch's own.
    """
    y = F.relu(x)
    return F.dropout(y, p) if p > 0 else y
