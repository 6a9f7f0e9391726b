"""What the functional ops share: argument checks, flattening. Traceable by Dynamo."""

from __future__ import annotations

import functools

import torch

from .._autocast import autocast_dtype  # noqa: F401

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def check_input(function: str, name: str, x) -> None:
    """x must be a floating-point tensor with at least one dimension."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{function}: {name} is a {type(x).__name__}, expected a torch.Tensor")
    if not x.is_floating_point():
        raise ValueError(f"{function}: {name} has dtype {_short(x.dtype)}, expected a floating-point dtype")
    if x.dim() == 0:
        raise ValueError(f"{function}: {name} has shape (), expected at least one dimension")


def fits(t, shape, x) -> bool:
    """Whether t passes check_like: asked first, because the messages cost more than the checks."""
    return type(t) in _PLAIN and t.shape == shape and t.dtype is x.dtype and t.device == x.device


def alike(x, tensors, shapes) -> bool:
    """Whether each of the tensors is None, or plain, of x's dtype, on its device and of its shape."""
    dtype, device = x.dtype, x.device
    for t, shape in zip(tensors, shapes, strict=True):
        if t is None or type(t) in _PLAIN and t.dtype is dtype and t.shape == shape and t.device == device:
            continue
        return False
    return True


def check_like(function: str, name: str, t, shape, why: str, x, x_name: str = "x", dtype=None) -> None:
    """t must have `shape`, x's device and `dtype` (by default x's); `why` says where the shape comes from."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{function}: {name} is a {type(t).__name__}, expected a torch.Tensor")
    if t.shape != shape:
        raise ValueError(f"{function}: {name} has shape {tuple(t.shape)}, expected {why}")
    want = x.dtype if dtype is None else dtype
    if t.dtype != want:
        raise ValueError(
            f"{function}: {name} has dtype {_short(t.dtype)}, expected {_short(want)} to match {x_name} "
            "(mixed dtypes are taken only under torch.autocast)"
        )
    if t.device != x.device:
        raise ValueError(f"{function}: {name} is on {t.device}, expected {x.device} to match {x_name}")


def number(function: str, name: str, value) -> float:
    """A Python number; a tensor is refused because its gradient would be lost."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} is a {type(value).__name__}, expected a Python number")
    return float(value)


def _short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows(x):
    """x [..., d] as a dense [rows, d]; an expanded or strided x is copied."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.is_contiguous() else x.contiguous()


def dense(t):
    return t if t is None or t.is_contiguous() else t.contiguous()


def all_dense(*tensors) -> list:
    """`dense` of each, without a call for each."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def unflatten(y, shape):
    """y [rows, n] as [*shape[:-1], n] without being an autograd view: users may modify the result in place."""
    return y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))


def wide(t):
    """The dtype of statistics and sums for t: fp32, float64 for float64."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def needs_grad(*tensors) -> bool:
    """Whether autograd has to record this call."""
    if torch.is_grad_enabled():
        for t in tensors:  # any() takes twice as long
            if t is not None and t.requires_grad:
                return True
    return False


def through_dispatcher(x) -> bool:
    """Compiled code and tensor subclasses (FakeTensor, ...) go through the registered op, all else to the launcher."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN


def first_order(op: str):
    """Wraps a Function's backward, whose gradients have no gradient: using them in another backward raises.

    torch's once_differentiable marks them only where the incoming gradient itself wants one, so that the gradient of
    `y.sum()` would silently count as a constant in a gradient penalty.
    """
    message = f"{op}: the fused backends cannot be differentiated twice, use backend='reference'".encode()

    def decorate(backward):
        @functools.wraps(backward)
        def wrapped(ctx, *grads):
            if not torch.is_grad_enabled():  # as nearly always: no context is entered
                return backward(ctx, *grads)
            with torch.no_grad():
                out = backward(ctx, *grads)
            out = out if isinstance(out, tuple) else (out,)
            marked = (None if g is None else g.detach().requires_grad_() for g in out)
            return torch._C._functions.DelayedError(message, len(out))(*marked)

        return wrapped

    return decorate


def grad_mask(needs_input_grad) -> int:
    """Bit i is set where gradient i is wanted."""
    mask, bit = 0, 1
    for needed in needs_input_grad:
        if needed:
            mask |= bit
        bit <<= 1
    return mask
