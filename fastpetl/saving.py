"""`save` and `load`: what a PETL method trained, in files that hold no code: safetensors for weights, JSON for the
rest, a model card.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastpetl import skip as _skip
from fastpetl._version import __version__
from fastpetl.methods import CONFIGS, attach, attached, detach, without
from fastpetl.skip import SkipPlan

WEIGHTS, CONFIG, CARD = "fastpetl.safetensors", "fastpetl.json", "README.md"
_METHODS = {cls.method: cls for cls in CONFIGS}
_COMMON = ("check", "keep", "replace")


def save(model: nn.Module, directory, *, task: str | None = None) -> Path:
    """Semantics: write the attached method's trained parameters, its configuration and the skip plan (masks per sample
    and policies are not the model's: not saved), and a model card; returns the directory, which is as hubs of
    models take it.

    The parameters are those the method trains (adapters, pooler, head, token types, ...), not the frozen backbone.
    task: only what this task uses: its own weights and those all tasks share. The directory is made if there is none;
    files of an earlier save are replaced, a model card that is there stays.
    """
    from safetensors.torch import save_file

    state = attached(model) if isinstance(model, nn.Module) else None
    if state is None:
        raise ValueError(f"save: model is {without(model)}, expected fastpetl.attach(model, config)")
    config = state.config if task is None else replace(state.config, tasks=_one_of(model, task))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().cpu().contiguous() for n, p in _trained(model, state.config, task).items()}
    plan = _skip.current(model)
    content = {
        "fastpetl": __version__,
        "method": config.method,
        "config": config.to_dict(),
        "skip": {"blocks": list(plan.blocks), "shortcut": plan.shortcut} if isinstance(plan, SkipPlan) else None,
    }
    if task is not None:
        content["task"] = task
    if _skip.pruned(model):
        content["pruned"] = True
    save_file(weights, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if not (directory / CARD).exists():
        (directory / CARD).write_text(_card(model, config, weights), encoding="utf-8")
    return directory


def _one_of(model, task: str) -> tuple[str]:
    from fastpetl.methods.tasks import tasks

    known = tasks(model)
    if task not in known:
        raise ValueError(f"save: task is {task!r}, expected one of {', '.join(known)}")
    return (task,)


def _trained(model, config, task: str | None) -> dict[str, nn.Parameter]:
    """The parameters that are trained, each under its first name; of a task's own ones only those of `task`."""
    from fastpetl.methods.task_set import task_of

    found, seen = {}, set()
    for name, p in model.named_parameters(remove_duplicate=task is None):
        if task_of(name) in (None, task) or task is None:
            if config.trainable(name) and id(p) not in seen:
                found[name] = p
                seen.add(id(p))
    return found


def _card(model, config, weights: dict) -> str:
    count = sum(w.numel() for w in weights.values())
    rows = "\n".join(f"| {name} | {value!r} |" for name, value in config.to_dict().items())
    return (
        f"---\nlibrary_name: fastpetl\ntags:\n- fastpetl\n- {config.method}\n---\n\n"
        f"{count:,} parameters trained with `{type(config).__name__}` on a frozen {type(model).__name__}. To use them, "
        f"`fastpetl.load(model, directory)` with the same backbone.\n\n| setting | value |\n|---|---|\n{rows}\n"
    )


def load(model: nn.Module, directory, *, patch: bool = True, common: str = "check") -> nn.Module:
    """Semantics: attach what `save` wrote (if nothing is attached yet), fill in its parameters, set its skip plan;
    returns `model`.

    The model must be the backbone it was trained on. Every saved parameter must find one of its shape; otherwise
    ValueError, and the model is as it was. One task's files also go into a model with other tasks of the same
    configuration: the task is added, or its weights replaced. What the model's other tasks use too ("single" adapters,
    norms) must then be equal in both ("check"), or stays the model's ("keep"), or becomes the files' ("replace").
    """
    from safetensors.torch import load_file

    directory = Path(directory)
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"load: {directory} has no {file}, expected a directory written by fastpetl.save")
    if common not in _COMMON:
        raise ValueError(f"load: common is {common!r}, expected one of {', '.join(_COMMON)}")
    content, config = _read(directory / CONFIG)
    weights = load_file(directory / WEIGHTS)
    plan = content["skip"] and SkipPlan(tuple(content["skip"]["blocks"]), content["skip"]["shortcut"])
    state = attached(model) if isinstance(model, nn.Module) else None
    if state is not None and state.config != config:
        if "task" in content and replace(state.config, tasks=config.tasks) == config:
            return _load_task(model, weights, content["task"], common)
        raise ValueError(f"load: model has {state.config} attached, expected {config}; fastpetl.detach(model) first")
    if state is None:
        attach(model, config, patch=patch)
    try:
        _check(model, config, weights, pruned=content.get("pruned", False))
        _skip(model, plan or None)
    except BaseException:
        if state is None:
            detach(model)
        raise
    if content.get("pruned") and not _skip.pruned(model):
        _skip.prune(model)
    _fill(dict(model.named_parameters()), weights)
    return model


def _read(path: Path) -> tuple:
    """(what the JSON file holds, its configuration)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"load: {path} is not JSON ({error}), expected what fastpetl.save wrote") from None
    if content.get("method") not in _METHODS:
        raise ValueError(f"load: method is {content.get('method')!r}, expected one of {', '.join(_METHODS)}")
    config = _METHODS[content["method"]]
    unknown = sorted(content["config"].keys() - config.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(
            f"load: config has {unknown[0]!r}, which {config.__name__} of fastpetl {__version__} does not have, "
            f"expected files of this version or an older one: these were written by {content.get('fastpetl')}"
        )
    return content, config(**content["config"])


def _load_task(model, weights: dict, task: str, common: str):
    """One task's weights into a model that has others."""
    from fastpetl.methods.task_set import add_task, remove_task, task_of
    from fastpetl.methods.tasks import tasks

    added = task not in tasks(model)
    if added:
        add_task(model, task)
    try:
        every = dict(model.named_parameters(remove_duplicate=False))
        # "single": the files' names are the task's, the parameters everybody's.
        of_others = {id(p) for n, p in every.items() if task_of(n) not in (None, task)}
        shared = {n for n in weights if task_of(n) is None or id(every.get(n)) in of_others}
        mine = _trained(model, attached(model).config, task)
        _match(mine, weights, mine.keys() ^ weights.keys())
        for name in sorted(shared) if common == "check" else ():
            if not torch.equal(every[name].detach().cpu(), weights[name]):
                raise ValueError(
                    f"load: {name} is used by other tasks too and differs from the model's, expected common='keep' or "
                    "common='replace'"
                )
    except BaseException:
        if added:
            remove_task(model, task)
        raise
    _fill(every, {n: w for n, w in weights.items() if common == "replace" or n not in shared})
    return model


def _fill(parameters: dict, weights: dict) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def _check(model: nn.Module, config, weights: dict, pruned: bool) -> None:
    parameters = {name: p for name, p in model.named_parameters() if config.trainable(name)}
    # A pruned model's files leave out what it dropped.
    _match(parameters, weights, weights.keys() - parameters.keys() if pruned else parameters.keys() ^ weights.keys())


def _match(parameters: dict, weights: dict, different) -> None:
    for name in sorted(different):
        side = "the model does not have" if name in weights else "the files do not have"
        raise ValueError(f"load: {side} {name}, expected the backbone the weights were trained on")
    for name, value in weights.items():
        if parameters[name].shape != value.shape:
            got, expected = tuple(value.shape), tuple(parameters[name].shape)
            raise ValueError(f"load: {name} has shape {got}, expected {expected} to match the model")
