"""Attention on each backend: C++ and plain torch, behind one signature (that of the raw C++ ops)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from ._common import wide
from ._measured import choose as measured
from ._measured import of_the_batch


def run_forward(name, qkv, key_mask, heads, scale, save):
    """Semantics: (out [B, T, H * D], lse [B, H, T]) by backend `name`; lse is empty unless save."""
    qkv = qkv.contiguous()
    b, t, c = qkv.shape
    if b * t == 0:
        return qkv.new_empty(b, t, c // 3), qkv.new_empty((b, heads, t) if save else 0, dtype=wide(qkv))
    if name == "cpp":
        return torch.ops.fastpetl.cpu_attention_forward.default(qkv, key_mask, heads, scale, save)
    return reference_forward(qkv, key_mask, heads, scale, save)


# Tokens up to which the C++ backward does without `out`: it then holds a head's probabilities and their gradients at
# once, 3 MB in scratch, where `out` would keep as much as q for every layer.
WITHOUT_OUT = 640


def keeps_out(name, qkv) -> bool:
    """Semantics: does `run_backward` need the forward's out?"""
    return name != "cpp" or qkv.shape[1] > WITHOUT_OUT


def run_backward(name, grad, qkv, key_mask, out, lse, heads, scale):
    """Semantics: dqkv by backend `name`; out may be None where not `keeps_out`."""
    if qkv.numel() == 0 or qkv.shape[0] * qkv.shape[1] == 0:
        return torch.zeros_like(qkv)
    if name == "cpp":
        return torch.ops.fastpetl.cpu_attention_backward.default(
            grad.contiguous(), qkv, key_mask, out, lse, heads, scale
        )
    return reference_backward(grad, qkv, key_mask, out, lse, heads, scale)


def choose(backend, qkv, key_mask, heads, head_dim, grad, one) -> str:
    """Semantics: the backend of an eager call; on "auto" the fastest that serves, measured once per shape class.

    `one(name, qkv)` is the call. Where a gradient is wanted, forward and backward are measured together: what a backend
    keeps in forward decides what its backward costs.
    """
    name = backends.resolve("attention", backend, qkv, head_dim).name
    names = backends.serving("attention", backend, qkv.device.type, qkv.dtype, head_dim)
    b, t, _ = qkv.shape
    if b * t == 0:
        return name
    size = (1 << (of_the_batch(b) - 1).bit_length(), 1 << (t - 1).bit_length(), heads, head_dim)
    key = (size, qkv.dtype, key_mask is not None)
    tolerance = 1e-5 if qkv.dtype == torch.float32 else 2e-2  # softmax magnifies the rounding of its scores
    return measured("attention", name, names, key, lambda n, t: one(n, t[0]), (qkv,), grad, "reference", tolerance)


_REACH = -1e5  # where a log-sum-exp in fp32 begins to lose more than the scores themselves lose


def unreachable(mask) -> bool:
    """Semantics: has an additive mask [..., keys] on the CPU a row whose keys are all so far down that a backward from
    log-sum-exps, ours or that of torch's kernel, is wrong? Not asked elsewhere, where it would wait for the device.
    """
    if mask is None or mask.device.type != "cpu" or not mask.is_floating_point() or mask.numel() == 0:
        return False
    return bool(mask.amax(-1).amin() < _REACH)


def heads_of(qkv, heads, parts=3):
    """q, k, v, each [B, H, T, D]."""
    b, t, c = qkv.shape
    return qkv.view(b, t, parts, heads, c // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def scores(q, k, key_mask, scale):
    s = torch.matmul(q, k.transpose(-1, -2)).to(wide(q)) * scale
    return s if key_mask is None else s + key_mask[:, None, None, :].to(s.dtype)


def sdpa(qkv, key_mask, heads, scale):
    """torch's own scaled_dot_product_attention."""
    q, k, v = heads_of(qkv.contiguous(), heads)
    if key_mask is not None:
        key_mask = key_mask[:, None, None, :].to(q.dtype).clamp(min=torch.finfo(q.dtype).min)  # no -inf by rounding
    return merge(F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, scale=scale))


def merge(o):
    """[B, H, T, D] as [B, T, H * D]."""
    return o.transpose(1, 2).flatten(2)


def reference_forward(qkv, key_mask, heads, scale, save):
    """Semantics: what the launcher's forward returns, in plain torch; rounds where `attention_reference` does."""
    q, k, v = heads_of(qkv, heads)
    s = scores(q, k, key_mask, scale)
    out = merge(torch.matmul(torch.softmax(s, -1).to(qkv.dtype), v)).contiguous()
    return out, torch.logsumexp(s, -1) if save else s.new_empty(0)


def reference_backward(grad, qkv, key_mask, out, lse, heads, scale):
    """Semantics: what the launcher's backward returns, in plain torch; P is computed again from lse, sums are fp32."""
    acc = wide(qkv)
    q, k, v = heads_of(qkv.to(acc), heads)
    (g,) = heads_of(grad.contiguous().to(acc), heads, 1)
    (o,) = heads_of(out.to(acc), heads, 1)
    p = torch.exp(scores(q, k, key_mask, scale) - lse[..., None])
    ds = p * (torch.matmul(g, v.transpose(-1, -2)) - (g * o).sum(-1, keepdim=True)) * scale
    parts = (torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q), torch.matmul(p.transpose(-1, -2), g))
    return torch.cat([merge(part) for part in parts], -1).to(qkv.dtype)
