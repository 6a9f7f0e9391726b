"""A site whose samples have tasks of their own: each through its task's adapter, then one norm for all, in one call."""

from __future__ import annotations

import torch

from .. import backends
from ..spec import TAILS, AdapterSpec
from ._common import (
    autocast_dtype,
    check_input,
    check_like,
    dense,
    first_order,
    fits,
    grad_mask,
    needs_grad,
    rows,
    through_dispatcher,
    unflatten,
)
from ._fused import KEEPS, _invertible
from ._measured import choose, rows_class
from .multi_adapter import multi_adapter, multi_adapter_reference
from .residual_norm import residual_norm, residual_norm_reference

__all__ = ["multi_adapter_residual_norm", "multi_adapter_residual_norm_reference", "multi_site_serves"]

_OP = "multi_adapter_residual_norm"
_SPEC = {"input": "sublayer", "placement": "inside", "emit": "norm", "dropout": 0.0}  # the one kind of site there is
_PARTS = ("w_down", "b_down", "w_up", "b_up")


def multi_adapter_residual_norm(
    x,
    f,
    weights,
    task_ids,
    *,
    spec,
    norm_weight=None,
    norm_bias=None,
    tail_weight=None,
    tail_bias=None,
    backend="auto",
    keep="sum",
):
    """Semantics: n[b] = norm(x[b] + f[b] + A(f[b])) with the adapter A of task_ids[b]: `adapter_residual_norm`, each
    sample with its task's weights.

    spec: an AdapterSpec with input "sublayer", emit "norm" and no dropout. Shapes: x, f, n [batch, ..., d]; weights:
    for each task (w_down [r, d], b_down [r], w_up [d, r], b_up [d]), biases None where spec says so; norm_weight,
    norm_bias, tail_weight, tail_bias [d], one for all tasks; task_ids int64 [batch], into weights.
    Parity: running each task's samples by themselves, in the same bits on one backend. Gradients: of all floating-point
    tensors, for all tasks, zeros for one without samples; not differentiable twice.
    backend: "cpp" is one call, what "auto" means in eager code on the CPU (in fp32 it measures both); all else, and
    "composed", is `multi_adapter` and `residual_norm`, as for mixed dtypes (under autocast). keep: what the one call
    keeps, as there; "inputs" is "sum" here.
    """
    tensors = _checked(spec, x, f, weights, task_ids, (norm_weight, norm_bias, tail_weight, tail_bias), keep)
    grad = needs_grad(*tensors)

    def one(name, tensors):
        if name == "composed":
            return _composed(tensors, task_ids, spec, "auto" if backend == "composed" else backend)
        if grad:
            return _MultiSite.apply(task_ids, spec, keep, *tensors)
        return _forward(task_ids, spec, tensors, False, False)[1].view(tensors[0].shape)

    if not multi_site_serves(x, backend) or any(t is not None and t.dtype != x.dtype for t in tensors):
        return one("composed", tensors)
    _check_range(task_ids, len(weights))
    name = "cpp"
    if backend == "auto" and x.dtype == torch.float32:
        wanted = tuple(t is not None and t.requires_grad for t in tensors) if grad else None
        there = tuple(t is not None for t in tensors)
        key = (rows_class(x), spec.hidden, spec.bottleneck, spec.code, spec.scale != 1, spec.tail, there, wanted)
        # Both are true fp32: the tolerance is for a ReLU that a rounding switches.
        name = choose("multi_site", "cpp", ("cpp", "composed"), key, one, tensors, grad, "composed", 1e-2)
    return one(name, tensors)


def multi_site_serves(x, backend="auto") -> bool:
    """Semantics: is there one call for such sites on x: eager code on the CPU, its C++ backend wanted?"""
    if through_dispatcher(x) or not x.is_cpu or x.numel() == 0 or autocast_dtype(x) is not None:
        return False
    return backend != "composed" and backends.resolve("adapter", backend, x).name == "cpp"


def multi_adapter_residual_norm_reference(
    x, f, weights, task_ids, *, spec, norm_weight=None, norm_bias=None, tail_weight=None, tail_bias=None
):
    """Semantics: n[b] = norm(x[b] + f[b] + A(f[b])) with the adapter A of task_ids[b].

    Plain torch, the contract of `multi_adapter_residual_norm`: same arguments, any floating dtype. Rounds as
    `multi_adapter_reference`, then as `residual_norm_reference`. Gradients: torch's own, any order.
    """
    tensors = _checked(spec, x, f, weights, task_ids, (norm_weight, norm_bias, tail_weight, tail_bias), "sum")
    return _composed(tensors, task_ids, spec, None)


def _composed(tensors, task_ids, spec, backend):
    """By two ops; backend None: by their references."""
    x, f, norm_weight, norm_bias, tail_weight, tail_bias, *flat = tensors
    stacks = [None if flat[i] is None else torch.stack(flat[i::4]) for i in range(4)]
    named = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": spec.eps, "activation": spec.activation}
    named |= {"scale": spec.scale, "residuals": (f, x)}
    tail = {"tail": spec.tail, "eps": spec.tail_eps, "emit": "norm"}
    if backend is None:
        s = multi_adapter_reference(f, *stacks, task_ids, **named)
        return residual_norm_reference(s, None, tail_weight, tail_bias, **tail)
    s = multi_adapter(f, *stacks, task_ids, **named, backend=backend)
    which = backends.for_op("residual_norm", backend)
    return residual_norm(s, None, tail_weight, tail_bias, **tail, backend=which)


# --- arguments --------------------------------------------------------------------------------------------------------


def _checked(spec, x, f, weights, task_ids, norms, keep) -> tuple:
    """(x, f, the norms' four, each task's four), once all is as it should be."""
    if not isinstance(spec, AdapterSpec):
        raise TypeError(f"{_OP}: spec is a {type(spec).__name__}, expected an AdapterSpec")
    got = {key: getattr(spec, key) for key in _SPEC}
    if got != _SPEC:
        raise ValueError(f"{_OP}: spec has {got}, expected {_SPEC}")
    if keep not in KEEPS:
        raise ValueError(f"{_OP}: keep is {keep!r}, expected one of {', '.join(KEEPS)}")
    check_input(_OP, "x", x)
    if x.dim() < 2 or x.shape[-1] != spec.hidden:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, expected (batch, ..., hidden={spec.hidden}) as in spec")
    _check_tensor("f", f, x.shape, True, x, "x")
    d = (spec.hidden,)
    there = spec.norm, spec.norm_bias, True, spec.tail == "layernorm" and norms[3] is not None
    for what, t, wanted in zip(("norm_weight", "norm_bias", "tail_weight", "tail_bias"), norms, there, strict=True):
        _check_tensor(what, t, d, wanted, x)
    _check_weights(weights, spec, x)
    _check_ids(task_ids, x)
    return x, f, *norms, *(t for group in weights for t in group)


def _check_weights(weights, spec, x) -> None:
    if not isinstance(weights, (tuple, list)) or not weights:
        got = "empty" if isinstance(weights, (tuple, list)) else f"a {type(weights).__name__}"
        raise ValueError(f"{_OP}: weights is {got}, expected a tuple ({', '.join(_PARTS)}) for each task")
    d, r = spec.hidden, spec.bottleneck
    wanted = ((r, d), True), ((r,), spec.down_bias), ((d, r), True), ((d,), spec.up_bias)
    for i, group in enumerate(weights):
        if not isinstance(group, (tuple, list)) or len(group) != 4:
            got = f"of {len(group)}" if isinstance(group, (tuple, list)) else f"a {type(group).__name__}"
            raise ValueError(f"{_OP}: weights[{i}] is {got}, expected a tuple ({', '.join(_PARTS)})")
        for what, t, (shape, there) in zip(_PARTS, group, wanted, strict=True):
            if not (t is None and not there or there and fits(t, shape, x)):
                _check_tensor(f"{what} of weights[{i}]", t, shape, there, x)


def _check_tensor(what, t, shape, there, x, source="spec") -> None:
    if (t is not None) != there:
        raise ValueError(f"{_OP}: {what} is {'None' if t is None else 'given'}, expected the contrary as spec says")
    if t is not None:
        dtype = getattr(t, "dtype", None) if autocast_dtype(x) is not None else None  # autocast mixes them
        check_like(_OP, what, t, shape, f"{tuple(shape)} to match {source}", x, dtype=dtype)


def _check_ids(task_ids, x) -> None:
    if not isinstance(task_ids, torch.Tensor):
        raise TypeError(f"{_OP}: task_ids is a {type(task_ids).__name__}, expected an int64 tensor")
    if task_ids.dtype != torch.int64 or task_ids.device != x.device:
        got = f"{str(task_ids.dtype).removeprefix('torch.')} on {task_ids.device}"
        raise ValueError(f"{_OP}: task_ids is {got}, expected int64 on {x.device}")
    if task_ids.shape != x.shape[:1]:
        expected = f"{tuple(x.shape[:1])}, one for each sample"
        raise ValueError(f"{_OP}: task_ids has shape {tuple(task_ids.shape)}, expected {expected}")


def _check_range(task_ids, tasks: int) -> None:
    ids = task_ids.tolist()
    if not 0 <= min(ids) <= max(ids) < tasks:
        raise ValueError(
            f"{_OP}: task_ids goes from {min(ids)} to {max(ids)}, expected 0 to {tasks - 1} (tasks={tasks})"
        )


# --- one call ---------------------------------------------------------------------------------------------------------


def _forward(task_ids, spec, tensors, keep_sum, save):
    """(s, n, z, stats, tail_stats) by the C++ op; s empty unless keep_sum, all but n unless save."""
    x, f, *norms = (t if t is None else t.detach() for t in tensors[:6])
    norms, weights = [dense(t) for t in norms], _by_kind(tensors[6:])
    return torch.ops.fastpetl.cpu_multi_site_forward.default(
        rows(f), *weights, *norms[:2], rows(x), *norms[2:], dense(task_ids), spec.eps, spec.code, float(spec.scale),
        TAILS[spec.tail], spec.tail_eps, keep_sum, save,
    )  # fmt: skip


def _by_kind(flat) -> list:
    """w_down, b_down, w_up, b_up, each a list with one for each task, or an empty one."""
    return [[] if flat[i] is None else [dense(t.detach()) for t in flat[i::4]] for i in range(4)]


class _MultiSite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, task_ids, spec, keep, *tensors):
        x, f, norm_weight, norm_bias, tail_weight, tail_bias, *flat = tensors
        inverted = keep == "norm" and x.dtype == torch.float32 and spec.tail == "layernorm"
        inverted = inverted and _invertible(tail_weight, tail_bias)
        s, n, z, stats, tail_stats = _forward(task_ids, spec, tensors, not inverted, True)
        n = unflatten(n, x.shape)
        ctx.config = spec, inverted
        norms = dense(norm_weight), dense(norm_bias), dense(tail_weight), dense(tail_bias)
        kept = n if inverted else s, tail_stats, rows(f), z, stats, dense(task_ids)
        ctx.save_for_backward(*kept, *norms, *flat[0::4], *flat[2::4])
        return n

    @staticmethod
    @first_order(_OP)
    def backward(ctx, grad):
        (spec, inverted), (x_too, f_too, *wanted) = ctx.config, ctx.needs_input_grad[3:]
        s, tail_stats, f, z, stats, task_ids, *norms = ctx.saved_tensors[:10]
        weights = [dense(w) for w in ctx.saved_tensors[10:]]
        tasks, norms_too, flat_too = len(weights) // 2, wanted[:4], wanted[4:]
        *own, tail_weight, tail_bias = norms
        asked = grad_mask((f_too, *(any(flat_too[i::4]) for i in range(4)), *norms_too))
        g, df, *per_task = torch.ops.fastpetl.cpu_multi_site_backward.default(
            rows(grad), rows(s), tail_stats, tail_weight, f, z, stats, weights[:tasks], weights[tasks:], *own,
            task_ids, spec.code, float(spec.scale), TAILS[spec.tail], asked, tail_bias if inverted else None, inverted,
        )  # fmt: skip
        flat = [per_task[i % 4][i // 4] if too else None for i, too in enumerate(flat_too)]
        norms = [t.sum(0) if too else None for t, too in zip(per_task[4:], norms_too, strict=True)]
        shape = grad.shape
        return (None, None, None, g.view(shape) if x_too else None, df.view(shape) if f_too else None,
                *norms, *flat)  # fmt: skip
