"""ViLT (Hugging Face transformers): its patch rules, its blocks, where DAS adapters go, and the original's parameter
names.
"""

from __future__ import annotations

import inspect
import re
import sys

import torch
from torch import nn

from fastpetl.patching._originals import renamed as rename
from fastpetl.patching._prompts import TakesPrompts
from fastpetl.patching._sites import LayerTable
from fastpetl.patching.registry import Rule

_HF = "transformers.models.vilt.modeling_vilt"
_NN = "fastpetl.nn.vilt"
_DAS = "fastpetl.nn.vilt_das"
_SIGNATURE = ["self", "hidden_states", "attention_mask", "output_attentions"]


# --- patch rules ------------------------------------------------------------------------------------------------------


def _library_reason() -> str | None:
    """Other versions of transformers give ViltLayer other arguments, or checkpoint in the encoder: none that we know
    the code of.
    """
    layer = sys.modules[_HF].ViltLayer
    signature = list(inspect.signature(layer.forward).parameters)
    if signature != _SIGNATURE or not any(base.__name__ == "GradientCheckpointingLayer" for base in layer.__mro__):
        version = sys.modules["transformers"].__version__
        got, expected = ", ".join(signature), ", ".join(_SIGNATURE)
        return f"transformers {version} has a ViltLayer with forward({got}), expected ({expected})"
    return None


def _check_layer(layer) -> str | None:
    from fastpetl.nn import vilt
    from fastpetl.nn.inline import structure_reason

    fused = vilt.FusedDASViltLayer if isinstance(layer, vilt.DASViltLayer) else vilt.FusedViltLayer
    reason = _library_reason() or structure_reason(layer, fused.structure_of(layer))
    if reason is not None:
        return reason
    for name in ("layernorm_before", "layernorm_after"):
        norm = getattr(layer, name)
        if norm.weight is None or len(norm.normalized_shape) != 1:
            return f"{name} is {norm}, expected a LayerNorm over the last dimension with a weight"
    attention = layer.attention.attention
    if len({linear.bias is None for linear in (attention.query, attention.key, attention.value)}) > 1:
        return "attention.attention: query, key and value differ in having a bias"
    return None


def _note_layer(layer) -> str:
    from fastpetl.nn.vilt import exact_gelu

    notes = []
    dropout = layer.attention.attention.dropout
    if dropout.p > 0:
        notes.append(f"attention dropout {dropout.p}: attention runs in torch while training")
    if not exact_gelu(layer.intermediate.intermediate_act_fn):
        notes.append(f"activation {layer.intermediate.intermediate_act_fn} is not the exact GELU and runs as it is")
    return "; ".join(notes)


def _check_patches(embeddings) -> str | None:
    from fastpetl.nn import vilt
    from fastpetl.nn.inline import structure_reason

    reason = structure_reason(embeddings, vilt.FusedViltPatchEmbeddings.structure)
    if reason is not None:
        return reason
    conv = embeddings.projection
    if conv.stride != conv.kernel_size or conv.padding != (0, 0) or conv.dilation != (1, 1) or conv.groups != 1:
        return f"projection is {conv}, expected one whose stride is its kernel, without padding, dilation or groups"
    return None


def _check_encoder(encoder) -> str | None:
    return _library_reason()


_LAYER = {"check": _check_layer, "note": _note_layer}
RULES = (
    Rule("vilt.layer", f"{_HF}:ViltLayer", f"{_NN}:FusedViltLayer", ops=("linear", "attention"), **_LAYER),
    Rule(
        "vilt.das_layer",
        f"{_DAS}:DASViltLayer",
        f"{_NN}:FusedDASViltLayer",
        ops=("linear", "attention", "adapter"),
        **_LAYER,
    ),
    Rule(
        "vilt.layer",
        "fastpetl.nn.task_layers:TaskViltLayer",
        f"{_NN}:FusedTaskViltLayer",
        ops=("linear", "attention"),
        **_LAYER,
    ),
    Rule("vilt.patches", f"{_HF}:ViltPatchEmbeddings", f"{_NN}:FusedViltPatchEmbeddings", _check_patches, ("linear",)),
    Rule("vilt.encoder", f"{_HF}:ViltEncoder", f"{_NN}:FusedViltEncoder", check=_check_encoder),
    Rule("vilt.encoder", f"{_DAS}:SkipViltEncoder", f"{_NN}:FusedSkipViltEncoder", check=_check_encoder),
)


# --- blocks and adapters ----------------------------------------------------------------------------------------------


class ViltFamily(TakesPrompts, LayerTable):
    """Answers for a ViLT encoder (the host of its blocks) what attaching, skipping and counting ask."""

    name = "ViLT (transformers)"
    das_sizes = (96, 192)  # the paper's bottleneck and skip_bottleneck
    classifier_token = False
    layer_classes = (f"{_HF}:ViltLayer",)
    outputs = {"attention.output.dense": False, "output.dense": False}
    queries_and_values = ("query", "value")
    prompted = {
        (_HF, "ViltModel"): {
            "": ("ViltModel", "PromptedVilt"),
            "embeddings.text_embeddings": ("TextEmbeddings", "PromptedEmbeddings"),
        }
    }

    def hosts(self, module: nn.Module) -> bool:
        encoder = getattr(sys.modules.get(_HF), "ViltEncoder", None)
        return encoder is not None and isinstance(module, encoder)

    def whole(self, model: nn.Module, encoder):
        """Semantics: the ViltModel that has the embeddings too, if the encoder is in one."""
        kind = sys.modules[_HF].ViltModel
        return next((m for m in model.modules() if isinstance(m, kind) and m.encoder is encoder), encoder)

    def hidden(self, encoder) -> int:
        return encoder.config.hidden_size

    def n_blocks(self, encoder) -> int:
        return len(encoder.layer)

    def blocks(self, model: nn.Module, encoder) -> list:
        from fastpetl.skip.plan import Block

        prefix = next(name for name, module in model.named_modules() if module is encoder)
        tokens = _longest(encoder.config)
        _, shortcut = self.get_skip(encoder)
        shortcuts = encoder.adapter_list if shortcut == "adapter" else [None] * len(encoder.layer)
        return [
            Block(
                index=i,
                name=f"{prefix}.layer.{i}".lstrip("."),
                macs=_linear_macs(layer, tokens) + _attention_macs(layer, tokens),
                kind="multimodal",
                shortcut_macs=_linear_macs(skipped, tokens),
            )
            for i, (layer, skipped) in enumerate(zip(encoder.layer, shortcuts, strict=True))
        ]

    def attach_reason(self, encoder) -> str | None:
        """Semantics: why nothing can be attached to this encoder, or None."""
        from fastpetl.nn import vilt

        for i, layer in enumerate(encoder.layer):
            if type(layer) not in (sys.modules[_HF].ViltLayer, vilt.FusedViltLayer):
                return f"layer {i} is {type(layer).__module__}.{type(layer).__qualname__}, expected {_HF}.ViltLayer"
        return _library_reason() or self.table_reason(encoder)

    def is_attached(self, encoder) -> bool:
        return (
            self.has_table(encoder)
            or any("adapter0" in layer._modules for layer in encoder.layer)
            or self.has_shortcut_adapters(encoder)
        )

    def attach_das(self, encoder, config) -> None:
        """Semantics: adapter0 and adapter1 in each layer, adapter_list.{i}.0 on the encoder, as das.md 1.1-1.3 of the
        original.
        """
        from fastpetl.nn.adapter import BottleneckAdapter
        from fastpetl.nn.vilt_das import DASViltLayer

        def adapter(layer, bottleneck: int, std_init: bool) -> BottleneckAdapter:
            like = layer.output.dense.weight
            made = {"activation": config.activation, "scale": config.scale, "device": like.device, "dtype": like.dtype}
            new = BottleneckAdapter(encoder.config.hidden_size, bottleneck, **made)
            if not std_init:  # the original re-draws its in-block adapters with the backbone's initialiser
                for linear in (new.down_proj, new.up_proj):
                    nn.init.trunc_normal_(linear.weight, std=0.02)
            return new.train(layer.training)

        for layer in encoder.layer:
            layer.adapter0 = adapter(layer, config.bottleneck, std_init=False)
            layer.adapter1 = adapter(layer, config.bottleneck, std_init=False)
            layer.__class__ = DASViltLayer
        if config.shortcut == "adapter":
            lists = [nn.Sequential(adapter(layer, config.skip_bottleneck, std_init=True)) for layer in encoder.layer]
            encoder.adapter_list = nn.ModuleList(lists).train(encoder.training)
        self.set_skip(encoder, *self.get_skip(encoder))

    def detach_das(self, encoder) -> None:
        if self.is_pruned(encoder):
            raise ValueError("detach: the model is pruned, expected one that still has all its blocks")
        layer_class = sys.modules[_HF].ViltLayer
        for layer in encoder.layer:
            for name in ("adapter0", "adapter1"):
                layer._modules.pop(name, None)
            layer.__class__ = layer_class
        values, shortcut = self.get_skip(encoder)
        encoder._modules.pop("adapter_list", None)
        self.set_skip(encoder, None if shortcut == "adapter" else values, "identity")

    # --- skipping

    def has_shortcut_adapters(self, encoder) -> bool:
        return "adapter_list" in encoder._modules

    def get_skip(self, encoder) -> tuple:
        values, shortcut = encoder.__dict__.get("_fastpetl_skip", (None, None))
        return values, shortcut or ("adapter" if self.has_shortcut_adapters(encoder) else "identity")

    def set_skip(self, encoder, values, shortcut: str) -> None:
        """Semantics: set what the encoder skips: None, n_blocks bools, or a policy of skip/policies.py. With nothing
        set or attached its class is the original again.
        """
        from fastpetl.nn import vilt, vilt_das

        plain = {
            sys.modules[_HF].ViltEncoder: vilt_das.SkipViltEncoder,
            vilt.FusedViltEncoder: vilt.FusedSkipViltEncoder,
        }
        needed = values is not None or self.has_shortcut_adapters(encoder)
        swaps = plain if needed else {skipping: cls for cls, skipping in plain.items()}
        if needed and type(encoder) not in (*plain, *plain.values()):
            got = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
            raise ValueError(f"skip: the encoder is {got}, expected {_HF}.ViltEncoder")
        encoder.__class__ = swaps.get(type(encoder), type(encoder))
        if values is None:
            encoder.__dict__.pop("_fastpetl_skip", None)
        else:
            encoder.__dict__["_fastpetl_skip"] = (values, shortcut)

    def is_pruned(self, encoder) -> bool:
        return any(isinstance(layer, nn.Identity) for layer in encoder.layer)

    def prune(self, encoder) -> None:
        """Semantics: an Identity stands where a block, or a kept block's shortcut adapter, was."""
        values, shortcut = self.get_skip(encoder)
        for i, skipped in enumerate(values):
            if skipped:
                encoder.layer[i] = nn.Identity()
            elif self.has_shortcut_adapters(encoder):
                encoder.adapter_list[i] = nn.Identity()
        if shortcut == "identity" and self.has_shortcut_adapters(encoder):
            for i in range(len(values)):
                encoder.adapter_list[i] = nn.Identity()

    # --- the original's checkpoints

    def from_original(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Semantics: a state_dict of ViLT or DAS-ViLT (dandelin/ViLT, DoubtedSteam/DAS) under the names of HF's task
        models.

        The search's buffers (das_gate, skip_num) and position_ids, which HF does not store, are left out.
        """
        renamed = {}
        for name, value in state.items():
            if name.split(".")[-1] in ("das_gate", "skip_num", "position_ids"):
                continue
            qkv = re.fullmatch(r"transformer\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
            if qkv is not None:
                for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[f"vilt.encoder.layer.{qkv[1]}.attention.attention.{part}.{qkv[2]}"] = chunk.clone()
                continue
            renamed[rename(name, _ORIGINAL_NAMES, "DAS-ViLT", "transformer.norm.weight")] = value
        return renamed


_ORIGINAL_NAMES = (
    (r"^(text_embeddings|token_type_embeddings)\.", r"vilt.embeddings.\1."),
    (r"^transformer\.cls_token$", "vilt.embeddings.cls_token"),
    (r"^transformer\.pos_embed$", "vilt.embeddings.position_embeddings"),
    (r"^transformer\.patch_embed\.proj\.", "vilt.embeddings.patch_embeddings.projection."),
    (r"^transformer\.blocks\.(\d+)\.norm1\.", r"vilt.encoder.layer.\1.layernorm_before."),
    (r"^transformer\.blocks\.(\d+)\.norm2\.", r"vilt.encoder.layer.\1.layernorm_after."),
    (r"^transformer\.blocks\.(\d+)\.attn\.proj\.", r"vilt.encoder.layer.\1.attention.output.dense."),
    (r"^transformer\.blocks\.(\d+)\.mlp\.fc1\.", r"vilt.encoder.layer.\1.intermediate.dense."),
    (r"^transformer\.blocks\.(\d+)\.mlp\.fc2\.", r"vilt.encoder.layer.\1.output.dense."),
    (r"^transformer\.blocks\.(\d+)\.(adapter[01])\.", r"vilt.encoder.layer.\1.\2."),
    (r"^adapter_list\.", "vilt.encoder.adapter_list."),
    (r"^transformer\.norm\.", "vilt.layernorm."),
    (r"^pooler\.", "vilt.pooler."),
    (r"^(?:vqa_classifier|nlvr2_classifier)\.", "classifier."),
    (r"^(rank_output|mlm_score)\.", r"\1."),
)


def _longest(config) -> int:
    """Tokens of the longest text and a square image of the configured size, class token included."""
    patches = (config.image_size // config.patch_size) ** 2
    if config.max_image_length > 0:
        patches = min(patches, config.max_image_length)
    return config.max_position_embeddings + patches + 1


def _attention_macs(layer, tokens: int) -> int:
    return 0 if isinstance(layer, nn.Identity) else 2 * tokens**2 * layer.attention.attention.all_head_size


def _linear_macs(module: nn.Module | None, tokens: int) -> int:
    linears = () if module is None else (m for m in module.modules() if isinstance(m, nn.Linear))
    return tokens * sum(linear.in_features * linear.out_features for linear in linears)


FAMILY = ViltFamily()
