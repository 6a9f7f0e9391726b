"""`fastpetl.task`: which task a model with task-specific modules serves from now on."""

from __future__ import annotations

from torch import nn

from fastpetl import skip
from fastpetl.nn.tasks import TaskRouted

__all__ = ["current_task", "task", "tasks"]

_KEY = "_fastpetl_task"


class _Setting:
    """What `task` returns: the setting is made; leaving it as a context restores the one before."""

    def __init__(self, before: list, name):
        self._before, self.name = before, name

    def __enter__(self):
        return self.name

    def __exit__(self, *_) -> None:
        for module, name in self._before:
            _set(module, name)

    def __repr__(self) -> str:
        return f"fastpetl.task({self.name!r})"


def task(model: nn.Module, name) -> _Setting:
    """Semantics: from now on every call of `model` is for the task `name`; None takes the setting back. A list of names
    is one task for each sample of the next batches: tasks mixed in one batch, in one launch where the model is patched.

    As a context manager it restores on leaving what was set before. A call's own `task=` goes first. The task is read
    when a layer is called: its backward, recomputed activations included, is of the task of the forward.
    """
    routed = _routed(model, "task")
    known = tasks(model)
    name = tuple(name) if isinstance(name, list | tuple) else name
    for one in name if isinstance(name, tuple) else () if name is None else (name,):
        if one not in known:
            raise ValueError(f"task: name is {one!r}, expected one of {', '.join(known)}")
    if isinstance(name, tuple) and skip.confuses_tasks(model):
        raise ValueError("task: blocks are skipped per sample, expected one task, or skip(model, None) before")
    before = [(module, module.__dict__.get(_KEY)) for module in routed]
    for module in routed:
        _set(module, name)
    return _Setting(before, name)


def current_task(model: nn.Module) -> str | tuple[str, ...] | None:
    """Semantics: the task that is set, or one for each sample, or None."""
    return _routed(model, "current_task")[0].__dict__.get(_KEY)


def tasks(model: nn.Module) -> tuple[str, ...]:
    """Semantics: the names of the tasks `model` has modules for, in order."""
    names: dict[str, None] = {}
    for module in _routed(model, "tasks"):
        for part in module.modules():
            names.update(dict.fromkeys(getattr(part, "tasks", ())))
    return tuple(names)


def _routed(model, function: str) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is {type(model).__name__}, expected a torch.nn.Module")
    found = [module for module in model.modules() if isinstance(module, TaskRouted)]
    if not found:
        raise ValueError(
            f"{function}: model is {type(model).__name__} without modules per task, expected one with e.g. "
            "fastpetl.attach(model, fastpetl.AdapterConfig(...))"
        )
    return found


def _set(module, name) -> None:
    if name is None:
        module.__dict__.pop(_KEY, None)
    else:
        module.__dict__[_KEY] = name
