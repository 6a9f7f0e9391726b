"""Compacter: the weights of all parameterised hypercomplex (PHM) layers in one launch, and the adapter that uses them.

Floor of the launch: its bytes. A VL-BART base model (30 adapters 768 x 96, n = 2) writes 4.4 million elements of H and
reads 2.2 million of W, where unfused code runs 4 launches for each of the 60 H.
The low-rank form costs n k (in + n^2 + out) multiply-adds a row instead of in out: at n = 4, k = 1, 768 x 96 one
twentieth.
"""

from __future__ import annotations

import torch

from .. import backends
from . import _phm
from ._common import check_input, check_like, first_order, needs_grad, through_dispatcher
from .adapter import adapter, adapter_reference

__all__ = ["phm_adapter", "phm_adapter_reference", "phm_weight", "phm_weights", "phm_weights_reference"]


def phm_weights(rules, weights, *, backend="auto"):
    """Semantics: H_l[c out' + q, a in' + k] = sum_i rule_l[i, a, c] W_l[i, k, q], for all l in one launch.

    H is [out, in] as in nn.Linear: F.linear(x, H) = x @ sum_i kron(rule[i], W[i]).
    rules: a list, one for each of weights, or a single rule that all share. A rule is a tensor [n, n, n] or a pair
    (left [n, n, 1], right [n, 1, n]) whose product it is. weights: a list; each a tensor [n, in', out'] or a pair
    (W_left [n, in', k], W_right [n, k, out']). Shapes may differ from one l to the next.
    Returns the list of H, slices of one tensor: ask for those a forward uses, since one that is not used gets zeros as
    gradient. Keep them between calls with a `WeightCache`.
    Dtypes: all tensors of one dtype; sums in fp32, rounded once. Gradients: of rules and weights (pairs included), only
    where wanted, deterministic. Source: Compacter's PHMLinear as VL-Adapter has it.
    """
    rules, weights = _entries("phm_weights", rules, weights)
    flat_rules, flat_weights = _products(rules), _products(weights)
    flat = _call(flat_rules, flat_weights, backend)
    sizes = [_phm.shape(w) for w in flat_weights]
    return [t.view(s) for t, s in zip(flat.split([a * b for a, b in sizes]), sizes, strict=True)]


def phm_weight(rule, weight, *, backend="auto"):
    """Semantics: H[c out' + q, a in' + k] = sum_i rule[i, a, c] W[i, k, q]; `phm_weights` of one layer."""
    return phm_weights(rule, [weight], backend=backend)[0]


def phm_weights_reference(rules, weights):
    """Semantics: H_l[c out' + q, a in' + k] = sum_i rule_l[i, a, c] W_l[i, k, q].

    Plain torch, the contract of `phm_weights`: same arguments, any floating dtype including float64. Rounds each
    product and then the sum, as the original does. Gradients: torch's own, any order.
    """
    rules, weights = _entries("phm_weights_reference", rules, weights)
    rules, weights = _products(rules), _products(weights)
    return [_phm.formula(rules[min(i, len(rules) - 1)], w) for i, w in enumerate(weights)]


def phm_adapter(
    x,
    down,
    b_down,
    up,
    b_up,
    *,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    activation="gelu_tanh",
    scale=1.0,
    residuals=(),
    backend="auto",
):
    """Semantics: y = scale * (act(n(x) H_down^T + b_down) H_up^T + b_up) + sum(residuals), H of PHM layers.

    down, up: H itself, [r, d] and [d, r], out of one `phm_weights` call for the whole model; or a pair (rule, weight)
    as that function takes them. Where both weights are low-rank pairs (W_left, W_right), no H is built: x is projected
    with W_left, mixed with the n x n x n rule and expanded with W_right, as products of torch's, so that an explicit
    fused backend is refused. Everything else as `adapter`: shapes, dtypes, autocast, residuals, gradients. Source:
    Compacter as VL-Adapter has it (HyperComplexAdapter).
    """
    options = dict(activation=activation, scale=scale, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps)
    if _lowrank(down) and _lowrank(up):
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"phm_adapter: backend is {backend!r}, which cannot serve this call: the low-rank form is composed of "
                "torch's products; expected backend='auto' or 'reference', or H from phm_weights as down and up"
            )
        _check_lowrank(x, down, b_down, up, b_up)
        return _phm.lowrank_adapter(x, _layer(down), b_down, _layer(up), b_up, residuals=residuals, **options)
    which = backends.for_op("phm", backend)
    down, up = (
        t if isinstance(t, torch.Tensor) else phm_weight(*_pair(n, t), backend=which) for n, t in _named(down, up)
    )
    return adapter(x, down, b_down, up, b_up, residuals=residuals, backend=backend, **options)


def phm_adapter_reference(x, down, b_down, up, b_up, **options):
    """Semantics: y = scale * (act(n(x) H_down^T + b_down) H_up^T + b_up) + sum(residuals), H of PHM layers.

    Plain torch, the contract of `phm_adapter`: builds H in every form. Rounds where `phm_weights_reference` and
    `adapter_reference` do.
    """
    down, up = (t if isinstance(t, torch.Tensor) else phm_weights_reference(t[0], [t[1]])[0] for t in (down, up))
    return adapter_reference(x, down, b_down, up, b_up, **{"activation": "gelu_tanh", **options})


# --- arguments --------------------------------------------------------------------------------------------------------


def _named(down, up):
    return ("down", down), ("up", up)


def _pair(name, t):
    if not isinstance(t, tuple) or len(t) != 2:
        raise TypeError(f"phm_adapter: {name} is a {type(t).__name__}, expected H as a tensor or a pair (rule, weight)")
    return t


def _lowrank(t) -> bool:
    return isinstance(t, tuple) and len(t) == 2 and isinstance(t[1], tuple)


def _layer(t):
    """(rule, W_left, W_right) of a low-rank pair."""
    return _products([t[0]])[0], *t[1]


def _check_lowrank(x, down, b_down, up, b_up):
    check_input("phm_adapter", "x", x)
    d = x.shape[-1]
    for t in (down, up):
        _entries("phm_adapter", [t[0]], [t[1]])
    shapes = [(t[1][1].shape[0] * t[1][1].shape[2], t[1][0].shape[0] * t[1][0].shape[1]) for t in (down, up)]
    r = shapes[0][0]
    for name, shape, want in (("down", shapes[0], (r, d)), ("up", shapes[1], (d, r))):
        if shape != want:
            raise ValueError(f"phm_adapter: {name} makes an H of shape {shape}, expected {want} to match x and down")
    for name, b, n in (("b_down", b_down, r), ("b_up", b_up, d)):
        if b is not None:
            check_like("phm_adapter", name, b, (n,), f"({n},)", x, dtype=b.dtype)


def _entries(function, rules, weights):
    """(rules, weights) as lists of checked entries; one rule alone stands for all weights."""
    if not isinstance(weights, list):
        raise TypeError(f"{function}: weights is a {type(weights).__name__}, expected a list of tensors or pairs")
    if not weights:
        raise ValueError(f"{function}: weights is empty, expected at least one")
    shared = not isinstance(rules, list)
    rules = [rules] if shared else rules
    if not shared and len(rules) != len(weights):
        raise ValueError(f"{function}: rules has {len(rules)} entries, expected {len(weights)} to match weights")
    first = _factors(function, "rules[0]", rules[0])[0]
    for i, rule in enumerate(rules):
        name, factors = f"rules[{i}]", _factors(function, f"rules[{i}]", rule)
        n = factors[0].shape[0] if factors[0].dim() else 0
        wants = [(n, n, n)] if len(factors) == 1 else [(n, n, 1), (n, 1, n)]
        words = ["(n, n, n)"] if len(factors) == 1 else ["(n, n, 1) of a pair", "(n, 1, n) of a pair"]
        for t, want, word in zip(factors, wants, words, strict=True):
            check_like(function, name, t, want, word, first, "rules[0]")
    for i, weight in enumerate(weights):
        name, factors = f"weights[{i}]", _factors(function, f"weights[{i}]", weight)
        n = _factors(function, "rules", rules[0 if shared else i])[0].shape[0]
        for t in factors:
            if t.dim() != 3 or t.shape[0] != n or t.numel() == 0:
                words = "(n, in / n, out / n)" if len(factors) == 1 else "(n, in / n, rank) and (n, rank, out / n)"
                raise ValueError(
                    f"{function}: {name} has shape {tuple(t.shape)}, expected {words} with n={n} of its rule"
                )
            check_like(function, name, t, t.shape, "", first, "rules[0]")
        if len(factors) == 2 and factors[0].shape[2] != factors[1].shape[1]:
            shapes = " and ".join(str(tuple(t.shape)) for t in factors)
            raise ValueError(f"{function}: {name} has shapes {shapes}, expected one rank in both")
    return rules, weights


def _factors(function, name, entry):
    entry = entry if isinstance(entry, tuple) else (entry,)
    if len(entry) > 2:
        raise TypeError(f"{function}: {name} is a tuple of {len(entry)}, expected a tensor or a pair of tensors")
    for t in entry:
        check_input(function, name, t)
    return entry


def _products(entries):
    """Each pair multiplied out; pairs of one shape in one batched product, the same pair only once."""
    groups, out = {}, list(entries)
    for i, e in enumerate(entries):
        if isinstance(e, tuple):
            group = groups.setdefault((e[0].shape, e[1].shape), [])
            # By identity and not by id, on which Dynamo would guard: each layer would be compiled anew.
            same = next((where for where in group if _same(entries[where[0]], e)), None)
            if same is None:
                group.append([i])
            else:
                same.append(i)
    for group in groups.values():
        firsts = [entries[where[0]] for where in group]
        products = torch.stack([e[0] for e in firsts]) @ torch.stack([e[1] for e in firsts])
        for where, product in zip(group, products.unbind(), strict=True):
            for i in where:
                out[i] = product
    return out


def _same(pair, other) -> bool:
    return pair[0] is other[0] and pair[1] is other[1]


# --- the call ---------------------------------------------------------------------------------------------------------


def _call(rules, weights, backend):
    first = weights[0]
    compiled = through_dispatcher(first)
    if compiled:
        name = backends.resolve_constant("phm", backend, first.device.type, first.dtype).name
    else:
        name = backends.resolve("phm", backend, first).name
    if name == "reference":
        rules = rules * len(weights) if len(rules) == 1 else rules
        return torch.cat([_phm.formula(r, w).reshape(-1) for r, w in zip(rules, weights, strict=True)])
    if compiled:
        return torch.ops.fastpetl.phm_weights(rules, weights, name)
    if needs_grad(*rules, *weights):
        return _Phm.apply(name, len(rules), *rules, *weights)
    return _phm.run_forward(name, rules, weights)


class _Phm(torch.autograd.Function):
    """The eager door: straight to the launcher."""

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.config = name, count
        ctx.save_for_backward(*tensors)
        return _phm.run_forward(name, tensors[:count], tensors[count:])

    @staticmethod
    @first_order("phm_weights")
    def backward(ctx, grad):
        name, count = ctx.config
        tensors = ctx.saved_tensors  # once: a checkpoint unpacks them only once
        rules, weights = tensors[:count], tensors[count:]
        wanted = ctx.needs_input_grad[2:]
        needs = any(wanted[:count]) | any(wanted[count:]) << 1
        flat = _phm.run_backward(name, grad, rules, weights, needs)
        grads = _phm.split(*flat, rules, weights)
        return (None, None, *(g if w else None for g, w in zip(grads, wanted, strict=True)))
