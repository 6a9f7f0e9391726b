"""Adapters of several tasks on the fused backend (Triton): which calls it serves, the eager autograd Function."""

from __future__ import annotations

import torch

from .. import backends
from ._common import first_order, grad_mask, needs_grad, rows, through_dispatcher, unflatten, wide


def _kernels():
    from fastpetl.kernels import multi_adapter as kernels

    return kernels


def _names(backend: str, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    return backends.serving("multi_adapter", backend, device, dtype)


_names._dynamo_marked_constant = True  # as backends.resolve_constant: looked up once, while tracing


def choose(backend: str, x, r: int, tasks: int) -> str:
    """Semantics: the backend of this call; what was asked for by name and cannot serve raises."""
    if backend not in ("auto", *backends.BACKENDS["multi_adapter"]):
        return "composed"  # of calls of `adapter`, whose backend it then is
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return backends.resolve("multi_adapter", backend, x).name
    names = _names(backend, x.device.type, x.dtype)
    if names[0] != "triton":
        return names[0]
    ok, why = _kernels().verify(x.dtype, x.shape[-1], r, tasks)
    if ok or len(names) > 1:
        return names[0 if ok else 1]
    raise RuntimeError(f"multi_adapter: backend is 'triton', which cannot serve this call: {why}")


def fused(tensors, task_ids, tasks, add_x, eps, code, scale):
    """Semantics: y like x; tensors: x [..., d], six stacks with T or 1 in front, two residuals, None among them."""
    x, *rest = tensors
    stacks, (res1, res2) = rest[:6], rest[6:]
    arguments = (task_ids.reshape(-1), tasks, add_x, eps, code, scale)
    grad = needs_grad(*tensors)
    if not through_dispatcher(x):
        if grad:
            return _MultiAdapter.apply(x, *stacks, res1, res2, *arguments)
        return unflatten(run_forward(rows(x), *stacks, res1, res2, *arguments, False)[0], x.shape)
    flat = [None if t is None else rows(t) for t in (res1, res2)]
    return torch.ops.fastpetl.multi_adapter(rows(x), *stacks, *flat, *arguments, grad)[0].view(x.shape)


def run_forward(x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, task_ids, tasks, add_x, eps, code,
                scale, save):  # fmt: skip
    """Semantics: (y [rows, d], z, stats, order, bounds); the last four are what the backward needs."""
    kernels = _kernels()
    x, res1, res2 = (None if t is None else rows(t) for t in (x, res1, res2))
    stacks = [_dense(t) for t in (w_down, b_down, w_up, b_up, norm_weight, norm_bias)]
    if x.shape[0] == 0:
        return (torch.empty_like(x), *saved(x, w_down, norm_weight, task_ids, tasks, save))
    order, bounds = kernels.sort_by_task(task_ids, tasks)
    y, z, stats = kernels.multi_adapter_forward(x, *stacks, order, bounds, res1, res2, add_x, eps, code, scale, save)
    return y, z, stats, order, bounds


def saved(x, w_down, norm_weight, task_ids, tasks, save):
    """Semantics: empty (z, stats, order, bounds) of the right shapes, for the fake and for no rows."""
    n = x.shape[0]
    z = x.new_empty((n, w_down.shape[1]) if save else (0,))
    stats = x.new_empty((n, 2) if save and norm_weight is not None else (0,), dtype=wide(x))
    order = task_ids.new_empty(task_ids.shape)
    return z, stats, order, torch.empty(tasks + 1, dtype=torch.int32, device=x.device)


def run_backward(grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, order, bounds, add_x, code, scale, needs,
                 shared):  # fmt: skip
    """Semantics: the seven gradients; bit i of `needs` asks for the i-th, bit i of `shared`: its parameter has no
    tasks."""
    if x.shape[0] == 0:
        shapes = gradient_shapes(x, w_down, bounds, needs, shared)
        return tuple(x.new_zeros(shape) for shape in shapes)
    stacks = [_dense(t) for t in (w_down, w_up, norm_weight, norm_bias)]
    return tuple(
        _kernels().multi_adapter_backward(
            rows(grad), x, z, stats, *stacks, order, bounds, add_x, code, scale, needs, shared
        )
    )


def gradient_shapes(x, w_down, bounds, needs, shared):
    d, r, tasks = x.shape[1], w_down.shape[1], bounds.shape[0] - 1
    own = (r, d), (r,), (d, r), (d,), (d,), (d,)
    shapes = x.shape, *((1 if shared >> i & 1 else tasks, *shape) for i, shape in enumerate(own, 1))
    return [shape if needs >> i & 1 else (0,) for i, shape in enumerate(shapes)]


def shared_mask(stacks, tasks: int) -> int:
    """Bit i + 1 is set where stack i is shared by several tasks."""
    return sum(1 << i for i, t in enumerate(stacks, 1) if t is not None and t.shape[0] != tasks)


def _dense(t):
    """Each task's tensor dense; the stride from task to task may be anything (0: expanded), which copies nothing."""
    if t is None or t.is_contiguous():
        return t
    expected = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


class _MultiAdapter(torch.autograd.Function):
    """The eager door: straight to the launcher."""

    @staticmethod
    def forward(ctx, x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, task_ids, tasks, add_x, eps,
                code, scale):  # fmt: skip
        ctx.needs = grad_mask(ctx.needs_input_grad[:7])
        stacks = w_down, b_down, w_up, b_up, norm_weight, norm_bias
        ctx.config = add_x, code, scale, ctx.needs, shared_mask(stacks, tasks)
        x2 = rows(x)
        y, *kept = run_forward(x2, *stacks, res1, res2, task_ids, tasks, add_x, eps, code, scale, ctx.needs != 0)
        if ctx.needs:
            z, stats, order, bounds = kept
            ctx.save_for_backward(x2, z, stats, w_down, w_up, norm_weight, norm_bias, order, bounds)
        return unflatten(y, x.shape)

    @staticmethod
    @first_order("multi_adapter")
    def backward(ctx, grad):
        grads = [None] * 7
        if ctx.needs:
            out = run_backward(grad, *ctx.saved_tensors, *ctx.config)
            grads = [g if ctx.needs >> i & 1 else None for i, g in enumerate(out)]
            if grads[0] is not None:
                grads[0] = grads[0].view(grad.shape)
        res = [grad if needed else None for needed in ctx.needs_input_grad[7:9]]
        return (*grads, *res, *(None,) * 6)
