"""residual_norm on each backend: C++, Triton and plain torch, behind one signature (that of the raw C++ ops)."""

from __future__ import annotations

import functools

import torch

from ..spec import EMITS, TAILS
from ._common import dense, rows, wide
from ._dropout import dropout_factor, dropped

LAYERNORM, SUM, NORM = TAILS["layernorm"], EMITS["sum"], EMITS["norm"]


@functools.cache
def _launchers(name: str):
    if name == "cpp":
        ops = torch.ops.fastpetl
        return ops.cpu_residual_norm_forward.default, ops.cpu_residual_norm_backward.default
    if name == "triton":
        from fastpetl.kernels import residual_norm as kernels

        return kernels.residual_norm_forward, kernels.residual_norm_backward
    return reference_forward, reference_backward


def run_forward(name, x, f, weight, bias, mask, seed, tail, emit, eps, dropout, save, mixed=False):
    """Semantics: (s, n, stats) by backend `name`: s = x + drop(f), n = norm(s); s = x in the rows of skipped samples.

    x [rows, d]; f [rows, d], or None: then s is x and not written; weight [d] (None: tail is 0); bias [d] or None; mask
    bool [batch] or None, True = skip: sample b is rows b*(rows/batch) up to (b+1)*(rows/batch), f is not read there;
    seed int64 [1], None where dropout is 0. Launchers get dense tensors of one dtype and rows > 0; mixed, for "triton"
    only: of any dtypes.
    tail: 0 none, 1 LayerNorm, 2 RMSNorm. emit: bit 0 wants s, bit 1 wants n. save: a backward will follow.
    s [rows, d]: empty (0 elements) unless f is given and (emit & 1 or (save and tail)); n [rows, d]: empty unless
    emit & 2; stats [rows, 2] fp32, (mean, rstd) of s as rounded to x's dtype, (0, rstd) for RMSNorm: empty unless save
    and tail.
    """
    x, f = rows(x), None if f is None else rows(f)
    if x.numel() == 0 and not mixed:
        return empty(x, f is not None, tail, emit, save)
    args = x, f, dense(weight), dense(bias), dense(mask), seed, tail, emit, eps, dropout, save
    return _launchers(name)[0](*args, mixed=True) if mixed else _launchers(name)[0](*args)


def run_backward(name, g_s, g_n, s, stats, weight, mask, seed, tail, dropout, needs, dtypes=()):
    """Semantics: (dx, df, dweight, dbias) by backend `name`; bit i of `needs` asks for the i-th, others are empty.

    g_s, g_n [rows, d], None where that output has no gradient (at least one is given; g_n only with a tail); s and
    stats as the forward gave them (s is x where f was None). dtypes: of the four gradients, after a mixed forward.
    """
    g_s, g_n = (None if g is None else rows(g) for g in (g_s, g_n))
    like = g_n if g_s is None else g_s
    if like.numel() == 0 and not dtypes:
        shapes = (like.shape, like.shape, like.shape[1:], like.shape[1:])
        return tuple(like.new_zeros(shape if needs >> i & 1 else 0) for i, shape in enumerate(shapes))
    args = g_s, g_n, s, stats, dense(weight), dense(mask), seed, tail, dropout, needs
    return tuple(_launchers(name)[1](*args, mixed=dtypes) if dtypes else _launchers(name)[1](*args))


def without_copy(needs, mask, dropout):
    """`needs` without df where it is dx: with neither mask nor dropout."""
    return needs & ~2 if needs & 3 == 3 and mask is None and not dropout else needs


def shared(out, needs, once):
    """The wanted gradients of a backward asked for `once`, None for the others."""
    return [out[0] if i == 1 and needs != once else g if needs >> i & 1 else None for i, g in enumerate(out)]


def empty(x, sublayer, tail, emit, save):
    """The outputs' shapes and dtypes, uninitialised."""
    s = x.new_empty(x.shape if sublayer and (emit & SUM or save and tail) else 0)
    stats = x.new_empty((x.shape[0], 2) if save and tail else 0, dtype=wide(x))
    return s, x.new_empty(x.shape if emit & NORM else 0), stats


def skipped_rows(mask, count):
    """The mask of samples as a mask of rows [rows, 1], or None."""
    return None if mask is None else mask.repeat_interleave(count // max(mask.numel(), 1)).unsqueeze(1)


def add_sublayer(x, f, factor, skipped):
    """x + drop(f), x in skipped rows, where f may hold anything."""
    if f is None:
        return x
    if skipped is not None:
        f = torch.where(skipped, 0, f)
    s = x + dropped(f, factor)
    return s if skipped is None else torch.where(skipped, x, s)


def norm_forward(s, weight, bias, tail, eps):
    """Semantics: (norm(s) in s's dtype, stats [rows, 2]), computed in fp32 or wider."""
    t = s.to(wide(s))
    if tail == LAYERNORM:
        var, mean = torch.var_mean(t, -1, correction=0, keepdim=True)
    else:
        var, mean = t.square().mean(-1, keepdim=True), torch.zeros_like(t[:, :1])
    stats = torch.cat([mean, torch.rsqrt(var + eps)], -1)
    n = _hat(s, stats) * weight
    return (n if bias is None else n + bias).to(s.dtype), stats


def _hat(s, stats):
    return (s.to(stats.dtype) - stats[:, :1]) * stats[:, 1:]


def norm_backward(g, s, stats, weight, tail):
    """Semantics: (ds, dweight, dbias) of norm_forward in fp32 or wider."""
    g, hat = g.to(stats.dtype), _hat(s, stats)
    e = g * weight
    ds = e - hat * (e * hat).mean(-1, keepdim=True)
    if tail == LAYERNORM:
        ds = ds - e.mean(-1, keepdim=True)
    return stats[:, 1:] * ds, (g * hat).sum(0), g.sum(0)


def reference_forward(x, f, weight, bias, mask, seed, tail, emit, eps, dropout, save):
    """Semantics: what every launcher's forward returns, in plain torch; rounds where `residual_norm_reference` does."""
    s = add_sublayer(x, f, dropout_factor(seed, *x.shape, dropout, x), skipped_rows(mask, x.shape[0]))
    none = empty(x[:0], True, tail, emit, save)
    n, stats = norm_forward(s, weight, bias, tail, eps) if tail else none[1:]
    keep = (f is not None and (emit & SUM or save and tail), emit & NORM, save and tail)
    return tuple(t if k else t.new_empty(0) for t, k in zip((s, n, stats), keep, strict=True))


def reference_backward(g_s, g_n, s, stats, weight, mask, seed, tail, dropout, needs):
    """Semantics: what every launcher's backward returns, in plain torch: gradients in x's dtype, sums in fp32."""
    like = g_n if g_s is None else g_s
    g = torch.zeros(like.shape, dtype=wide(like), device=like.device) if g_s is None else g_s.to(wide(like))
    dweight = dbias = like.new_zeros(like.shape[1])
    if g_n is not None:
        ds, dweight, dbias = norm_backward(g_n, s, stats, weight, tail)
        g = g + ds
    factor, skipped = dropout_factor(seed, *like.shape, dropout, like), skipped_rows(mask, like.shape[0])
    df = g if factor is None else g * factor
    df = df if skipped is None else torch.where(skipped, 0, df)
    made = (g, df, dweight, dbias)
    return tuple(t.to(like.dtype, copy=True) if needs >> i & 1 else like.new_empty(0) for i, t in enumerate(made))
