"""Multi-head self-attention on a fused q|k|v tensor, with an additive mask over keys."""

from __future__ import annotations

import torch

from .. import backends
from ._attention import choose, heads_of, keeps_out, merge, run_backward, run_forward, scores, sdpa, unreachable
from ._casts import cast
from ._common import autocast_dtype, check_input, first_order, needs_grad, number, through_dispatcher

__all__ = ["attention", "attention_reference"]


def attention(qkv, heads, *, key_mask=None, scale=None, backend="auto"):
    """Semantics: out[b, t, h] = softmax_s(scale * q[b, t, h] . k[b, s, h] + key_mask[b, s]) v[b, s, h].

    Shapes: qkv [B, T, 3 * heads * D] as q | k | v, each [heads, D]; out [B, T, heads * D]. key_mask: None or [B, T],
    additive (0 keeps, a large negative number drops a key), a constant. scale: D ** -0.5 unless given.
    backend: "auto" measures the serving backends once per process and shape class, in eager code
    (`fastpetl.backends.tuned()`; FASTPETL_TUNE=0 turns it off). "torch" is torch's scaled_dot_product_attention.
    Dtypes: out has qkv's; key_mask is read as fp32. Under torch.autocast qkv is cast to its dtype. The fused backend
    keeps scores, softmax and sums in fp32; see `attention_reference` for where plain torch rounds. Gradients: dqkv,
    deterministic; not differentiable twice except with backend="reference". In eager code on the CPU a batch with a
    sample all of whose keys are below -1e5 is the reference's where a gradient is wanted, whatever the backend: the
    others take the probabilities from a log-sum-exp, in which the number of keys is then lost, as torch's own does.
    """
    dtype = autocast_dtype(qkv) if isinstance(qkv, torch.Tensor) else None
    qkv = qkv if dtype is None else cast(qkv, dtype)
    head_dim = _check(qkv, heads, key_mask)
    scale = head_dim**-0.5 if scale is None else number("attention", "scale", scale)
    if needs_grad(key_mask):
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"attention: key_mask requires grad, expected a constant: backend {backend!r} does not train it"
            )
        return _formula(qkv, heads, key_mask, scale)
    key_mask = None if key_mask is None else key_mask.detach()
    grad = needs_grad(qkv)
    if through_dispatcher(qkv):
        name = backends.resolve_constant("attention", backend, qkv.device.type, qkv.dtype, head_dim).name
        if name not in ("reference", "torch"):
            return torch.ops.fastpetl.attention(qkv, _mask(key_mask), heads, scale, grad, name)[0]
    elif grad and unreachable(key_mask):
        backends.resolve("attention", backend, qkv, head_dim)  # raises where an explicit one cannot serve
        name = "reference"
    else:

        def one(name, qkv):
            return _eager(name, qkv, key_mask, heads, scale, grad)

        name = choose(backend, qkv, key_mask, heads, head_dim, grad, one)
    return _eager(name, qkv, key_mask, heads, scale, grad)


def _eager(name, qkv, key_mask, heads, scale, grad):
    if name == "reference":
        return _formula(qkv, heads, key_mask, scale)
    if name == "torch":
        return sdpa(qkv, key_mask, heads, scale)
    if grad:
        return _Attention.apply(qkv, _mask(key_mask), heads, scale, name)
    return run_forward(name, qkv, _mask(key_mask), heads, scale, False)[0]


def _check(qkv, heads, key_mask) -> int:
    check_input("attention", "qkv", qkv)
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"attention: heads is {heads!r}, expected an integer of at least 1")
    if qkv.dim() != 3 or qkv.shape[2] % (3 * heads) or qkv.shape[2] == 0:
        raise ValueError(
            f"attention: qkv has shape {tuple(qkv.shape)}, expected (batch, tokens, 3 * {heads} heads * head size)"
        )
    if key_mask is not None:
        if not isinstance(key_mask, torch.Tensor):
            raise TypeError(f"attention: key_mask is a {type(key_mask).__name__}, expected a torch.Tensor")
        if key_mask.shape != qkv.shape[:2]:
            raise ValueError(
                f"attention: key_mask has shape {tuple(key_mask.shape)}, expected {tuple(qkv.shape[:2])} to match qkv"
            )
        if not key_mask.is_floating_point():
            got = str(key_mask.dtype).removeprefix("torch.")
            raise ValueError(
                f"attention: key_mask has dtype {got}, expected an additive floating-point mask (0 keeps a key)"
            )
        if key_mask.device != qkv.device:
            raise ValueError(f"attention: key_mask is on {key_mask.device}, expected {qkv.device} to match qkv")
    return int(qkv.shape[2] // (3 * heads))


def _mask(key_mask):
    return None if key_mask is None else key_mask.float().contiguous()


class _Attention(torch.autograd.Function):
    """The eager door: straight to the launcher. Keeps qkv, the log-sum-exp and, of many tokens, out; P is computed
    again.
    """

    @staticmethod
    def forward(ctx, qkv, key_mask, heads, scale, name):
        qkv = qkv.contiguous()
        out, lse = run_forward(name, qkv, key_mask, heads, scale, True)
        ctx.save_for_backward(qkv, key_mask, out if keeps_out(name, qkv) else None, lse)
        ctx.config = (heads, scale, name)
        return out

    @staticmethod
    @first_order("attention")
    def backward(ctx, grad):
        heads, scale, name = ctx.config
        return run_backward(name, grad, *ctx.saved_tensors, heads, scale), None, None, None, None


# --- reference: the contract ------------------------------------------------------------------------------------------


def attention_reference(qkv, heads, *, key_mask=None, scale=None):
    """Semantics: out[b, t, h] = softmax_s(scale * q[b, t, h] . k[b, s, h] + key_mask[b, s]) v[b, s, h].

    Plain torch, the contract of `attention`: same arguments and shapes, any floating dtype including float64. Rounds to
    qkv's dtype after q . k, then scales, masks and normalises in fp32 (float64 for float64), rounds the probabilities
    to qkv's dtype, and the output.
    Gradients: torch's own, of qkv and key_mask, any order. A row whose keys are all at -inf is NaN, as in torch.
    """
    scale = (qkv.shape[-1] // (3 * heads)) ** -0.5 if scale is None else scale
    return _formula(qkv, heads, key_mask, scale)


def _formula(qkv, heads, key_mask, scale):
    q, k, v = heads_of(qkv.contiguous(), heads)
    p = torch.softmax(scores(q, k, key_mask, scale), -1).to(qkv.dtype)
    return merge(torch.matmul(p, v))
