"""Which method a checkpoint of VL-Adapter's own code was trained with, read off its names and shapes."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastpetl.methods.adapter import AdapterConfig
from fastpetl.methods.compacter import CompacterConfig, LowRankConfig
from fastpetl.methods.hyperformer import HyperformerConfig
from fastpetl.methods.lora import LoRAConfig
from fastpetl.methods.prompt import PromptConfig


def config_of(state: dict[str, torch.Tensor]) -> AdapterConfig | None:
    """Semantics: the configuration of the method in a state_dict with the original's names, prompts beside others
    included; None without any. Sharing is read off the values: what is equal for all tasks counts as shared.
    """
    method, prompts = _method_of(state), None
    if any(".prompt_modules." in name for name in state):
        prompts = PromptConfig(**PromptConfig.fields_of(state))
    return prompts if method is None else replace(method, prompts=prompts)


def _method_of(state) -> AdapterConfig | None:
    if any(".lora_As." in name for name in state):
        return LoRAConfig(**LoRAConfig.fields_of(state))
    cross = any("enc_attn_adapter" in name or "cross_attention" in name for name in state)
    if any("adapter_layers_hyper_net" in name for name in state):
        return HyperformerConfig(**HyperformerConfig.fields_of(state), cross_attention=cross)
    found = [n.split(".adapters.") for n in state if ".adapters." in n and n.endswith("down_sampler.b")]
    found = found or [n.split(".adapters.") for n in state if ".adapters." in n and n.endswith("down_sampler.bias")]
    if not found:
        return None
    at = found[0][0]
    tasks = tuple(rest.split(".")[0] for where, rest in found if where == at)
    adapters = [_of(state, f"{at}.adapters.{task}.") for task in tasks]
    up, down = (all(_equal(adapter, adapters[0], half) for adapter in adapters) for half in ("up", "down"))
    first = adapters[0]
    cls = AdapterConfig
    if any("phm_rule" in name for name in first):
        cls = CompacterConfig
    elif "down_sampler.W_left" in first:
        cls = LowRankConfig
    fields = cls.fields_of(first) if cls is not AdapterConfig else {}
    if cls is CompacterConfig:
        fields["shared_rule"] = any(name.startswith("phm_rule") for name in state)
    return cls(
        tasks=tasks,
        sharing="single" if up and down else "half" if up or down else "multiple",
        shared="down" if down and not up else "up",
        bottleneck=first.get("down_sampler.bias", first.get("down_sampler.b")).shape[0],
        norm_before=f"{at}.pre_layer_norm.weight" in state,
        norm_after=f"{at}.post_layer_norm.weight" in state,
        cross_attention=cross,
        **fields,
    )


def _of(state, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _equal(adapter: dict, other: dict, half: str) -> bool:
    names = [name for name in other if name.startswith(f"{half}_sampler.") and "phm_rule" not in name]
    return all(torch.equal(adapter[name], other[name]) for name in names)
