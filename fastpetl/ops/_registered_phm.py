"""The registered op of the PHM weights (see _library.py)."""

from __future__ import annotations

import torch

from . import _phm
from ._library import autograd, not_twice, register


def _forward(rules, weights, backend):
    return _phm.run_forward(backend, rules, weights)


def _forward_fake(rules, weights, backend):
    return weights[0].new_empty(sum(w.numel() * w.shape[0] for w in weights))


def _backward(grad, rules, weights, needs, backend):
    return _phm.run_backward(backend, grad, rules, weights, needs)


def _backward_fake(grad, rules, weights, needs, backend):
    sizes = (sum(t.numel() for t in ts) for ts in (rules, weights))
    return tuple(grad.new_empty(n if needs >> i & 1 else 0) for i, n in enumerate(sizes))


def _context(ctx, inputs, output):
    rules, weights, backend = inputs
    ctx.count, ctx.backend = len(rules), backend
    ctx.save_for_backward(*rules, *weights)


def _gradient(ctx, grad):
    tensors = ctx.saved_tensors  # once: a checkpoint unpacks them only once
    rules, weights = tensors[: ctx.count], tensors[ctx.count :]
    wanted = ctx.needs_input_grad
    needs = any(wanted[0]) | any(wanted[1]) << 1
    flat = torch.ops.fastpetl.phm_weights_backward(grad, rules, weights, needs, ctx.backend)
    grads = _phm.split(*flat, rules, weights)
    return grads[: ctx.count], grads[ctx.count :], None


register("phm_weights(Tensor[] rules, Tensor[] weights, str backend) -> Tensor", _forward, _forward_fake)
register(
    "phm_weights_backward(Tensor grad, Tensor[] rules, Tensor[] weights, int needs, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
autograd("phm_weights", _context, _gradient)
not_twice("phm_weights_backward")
