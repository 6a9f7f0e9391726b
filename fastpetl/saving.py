"""`save` and `load`: what a PETL method trained, in two files that hold no code: safetensors for weights, JSON for
the rest.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from fastpetl import skip as _skip
from fastpetl._version import __version__
from fastpetl.methods import CONFIGS, attach, attached, detach
from fastpetl.skip import SkipPlan

WEIGHTS, CONFIG = "fastpetl.safetensors", "fastpetl.json"
_METHODS = {cls.method: cls for cls in CONFIGS}


def save(model: nn.Module, directory) -> Path:
    """Semantics: write the attached method's trained parameters, its configuration and the skip plan (masks per sample
    and policies are not the model's: not saved); returns the directory.

    The parameters are those the method trains (adapters, pooler, head, token types, ...), not the frozen backbone.
    The directory is made if there is none; files of an earlier save are replaced.
    """
    from safetensors.torch import save_file

    state = attached(model) if isinstance(model, nn.Module) else None
    if state is None:
        raise ValueError(
            f"save: model is {type(model).__name__} with nothing attached, expected fastpetl.attach(model, config)"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if state.config.trainable(n)}
    plan = _skip.current(model)
    content = {
        "fastpetl": __version__,
        "method": state.config.method,
        "config": state.config.to_dict(),
        "skip": {"blocks": list(plan.blocks), "shortcut": plan.shortcut} if isinstance(plan, SkipPlan) else None,
    }
    if _skip.pruned(model):
        content["pruned"] = True
    save_file(weights, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory


def load(model: nn.Module, directory, *, patch: bool = True) -> nn.Module:
    """Semantics: attach what `save` wrote (if nothing is attached yet), fill in its parameters, set its skip plan;
    returns `model`.

    The model must be the backbone it was trained on. Every saved parameter must find one of its shape; otherwise
    ValueError, and the model is as it was.
    """
    from safetensors.torch import load_file

    directory = Path(directory)
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"load: {directory} has no {file}, expected a directory written by fastpetl.save")
    content = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    if content.get("method") not in _METHODS:
        raise ValueError(f"load: method is {content.get('method')!r}, expected one of {', '.join(_METHODS)}")
    config = _METHODS[content["method"]](**content["config"])
    weights = load_file(directory / WEIGHTS)
    plan = content["skip"] and SkipPlan(tuple(content["skip"]["blocks"]), content["skip"]["shortcut"])
    state = attached(model) if isinstance(model, nn.Module) else None
    if state is not None and state.config != config:
        raise ValueError(f"load: model has {state.config} attached, expected {config}; fastpetl.detach(model) first")
    if state is None:
        attach(model, config, patch=patch)
    try:
        _check(model, config, weights, pruned=content.get("pruned", False))
    except BaseException:
        if state is None:
            detach(model)
        raise
    _skip(model, plan or None)
    if content.get("pruned") and not _skip.pruned(model):
        _skip.prune(model)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in weights.items():
            parameters[name].copy_(value)
    return model


def _check(model: nn.Module, config, weights: dict, pruned: bool) -> None:
    parameters = {name: p for name, p in model.named_parameters() if config.trainable(name)}
    # A pruned model's files leave out what it dropped.
    for name in sorted(weights.keys() - parameters.keys() if pruned else parameters.keys() ^ weights.keys()):
        side = "the model does not have" if name in weights else "the files do not have"
        raise ValueError(f"load: {side} {name}, expected the backbone the weights were trained on")
    for name, value in weights.items():
        if parameters[name].shape != value.shape:
            got, expected = tuple(value.shape), tuple(parameters[name].shape)
            raise ValueError(f"load: {name} has shape {got}, expected {expected} to match the model")
