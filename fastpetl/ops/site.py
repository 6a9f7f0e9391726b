"""One adapter site: what happens between two big GEMMs where an adapter sits (design.md section 5)."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import backends
from ..spec import AdapterSpec
from . import _mixed
from ._adapter import ACT
from ._common import autocast_dtype, check_input, check_like
from ._dropout import dropout_factor, dropped
from ._fused import KEEPS, at_once, one_launch
from ._residual_norm import norm_forward, skipped_rows
from .adapter import adapter
from .residual_norm import check_mask, check_seed, residual_norm

__all__ = ["adapter_residual_norm", "adapter_residual_norm_reference"]
PARAMETERS = ("w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias")
TAIL_CODES = {"layernorm": 1, "rmsnorm": 2}


def adapter_residual_norm(
    x,
    f,
    w_down,
    b_down,
    w_up,
    b_up,
    *,
    spec,
    norm_weight=None,
    norm_bias=None,
    tail_weight=None,
    tail_bias=None,
    normed=None,
    shortcut=None,
    mask=None,
    seed=None,
    backend="auto",
    keep="sum",
):
    """Semantics: the site that `spec` (AdapterSpec) describes. A(u) = scale * (act(own(u) w_down^T + b_down) w_up^T +
    b_up), own = LayerNorm iff norm_weight is given, u = x, f or `normed` as spec.input says:

        sublayer                        s = x + drop(f + A(f))         n = norm(s)      VL-BART, VL-T5, CLIP-ViL
        residual, normalised; inside    s = x + drop(f) + A(u)         n = norm(s)      ViLT, METER attention
        residual, normalised; after     s = x + drop(f)                n = norm(s) + A(u)       METER FFN
        samples with mask[b]            s = x + A_shortcut(x), or s = x without one; n = norm(s)

    Returns (s, n), s or n, as spec.emit says. Shapes: x, f, normed [..., d] (f None adds nothing; normed None with
    "normalised" and "after": u = norm(s)); w_down [r, d]; w_up [d, r]; b_down [r], the others [d]; shortcut: a tuple
    (w_down, b_down, w_up, b_up, norm_weight, norm_bias) of any bottleneck; mask bool [batch], True = skipped: f and
    normed are not read there; seed: see `residual_norm`.
    A norm right behind the adapter (placement "inside", no dropout) is computed in the same launch where the backend
    has one ("cpp", "triton", "cuda": `fastpetl.backends`, op "site"); s is then rounded once. All else, and "composed",
    is made of `adapter` and `residual_norm`, whose dtypes, rounding, gradients and backends it has (a backend that only
    adapters have: "auto" for the norm); skipped samples are computed apart (in compiled code together, so that a mask
    never recompiles). "auto" on the CPU measures "cpp" and "composed" as `adapter` does.
    keep: from what the backward has s, where the C++ kernel serves an eager fp32 site that emits only n: "sum", s
    itself, as everywhere else; "norm", n, for who keeps it anyway (s where a gain is so small that dividing by it would
    show); "inputs", x and f, at the price of the adapter's forward once more.
    """
    if mask is None and normed is None and seed is None and shortcut is None:
        mine = (w_down, b_down, w_up, b_up, norm_weight, norm_bias)
        made = at_once(spec, x, f, mine, tail_weight, tail_bias, backend, keep)
        if made is not None:
            return made
        made = _mixed.site(spec, x, f, None, mine, tail_weight, tail_bias, backend) if keep in KEEPS else None
        if made is not None:
            return _emit(spec, *made)
    if keep not in KEEPS:
        raise ValueError(f"adapter_residual_norm: keep is {keep!r}, expected one of {', '.join(KEEPS)}")
    mine = (w_down, b_down, w_up, b_up, norm_weight, norm_bias)
    _check(spec, x, f, normed, mine, tail_weight, tail_bias, shortcut, mask, seed)
    if mask is None:
        return _kept(spec, x, f, normed, mine, tail_weight, tail_bias, seed, backend, keep)
    if torch.compiler.is_compiling():
        return _together(spec, x, f, normed, mine, tail_weight, tail_bias, shortcut, mask, seed, backend)
    return _apart(spec, x, f, normed, mine, tail_weight, tail_bias, shortcut, mask, seed, backend)


def _adapt(spec, u, parameters, residuals, backend):
    w_down, b_down, w_up, b_up, norm_weight, norm_bias = parameters
    return adapter(
        u,
        w_down,
        b_down,
        w_up,
        b_up,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=spec.eps,
        activation=spec.activation,
        scale=spec.scale,
        residuals=residuals,
        backend=backend,
    )


def _finish(spec, x, f, weight, bias, seed, backend, own=False):
    """(s, n) with what the spec does not emit left out as None; f None: s is x; own: nobody else has seen f."""
    tail = {"tail": spec.tail, "eps": spec.tail_eps, "backend": backends.for_op("residual_norm", backend)}
    if f is None:
        n = None if spec.tail is None else residual_norm(x, None, weight, bias, emit="norm", **tail)
        return x, n
    out = residual_norm(x, f, weight, bias, emit=spec.emit, dropout=spec.dropout, seed=seed, overwrite=own, **tail)
    return out if spec.emit == "both" else (out, None) if spec.emit == "sum" else (None, out)


def _emit(spec, s, n):
    return (s, n) if spec.emit == "both" else s if spec.emit == "sum" else n


def _kept(spec, x, f, normed, mine, weight, bias, seed, backend, keep="sum"):
    """The site of samples that are not skipped: in one launch where that can be."""

    def composed(tensors):
        x, f, normed, *mine, weight, bias = tensors
        return _composed(spec, x, f, normed, mine, weight, bias, None, backend)

    if not spec.dropout:
        made = _mixed.site(spec, x, f, normed, mine, weight, bias, backend)
        if made is not None:
            return _emit(spec, *made)
        made = one_launch(spec, x, f, normed, mine, weight, bias, backend, composed, keep)
        if made is not None:
            return _emit(spec, *made)
    return _composed(spec, x, f, normed, mine, weight, bias, seed, backend)


def _composed(spec, x, f, normed, mine, weight, bias, seed, backend):
    backend = "auto" if backend == "composed" else backend
    if spec.input == "sublayer":
        f = _adapt(spec, f, mine, (f,), backend)
        return _emit(spec, *_finish(spec, x, f, weight, bias, seed, backend, own=True))
    u = x if spec.input == "residual" else normed
    if spec.placement == "after":
        s, n = _finish(spec, x, f, weight, bias, seed, backend)
        return _emit(spec, s, _adapt(spec, n if u is None else u, mine, (n,), backend))
    if spec.dropout and f is not None:  # the adapter is not dropped: x + A(u) is the residual of drop(f)
        stream = _adapt(spec, u, mine, (x,), backend)
        return _emit(spec, *_finish(spec, stream, f, weight, bias, seed, backend))
    s = _adapt(spec, u, mine, (x,) if f is None else (x, f), backend)
    return _emit(spec, *_finish(spec, s, None, weight, bias, None, backend))


def _apart(spec, x, f, normed, mine, weight, bias, shortcut, mask, seed, backend):
    """Kept and skipped samples each by themselves, then in their order again."""
    kept, skipped = (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
    outs = (
        _kept_samples(spec, kept, x, f, normed, mine, weight, bias, seed, backend),
        _skipped(spec, x[skipped], weight, bias, shortcut, backend),
    )
    order = torch.cat([kept, skipped]).argsort()
    if spec.emit == "both":
        return tuple(torch.cat(pair)[order] for pair in zip(*outs, strict=True))
    return torch.cat(outs)[order]


def _kept_samples(spec, ids, x, f, normed, mine, weight, bias, seed, backend):
    """The site of the samples `ids`; what dropout does to an element depends on its place in the whole batch."""
    sub, normed = None if f is None else f[ids], None if normed is None else normed[ids]
    if not spec.dropout:
        return _kept(spec, x[ids], sub, normed, mine, weight, bias, seed, backend)
    factor = dropout_factor(seed, x[..., 0].numel(), x.shape[-1], spec.dropout, x).view(x.shape)[ids]
    plain = replace(spec, dropout=0.0)
    if spec.input == "sublayer":
        sub = dropped(_adapt(spec, sub, mine, (sub,), backend), factor)
        return _emit(spec, *_finish(plain, x[ids], sub, weight, bias, None, backend))
    return _kept(plain, x[ids], dropped(sub, factor), normed, mine, weight, bias, None, backend)


def _skipped(spec, x, weight, bias, shortcut, backend):
    s = x if shortcut is None else _adapt(spec, x, shortcut, (x,), backend)
    return _emit(spec, *_finish(spec, s, None, weight, bias, None, backend))


def _together(spec, x, f, normed, mine, weight, bias, shortcut, mask, seed, backend):
    """Every sample both ways, one of them chosen: no shape depends on the mask. Each way sees zeros for the other's
    samples: what is infinite or NaN there must not reach its weights' gradients.
    """
    choose = mask.view(-1, *(1,) * (x.dim() - 1))
    mine_x, f, normed = (None if t is None else torch.where(choose, 0, t) for t in (x, f, normed))
    kept = _kept(spec, mine_x, f, normed, mine, weight, bias, seed, backend)
    skipped = _skipped(spec, torch.where(choose, x, 0), weight, bias, shortcut, backend)
    if spec.emit == "both":
        return tuple(torch.where(choose, s, k) for k, s in zip(kept, skipped, strict=True))
    return torch.where(choose, skipped, kept)


def _check(spec, x, f, normed, mine, tail_weight, tail_bias, shortcut, mask, seed) -> None:
    name = "adapter_residual_norm"
    if not isinstance(spec, AdapterSpec):
        raise TypeError(f"{name}: spec is a {type(spec).__name__}, expected an AdapterSpec")
    check_input(name, "x", x)
    if x.shape[-1] != spec.hidden:
        raise ValueError(f"{name}: x has {x.shape[-1]} channels, expected hidden={spec.hidden} as in spec")
    if isinstance(mine[0], torch.Tensor) and mine[0].shape[:1] != (spec.bottleneck,):
        raise ValueError(
            f"{name}: w_down has shape {tuple(mine[0].shape)}, expected bottleneck={spec.bottleneck} as in spec"
        )
    expected = (True, spec.down_bias, True, spec.up_bias, spec.norm, spec.norm_bias)
    for what, t, there in zip(PARAMETERS, mine, expected, strict=True):
        if (t is not None) != there:
            raise ValueError(
                f"{name}: {what} is {'None' if t is None else 'given'}, expected the contrary as spec says"
            )
    if f is None and (spec.input == "sublayer" or spec.dropout):
        raise ValueError(f"{name}: f is None with input={spec.input!r} and dropout={spec.dropout}, expected a tensor")
    for what, t in (("f", f), ("normed", normed)):
        if t is not None:
            dtype = getattr(t, "dtype", None) if autocast_dtype(x) is not None else None  # autocast mixes them
            check_like(name, what, t, x.shape, f"{tuple(x.shape)} to match x", x, dtype=dtype)
    wanted = spec.input == "normalised" and spec.placement == "inside"
    if (normed is None) if wanted else (normed is not None and spec.input != "normalised"):
        got = "None" if normed is None else "given"
        raise ValueError(f"{name}: normed is {got} with input={spec.input!r} and placement={spec.placement!r}")
    if (tail_weight is None) != (spec.tail is None) or (tail_bias is not None and spec.tail != "layernorm"):
        raise ValueError(f"{name}: tail_weight and tail_bias do not fit tail={spec.tail!r} of spec")
    if shortcut is not None and (not isinstance(shortcut, (tuple, list)) or len(shortcut) != 6):
        raise ValueError(f"{name}: shortcut is {type(shortcut).__name__}, expected a tuple ({', '.join(PARAMETERS)})")
    check_mask(name, mask, x)
    check_seed(name, seed, spec.dropout, x)


def adapter_residual_norm_reference(
    x,
    f,
    w_down,
    b_down,
    w_up,
    b_up,
    *,
    spec,
    norm_weight=None,
    norm_bias=None,
    tail_weight=None,
    tail_bias=None,
    normed=None,
    shortcut=None,
    mask=None,
    seed=None,
):
    """Semantics: as `adapter_residual_norm`, in plain torch on all rows; the contract.

    Any floating dtype including float64. Rounds to x's dtype after each step, in the order written there. Gradients:
    torch's own, any order. Source: das.md 1.3-1.5, vl_adapter.md 2.
    """

    def adapt(u, w_down, b_down, w_up, b_up, gamma, beta):
        h = u if gamma is None else torch.nn.functional.layer_norm(u, u.shape[-1:], gamma, beta, spec.eps)
        h = ACT[spec.code](torch.nn.functional.linear(h, w_down, b_down))
        return torch.nn.functional.linear(h, w_up, b_up) * spec.scale

    def flat(t):
        return None if t is None else t.reshape(-1, t.shape[-1])

    mine = (w_down, b_down, w_up, b_up, norm_weight, norm_bias)
    shape, x, f, normed = x.shape, flat(x), flat(f), flat(normed)
    skipped = skipped_rows(mask, x.shape[0])
    if skipped is not None:
        f, normed = (None if t is None else torch.where(skipped, 0, t) for t in (f, normed))
    factor = dropout_factor(seed, *x.shape, spec.dropout, x)
    own = (
        x if skipped is None else torch.where(skipped, 0, x)
    )  # what an adapter does not see cannot reach its gradients
    after, u = spec.placement == "after", {"residual": own, "sublayer": f, "normalised": normed}[spec.input]
    s = own
    if f is not None:
        s = own + dropped(f + adapt(f, *mine) if spec.input == "sublayer" else f, factor)
    if spec.input != "sublayer" and not after:
        s = s + adapt(u, *mine)
    if skipped is not None:
        theirs = torch.where(skipped, x, 0)
        s = torch.where(skipped, theirs if shortcut is None else theirs + adapt(theirs, *shortcut), s)
    n = None
    if spec.tail is not None:
        n = norm_forward(s, tail_weight, tail_bias, TAIL_CODES[spec.tail], spec.tail_eps)[0]
        if after:
            added = n + adapt(n if u is None else u, *mine)
            n = added if skipped is None else torch.where(skipped, n, added)
    return _emit(spec, s.view(shape), None if n is None else n.view(shape))
