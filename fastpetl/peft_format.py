"""LoRA weights in the folder format of Hugging Face's PEFT: `export_peft` writes what PEFT loads, `import_peft` reads
what PEFT saved. Neither needs PEFT.

The format (PEFT 0.21): adapter_config.json, and adapter_model.safetensors with
`base_model.model.<module>.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank]; biases under their own names
(`.base_layer.bias` in wrapped linears); modules that are saved whole under their own names.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastpetl.methods import LoRAConfig, attach, attached, detach
from fastpetl.methods.task_set import task_of
from fastpetl.methods.tasks import tasks
from fastpetl.nn.lora import LoRALinear

__all__ = ["export_peft", "import_peft"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WORDS = "visual_embedding.obj_order_embedding.weight"
# Settings that change the arithmetic or its place, and what they are where this module's is meant.
_PLAIN = {
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
}


def export_peft(model: nn.Module, directory, *, task: str | None = None) -> Path:
    """Semantics: write the LoRA of one task (None: the only one, or the one shared by all) and what was trained beside
    it, biases, norms and the visual embedding, for `peft.PeftModel.from_pretrained(backbone, directory)`; returns the
    directory.
    """
    from safetensors.torch import save_file

    state = attached(model) if isinstance(model, nn.Module) else None
    if state is None or not isinstance(state.config, LoRAConfig):
        got = type(model).__name__ if state is None else type(state.config).__name__
        raise ValueError(f"export_peft: model is {got}, expected one with fastpetl.attach(model, LoRAConfig(...))")
    config, known = state.config, tasks(model)
    if config.prompts is not None:
        raise ValueError("export_peft: prompts are attached beside the LoRA, expected none: a folder has one method")
    if task is None and (len(known) == 1 or config.sharing == "single"):
        task = known[0]
    if task not in known:
        raise ValueError(f"export_peft: task is {task!r}, expected one of {', '.join(known)}")
    weights, targets, whole = {}, set(), set()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            targets.add(name)
            weights[f"{name}.lora_A.weight"] = module.lora_As[task]
            weights[f"{name}.lora_B.weight"] = module.lora_Bs[task]
    for name, p in model.named_parameters():
        if config.trainable(name) and task_of(name) is None:
            owner = _whole(name, config)
            whole |= {owner} - {None}
            weights[_in_peft(model, name)] = p
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = {_PREFIX + name: p.detach().cpu().contiguous() for name, p in weights.items()}
    save_file(found, directory / WEIGHTS, metadata={"format": "pt"})
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _named(model, targets),
        "bias": "all" if config.train_biases else "none",
        "modules_to_save": _named(model, whole) or None,
        "inference_mode": True,
        **_PLAIN,
    }
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory


def _whole(name: str, config) -> str | None:
    """The module PEFT must save whole for this trained parameter; None where `bias` covers it."""
    parts = name.split(".")
    if "visual_embedding" in parts and config.train_visual:  # part by part: whole it has the words in it
        return ".".join(parts[: parts.index("visual_embedding") + 2])
    return None if config.train_biases and parts[-1] == "bias" else ".".join(parts[:-1])


def _named(model, modules: set[str]) -> list[str]:
    """The modules by their last name where nobody else has it (METER's towers have queries, too), else by their full
    one: PEFT compares the ends of names.
    """
    every = [name for name, _ in model.named_modules()]
    short = {last: {name for name in every if name.endswith(last)} for last in {m.split(".")[-1] for m in modules}}
    return sorted({last if short[last] <= modules else m for m in modules for last in (m.split(".")[-1],)})


def _in_peft(model, name: str) -> str:
    module, _, last = name.rpartition(".")
    return f"{module}.base_layer.{last}" if isinstance(model.get_submodule(module), LoRALinear) else name


def import_peft(model: nn.Module, directory, *, task: str = "default", patch: bool = True) -> nn.Module:
    """Semantics: the LoRA that PEFT saved in `directory` as the task `task`, with the biases and modules saved beside
    it; returns `model`.

    Where nothing is attached a LoRAConfig of the files' rank, alpha and dropout is, else the model's must have the
    same rank and alpha and know the task (`fastpetl.add_task`). LoRA on other places than the queries and values of all
    attentions, and variants with other arithmetic (DoRA, rsLoRA, ranks per layer), are refused with ValueError, and the
    model is as it was.
    """
    from safetensors.torch import load_file

    directory = Path(directory)
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"import_peft: {directory} has no {file}, expected a folder saved by PEFT")
    content = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    _refuse(content)
    weights = _named_as_here(load_file(directory / WEIGHTS))
    state = attached(model) if isinstance(model, nn.Module) else None
    if state is None:
        sizes = {"rank": content["r"], "alpha": float(content["lora_alpha"]), "dropout": content["lora_dropout"]}
        beside = [name for name in weights if ".lora_" not in name]
        trains = {
            "train_biases": content.get("bias", "none") == "all",
            "train_visual": any("visual_embedding" in name for name in beside),
            "train_norms": any(name.endswith("norm.weight") for name in beside if "visual_embedding" not in name),
        }
        attach(model, LoRAConfig(tasks=(task,), **sizes, **trains), patch=patch)
    try:
        found = _places(model, weights, content, task)
    except BaseException:
        if state is None:
            detach(model)
        raise
    with torch.no_grad():
        for name, p in found.items():
            p.copy_(weights[name])
    return model


def _named_as_here(weights: dict) -> dict:
    """Without PEFT's wrappers: what a module was before it was saved whole is left out."""
    found = {name.removeprefix(_PREFIX): w for name, w in weights.items() if ".original_module." not in name}
    return {re.sub(r"\.modules_to_save\.(?:[^.]+\.)?", ".", name): w for name, w in found.items()}


def _refuse(content: dict) -> None:
    if content.get("peft_type") != "LORA":
        raise ValueError(f"import_peft: peft_type is {content.get('peft_type')!r}, expected 'LORA'")
    for name, plain in _PLAIN.items():
        if content.get(name, plain) not in (plain, None):
            raise ValueError(f"import_peft: {name} is {content[name]!r}, expected {plain!r}")
    if content.get("bias", "none") not in ("none", "all"):
        raise ValueError(f"import_peft: bias is {content['bias']!r}, expected 'none' or 'all'")


def _places(model, weights: dict, content: dict, task: str) -> dict:
    """name in the files -> the parameter it is; ValueError for anything without a place, or a place without one."""
    config = attached(model).config
    expected = {"rank": content["r"], "alpha": content["lora_alpha"]}
    if not isinstance(config, LoRAConfig) or replace(config, **expected) != config:
        raise ValueError(f"import_peft: model has {config} attached, expected LoRAConfig with {expected}")
    if task not in tasks(model):
        raise ValueError(f"import_peft: task is {task!r}, expected one of {', '.join(tasks(model))}")
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            places[f"{name}.lora_A.weight"] = module.lora_As[task]
            places[f"{name}.lora_B.weight"] = module.lora_Bs[task]
    for name in places:
        if name not in weights:
            raise ValueError(
                f"import_peft: the files have no {name}, expected LoRA on the queries and values of all attentions"
            )
    every = model.named_parameters(remove_duplicate=False)
    others = {_in_peft(model, name): p for name, p in every if task_of(name) is None}
    for name, value in weights.items():
        p = places.get(name, others.get(name))
        if p is None:
            raise ValueError(f"import_peft: the files have {name}, for which this model has no place")
        if p.shape != value.shape:
            got, want = tuple(value.shape), tuple(p.shape)
            raise ValueError(f"import_peft: {name} has shape {got}, expected {want} to match the model")
        if name.endswith(_WORDS) and not torch.equal(value, p.detach().cpu()):
            raise ValueError(
                f"import_peft: {name} differs from the words of the model, which it is tied to, expected it as it was"
            )
        places[name] = p
    return places
