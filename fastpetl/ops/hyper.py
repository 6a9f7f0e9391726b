"""Hyperformer: adapters whose weights a small network generates, for all layers at once, and the adapter that uses
them.

The generators are matrix products of torch's, one for each generator and forward whatever the number of layers: the
original runs ten matrix-vector products per layer. Floor: the bytes of the generators and of what they generate
(VL-BART
base: 4.45 million elements of weights a forward, nothing in eval where a `WeightCache` keeps them).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import check_input, check_like, number
from .adapter import adapter, adapter_reference

__all__ = ["HyperWeights", "hyper_adapter", "hyper_adapter_reference", "hyper_embedding", "hyper_weights"]

_NAMES = ("down weight", "down bias", "up weight", "up bias", "norm weight", "norm bias")


def hyper_embedding(task, layers, w_in, b_in, w_out, b_out, norm_weight, norm_bias, *, kinds=None, eps=1e-6):
    """Semantics: e[l] = LayerNorm(relu([task, layers[l]] w_in^T + b_in) w_out^T + b_out), for all layers in one
    product.

    task [t] or, for several tasks at once, [T, t]; layers [L, s]; kinds (Hyperformer++, one generator for all kinds of
    site): [K, s]. The input of w_in [hidden, t + s (+ s)] is [task, layer (, kind)] in that order; w_out [p, hidden].
    Returns [L, p]; with kinds [L, K, p]; with several tasks [L, T, p] or [L, K, T, p].
    Dtypes: as F.linear. Gradients: torch's own, of every argument. Source: AdapterLayersHyperNetController.
    """
    f = "hyper_embedding"
    for name, t in (("task", task), ("layers", layers), *(() if kinds is None else (("kinds", kinds),))):
        check_input(f, name, t)
        if t.dim() != 2 and not (name == "task" and t.dim() == 1):
            raise ValueError(f"{f}: {name} has shape {tuple(t.shape)}, expected one row for each of the {name}")
        check_like(f, name, t, t.shape, "", task, "task")
    width = task.shape[-1] + layers.shape[1] + (0 if kinds is None else kinds.shape[1])
    for name, w, n in (("w_in", w_in, width), ("w_out", w_out, w_in.shape[0])):
        if w.dim() != 2 or w.shape[1] != n:
            raise ValueError(f"{f}: {name} has shape {tuple(w.shape)}, expected (features, {n})")
    inner, features = w_in.shape[0], w_out.shape[0]
    affine = ("norm_weight", norm_weight, features), ("norm_bias", norm_bias, features)
    for name, t, n in (("b_in", b_in, inner), ("b_out", b_out, features), *affine):
        if t is not None and tuple(t.shape) != (n,):
            raise ValueError(f"{f}: {name} has shape {tuple(t.shape)}, expected ({n},)")
    axes = [layers] if kinds is None else [layers, kinds]
    lead = [len(t) for t in axes] + list(task.shape[:-1])
    parts = [task.expand(*lead, -1)]
    for i, t in enumerate(axes):
        parts.append(t.view([-1 if j == i else 1 for j in range(len(lead))] + [t.shape[1]]).expand(*lead, -1))
    e = F.linear(F.relu(F.linear(torch.cat(parts, -1), w_in, b_in)), w_out, b_out)
    return F.layer_norm(e, e.shape[-1:], norm_weight, norm_bias, number(f, "eps", eps))


class HyperWeights:
    """Semantics: the weights generated for one forward; `self[l]` is (w_down, b_down, w_up, b_up, norm weight, norm
    bias) of layer l, slices without copies, the last two None where none are generated.

    w_down [r, d], b_down [r], w_up [d, r], b_up [d]; with several tasks (or kinds) each has their dimensions in front.
    """

    def __init__(self, tensors):
        # unbind, not indexing: the gradients of all layers then meet in one stack, not in one full-size sum each
        self._layers = tuple(
            zip(*(t.unbind() if t is not None else (None,) * len(tensors[0]) for t in tensors), strict=True)
        )

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer):
        return self._layers[layer]


def hyper_weights(embedding, down, up, *, norm=None):
    """Semantics: weights[l] = the adapter of layer l, each tensor a linear of e[l]: (e[l] W^T + b) in its shape.

    embedding [L, ..., p], as `hyper_embedding` makes it. down, up: each (weight generator, bias generator); norm: None
    or the same for a generated LayerNorm in front. A generator is a pair (W, b): W [r d, p] makes a weight that is read
    row by row, [r, d] for down and [d, r] for up; W [r, p] or [d, p] a bias. b may be None.
    Returns a `HyperWeights`: one product per generator for all layers. Keep it in eval with a `WeightCache`:
    `cache.get(task, parameters, lambda: hyper_weights(hyper_embedding(...), ...))`, one entry a task.
    Dtypes: as F.linear. Gradients: torch's own, of every argument. Source: AdapterLayersHyperNetController.
    """
    check_input("hyper_weights", "embedding", embedding)
    if embedding.dim() < 2:
        raise ValueError(
            f"hyper_weights: embedding has shape {tuple(embedding.shape)}, expected (layers, ..., features)"
        )
    given = [*_two("down", down), *_two("up", up), *((None, None) if norm is None else _two("norm", norm))]
    for name, g in zip(_NAMES, given, strict=True):
        if g is not None:
            _check_generator(name, g, embedding)
    r, d = given[1][0].shape[0], given[3][0].shape[0]
    for i, n, words in ((0, r * d, "r * d"), (2, r * d, "r * d"), (4, d, "d"), (5, d, "d")):
        if given[i] is not None and given[i][0].shape[0] != n:
            raise ValueError(
                f"hyper_weights: the generator of the {_NAMES[i]} makes {given[i][0].shape[0]} elements, expected "
                f"{words} = {n} to match the biases' r={r} and d={d}"
            )
    shapes = ((r, d), (r,), (d, r), (d,), (d,), (d,))
    lead = embedding.shape[:-1]
    return HyperWeights(
        [None if g is None else F.linear(embedding, *g).view(*lead, *s) for g, s in zip(given, shapes, strict=True)]
    )


def _two(name, t):
    if not isinstance(t, (tuple, list)) or len(t) != 2:
        raise TypeError(f"hyper_weights: {name} is not a pair, expected (weight generator, bias generator)")
    return t


def _check_generator(name, g, embedding):
    if not isinstance(g, (tuple, list)) or len(g) != 2:
        raise TypeError(f"hyper_weights: the generator of the {name} is a {type(g).__name__}, expected a pair (W, b)")
    w, b = g
    p = embedding.shape[-1]
    check_input("hyper_weights", f"the generator of the {name}", w)
    if w.dim() != 2 or w.shape[1] != p:
        raise ValueError(
            f"hyper_weights: the generator of the {name} has shape {tuple(w.shape)}, expected (elements, {p}) to match "
            "embedding"
        )
    if b is not None:
        n = w.shape[0]
        check_like(
            "hyper_weights", f"the bias of the generator of the {name}", b, (n,), f"({n},)", embedding, dtype=b.dtype
        )


def hyper_adapter(x, weights, *, eps=1e-5, activation="gelu_tanh", scale=1.0, residuals=(), backend="auto"):
    """Semantics: y = scale * (act(n(x) w_down^T + b_down) w_up^T + b_up) + sum(residuals) with generated weights.

    weights: `HyperWeights[layer]`, one layer's six tensors. Everything else as `adapter`: shapes, dtypes, gradients,
    which go on through the generators.
    """
    down_up, norm = _layer("hyper_adapter", weights)
    options = dict(eps=eps, activation=activation, scale=scale, residuals=residuals, backend=backend)
    return adapter(x, *down_up, **norm, **options)


def hyper_adapter_reference(x, weights, *, eps=1e-5, activation="gelu_tanh", scale=1.0, residuals=()):
    """Semantics: y = scale * (act(n(x) w_down^T + b_down) w_up^T + b_up) + sum(residuals) with generated weights.

    Plain torch, the contract of `hyper_adapter`.
    """
    down_up, norm = _layer("hyper_adapter_reference", weights)
    return adapter_reference(x, *down_up, **norm, eps=eps, activation=activation, scale=scale, residuals=residuals)


def _layer(function, weights):
    if not isinstance(weights, tuple) or len(weights) != 6:
        raise TypeError(f"{function}: weights is a {type(weights).__name__}, expected a layer of hyper_weights' result")
    return weights[:4], dict(norm_weight=weights[4], norm_bias=weights[5])
