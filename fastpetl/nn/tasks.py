"""Which task a model's task-specific modules serve: set by `fastpetl.task`, or given to a call as `task=`."""

from __future__ import annotations

import functools

import torch


class TaskRouted:
    """Mixin of a layer that holds modules per task: what is set on it, or given as `task=`, reaches its forward.

    The setting is read where the layer is called, outside activation checkpointing: a layer that is run again in
    backward sees the task of its forward, whatever is set by then.
    """

    _fastpetl_task: str | tuple[str, ...] | None = None

    def __call__(self, *args, task=None, **kwargs):
        return super().__call__(*args, task=self._fastpetl_task if task is None else task, **kwargs)


class Told:
    """Mixin of a module that is told the task by the layer it is in (`TellsTask`), not by its caller."""

    _fastpetl_current: str | tuple[str, ...] | None = None


_AS_BEFORE = object()


class HearsTask:
    """Mixin of a layer, before the original: tells the modules in it the task of this call, so that a layer recomputed
    in the backward is that of its forward. A call that names no task (a fused forward's to the original) changes
    nothing.
    """

    def forward(self, *args, task=_AS_BEFORE, **kwargs):
        if task is not _AS_BEFORE:
            self._route(task)
        return super().forward(*args, **kwargs)

    def _route(self, task) -> None:
        below = [self]
        while below:  # self.modules() takes ten times as long, at every call of every layer
            for module in below.pop()._modules.values():
                if isinstance(module, Told):
                    module.__dict__["_fastpetl_current"] = task
                if module is not None and module._modules:
                    below.append(module)


class TellsTask(TaskRouted):
    """`HearsTask` of a layer the task is set on; a class of its own, for both stand in one fused class."""

    def forward(self, *args, task=_AS_BEFORE, **kwargs):
        if task is not _AS_BEFORE:
            self._route(task)
        return super().forward(*args, **kwargs)

    _route = HearsTask._route


# By identity and not by id, on which Dynamo would guard: each layer, and each model, would be compiled anew.


def name_of(one, named) -> str:
    """Semantics: the first name that `one` has in `named`, where several may stand for the same."""
    return next(name for name, other in named.items() if other is one)


def only_name(named) -> str | None:
    """Semantics: the first of the names, if all stand for the same; else None."""
    (name, one), *others = named.items()
    return name if all(other is one for _, other in others) else None


def mixed(model: torch.nn.Module) -> bool:
    """Semantics: is a task for each sample set on `model`?"""
    return any(isinstance(module.__dict__.get("_fastpetl_task"), tuple) for module in model.modules())


def per_sample(x: torch.Tensor, tasks, run) -> torch.Tensor:
    """Semantics: y[b] = run(x[b], tasks[b]), samples of one task in one call.

    x [batch, ...]; tasks: as many names, or a divisor of batch: then each stands for as many samples in a row (beams).
    """
    names, indices, restore = _groups(tuple(tasks), _repeats(x, tasks), x.device)
    if len(names) == 1:
        return run(x, names[0])
    parts = [run(x.index_select(0, index), name) for name, index in zip(names, indices, strict=True)]
    return torch.cat(parts).index_select(0, restore)


def task_ids(x: torch.Tensor, tasks, known) -> torch.Tensor:
    """Semantics: ids[b] = where the task of sample b stands in `known`, int64 [batch]; x and tasks as in
    `per_sample`.
    """
    return _ids(tuple(tasks), _repeats(x, tasks), tuple(known), x.device)


def in_one_launch(x: torch.Tensor) -> bool:
    """Semantics: do the tasks of a batch go into one launch? Not in compiled code on the CPU, where that is every row
    through every task's weights; the groups of `per_sample` are constants of the graph.
    """
    return x.device.type == "cuda" or not torch.compiler.is_compiling()


def stacked(weights) -> tuple:
    """Semantics: the tensors of several tasks as `ops.multi_adapter` takes them: tasks in front, 1 in front of what all
    share, None where there is none. weights: for each task as many tensors.
    """
    groups = list(zip(*weights, strict=True))
    shared = [all(t is group[0] for t in group) for group in groups]
    shared[0] &= not all(shared)  # something has to say how many there are
    pairs = zip(groups, shared, strict=True)
    return tuple(None if g[0] is None else g[0].unsqueeze(0) if one else torch.stack(g) for g, one in pairs)


def _repeats(x, tasks) -> int:
    if not tasks or x.shape[0] % len(tasks):
        raise ValueError(f"task: {len(tasks)} names are set for a batch of {x.shape[0]}, expected one for each sample")
    return x.shape[0] // len(tasks)


@functools.lru_cache(maxsize=64)
def _ids(tasks: tuple[str, ...], repeats: int, known: tuple[str, ...], device) -> torch.Tensor:
    with torch.inference_mode(False):  # it may meet autograd later
        return torch.tensor([known.index(task) for task in tasks for _ in range(repeats)], device=device)


@functools.lru_cache(maxsize=64)
def _groups(tasks: tuple[str, ...], repeats: int, device) -> tuple:
    """(the names, where the samples of each are, where each sample is once these stand one after the other)."""
    each = [task for task in tasks for _ in range(repeats)]
    names = tuple(dict.fromkeys(each))
    with torch.inference_mode(False):  # they may meet autograd later
        indices = [torch.tensor([b for b, task in enumerate(each) if task == name], device=device) for name in names]
        return names, tuple(indices), torch.cat(indices).argsort()
