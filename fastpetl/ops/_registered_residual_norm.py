"""The registered ops of residual_norm (see _library.py)."""

from __future__ import annotations

import torch

from ._common import grad_mask
from ._library import autograd, not_twice, register
from ._residual_norm import empty, run_backward, run_forward, shared, without_copy


def _forward(*args):
    return tuple(run_forward(args[-1], *args[:-1]))


def _forward_fake(x, f, weight, bias, mask, seed, tail, emit, eps, dropout, save, backend):
    return empty(x, f is not None, tail, emit, save)


def _backward(*args):
    return tuple(run_backward(args[-1], *args[:-1]))


def _backward_fake(g_s, g_n, s, stats, weight, mask, seed, tail, dropout, needs, backend):
    like = g_n if g_s is None else g_s
    shapes = (like.shape, like.shape, like.shape[1:], like.shape[1:])
    return tuple(like.new_empty(shape if needs >> i & 1 else (0,)) for i, shape in enumerate(shapes))


def _context(ctx, inputs, output):
    x, f, weight, _, mask, seed, tail, emit, _, dropout, save, backend = inputs
    s, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.config = tail, emit, dropout, save, backend
    ctx.save_for_backward((x if f is None else s) if tail else None, stats, weight, mask, seed)


def _gradient(ctx, g_s, g_n, _):
    tail, emit, dropout, save, backend = ctx.config
    if not save:
        raise RuntimeError("fastpetl::residual_norm: save is False but a gradient is wanted, expected save=True")
    g_s, g_n = g_s if emit & 1 else None, g_n if emit & 2 else None
    needs, grads = grad_mask(ctx.needs_input_grad[:4]), [None] * 4
    if needs and (g_s is not None or g_n is not None):
        s, stats, weight, mask, seed = ctx.saved_tensors
        s = stats if s is None else s
        once = without_copy(needs, mask, dropout)
        out = torch.ops.fastpetl.residual_norm_backward(
            g_s, g_n, s, stats, weight, mask, seed, tail, dropout, once, backend
        )
        grads = shared(out, needs, once)
    return (*grads, *(None,) * 8)


register(
    "residual_norm(Tensor x, Tensor? f, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? seed, int tail, int emit, "
    "float eps, float dropout, bool save, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "residual_norm_backward(Tensor? g_s, Tensor? g_n, Tensor s, Tensor stats, Tensor? weight, Tensor? mask, "
    "Tensor? seed, int tail, float dropout, int needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
autograd("residual_norm", _context, _gradient)
not_twice("residual_norm_backward")
