"""The registered ops of the adapter, the frozen linears and the attention (see _library.py)."""

from __future__ import annotations

import torch

from . import _adapter, _attention
from . import _linear as lb
from ._common import grad_mask, wide
from ._library import apart, autograd, not_twice, register

# --- adapter ----------------------------------------------------------------------------------------------------------


def _adapter_forward(*args):
    *args, save, backend = args
    y, z, stats = _adapter.run_forward(backend, *args, save)
    return y, z, stats if save else y.new_empty(0, dtype=wide(y))  # no result is another: a launcher's may be


def _adapter_forward_fake(
    x, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, add_x, eps, code, scale, save, backend
):
    rows = x.shape[0]
    z = x.new_empty((rows, w_down.shape[0]) if save else (0,))
    norm = save and norm_weight is not None
    return x.new_empty(x.shape), z, x.new_empty((rows, 2) if norm else (0,), dtype=wide(x))


def _adapter_backward(*args):
    return apart(_adapter.run_backward(args[-1], *args[:-1]))


def _adapter_backward_fake(grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x, code, scale, needs, backend):
    r, d = w_down.shape
    shapes = (x.shape, (r, d), (r,), (d, r), (d,), (d,), (d,))
    return tuple(x.new_empty(shape if needs >> i & 1 else (0,)) for i, shape in enumerate(shapes))


def _adapter_context(ctx, inputs, output):
    x, w_down, _, w_up, _, norm_weight, norm_bias, _, _, add_x, _, code, scale, save, backend = inputs
    _, z, stats = output
    ctx.mark_non_differentiable(z, stats)
    ctx.config = (add_x, code, scale, backend, save)
    ctx.save_for_backward(x, z, stats, w_down, w_up, norm_weight, norm_bias)


def _adapter_gradient(ctx, grad, *_):
    add_x, code, scale, backend, save = ctx.config
    if not save:
        raise RuntimeError("fastpetl::adapter: save is False but a gradient is wanted, expected save=True")
    needs = grad_mask(ctx.needs_input_grad[:7])
    grads = [None] * 7
    if needs:
        out = torch.ops.fastpetl.adapter_backward(grad, *ctx.saved_tensors, add_x, code, scale, needs, backend)
        grads = [g if needs >> i & 1 else None for i, g in enumerate(out)]
    return (*grads, *(grad if n else None for n in ctx.needs_input_grad[7:9]), *(None,) * 6)


register(
    "adapter(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? res1, Tensor? res2, bool add_x, float eps, int activation, float scale, "
    "bool save, str backend) -> (Tensor, Tensor, Tensor)",
    _adapter_forward,
    _adapter_forward_fake,
)
register(
    "adapter_backward(Tensor grad, Tensor x, Tensor z, Tensor stats, Tensor w_down, Tensor w_up, Tensor? norm_weight, "
    "Tensor? norm_bias, bool add_x, int activation, float scale, int needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _adapter_backward,
    _adapter_backward_fake,
)
autograd("adapter", _adapter_context, _adapter_gradient)
not_twice("adapter_backward")


# --- linear -----------------------------------------------------------------------------------------------------------


def _linear_forward(x, weights, biases, prologue, norm_weight, norm_bias, eps, backend):
    return tuple(lb.run_forward(backend, x.contiguous(), weights, biases, prologue, norm_weight, norm_bias, eps))


def _linear_forward_fake(x, weights, biases, prologue, norm_weight, norm_bias, eps, backend):
    stats = x.new_empty((x.shape[0], 2) if prologue == lb.NORM else (0,), dtype=wide(x))
    return x.new_empty(x.shape[0], sum(w.shape[0] for w in weights)), stats


def _linear_backward(grad, x, stats, weights, prologue, norm_weight, backend):
    x = None if x is None else x.contiguous()
    return lb.run_backward(backend, grad.contiguous(), x, stats, weights, prologue, norm_weight)


def _linear_backward_fake(grad, x, stats, weights, prologue, norm_weight, backend):
    return grad.new_empty(grad.shape[0], weights[0].shape[1])


def _linear_context(ctx, inputs, output):
    x, weights, biases, prologue, norm_weight, _, _, backend = inputs
    stats = output[1]
    ctx.mark_non_differentiable(stats)
    ctx.config = (prologue, backend, len(weights), len(biases))
    ctx.save_for_backward(x if prologue else None, stats, norm_weight, *weights)


def _linear_gradient(ctx, grad, *_):
    x, stats, norm_weight, *weights = ctx.saved_tensors
    prologue, backend, n_weights, n_biases = ctx.config
    dx = torch.ops.fastpetl.linear_backward(grad, x, stats, weights, prologue, norm_weight, backend)
    return dx, [None] * n_weights, [None] * n_biases, None, None, None, None, None


register(
    "linear(Tensor x, Tensor[] weights, Tensor[] biases, int prologue, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, str backend) -> (Tensor, Tensor)",
    _linear_forward,
    _linear_forward_fake,
)
register(
    "linear_backward(Tensor grad, Tensor? x, Tensor stats, Tensor[] weights, int prologue, "
    "Tensor? norm_weight, str backend) -> Tensor",
    _linear_backward,
    _linear_backward_fake,
)
autograd("linear", _linear_context, _linear_gradient)
not_twice("linear_backward")


# --- attention --------------------------------------------------------------------------------------------------------


def _attention_forward(qkv, key_mask, heads, scale, save, backend):
    return tuple(_attention.run_forward(backend, qkv, key_mask, heads, scale, save))


def _attention_forward_fake(qkv, key_mask, heads, scale, save, backend):
    b, t, c = qkv.shape
    return qkv.new_empty(b, t, c // 3), qkv.new_empty((b, heads, t) if save else (0,), dtype=wide(qkv))


def _attention_backward(grad, qkv, key_mask, out, lse, heads, scale, backend):
    return _attention.run_backward(backend, grad, qkv.contiguous(), key_mask, out, lse, heads, scale)


def _attention_backward_fake(grad, qkv, key_mask, out, lse, heads, scale, backend):
    return qkv.new_empty(qkv.shape)


def _attention_context(ctx, inputs, output):
    qkv, key_mask, heads, scale, save, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.config = (heads, scale, backend, save)
    ctx.save_for_backward(qkv, key_mask, out, lse)


def _attention_gradient(ctx, grad, *_):
    heads, scale, backend, save = ctx.config
    if not save:
        raise RuntimeError("fastpetl::attention: save is False but a gradient is wanted, expected save=True")
    dqkv = torch.ops.fastpetl.attention_backward(grad, *ctx.saved_tensors, heads, scale, backend)
    return dqkv, None, None, None, None, None


register(
    "attention(Tensor qkv, Tensor? key_mask, int heads, float scale, bool save, str backend) -> (Tensor, Tensor)",
    _attention_forward,
    _attention_forward_fake,
)
register(
    "attention_backward(Tensor grad, Tensor qkv, Tensor? key_mask, Tensor out, Tensor lse, int heads, "
    "float scale, str backend) -> Tensor",
    _attention_backward,
    _attention_backward_fake,
)
autograd("attention", _attention_context, _attention_gradient)
not_twice("attention_backward")
