"""Attention of a few queries over many keys whose projections are frozen: those are moved to the queries' side.

q . (W_k e) = (W_k^T q) . e, and sum_s p_s (W_v e_s) = W_v (sum_s p_s e_s): keys and values are never made. An answer's
five tokens cost a sixth of what projecting 56 tokens costs, and what is kept for the backward is q and the
probabilities instead of the keys and values of every layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import check_input, check_like, first_order, needs_grad, number, through_dispatcher

__all__ = ["cross_attention", "cross_attention_reference", "cross_attention_saves"]


def cross_attention_saves(queries: int, keys: int, hidden: int, heads: int) -> bool:
    """Semantics: is `cross_attention` less work than projecting keys and values, by a factor of 3 at least? The factor
    is for the batched products, which do not run on the fastest GEMM.
    """
    return 3 * queries * (hidden + keys * heads) <= keys * hidden


def cross_attention(q, source, w_k, w_v, b_v=None, *, heads, b_k=None, mask=None, scale=None, dropout=0.0):
    """Semantics: out[b, t, h] = sum_s drop(softmax_s(scale * q[b, t, h] . k[b, s, h] + mask[b, h, t, s])) v[b, s, h],
    k = source w_k^T + b_k and v = source w_v^T + b_v. (b_k adds the same to all of a query's scores: it is not read,
    and its gradient is zeros.)

    Shapes: q [B, T, heads * D]; source [B, S, d]; w_k, w_v [heads * D, d]; b_k, b_v [heads * D] or None; mask None,
    additive or bool (True keeps), broadcast to [B, heads, T, S]; out [B, T, heads * D]. scale: D ** -0.5 unless given.
    dropout: of the probabilities, by the draws F.dropout makes on [B, heads, T, S].
    A query without any key gives 0, as in torch's scaled_dot_product_attention.
    Dtypes: all of one dtype. Rounds differently from `cross_attention_reference`, which makes k and v: meant for fp32.
    Gradients: of all but w_k and mask, not differentiable twice; where these want one, and in compiled code, the
    reference serves.
    """
    scale = _check(q, source, w_k, w_v, b_k, b_v, mask, heads, scale, dropout)
    if needs_grad(w_k, mask) or through_dispatcher(q):
        return _formula(q, source, w_k, w_v, b_k, b_v, heads, mask, scale, dropout)
    if needs_grad(q, source, w_v, b_k, b_v):
        return _CrossAttention.apply(q, source, w_k, w_v, b_k, b_v, mask, heads, scale, dropout)
    return _forward(q, source, w_k, w_v, b_v, mask, heads, scale, dropout)[0]


def _check(q, source, w_k, w_v, b_k, b_v, mask, heads, scale, dropout) -> float:
    name = "cross_attention"
    check_input(name, "q", q)
    check_input(name, "source", source)
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"{name}: heads is {heads!r}, expected an integer of at least 1")
    if q.dim() != 3 or q.shape[2] % heads:
        raise ValueError(f"{name}: q has shape {tuple(q.shape)}, expected (batch, queries, {heads} heads * head size)")
    inner, shape = q.shape[2], (q.shape[0], source.shape[-2] if source.dim() > 1 else 0, source.shape[-1])
    check_like(name, "source", source, shape, f"(batch={q.shape[0]}, keys, hidden) to match q", q, "q")
    for what, w in (("w_k", w_k), ("w_v", w_v)):
        check_like(name, what, w, (inner, shape[2]), f"({inner}, {shape[2]}) to match q and source", q, "q")
    for what, b in (("b_k", b_k), ("b_v", b_v)):
        if b is not None:
            check_like(name, what, b, (inner,), f"({inner},) to match q", q, "q")
    if mask is not None:
        _check_mask(mask, q, (q.shape[0], heads, q.shape[1], shape[1]))
    if not 0 <= number(name, "dropout", dropout) <= 1:
        raise ValueError(f"{name}: dropout is {dropout!r}, expected a probability")
    return (inner // heads) ** -0.5 if scale is None else number(name, "scale", scale)


def _check_mask(mask, q, scores: tuple) -> None:
    name = "cross_attention"
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name}: mask is a {type(mask).__name__}, expected a torch.Tensor or None")
    if mask.dim() != 4 or any(n not in (1, whole) for n, whole in zip(mask.shape, scores, strict=True)):
        raise ValueError(f"{name}: mask has shape {tuple(mask.shape)}, expected one broadcast to {scores} (B, H, T, S)")
    if mask.dtype != torch.bool and mask.dtype != q.dtype:
        got, own = (str(t.dtype).removeprefix("torch.") for t in (mask, q))
        raise ValueError(f"{name}: mask has dtype {got}, expected bool (True keeps a key) or {own}, which is added")
    if mask.device != q.device:
        raise ValueError(f"{name}: mask is on {mask.device}, expected {q.device} to match q")


def _towards(q, w, heads):
    """q [B, T, H * D] in the source's space, [B, T * H, d]: each head by its rows of w [H * D, d]."""
    b, t, inner = q.shape
    y = torch.bmm(q.reshape(b * t, heads, inner // heads).transpose(0, 1), w.view(heads, inner // heads, -1))
    return y.transpose(0, 1).reshape(b, t * heads, -1)


def _back(y, w, heads):
    """The transpose of _towards: y [B, T * H, d] as [B, T, H * D]."""
    b, th, d = y.shape
    w = w.view(heads, w.shape[0] // heads, d).transpose(1, 2)
    return torch.bmm(y.view(b * th // heads, heads, d).transpose(0, 1), w).transpose(0, 1).reshape(b, th // heads, -1)


def _forward(q, source, w_k, w_v, b_v, mask, heads, scale, dropout):
    """(out, p, keep, seen): p [B, T, H, S] the probabilities, keep their dropout's factors or None, seen [B, T * H, d]
    what each head made of the source.
    """
    (b, t, _), keys = q.shape, source.shape[1]
    s = torch.bmm(_towards(q * scale, w_k, heads), source.transpose(1, 2)).view(b, t, heads, keys)
    if mask is not None and mask.dtype == torch.bool:
        s.masked_fill_(~mask.transpose(1, 2), -torch.inf)
    elif mask is not None:
        s += mask.transpose(1, 2)
    p = torch.ops.aten._safe_softmax(s, -1)
    keep = None
    if dropout > 0:
        keep = F.dropout(p.new_ones(b, heads, t, keys), dropout).transpose(1, 2).contiguous()
    r = p if keep is None else p * keep
    seen = torch.bmm(r.view(b, t * heads, keys), source)
    out = _back(seen, w_v, heads)
    if b_v is not None:
        out.view(b, t, heads, -1).add_(r.sum(-1, keepdim=True) * b_v.view(heads, -1))
    return out, p, keep, seen


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, source, w_k, w_v, b_k, b_v, mask, heads, scale, dropout):
        out, p, keep, seen = _forward(q, source, w_k, w_v, b_v, mask, heads, scale, dropout)
        ctx.save_for_backward(q, source, w_k, w_v, b_v, p, keep, seen if ctx.needs_input_grad[3] else None)
        ctx.config = heads, scale
        return out

    @staticmethod
    @first_order("cross_attention")
    def backward(ctx, grad):
        q, source, w_k, w_v, b_v, p, keep, seen = ctx.saved_tensors
        heads, scale = ctx.config
        b, t, _, keys = p.shape
        g = _towards(grad, w_v, heads)
        dp, r = torch.bmm(g, source.transpose(1, 2)).view(p.shape), p
        if keep is not None:  # without dropout the bias adds the same to a query's scores
            if b_v is not None:
                dp += (grad.view(b, t, heads, -1) * b_v.view(heads, -1)).sum(-1, keepdim=True)
            dp, r = dp * keep, p * keep
        ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).view(b, t * heads, keys)
        dq = dsource = dw_v = db_k = db_v = None
        if ctx.needs_input_grad[0]:
            dq = _back(torch.bmm(ds, source), w_k, heads) * scale
        if ctx.needs_input_grad[1]:
            dsource = torch.bmm(r.view(ds.shape).transpose(1, 2), g)
            dsource.baddbmm_(ds.transpose(1, 2), _towards(q * scale, w_k, heads))
        if ctx.needs_input_grad[3]:
            by_head = grad.reshape(b * t, heads, -1).permute(1, 2, 0)
            dw_v = torch.bmm(by_head, seen.view(b * t, heads, -1).transpose(0, 1)).view(w_v.shape)
        if ctx.needs_input_grad[4]:
            db_k = grad.new_zeros(w_k.shape[0])
        if ctx.needs_input_grad[5]:
            db_v = (r.sum(-1, keepdim=True) * grad.view(b, t, heads, -1)).sum((0, 1)).view(-1)
        return dq, dsource, None, dw_v, db_k, db_v, *(None,) * 4


# --- reference: the contract ------------------------------------------------------------------------------------------


def cross_attention_reference(q, source, w_k, w_v, b_v=None, *, heads, b_k=None, mask=None, scale=None, dropout=0.0):
    """Semantics: out[b, t, h] = sum_s drop(softmax_s(scale * q[b, t, h] . k[b, s, h] + mask[b, h, t, s])) v[b, s, h],
    k = source w_k^T + b_k and v = source w_v^T + b_v.

    Plain torch, the contract of `cross_attention`: same arguments. Rounds to the dtype after each projection, then as
    scaled_dot_product_attention. Gradients: torch's own, of every tensor, any order.
    """
    scale = _check(q, source, w_k, w_v, b_k, b_v, mask, heads, scale, dropout)
    return _formula(q, source, w_k, w_v, b_k, b_v, heads, mask, scale, dropout)


def _formula(q, source, w_k, w_v, b_k, b_v, heads, mask, scale, dropout):
    k, v = F.linear(source, w_k, b_k), F.linear(source, w_v, b_v)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2).flatten(2)
