"""Bottleneck adapters in the folder format of AdapterHub's `adapters`: `import_adapterhub` reads what it saved, without
that library.

The format: adapter_config.json, and adapter.safetensors or pytorch_adapter.bin with
`<place>.adapters.<name>.adapter_down.0.weight` [bottleneck, hidden] (`.1.` behind a norm), `adapter_up.weight`,
`adapter_norm_before`, `adapter_norm_after`, `scaling`.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastpetl.methods import AdapterConfig, attach, attached, detach
from fastpetl.methods.tasks import tasks
from fastpetl.nn.adapter_controller import CONTROLLERS, TaskAdapter
from fastpetl.patching import registry

__all__ = ["import_adapterhub"]

# From where on names are compared; of CLIP's two sides, which.
_STACK = r"(?:(?:text|vision)_model\.)?(?:encoder|decoder)"
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
_ACTIVATIONS = {
    **{"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    **{"swish": "silu", "silu": "silu", "linear": "identity"},
}
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # files without a version call them so
# Setting -> (its default there, what an AdapterConfig computes, why another value is something else)
_PLAIN = {
    "architecture": (None, (None,), "not a bottleneck adapter"),
    "mh_adapter": (None, (True,), "AdapterConfig adapts attention and feed-forward both (Houlsby's places)"),
    "output_adapter": (None, (True,), "AdapterConfig adapts attention and feed-forward both (Houlsby's places)"),
    "original_ln_before": (
        False,
        (False,),
        "the adapter reads the normalised sum (Pfeiffer's), not the sublayer's output",
    ),
    "original_ln_after": (True, (True,), "the model's own norm would be left out"),
    "residual_before_ln": (True, (True, False), "the adapter's residual is the sublayer's output"),
    "is_parallel": (False, (False,), "the adapter reads the sublayer's input"),
    "use_gating": (False, (False,), "AdapterConfig has no gates"),
    "phm_layer": (False, (False,), "AdapterConfig's projections are plain matrices"),
    "inv_adapter": (None, (None,), "AdapterConfig has no invertible adapters"),
    "leave_out": ([], ([],), "AdapterConfig adapts every layer"),
    "dropout": (0.0, (0.0,), "AdapterConfig has no dropout inside adapters"),
    "stochastic_depth": (0.0, (0.0, None), "AdapterConfig drops no adapters"),
}


def import_adapterhub(model: nn.Module, directory, *, task: str = "default", patch: bool = True) -> nn.Module:
    """Semantics: the bottleneck adapter that AdapterHub's `adapters` saved in `directory` as the task `task`; in place;
    returns `model`, a BART, T5, BERT, RoBERTa or CLIP (both sides with one bottleneck, or one side alone).

    What maps is Houlsby's placement (`double_seq_bn`; mh_adapter and output_adapter, original_ln_before=False): f +
    U(act(D(f))) on each sublayer's output, with or without cross_adapter, ln_before, ln_after, and any scaling, which
    is multiplied into the up projection. Everything else (Pfeiffer's `seq_bn`, whose adapter reads the normalised sum;
    parallel, gated, PHM and invertible adapters; single layers left out) is refused with ValueError naming the setting,
    and the model is as it was. In training there they drop a sublayer's output before the adapter, here behind it.

    Where nothing is attached an AdapterConfig is, that trains the adapters alone; else the model's must be of the same
    kind and know the task (`fastpetl.add_task`).
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(
            f"import_adapterhub: {directory} has no {CONFIG}, expected a folder saved by AdapterHub"
        )
    content = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    family, host = registry.family_of(model, "import_adapterhub")
    if not hasattr(family, "adapterhub"):
        known = ", ".join(f.name for f in registry.families() if hasattr(f, "adapterhub"))
        raise ValueError(f"import_adapterhub: model is {family.name}, expected one of: {known}")
    settings = _checked(content)
    side = getattr(family, "adapterhub_side", {}).get(type(host).__name__, "")
    weights = {n.removeprefix(side): w for n, w in _weights(directory, content.get("name")).items()}
    scaling = settings.get("scaling", 1.0)
    if not isinstance(scaling, str):  # a learned one is among the weights
        weights = {n: w * scaling if ".adapter_up." in n else w for n, w in weights.items()}
    every_site = bool(settings.get("cross_adapter")) or not hasattr(host, "decoder")
    config = AdapterConfig(
        tasks=(task,),
        bottleneck=next(
            w.shape[0] for n, w in weights.items() if re.search(r"adapter_down\.\d\.weight$", n) and w.dim() == 2
        ),
        activation=_activation(settings, content),
        norm_before=bool(settings.get("ln_before")),
        norm_after=bool(settings.get("ln_after")),
        cross_attention=every_site,
        **dict.fromkeys(("train_norms", "train_visual", "train_head"), False),
    )
    state = attached(model)
    if state is None:
        attach(model, config, patch=patch)
    try:
        found = _places(model, family, side, weights, config, task)
    except BaseException:
        if state is None:
            detach(model)
        raise
    with torch.no_grad():
        for p, value in found:
            p.copy_(value)
    return model


def _checked(content: dict) -> dict:
    """The settings, all of them ones that an AdapterConfig can say."""
    settings = content.get("config")
    if not isinstance(settings, dict):
        raise ValueError(f"import_adapterhub: config is {settings!r}, expected the adapter's settings")
    for name, (default, plain, why) in _PLAIN.items():
        value = settings.get(name, default)
        if value not in plain:
            raise ValueError(f"import_adapterhub: {name} is {value!r}, expected {plain[0]!r}: {why}")
    if settings.get("ln_after") and settings.get("adapter_residual_before_ln"):
        raise ValueError(
            "import_adapterhub: adapter_residual_before_ln is True with ln_after, expected False: the new norm is of "
            "the adapter's output alone"
        )
    return settings


def _activation(settings: dict, content: dict) -> str:
    name = str(settings.get("non_linearity")).lower()
    name = name if "version" in content else _OLD_ACTIVATIONS.get(name, name)
    if name not in _ACTIVATIONS:
        raise ValueError(f"import_adapterhub: non_linearity is {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _weights(directory: Path, name: str | None) -> dict:
    """ "<place from its stack on>.<leaf>" -> tensor, of the adapter alone."""
    if (directory / WEIGHTS).is_file():
        from safetensors.torch import load_file

        files = load_file(directory / WEIGHTS)
    elif (directory / PICKLED).is_file():
        files = torch.load(directory / PICKLED, map_location="cpu", weights_only=True)
    else:
        raise FileNotFoundError(
            f"import_adapterhub: {directory} has no {WEIGHTS} and no {PICKLED}, expected one of them"
        )
    found, names = {}, set()
    for key, value in files.items():
        match = re.fullmatch(rf"(?:.*?\.)??({_STACK}\..*adapters)\.([^.]+)\.((?:adapter_|scaling).*)", key)
        if match is None:
            raise ValueError(f"import_adapterhub: the files have {key}, for which an AdapterConfig has no place")
        names.add(match[2])
        found[f"{match[1]}.{match[3]}"] = value
    if len(names) != 1 or name not in (None, *names):
        raise ValueError(f"import_adapterhub: the files have adapters {sorted(names)}, expected one, {name!r}")
    return found


def _places(model, family, side: str, weights: dict, config: AdapterConfig, task: str) -> list:
    """(parameter, its value); ValueError for anything without a place, or a place without one."""
    mine = attached(model).config
    same = {"tasks": mine.tasks, "sharing": mine.sharing, "shared": mine.shared}
    same |= {name: getattr(mine, name, None) for name in ("train_norms", "train_visual", "train_head", "prompts")}
    if type(mine) is not AdapterConfig or replace(config, **same) != mine:
        raise ValueError(f"import_adapterhub: model has {mine} attached, expected {config} for the files")
    if task not in tasks(model):
        raise ValueError(f"import_adapterhub: task is {task!r}, expected one of {', '.join(tasks(model))}")
    found, left = [], set(weights)
    for name, site in model.named_modules():
        if not isinstance(site, CONTROLLERS):
            continue
        place = re.search(rf"(?:^|\.)({_STACK}\..*)", name)[1].removeprefix(side)
        for ours, theirs in family.adapterhub:
            place = re.sub(ours, theirs, place)
        for leaf, p in _leaves(site, task):
            key = f"{place}.{leaf}"
            if key not in weights:
                raise ValueError(f"import_adapterhub: the files have no {key}, expected an adapter at every sublayer")
            left.discard(key)
            value = weights[key]
            if leaf.startswith("adapter_up") and f"{place}.scaling" in weights:
                left.discard(f"{place}.scaling")
                scaling = weights[f"{place}.scaling"]
                value = value * (scaling[:, None] if value.dim() == 2 else scaling)
            if p.shape != value.shape:
                got, want = tuple(value.shape), tuple(p.shape)
                raise ValueError(f"import_adapterhub: {key} has shape {got}, expected {want} to match the model")
            found.append((p, value))
        if site._modules.get("pre_layer_norm") is not None:  # stored twice
            left -= {f"{place}.adapter_down.0.{n}" for n in ("weight", "bias")}
    if left:
        raise ValueError(f"import_adapterhub: the files have {sorted(left)[0]}, for which this model has no place")
    return found


def _leaves(site, task: str):
    """(name there, parameter here)"""
    adapter: TaskAdapter = site.adapter(task)
    pre, post = site._modules.get("pre_layer_norm"), site._modules.get("post_layer_norm")
    parts = {f"adapter_down.{int(pre is not None)}": adapter.down_sampler, "adapter_up": adapter.up_sampler}
    parts |= {"adapter_norm_before": pre, "adapter_norm_after": post}
    for name, module in parts.items():
        if module is not None:
            yield f"{name}.weight", module.weight
            yield f"{name}.bias", module.bias
