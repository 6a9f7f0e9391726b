"""`add_task`, `remove_task`, `rename_task`: the tasks of a model that has modules per task, changed in place."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import nn

from fastpetl.methods import _KEY as _ATTACHED
from fastpetl.methods import attached, without
from fastpetl.methods.tasks import _set, tasks
from fastpetl.nn.tasks import TaskRouted
from fastpetl.patching import registry

__all__ = ["add_task", "remove_task", "rename_task", "task_of"]

# The children with one entry per task: of adapters, LoRA (two), Hyperformer and prompts.
_HOLDERS = ("adapters", "lora_As", "lora_Bs", "task_to_embeddings", "prompts")
_PER_TASK = re.compile(rf"(?:^|\.)(?:{'|'.join(_HOLDERS)})\.([^.]+)(?:\.|$)")


def task_of(name: str) -> str | None:
    """Semantics: the task a parameter of this name is for, None for one that is not a task's own."""
    found = _PER_TASK.search(name)
    return found and found[1]


def add_task(model: nn.Module, name: str, *, like: str | None = None) -> nn.Module:
    """Semantics: one more task, in place; returns `model`. Its weights are drawn as `attach` draws them, or start as
    copies of the task `like`'s; what the method shares between tasks ("single", the shared half of "half",
    Hyperformer's networks) is the new task's too.

    The optimizer does not know the new parameters: add them to it, or build it anew.
    """
    config, family, host = _attached(model, "add_task")
    known = tasks(model)
    if not isinstance(name, str) or not name or "." in name or name in known:
        raise ValueError(f"add_task: name is {name!r}, expected a new name without dots, not one of {', '.join(known)}")
    _known(model, "add_task", "like", like) if like is not None else None
    new = replace(config, tasks=(name,))
    for owner in _owners(host):
        for holder in _holders(owner):
            first = next(iter(holder.values()))
            part = _part(new, owner, holder)
            shared = part.sharing == "single" and holder is not owner._modules.get("task_to_embeddings")
            made = first if shared else _made(owner, holder, first, part, family, host, model)
            holder[name] = made
            if like is not None and made is not first:
                _copy(made, holder[like])
    _finish(model, config, (*config.tasks, name))
    return model


def remove_task(model: nn.Module, name: str) -> nn.Module:
    """Semantics: the task and the weights only it uses are gone, in place; returns `model`. Where the task was set by
    `fastpetl.task`, none is set any more. A model keeps at least one task.
    """
    config, _, host = _attached(model, "remove_task")
    known = _known(model, "remove_task", "name", name)
    if len(known) == 1:
        raise ValueError(f"remove_task: name is {name!r}, the only task, expected one of several")
    for owner in _owners(host):
        for holder in _holders(owner):
            del holder[name]
    _finish(model, config, tuple(task for task in config.tasks if task != name))
    _reset(model, lambda task: None if name in (task if isinstance(task, tuple) else (task,)) else task)
    return model


def rename_task(model: nn.Module, name: str, new: str) -> nn.Module:
    """Semantics: the task `name` is called `new`, in place; same parameters, same order; returns `model`."""
    config, _, host = _attached(model, "rename_task")
    known = _known(model, "rename_task", "name", name)
    if not isinstance(new, str) or not new or "." in new or new in known:
        raise ValueError(f"rename_task: new is {new!r}, expected a name without dots that is not one of the tasks")
    for owner in _owners(host):
        for holder in _holders(owner):
            entries = list(holder.items())
            holder.clear()
            for task, entry in entries:
                holder[new if task == name else task] = entry
    names = {name: new}
    _finish(model, config, tuple(names.get(task, task) for task in config.tasks))
    _reset(model, lambda t: tuple(names.get(one, one) for one in t) if isinstance(t, tuple) else names.get(t, t))
    return model


def _attached(model, function: str):
    state = attached(model) if isinstance(model, nn.Module) else None
    if state is None:
        raise ValueError(f"{function}: model is {without(model)}, expected fastpetl.attach(model, config)")
    family, host = registry.family_of(model, function)
    host = family.whole(model, host)
    if not any(_holders(owner) for owner in _owners(host)):
        raise ValueError(
            f"{function}: {type(state.config).__name__} has no weights per task, expected a method that has"
        )
    return state.config, family, host


def _known(model, function, argument, name) -> tuple[str, ...]:
    known = tasks(model)
    if name not in known:
        raise ValueError(f"{function}: {argument} is {name!r}, expected one of {', '.join(known)}")
    return known


def _owners(host) -> list[nn.Module]:
    return [module for module in host.modules() if _holders(module)]


def _holders(module) -> list:
    found = [module._modules.get(name) for name in _HOLDERS]
    return [holder for holder in found if isinstance(holder, nn.ModuleDict | nn.ParameterDict)]


def _part(config, owner, holder):
    """The configuration that says what `holder` holds: prompts may stand beside another method's modules."""
    prompts = holder is owner._modules.get("prompts")
    return config.prompts if prompts and config.prompts is not None else config


def _made(owner, holder, first, config, family, host, model):
    """A new entry of `holder`, drawn as `attach` draws it."""
    (task,) = config.tasks
    if isinstance(first, nn.Parameter):
        value = torch.empty_like(first)
        if holder is owner._modules.get("task_to_embeddings"):
            nn.init.normal_(value)
        elif holder is owner._modules.get("lora_As"):
            nn.init.kaiming_uniform_(value, a=5**0.5)
        else:
            nn.init.zeros_(value)
        return nn.Parameter(value)
    like = next(first.parameters())
    sizes = (getattr(owner, "hidden", None) or family.hidden(host), family.std(host.config))
    made = {"device": like.device, "dtype": like.dtype}
    if holder is owner._modules.get("prompts"):
        return config.controller(*sizes, **made).prompts[task].train(owner.training)
    entry = config.site(*sizes, **made).adapters[task].train(owner.training)
    if config.sharing == "half":
        setattr(entry, f"{config.shared}_sampler", getattr(first, f"{config.shared}_sampler"))
    for part in entry.modules():  # a rule that the whole model shares
        for name in part._parameters.keys() & model._parameters.keys():
            part._parameters[name] = model._parameters[name]
    return entry


def _copy(entry, like) -> None:
    with torch.no_grad():
        if isinstance(entry, nn.Parameter):
            entry.copy_(like)
            return
        for mine, theirs in zip(entry.parameters(), like.parameters(), strict=True):
            mine.copy_(theirs)  # a shared one onto itself


def _finish(model, config, names) -> None:
    config = replace(config, tasks=names)
    model.__dict__[_ATTACHED] = replace(attached(model), config=config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.trainable(name)) if task_of(name) is not None else None


def _reset(model, change) -> None:
    for module in model.modules():
        if isinstance(module, TaskRouted) and module._fastpetl_task is not None:
            _set(module, change(module._fastpetl_task))
