"""gather_rows and scatter_rows by the Triton kernels, with their gradients; plain torch stands in rows.py."""

from __future__ import annotations

import torch

from ._common import first_order
from ._library import autograd, not_twice, register


def _flat(t):
    return t.reshape(t.shape[0], t.shape[1:].numel()).contiguous()


def _shaped(y, *shape):
    return torch.ops.aten._unsafe_view(y, shape)  # no autograd view: users may modify the result in place


def gather(x, index, count):
    """Semantics: y[i] = x[index[i]] for i < count, 0 behind."""
    from fastpetl.kernels import rows as kernels

    count = None if count is None else count.contiguous()
    return _shaped(kernels.gather(_flat(x), index.contiguous(), count), index.shape[0], *x.shape[1:])


def gather_backward(grad, index, count, n):
    """Semantics: gather's gradient of x [n, ...]."""
    from fastpetl.kernels import rows as kernels

    count = None if count is None else count.contiguous()
    return _shaped(kernels.gather_backward(_flat(grad), index.contiguous(), count, n), n, *grad.shape[1:])


def scatter(base, rows, index, count):
    """Semantics: y = base, but y[index[i]] = rows[i] for i < count; rows None: 0 there."""
    from fastpetl.kernels import rows as kernels

    found = kernels.inverse(index.contiguous(), None if count is None else count.contiguous(), base.shape[0])
    return _shaped(kernels.merge(_flat(base), None if rows is None else _flat(rows), found), *base.shape)


class Gather(torch.autograd.Function):
    """The eager door: straight to the launcher."""

    @staticmethod
    def forward(ctx, x, index, count):
        ctx.save_for_backward(index, count)
        ctx.n = x.shape[0]
        return gather(x, index, count)

    @staticmethod
    @first_order("gather_rows")
    def backward(ctx, grad):
        return gather_backward(grad, *ctx.saved_tensors, ctx.n), None, None


class Scatter(torch.autograd.Function):
    """The eager door: straight to the launchers."""

    @staticmethod
    def forward(ctx, base, rows, index, count):
        ctx.save_for_backward(index, count)
        return scatter(base, rows, index, count)

    @staticmethod
    @first_order("scatter_rows")
    def backward(ctx, grad):
        needs = ctx.needs_input_grad
        base = scatter(grad, None, *ctx.saved_tensors) if needs[0] else None
        return base, gather(grad, *ctx.saved_tensors) if needs[1] else None, None, None


# --- for compiled code ------------------------------------------------------------------------------------------------


def _context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[-2:])
    ctx.n = inputs[0].shape[0]


def _gather_gradient(ctx, grad):
    return torch.ops.fastpetl.gather_rows_backward(grad, *ctx.saved_tensors, ctx.n), None, None


def _scatter_gradient(ctx, grad):
    index, count = ctx.saved_tensors
    base = torch.ops.fastpetl.scatter_rows(grad, None, index, count) if ctx.needs_input_grad[0] else None
    rows = torch.ops.fastpetl.gather_rows(grad, index, count) if ctx.needs_input_grad[1] else None
    return base, rows, None, None


register(
    "gather_rows(Tensor x, Tensor index, Tensor? count) -> Tensor",
    gather,
    lambda x, index, count: x.new_empty(index.shape[0], *x.shape[1:]),
)
register(
    "gather_rows_backward(Tensor grad, Tensor index, Tensor? count, SymInt n) -> Tensor",
    gather_backward,
    lambda grad, index, count, n: grad.new_empty(n, *grad.shape[1:]),
)
register(
    "scatter_rows(Tensor base, Tensor? rows, Tensor index, Tensor? count) -> Tensor",
    scatter,
    lambda base, rows, index, count: base.new_empty(base.shape),
)
autograd("gather_rows", _context, _gather_gradient)
autograd("scatter_rows", _context, _scatter_gradient)
not_twice("gather_rows_backward")
