"""gather_rows and scatter_rows by the Triton or CUDA kernels, with their gradients; plain torch stands in rows.py."""

from __future__ import annotations

import torch

from . import _cuda
from ._common import dense, first_order
from ._library import autograd, not_twice, register


def _flat(t):
    return t.reshape(t.shape[0], t.shape[1:].numel()).contiguous()


def _shaped(y, *shape):
    return torch.ops.aten._unsafe_view(y, shape)  # no autograd view: users may modify the result in place


class _Triton:
    """The Triton launchers with the signature of _cuda.py's."""

    @staticmethod
    def gather(x, index, count):
        from fastpetl.kernels import rows as kernels

        return kernels.gather(x, index, count)

    @staticmethod
    def gather_backward(grad, index, count, n):
        from fastpetl.kernels import rows as kernels

        return kernels.gather_backward(grad, index, count, n)

    @staticmethod
    def scatter(base, rows, index, count):
        from fastpetl.kernels import rows as kernels

        return kernels.merge(base, rows, kernels.inverse(index, count, base.shape[0]))


def _launchers(name):
    return _cuda if name == "cuda" else _Triton


def gather(x, index, count, name="triton"):
    """Semantics: y[i] = x[index[i]] for i < count, 0 behind."""
    y = _launchers(name).gather(_flat(x), index.contiguous(), dense(count))
    return _shaped(y, index.shape[0], *x.shape[1:])


def gather_backward(grad, index, count, n, name="triton"):
    """Semantics: gather's gradient of x [n, ...]."""
    dx = _launchers(name).gather_backward(_flat(grad), index.contiguous(), dense(count), n)
    return _shaped(dx, n, *grad.shape[1:])


def scatter(base, rows, index, count, name="triton"):
    """Semantics: y = base, but y[index[i]] = rows[i] for i < count; rows None: 0 there."""
    rows = None if rows is None else _flat(rows)
    y = _launchers(name).scatter(_flat(base), rows, index.contiguous(), dense(count))
    return _shaped(y, *base.shape)


class Gather(torch.autograd.Function):
    """The eager door: straight to the launcher."""

    @staticmethod
    def forward(ctx, x, index, count, name):
        ctx.save_for_backward(index, count)
        ctx.n, ctx.name = x.shape[0], name
        return gather(x, index, count, name)

    @staticmethod
    @first_order("gather_rows")
    def backward(ctx, grad):
        return gather_backward(grad, *ctx.saved_tensors, ctx.n, ctx.name), None, None, None


class Scatter(torch.autograd.Function):
    """The eager door: straight to the launchers."""

    @staticmethod
    def forward(ctx, base, rows, index, count, name):
        ctx.save_for_backward(index, count)
        ctx.name = name
        return scatter(base, rows, index, count, name)

    @staticmethod
    @first_order("scatter_rows")
    def backward(ctx, grad):
        needs = ctx.needs_input_grad
        base = scatter(grad, None, *ctx.saved_tensors, ctx.name) if needs[0] else None
        return base, gather(grad, *ctx.saved_tensors, ctx.name) if needs[1] else None, None, None, None


# --- for compiled code ------------------------------------------------------------------------------------------------


def _context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[-3:-1])
    ctx.n, ctx.name = inputs[0].shape[0], inputs[-1]


def _gather_gradient(ctx, grad):
    return torch.ops.fastpetl.gather_rows_backward(grad, *ctx.saved_tensors, ctx.n, ctx.name), None, None, None


def _scatter_gradient(ctx, grad):
    index, count = ctx.saved_tensors
    base = torch.ops.fastpetl.scatter_rows(grad, None, index, count, ctx.name) if ctx.needs_input_grad[0] else None
    rows = torch.ops.fastpetl.gather_rows(grad, index, count, ctx.name) if ctx.needs_input_grad[1] else None
    return base, rows, None, None, None


register(
    "gather_rows(Tensor x, Tensor index, Tensor? count, str backend='triton') -> Tensor",
    gather,
    lambda x, index, count, backend="triton": x.new_empty(index.shape[0], *x.shape[1:]),
)
register(
    "gather_rows_backward(Tensor grad, Tensor index, Tensor? count, SymInt n, str backend='triton') -> Tensor",
    gather_backward,
    lambda grad, index, count, n, backend="triton": grad.new_empty(n, *grad.shape[1:]),
)
register(
    "scatter_rows(Tensor base, Tensor? rows, Tensor index, Tensor? count, str backend='triton') -> Tensor",
    scatter,
    lambda base, rows, index, count, backend="triton": base.new_empty(base.shape),
)
autograd("gather_rows", _context, _gather_gradient)
autograd("scatter_rows", _context, _scatter_gradient)
not_twice("gather_rows_backward")
