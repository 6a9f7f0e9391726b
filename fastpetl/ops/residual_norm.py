"""What follows a sublayer: dropout, the residual sum and the norm in front of the next GEMM, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from .._by_torch import norm_by_torch
from ..spec import EMITS, TAILS, check_tail
from . import _mixed
from ._casts import cast
from ._common import (
    autocast_dtype,
    check_input,
    check_like,
    first_order,
    fits,
    grad_mask,
    needs_grad,
    number,
    rows,
    through_dispatcher,
    unflatten,
    wide,
)
from ._dropout import dropout_factor
from ._measured import choose, rows_class
from ._residual_norm import (
    LAYERNORM,
    NORM,
    SUM,
    add_sublayer,
    norm_forward,
    run_backward,
    run_forward,
    shared,
    skipped_rows,
    without_copy,
)

__all__ = ["residual_norm", "residual_norm_reference"]


def residual_norm(
    x,
    f,
    weight=None,
    bias=None,
    *,
    tail="layernorm",
    eps=1e-5,
    emit="both",
    dropout=0.0,
    seed=None,
    mask=None,
    backend="auto",
    overwrite=False,
):
    """Semantics: s = x + drop(f), n = norm(s); s = x in samples with mask[b]. Returns (s, n), s or n, as `emit` says.

    Shapes: x and f [..., d] (f None: s is x, only n can be emitted); weight, bias [d]; mask bool [batch], batch = x's
    first dimension, True = the sample's sublayer was skipped: its f is not read; seed int64 tensor of one element.
    tail: "layernorm", "rmsnorm" (no bias, no mean) or None (no weight, emit="sum"). emit: "both", "sum" or "norm".
    dropout: drops elements of f with this probability and scales the rest by 1 / (1 - p), by a Philox mask of the
    element's position under `seed`, the same on every backend and in the backward.
    Dtypes: all of one dtype. Under torch.autocast s is of the wider of x's dtype and f's, n too; on CUDA, where
    autocast has norms in fp32, n is fp32. What the Triton kernel takes as it is, is cast for the other backends, f to
    x's dtype (on CUDA x to fp32 first).
    Rounds: s to x's dtype, n once; statistics of the rounded s, in fp32.
    Gradients: for x, f, weight and bias, computed only where wanted, deterministic; not differentiable twice except
    with backend="reference" or "torch".
    overwrite: f is the caller's and may be written to: where no gradient is recorded, the sum then needs no memory.
    backend: "auto" measures "cpp" and "torch" once per process and shape class, in eager fp32 code without mask and
    dropout (`fastpetl.backends.tuned()`; FASTPETL_TUNE=0 turns it off).
    """
    check_tail("residual_norm", "tail", tail, emit, dropout)
    eps = number("residual_norm", "eps", eps)
    mixed = None
    if isinstance(x, torch.Tensor) and autocast_dtype(x) is not None:
        mixed = _mixed_dtype(x, f, mask, dropout, backend)
        if mixed is None:
            x = x.float() if x.is_cuda else x
            f = cast(f, x.dtype)
        weight, bias = (cast(t, x.dtype if mixed is None else mixed) for t in (weight, bias))
    _check(x, f, weight, bias, tail, emit, dropout, seed, mask, mixed)
    config = TAILS[tail], EMITS[emit], eps, float(dropout)
    tensors = (x, f, weight, bias, mask, seed if dropout else None)
    s, n = _call(tensors, *config, backend, overwrite) if mixed is None else _eager("triton", tensors, config, True)
    return (s, n) if emit == "both" else s if emit == "sum" else n


def _mixed_dtype(x, f, mask, dropout, backend) -> torch.dtype | None:
    """The norm's dtype under autocast, where a kernel takes x and f as they are."""
    if not (f is None or isinstance(f, torch.Tensor) and f.dtype in _mixed.FLOATS and f.dim()):
        return None
    if _mixed.serves("residual_norm", x, backend) is None:
        return None
    if backend == "auto" and mask is None and not dropout and norm_by_torch(backend, x):
        return None
    return _mixed.norm_dtype(x, f)


def _check(x, f, weight, bias, tail, emit, dropout, seed, mask, mixed=None) -> None:
    check_input("residual_norm", "x", x)
    if f is not None and fits(f, x.shape, x):
        pass
    elif f is not None:
        dtype = None if mixed is None else f.dtype
        check_like("residual_norm", "f", f, x.shape, f"{tuple(x.shape)} to match x", x, dtype=dtype)
    elif emit != "norm" or dropout or mask is not None:
        raise ValueError("residual_norm: f is None, expected a tensor, or emit='norm' without dropout and mask")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and not fits(t, x.shape[-1:], x):
            why = f"(hidden={x.shape[-1]},) to match x"
            check_like("residual_norm", name, t, (x.shape[-1],), why, x, dtype=mixed)
    if (weight is None) != (tail is None):
        got = "None" if weight is None else "a tensor"
        raise ValueError(
            f"residual_norm: weight is {got} with tail={tail!r}, expected it if and only if there is a tail"
        )
    if bias is not None and tail != "layernorm":
        raise ValueError(f"residual_norm: bias is given with tail={tail!r}, expected it with 'layernorm' only")
    check_mask("residual_norm", mask, x)
    check_seed("residual_norm", seed, dropout, x)


def check_mask(function: str, mask, x) -> None:
    """mask must be None or a bool tensor [batch] on x's device."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{function}: mask is a {type(mask).__name__}, expected a bool tensor")
    if mask.dtype != torch.bool or mask.shape != x.shape[:1] or mask.device != x.device or x.dim() < 2:
        got = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)} on {mask.device}"
        raise ValueError(f"{function}: mask is {got}, expected bool (batch={x.shape[0]},) on {x.device} to match x")


def check_seed(function: str, seed, dropout, x) -> None:
    """With dropout, seed must be an int64 tensor of one element on x's device: data, so that graphs do not fix it."""
    if not dropout:
        return
    if not isinstance(seed, torch.Tensor):
        raise TypeError(f"{function}: seed is a {type(seed).__name__}, expected an int64 tensor of one element")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        got = f"{str(seed.dtype).removeprefix('torch.')} {tuple(seed.shape)} on {seed.device}"
        raise ValueError(f"{function}: seed is {got}, expected int64 of one element on {x.device}")


def _call(tensors, tail, emit, eps, dropout, backend, overwrite=False):
    x, f, weight, bias, mask, seed = tensors
    compiled = through_dispatcher(x)
    if compiled:
        name = backends.resolve_constant("residual_norm", backend, x.device.type, x.dtype).name
    else:
        name = backends.resolve("residual_norm", backend, x).name
    if name == "reference":
        return _formula(*tensors, tail, emit, eps, dropout)
    grad = needs_grad(x, f, weight, bias)
    if not compiled and backend == "auto" and mask is None and not dropout:
        if name == "cpp":
            name = _choose(tensors, tail, emit, eps, grad)
        elif norm_by_torch(backend, x):
            name = "torch"
    if name == "torch":
        overwrite = overwrite and not torch.is_grad_enabled() and not compiled
        return _torch(*tensors, tail, emit, eps, dropout, overwrite)
    if compiled:
        flat = rows(x), None if f is None else rows(f)
        s, n, _ = torch.ops.fastpetl.residual_norm(
            *flat, weight, bias, mask, seed, tail, emit, eps, dropout, grad, name
        )
        return (s.view(x.shape) if emit & SUM else None), (n.view(x.shape) if emit & NORM else None)
    return _eager(name, tensors, (tail, emit, eps, dropout), False)


def _eager(name, tensors, config, mixed):
    """(s, n) by a launcher."""
    x, emit = tensors[0], config[1]
    if needs_grad(*tensors[:4]):
        return _ResidualNorm.apply(*tensors, *config, name, mixed)
    s, n, _ = run_forward(name, *tensors, *config, False, mixed)
    return (s.view(x.shape) if emit & SUM else None), (n.view(x.shape) if emit & NORM else None)


def _choose(tensors, tail, emit, eps, grad) -> str:
    x, f, weight, bias, *_ = tensors
    if x.dtype != torch.float32 or x.numel() == 0:  # torch keeps the statistics of other dtypes in them
        return "cpp"

    def one(name, tensors):
        if name == "torch":
            return _torch(*tensors, tail, emit, eps, 0.0)
        return _eager(name, tensors, (tail, emit, eps, 0.0), False)

    names = backends.serving("residual_norm", "auto", x.device.type, x.dtype)
    wanted = tuple([t is not None and t.requires_grad for t in (x, f, weight, bias)]) if grad else f is None
    key = (rows_class(x), x.shape[-1], tail, emit, bias is None, wanted)
    return choose("residual_norm", "cpp", names, key, one, tensors, grad, "torch", 1e-4)


class _ResidualNorm(torch.autograd.Function):
    """The eager door: straight to the launcher."""

    @staticmethod
    def forward(ctx, x, f, weight, bias, mask, seed, tail, emit, eps, dropout, name, mixed):
        s, n, stats = run_forward(name, x, f, weight, bias, mask, seed, tail, emit, eps, dropout, True, mixed)
        ctx.config = tail, dropout, name
        ctx.dtypes = tuple([(x if t is None else t).dtype for t in (x, f, weight, bias)]) if mixed else ()
        ctx.set_materialize_grads(False)
        kept = rows(x) if f is None and tail else s
        out = unflatten(s, x.shape) if emit & SUM else None
        # Where s is an output, what is saved is that output: autograd then counts it once and sees writes to it.
        ctx.save_for_backward(out if tail and out is not None else kept if tail else None, stats, weight, mask, seed)
        return out, (unflatten(n, x.shape) if emit & NORM else None)

    @staticmethod
    @first_order("residual_norm")
    def backward(ctx, g_s, g_n):
        like = g_n if g_s is None else g_s
        grads = [None] * 4
        needs = grad_mask(ctx.needs_input_grad[:4])
        if like is not None and needs:
            tail, dropout, name = ctx.config
            s, stats, weight, mask, seed = ctx.saved_tensors
            s = stats.new_empty(0) if s is None else rows(s)
            once = needs if ctx.dtypes and ctx.dtypes[0] is not ctx.dtypes[1] else without_copy(needs, mask, dropout)
            out = run_backward(name, g_s, g_n, s, stats, weight, mask, seed, tail, dropout, once, ctx.dtypes)
            grads = shared(out, needs, once)
            grads[:2] = [None if g is None else g.view(like.shape) for g in grads[:2]]
        return (*grads, *(None,) * 8)


def residual_norm_reference(
    x, f, weight=None, bias=None, *, tail="layernorm", eps=1e-5, emit="both", dropout=0.0, seed=None, mask=None
):
    """Semantics: s = x + drop(f), n = norm(s); s = x in samples with mask[b]. Returns (s, n), s or n, as `emit` says.

    Plain torch, the contract of `residual_norm`: same arguments and shapes, any floating dtype including float64.
    Rounds to x's dtype after dropout, after the sum and after the norm, which is computed in fp32 or wider.
    Gradients: torch's own, any order. Source: design.md section 5; METER `BertSelfOutput`, VL-BART and VL-T5 layers.
    """
    check_tail("residual_norm_reference", "tail", tail, emit, dropout)
    s, n = _formula(x, f, weight, bias, mask, seed, TAILS[tail], EMITS[emit], eps, float(dropout))
    return (s, n) if emit == "both" else s if emit == "sum" else n


def _torch(x, f, weight, bias, mask, seed, tail, emit, eps, dropout, overwrite=False):
    """(s, n) by torch's own kernels and autograd."""
    plain = f is not None and mask is None and not dropout
    s = x if f is None else f.add_(x) if overwrite and plain else x + f
    if mask is not None or dropout:
        flat, sub = x.reshape(-1, x.shape[-1]), None if f is None else f.reshape(-1, x.shape[-1])
        factor = dropout_factor(seed, *flat.shape, dropout, x)
        s = add_sublayer(flat, sub, factor, skipped_rows(mask, flat.shape[0])).view(x.shape)
    n = None
    if emit & NORM and x.device.type == "cpu" and x.dtype != wide(x):  # there torch keeps the statistics in x's dtype
        n = norm_forward(s.reshape(-1, s.shape[-1]), weight, bias, tail, eps)[0].view(x.shape)
    elif emit & NORM:
        shape = x.shape[-1:]
        n = F.layer_norm(s, shape, weight, bias, eps) if tail == LAYERNORM else F.rms_norm(s, shape, weight, eps)
    return (s if emit & SUM else None), n


def _formula(x, f, weight, bias, mask, seed, tail, emit, eps, dropout):
    flat, sub = x.reshape(-1, x.shape[-1]), None if f is None else f.reshape(-1, x.shape[-1])
    factor = dropout_factor(seed, *flat.shape, dropout, x)
    s = add_sublayer(flat, sub, factor, skipped_rows(mask, flat.shape[0]))
    n = norm_forward(s, weight, bias, tail, eps)[0].view(x.shape) if tail else None
    return (s.view(x.shape) if emit & SUM else None), (n if emit & NORM else None)
