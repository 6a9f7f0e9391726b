"""multi_adapter by one call of the C++ backend, which takes each task's rows where they lie."""

from __future__ import annotations

import torch

from .. import backends
from ..spec import activation_code
from ._common import autocast_dtype, dense, first_order, grad_mask, needs_grad, number, rows, through_dispatcher
from ._measured import choose, rows_class, steady
from .adapter import _check as check_adapter


def in_one_call(compose, x, stacks, residuals, task_ids, tasks, eps, activation, scale, backend):
    """Semantics: multi_adapter's y by the C++ backend, or None: another one serves, or has fewer limits.

    compose(name, x, stacks, residuals) is the op composed of backend `name`'s adapters: what "auto" measures against.
    """
    others = [r for r in residuals if r is not x]
    if through_dispatcher(x) or x.numel() == 0 or len(residuals) - len(others) > 1 or len(others) > 2:
        return None
    if autocast_dtype(x) is not None or any(r.dtype != x.dtype for r in others):
        return None
    check_adapter(x, *(_first(t, dims) for t, dims in zip(stacks, (2, 1, 2, 1, 1, 1), strict=True)))
    if backends.resolve("adapter", backend, x).name != "cpp":
        return None
    code, add_x = activation_code(activation, "multi_adapter"), len(others) < len(residuals)
    config = (add_x, number("multi_adapter", "eps", eps), code, number("multi_adapter", "scale", scale))
    tensors = (x, *stacks, *others, *(None,) * (2 - len(others)))
    grad = needs_grad(*tensors)

    def one(name, tensors):
        if name == "cpp":
            return _call(tensors, task_ids, tasks, config, grad)
        own = [r for r in (tensors[0] if add_x else None, *tensors[7:]) if r is not None]
        return compose(name, tensors[0], tensors[1:7], tuple(own))

    if backend == "auto" and x.dtype == torch.float32:  # in other dtypes the fused kernel rounds less, as `adapter`'s
        names = backends.serving("adapter", "auto", x.device.type, x.dtype)
        names = steady("adapter", names, x.numel() // x.shape[-1])
        wanted = tuple(t is not None and t.requires_grad for t in tensors) if grad else None
        there = tuple(None if t is None else t.shape[0] == tasks for t in stacks)
        per_row = task_ids.dim() == x.dim() - 1
        key = (rows_class(x), stacks[0].shape, tasks, per_row, code, add_x, len(others), there, wanted)
        return one(choose("multi_adapter", "cpp", names, key, one, tensors, grad, "reference", 1e-2), tensors)
    return one("cpp", tensors)


def _first(stack, dims):
    """The tensor of the first task."""
    return stack if stack is None or stack.dim() == dims else stack.detach()[0]


def _call(tensors, task_ids, tasks, config, grad):
    if grad:
        return _MultiAdapter.apply(*tensors, task_ids, tasks, *config)
    return _forward(tensors, dense(task_ids), tasks, config, False)[0].view(tensors[0].shape)


def _forward(tensors, task_ids, tasks, config, save):
    x, *stacks, res1, res2 = tensors
    x, res1, res2 = (None if t is None else rows(t) for t in (x, res1, res2))
    stacks = [dense(t) for t in stacks]
    return torch.ops.fastpetl.cpu_multi_adapter_forward.default(x, *stacks, res1, res2, task_ids, tasks, *config, save)


class _MultiAdapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, task_ids, tasks, *config):
        stacks = [dense(t) for t in (w_down, b_down, w_up, b_up, norm_weight, norm_bias)]
        x2, task_ids = rows(x), dense(task_ids)
        y, z, stats = _forward((x2, *stacks, res1, res2), task_ids, tasks, config, True)
        ctx.needs, ctx.tasks, ctx.config = grad_mask(ctx.needs_input_grad[:7]), tasks, config
        ctx.shapes = [x.shape, *(None if t is None else t.shape for t in stacks)]
        ctx.save_for_backward(x2, z, stats, stacks[0], stacks[2], stacks[4], stacks[5], task_ids)
        return y.view(x.shape)

    @staticmethod
    @first_order("multi_adapter")
    def backward(ctx, grad):
        grads = [None] * 7
        if ctx.needs:
            add_x, _, code, scale = ctx.config
            op = torch.ops.fastpetl.cpu_multi_adapter_backward.default
            out = op(rows(grad), *ctx.saved_tensors, ctx.tasks, add_x, code, scale, ctx.needs)
            pairs = enumerate(zip(out, ctx.shapes, strict=True))
            grads = [_as(g, shape, i) if ctx.needs >> i & 1 else None for i, (g, shape) in pairs]
        res = [grad if needed else None for needed in ctx.needs_input_grad[7:9]]
        return (*grads, *res, *(None,) * 6)


def _as(g, shape, i):
    """The gradient of x, or of a stack from the tasks' gradients: their sum where they share it."""
    return g.view(shape) if i == 0 or g.numel() == shape.numel() else g.sum(0).view(shape)
