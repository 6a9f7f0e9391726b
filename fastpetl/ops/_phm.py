"""PHM weights on each backend, behind one signature, and the low-rank form that needs none.

Forward: (rules, weights) -> all H, one behind the other in a flat tensor. Backward: (its gradient, rules, weights,
needs) -> (the rules' gradients, the weights' gradients), each flat; bit 0 of `needs` asks for the rules', bit 1 for the
weights'. One rule for several weights is shared: its gradients are summed in their order.
"""

from __future__ import annotations

import torch

from ..spec import activation_code
from ._adapter import ACT
from ._casts import cast
from ._common import autocast_dtype, wide


def shape(weight):
    """(out, in) of the H that a weight [n, in', out'] makes."""
    n, rows, columns = weight.shape
    return n * columns, n * rows


def formula(rule, weight):
    """H of one layer: sum_i kron(rule[i], W[i]), transposed."""
    h = (rule[:, :, None, :, None] * weight[:, None, :, None, :]).sum(0)  # [a, k, c, q]
    return h.permute(2, 3, 0, 1).reshape(shape(weight))


def _launchers(name):
    if name == "cpp":
        ops = torch.ops.fastpetl
        return ops.cpu_phm_forward.default, ops.cpu_phm_backward.default
    if name == "triton":
        from fastpetl.kernels import phm as kernels

        return kernels.phm_forward, kernels.phm_backward
    return reference_forward, reference_backward


def run_forward(name, rules, weights):
    """Semantics: all H in one flat tensor, by backend `name`."""
    return _launchers(name)[0]([r.contiguous() for r in rules], [w.contiguous() for w in weights])


def run_backward(name, grad, rules, weights, needs):
    """Semantics: (gradients of the rules, of the weights), flat, empty where not asked for, by backend `name`."""
    rules, weights = [r.contiguous() for r in rules], [w.contiguous() for w in weights]
    return tuple(_launchers(name)[1](grad.contiguous(), rules, weights, needs))


def split(drules, dweights, rules, weights):
    """The flat gradients as one tensor per rule and per weight, None where there are none."""
    out = []
    for flat, like in ((drules, rules), (dweights, weights)):
        parts = flat.split([t.numel() for t in like]) if flat.numel() else [None] * len(like)
        out += [None if p is None else p.view(t.shape) for p, t in zip(parts, like, strict=True)]
    return out


def reference_forward(rules, weights):
    """Semantics: what every launcher's forward returns, in plain torch."""
    rules = list(rules) * len(weights) if len(rules) == 1 else rules
    return torch.cat([formula(r, w).reshape(-1) for r, w in zip(rules, weights, strict=True)])


def reference_backward(grad, rules, weights, needs):
    """Semantics: what every launcher's backward returns, in plain torch: sums in fp32."""
    acc, shared = wide(grad), len(rules) == 1
    drules, dweights = [], []
    for i, (w, g) in enumerate(zip(weights, grad.split([w.numel() * w.shape[0] for w in weights]), strict=True)):
        n, rows, columns = w.shape
        rule, g = rules[0 if shared else i].to(acc), g.to(acc).view(n, columns, n, rows)  # [c, q, a, k]
        if needs & 1:
            drules.append(torch.einsum("cqak,ikq->iac", g, w.to(acc)))
        if needs & 2:
            dweights.append(torch.einsum("cqak,iac->ikq", g, rule))
    if shared and drules:
        drules = [torch.stack(drules).sum(0)]
    flat = (
        torch.cat([t.reshape(-1) for t in ts]).to(grad.dtype) if ts else grad.new_empty(0) for ts in (drules, dweights)
    )
    return tuple(flat)


# --- the low-rank form ------------------------------------------------------------------------------------------------


def lowrank_linear(x, rule, left, right, bias):
    """Semantics: x H^T + bias for W[i] = left[i] right[i], without W and H.

    y[c, q] = b[c, q] + sum_i sum_t (sum_a rule[i, a, c] (sum_k x[a, k] left[i, k, t])) right[i, t, q].
    """
    n, rows, rank = left.shape
    lead = x.shape[:-1]
    p = x.reshape(-1, rows) @ left.permute(1, 0, 2).reshape(rows, n * rank)  # [x's rows, a; i, t]
    p = torch.einsum("zait,iac->zcit", p.view(-1, n, n, rank), rule)
    y = p.reshape(-1, n * rank) @ right.reshape(n * rank, -1)  # [x's rows, c; q]
    y = y.view(*lead, n * right.shape[2])
    return y if bias is None else y + bias


def lowrank_adapter(x, down, b_down, up, b_up, *, activation, scale, norm_weight, norm_bias, eps, residuals):
    """Semantics: the adapter with both projections in the low-rank form; down and up are (rule, left, right)."""
    code = activation_code(activation, "phm_adapter")
    dtype = autocast_dtype(x)
    if dtype is not None:
        down, up = tuple(cast(t, dtype) for t in down), tuple(cast(t, dtype) for t in up)
        b_down, b_up = cast(b_down, dtype), cast(b_up, dtype)
    h = x if norm_weight is None else torch.nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    h = h if dtype is None else cast(h, dtype)
    y = lowrank_linear(ACT[code](lowrank_linear(h, *down, b_down)), *up, b_up)
    y = y if scale == 1 else y * scale
    for r in residuals:
        y = y + r
    return y
