"""The registered op of the adapters of several tasks (see _library.py)."""

from __future__ import annotations

import torch

from . import _multi_adapter_triton as m
from ._common import grad_mask
from ._library import autograd, not_twice, register


def _forward_fake(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, task_ids, tasks, add_x, eps, code,
                  scale, save):  # fmt: skip
    return (x.new_empty(x.shape), *m.saved(x, w_down, norm_weight, task_ids, tasks, save))


def _backward_fake(grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, order, bounds, add_x, code, scale, needs,
                   shared):  # fmt: skip
    return tuple(x.new_empty(shape) for shape in m.gradient_shapes(x, w_down, bounds, needs, shared))


def _context(ctx, inputs, output):
    x, *stacks = inputs[:7]
    w_down, _, w_up, _, norm_weight, norm_bias = stacks
    tasks, add_x, _, code, scale, save = inputs[10:]
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.config, ctx.save = (add_x, code, scale, m.shared_mask(stacks, tasks)), save
    z, stats, order, bounds = kept
    ctx.save_for_backward(x, z, stats, w_down, w_up, norm_weight, norm_bias, order, bounds)


def _gradient(ctx, grad, *_):
    if not ctx.save:
        raise RuntimeError("fastpetl::multi_adapter: save is False but a gradient is wanted, expected save=True")
    needs, grads = grad_mask(ctx.needs_input_grad[:7]), [None] * 7
    if needs:
        *config, shared = ctx.config
        out = torch.ops.fastpetl.multi_adapter_backward(grad, *ctx.saved_tensors, *config, needs, shared)
        grads = [g if needs >> i & 1 else None for i, g in enumerate(out)]
    return (*grads, *(grad if n else None for n in ctx.needs_input_grad[7:9]), *(None,) * 7)


register(
    "multi_adapter(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? res1, Tensor? res2, Tensor task_ids, int tasks, bool add_x, float eps, "
    "int activation, float scale, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    m.run_forward,
    _forward_fake,
)
register(
    "multi_adapter_backward(Tensor grad, Tensor x, Tensor z, Tensor stats, Tensor w_down, Tensor w_up, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor order, Tensor bounds, bool add_x, int activation, float scale, "
    "int needs, int shared) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    m.run_backward,
    _backward_fake,
)
autograd("multi_adapter", _context, _gradient)
not_twice("multi_adapter_backward")
