"""METER (`fastpetl.models.Meter...`): its blocks, where DAS adapters go, and the originals' parameter names."""

from __future__ import annotations

import re
import sys

import torch
from torch import nn

from fastpetl.patching._bert_like import OUTPUTS, check_layer, layer_note, text_prompts
from fastpetl.patching._originals import renamed as rename
from fastpetl.patching._prompts import TakesPrompts
from fastpetl.patching._sites import LayerTable
from fastpetl.patching.registry import Rule

_MODEL = "fastpetl.models.meter"
_SHORTCUTS = ("adapter_list_l", "adapter_list_v")


class MeterFamily(TakesPrompts, LayerTable):
    """Answers for a MeterModel (the host of both stacks of cross-modal layers) what attaching, skipping and counting
    ask; blocks are numbered as DAS's gates: the text layers, then the image layers.
    """

    name = "METER (fastpetl.models)"
    das_sizes = (96, 288)  # the original's bottleneck and skip_bottleneck
    classifier_token = True
    layer_classes = ("fastpetl.nn.meter:MeterCrossLayer",)  # the towers stay frozen, as DAS has it
    outputs = OUTPUTS
    queries_and_values = ("query", "value")
    prompted = text_prompts("transformers.models.roberta.modeling_roberta", "Roberta")

    def hosts(self, module: nn.Module) -> bool:
        meter = sys.modules.get(_MODEL)
        return meter is not None and isinstance(module, meter.MeterModel)

    def hidden(self, host) -> int:
        return host.config.hidden_size

    def n_blocks(self, host) -> int:
        return 2 * host.config.num_hidden_layers

    def blocks(self, model: nn.Module, host) -> list:
        from fastpetl.skip.plan import Block

        prefix = next(name for name, module in model.named_modules() if module is host)
        config, shortcut = host.config, self.get_skip(host)[1]
        tokens = [config.max_text_length, (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1]
        found = []
        for k, kind in enumerate(("text", "image")):
            shortcuts = host._shortcuts(k) if shortcut == "adapter" else [None] * config.num_hidden_layers
            for i, (layer, skipped) in enumerate(zip(host._layers(k), shortcuts, strict=True)):
                found.append(
                    Block(
                        index=len(found),
                        name=f"{prefix}.cross_modal_{kind}_layers.{i}".lstrip("."),
                        macs=_layer_macs(layer, tokens[k], tokens[1 - k]),
                        kind=kind,
                        shortcut_macs=_linear_macs(skipped) * tokens[k],
                    )
                )
        return found

    # --- adapters

    def attach_reason(self, host) -> str | None:
        """Semantics: why nothing can be attached to this model, or None."""
        from fastpetl.nn.meter import MeterCrossLayer
        from fastpetl.nn.meter_fused import FusedMeterCrossLayer

        for k in range(2):
            for i, layer in enumerate(host._layers(k)):
                if type(layer) not in (MeterCrossLayer, FusedMeterCrossLayer):
                    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
                    return f"{('text', 'image')[k]} layer {i} is {kind}, expected fastpetl.nn.meter.MeterCrossLayer"
        return self.table_reason(host)

    def is_attached(self, host) -> bool:
        return (
            self.has_table(host)
            or "adapter" in host.cross_modal_text_layers[0]._modules
            or self.has_shortcut_adapters(host)
        )

    def attach_das(self, host, config) -> None:
        """Semantics: three adapters in each layer, a shortcut adapter beside it, and the trained first text token."""
        from fastpetl.nn.adapter import BottleneckAdapter
        from fastpetl.nn.meter import DASMeterCrossLayer, DASSelfOutput

        def adapter(layer, bottleneck: int) -> BottleneckAdapter:
            like = layer.output.dense.weight
            made = {"activation": config.activation, "scale": config.scale, "device": like.device, "dtype": like.dtype}
            return BottleneckAdapter(host.config.hidden_size, bottleneck, **made).train(layer.training)

        if config.classifier_token:
            first = host.get_input_embeddings().weight.new_zeros(1, 1, dtype=torch.long)
            if host.config.text_config.hidden_size != host.config.hidden_size:
                raise ValueError(
                    f"attach: the text encoder is {host.config.text_config.hidden_size} wide and the cross-modal "
                    f"layers {host.config.hidden_size}, expected the same, or DASConfig(classifier_token=False)"
                )
            embeddings = host.text_transformer.embeddings
            training = embeddings.training
            with torch.no_grad():
                host.token4classifier = nn.Parameter(embeddings.eval()(input_ids=first).clone())
            embeddings.train(training)
        for k, name in enumerate(_SHORTCUTS):
            for layer in host._layers(k):
                for attention in (layer.attention, layer.crossattention):
                    attention.output.adapter = adapter(layer, config.bottleneck)
                    attention.output.__class__ = DASSelfOutput
                layer.adapter = adapter(layer, config.bottleneck)
                layer.__class__ = DASMeterCrossLayer
            if config.shortcut == "adapter":
                lists = [nn.Sequential(adapter(layer, config.skip_bottleneck)) for layer in host._layers(k)]
                host.add_module(name, nn.ModuleList(lists).train(host.training))

    def detach_das(self, host) -> None:
        from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerSelfOutput

        from fastpetl.nn.meter import MeterCrossLayer

        if self.is_pruned(host):
            raise ValueError("detach: the model is pruned, expected one that still has all its blocks")
        values, shortcut = self.get_skip(host)
        for k, name in enumerate(_SHORTCUTS):
            for layer in host._layers(k):
                for attention in (layer.attention, layer.crossattention):
                    attention.output._modules.pop("adapter", None)
                    attention.output.__class__ = BridgeTowerSelfOutput
                layer._modules.pop("adapter", None)
                layer.__class__ = MeterCrossLayer
            host._modules.pop(name, None)
        host._parameters.pop("token4classifier", None)
        self.set_skip(host, None if shortcut == "adapter" else values, "identity")

    # --- skipping

    def has_shortcut_adapters(self, host) -> bool:
        return _SHORTCUTS[0] in host._modules

    def get_skip(self, host) -> tuple:
        values, shortcut = host.__dict__.get("_fastpetl_skip", (None, None))
        return values, shortcut or ("adapter" if self.has_shortcut_adapters(host) else "identity")

    def set_skip(self, host, values, shortcut: str) -> None:
        """Semantics: set what the model skips: None, a bool per block, or a policy of skip/policies.py."""
        if values is None:
            host.__dict__.pop("_fastpetl_skip", None)
        else:
            host.__dict__["_fastpetl_skip"] = (values, shortcut)

    def is_pruned(self, host) -> bool:
        return any(isinstance(layer, nn.Identity) for k in range(2) for layer in host._layers(k))

    def prune(self, host) -> None:
        """Semantics: an Identity stands where a block, or a kept block's shortcut adapter, was."""
        values, shortcut = self.get_skip(host)
        n = host.config.num_hidden_layers
        for i, skipped in enumerate(values):
            if skipped:
                host._layers(i // n)[i % n] = nn.Identity()
            if self.has_shortcut_adapters(host) and (not skipped or shortcut == "identity"):
                host._shortcuts(i // n)[i % n] = nn.Identity()

    # --- the originals' checkpoints

    def from_original(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Semantics: a state_dict of METER or DAS-METER (zdou0830/METER, DoubtedSteam/DAS, CLIP and RoBERTa encoders)
        under the names of `fastpetl.models`' task models.

        Left out: RoBERTa's pooler and CLIP's text side, which METER never uses, the pre-training heads (the retrieval
        head is made of the matching head's second row where there is none), and the search's buffers.
        """
        renamed = {}
        for name, value in state.items():
            if re.search(_UNUSED, name):
                continue
            packed = re.fullmatch(
                r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name
            )
            if packed is not None:
                for part, chunk in zip("qkv", value.chunk(3), strict=True):
                    key = f"meter.vit_model.encoder.layers.{packed[1]}.self_attn.{part}_proj.{packed[2]}"
                    renamed[key] = chunk.clone()
                continue
            renamed[rename(name, _ORIGINAL_NAMES, "METER", "token_type_embeddings.weight")] = value
        for name in ("weight", "bias"):
            if f"itm_score.fc.{name}" in state and f"rank_output.{name}" not in renamed:
                renamed[f"rank_output.{name}"] = state[f"itm_score.fc.{name}"][1:].clone()
        return renamed


_UNUSED = (
    r"^(itm_score|mlm_score)\.|^das_gate$|^skip_num$|^vit_model\.(positional_embedding$|ln_final\.)"
    r"|^text_transformer\.(pooler\.|embeddings\.position_ids$)"
)
_BLOCK = r"^vit_model\.visual\.transformer\.resblocks\.(\d+)"
_NEW_BLOCK = r"meter.vit_model.encoder.layers.\1"
_ORIGINAL_NAMES = (
    (r"^vit_model\.visual\.class_embedding$", "meter.vit_model.embeddings.class_embedding"),
    (r"^vit_model\.visual\.positional_embedding$", "meter.vit_model.embeddings.position_embedding.weight"),
    (r"^vit_model\.visual\.conv1\.", "meter.vit_model.embeddings.patch_embedding."),
    (r"^vit_model\.visual\.ln_pre\.", "meter.vit_model.pre_layrnorm."),
    (r"^vit_model\.visual\.ln_post\.", "meter.vit_model.post_layernorm."),
    (rf"{_BLOCK}\.attn\.out_proj\.", rf"{_NEW_BLOCK}.self_attn.out_proj."),
    (rf"{_BLOCK}\.ln_([12])\.", rf"{_NEW_BLOCK}.layer_norm\2."),
    (rf"{_BLOCK}\.mlp\.c_fc\.", rf"{_NEW_BLOCK}.mlp.fc1."),
    (rf"{_BLOCK}\.mlp\.c_proj\.", rf"{_NEW_BLOCK}.mlp.fc2."),
    (r"^(text_transformer|cross_modal_(?:text|image)_(?:transform|layers|pooler)|adapter_list_[lv])\.", r"meter.\1."),
    (r"^(token_type_embeddings\.|token4classifier$)", r"meter.\1"),
    (r"^(?:vqa|nlvr2|snli)_classifier\.", "classifier."),
    (r"^rank_output\.", "rank_output."),
)


def _layer_macs(layer, own: int, other: int) -> int:
    """One sample: keys and values of the cross-attention are of the other stream's tokens."""
    if isinstance(layer, nn.Identity):
        return 0
    cross = layer.crossattention.self
    theirs = _linear_macs(cross.key) + _linear_macs(cross.value)
    products = 2 * own * (own + other) * cross.all_head_size
    return (_linear_macs(layer) - theirs) * own + theirs * other + products


def _linear_macs(module: nn.Module | None) -> int:
    linears = () if module is None else (m for m in module.modules() if isinstance(m, nn.Linear))
    return sum(linear.in_features * linear.out_features for linear in linears)


# --- patch rules ------------------------------------------------------------------------------------------------------

_NN = "fastpetl.nn.meter"
_FUSED = "fastpetl.nn.meter_fused"


def _check_output(output) -> str | None:
    from fastpetl.nn.inline import structure_reason
    from fastpetl.nn.meter_fused import DAS_OUTPUT

    return structure_reason(output, DAS_OUTPUT)


def _layer(kind: str, name: str, module: str = _NN) -> Rule:
    fused = f"{_FUSED}:Fused{name}"
    ops = ("linear", "residual_norm")
    return Rule(f"meter.{kind}", f"{module}:{name}", fused, lambda m: check_layer(m, fused), ops=ops, note=layer_note)


RULES = (
    _layer("layer", "MeterCrossLayer"),
    _layer("layer", "TaskMeterCrossLayer", "fastpetl.nn.task_layers"),
    _layer("das_layer", "DASMeterCrossLayer"),
    Rule(
        "meter.das_output",
        f"{_NN}:DASSelfOutput",
        f"{_FUSED}:FusedDASSelfOutput",
        _check_output,
        ops=("linear", "adapter", "residual_norm"),
    ),
)
FAMILY = MeterFamily()
