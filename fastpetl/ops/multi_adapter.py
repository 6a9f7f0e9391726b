"""Adapters of several tasks in one batch: each sample, or each row, goes through its task's weights."""

from __future__ import annotations

import torch

from ..spec import activation_code
from . import _multi_adapter_triton
from ._casts import cast
from ._common import autocast_dtype, check_input, check_like, number
from ._multi_adapter import in_one_call
from .adapter import _check as check_adapter
from .adapter import adapter, adapter_reference

__all__ = ["multi_adapter", "multi_adapter_reference"]


def multi_adapter(
    x,
    w_down,
    b_down,
    w_up,
    b_up,
    task_ids,
    *,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    activation="gelu_tanh",
    scale=1.0,
    residuals=(),
    backend="auto",
):
    """Semantics: y[i] = adapter(x[i]) with the weights of task_ids[i].

    Shapes: x [batch, ..., d]; w_down [T, r, d], w_up [T, d, r], b_down [T, r], b_up [T, d], each None where `adapter`
    allows it; a first dimension of 1 is shared by all tasks (half-shared adapters); norm_weight and norm_bias [d],
    shared, or [T, d]; task_ids int64, [batch] or of x's shape without its last dimension.
    The rest as `adapter`. Parity: running each task's rows by themselves. Gradients: for all T, zeros for a task
    without rows.
    backend: "triton" ("auto" on CUDA) is one launch that never waits for the device; an id out of range is a
    device-side assertion there. "composed" ("auto" elsewhere, or where the bottleneck is too wide) calls `adapter`:
    once for a batch of one task, else in the tasks' order, or C++ where each task's rows lie; in compiled code every
    row goes through every task's adapter, so that ids do not shape the graph. A backend of `adapter` by name is
    "composed" with it in each call.
    """
    tensors = (x, w_down, b_down, w_up, b_up, norm_weight, norm_bias)
    options = {"eps": eps, "activation": activation, "scale": scale}
    tasks = _checked("multi_adapter", tensors, task_ids, residuals)
    dtype = autocast_dtype(x)
    inner = tensors if dtype is None else tuple(cast(t, dtype) for t in tensors)
    if tasks > 1 and _multi_adapter_triton.choose(backend, inner[0], w_down.shape[1], tasks) == "triton":
        return _fused(x, inner, task_ids, tasks, options, residuals, dtype)
    within = "auto" if backend == "composed" else backend
    together = torch.compiler.is_compiling()
    return _run("multi_adapter", tensors, task_ids, tasks, options, residuals, together, within)


def multi_adapter_reference(
    x,
    w_down,
    b_down,
    w_up,
    b_up,
    task_ids,
    *,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    activation="gelu_tanh",
    scale=1.0,
    residuals=(),
):
    """Semantics: y[i] = adapter_reference(x[i]) with the weights of task_ids[i]: all rows through all tasks, one
    chosen.

    Plain torch, the contract of `multi_adapter`; any floating dtype. Source: vl_adapter.md 1.2 (AdapterController).
    """
    tensors, options = (
        (x, w_down, b_down, w_up, b_up, norm_weight, norm_bias),
        dict(eps=eps, activation=activation, scale=scale),
    )
    name = "multi_adapter_reference"
    tasks = _checked(name, tensors, task_ids, residuals)
    return _run(name, tensors, task_ids, tasks, options, residuals, True)


def _checked(function, tensors, task_ids, residuals) -> int:
    """The number of tasks, once shapes and types are as they should be."""
    x, *stacks = tensors
    tasks = _check(function, x, stacks, task_ids)
    if not isinstance(residuals, (tuple, list)):
        raise TypeError(f"{function}: residuals is a {type(residuals).__name__}, expected a tuple of tensors")
    for i, r in enumerate(residuals):
        check_like(
            function, f"residuals[{i}]", r, x.shape, f"{tuple(x.shape)} to match x", x, dtype=getattr(r, "dtype", 0)
        )
    return tasks


def _fused(stream, tensors, task_ids, tasks, options, residuals, autocast):
    """The one launch; what it takes as residuals and what is added after it, as in `adapter`."""
    code = activation_code(options["activation"], "multi_adapter")
    eps, scale = (number("multi_adapter", name, options[name]) for name in ("eps", "scale"))
    x, *stacks = tensors
    stacks[4:] = [t if t is None or t.dim() == 2 else t.unsqueeze(0) for t in stacks[4:]]
    check_adapter(x, *(t if t is None else t[0] for t in stacks))
    if stream.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range("multi_adapter", task_ids, tasks)
    add_x, inside, late = False, [], []
    for i, r in enumerate(residuals):
        if autocast is None and r.dtype != x.dtype:
            check_like("multi_adapter", f"residuals[{i}]", r, x.shape, "", x)
        if r.dtype != x.dtype:
            late.append(r)
        elif r is stream and not add_x:
            add_x = True
        else:
            inside.append(r)
    if len(inside) > 2:
        raise ValueError(f"multi_adapter: residuals has {len(inside)} tensors beside x, expected at most 2")
    tensors = (x, *stacks, *inside, *(None,) * (2 - len(inside)))
    y = _multi_adapter_triton.fused(tensors, task_ids, tasks, add_x, eps, code, scale)
    for r in late:
        y = y + r
    return y


def _run(function, tensors, task_ids, tasks, options, residuals, together, backend=None):
    x, *stacks = tensors
    if not torch.compiler.is_compiling():
        _check_range(function, task_ids, tasks)

    def compose(name, x, stacks, residuals):
        own = [_per_task(t, tasks, flat) for t, flat in zip(stacks, (0, 0, 0, 0, 1, 1), strict=True)]

        def call(t, u, res):
            w_down, b_down, w_up, b_up, gamma, beta = (stack[t] for stack in own)
            named = dict(norm_weight=gamma, norm_bias=beta, **options, residuals=res)
            if name is None:
                return adapter_reference(u, w_down, b_down, w_up, b_up, **named)
            return adapter(u, w_down, b_down, w_up, b_up, **named, backend=name)

        if tasks == 1:
            return call(0, x, residuals)
        return (_together if together else _grouped)(call, x, residuals, task_ids, tasks)

    residuals = tuple(residuals)
    if tasks > 1 and not together:
        y = in_one_call(compose, x, stacks, residuals, task_ids, tasks, **options, backend=backend)
        if y is not None:
            return y
    return compose(backend, x, stacks, residuals)


def _together(call, x, residuals, task_ids, tasks):
    """Every row through every task's adapter, one chosen. Zeros elsewhere: no infinity of another task's row reaches
    this one's gradients.
    """
    ids, y = task_ids.view(*task_ids.shape, *(1,) * (x.dim() - task_ids.dim())), None
    for t in range(tasks):
        mine = ids == t
        u, *res = (torch.where(mine, r, 0) for r in (x, *residuals))
        out = call(t, u, tuple(res))
        y = out if y is None else torch.where(mine, out, y)
    return y


def _check_range(function, task_ids, tasks) -> None:
    if task_ids.numel() and not 0 <= int(task_ids.min()) <= int(task_ids.max()) < tasks:
        got = f"{int(task_ids.min())} to {int(task_ids.max())}"
        raise ValueError(f"{function}: task_ids goes from {got}, expected 0 to {tasks - 1} (tasks={tasks})")


def _grouped(call, x, residuals, task_ids, tasks):
    """One adapter per task over its rows, gathered; samples stay whole where ids are per sample."""
    ids = task_ids.reshape(-1)
    present = [t for t in range(tasks) if bool((ids == t).any())]
    if len(present) <= 1:
        return call(present[0] if present else 0, x, residuals)
    units = x.reshape(ids.numel(), *x.shape[task_ids.dim() :])
    parts, order = [], []
    for t in present:
        rows = (ids == t).nonzero().squeeze(1)
        u = units.index_select(0, rows)
        res = tuple(u if r is x else r.reshape(units.shape).index_select(0, rows) for r in residuals)
        parts.append(call(t, u, res))
        order.append(rows)
    return torch.cat(parts).index_select(0, torch.cat(order).argsort()).view(x.shape)


def _per_task(stack, tasks, norm):
    """The tensor of each task; unbind, so that a task without rows gets zeros, not None, as its gradient."""
    if stack is None or norm and stack.dim() == 1:
        return (stack,) * tasks
    return stack.unbind() if stack.shape[0] == tasks else (stack[0],) * tasks


def _check(function, x, stacks, task_ids) -> int:
    check_input(function, "x", x)
    names = ("w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias")
    tasks = 1
    for name, t, dims in zip(names, stacks, ((3,), (2,), (3,), (2,), (1, 2), (1, 2)), strict=True):
        if t is None and name not in ("w_down", "w_up"):
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{function}: {name} is a {type(t).__name__}, expected a torch.Tensor")
        if t.dim() not in dims or (t.dim() == dims[-1] and t.shape[0] == 0):
            raise ValueError(f"{function}: {name} has shape {tuple(t.shape)}, expected tasks (or 1) in front")
        if t.dim() == dims[-1] and t.shape[0] != 1:
            if tasks not in (1, t.shape[0]):
                raise ValueError(f"{function}: {name} has shape {tuple(t.shape)}, expected {tasks} or 1 tasks in front")
            tasks = t.shape[0]
    if not isinstance(task_ids, torch.Tensor):
        raise TypeError(f"{function}: task_ids is a {type(task_ids).__name__}, expected an int64 tensor")
    if task_ids.dtype != torch.int64 or task_ids.device != x.device:
        got = f"{str(task_ids.dtype).removeprefix('torch.')} on {task_ids.device}"
        raise ValueError(f"{function}: task_ids is {got}, expected int64 on {x.device}")
    if task_ids.shape not in (x.shape[:1], x.shape[:-1]):
        expected = f"{tuple(x.shape[:1])} or {tuple(x.shape[:-1])}"
        raise ValueError(f"{function}: task_ids has shape {tuple(task_ids.shape)}, expected {expected} to match x")
    return tasks
