"""BART (Hugging Face transformers) and VL-BART (`fastpetl.models.VLBart`): patch rules, and where adapters go."""

from __future__ import annotations

import sys

from fastpetl.patching._seq2seq import Seq2SeqFamily, attention_check, attention_note, original_signature
from fastpetl.patching.registry import Rule

_HF = "transformers.models.bart.modeling_bart"
_NN = "fastpetl.nn.bart"
_TASK = "fastpetl.nn.task_layers"
_PLAIN = "fastpetl.nn.bart_adapters"
_FORWARD = {  # what the fused classes were written for
    "BartAttention": ["hidden_states", "key_value_states", "past_key_values", "attention_mask", "kwargs"],
    "BartEncoderLayer": ["hidden_states", "attention_mask", "kwargs"],
    "BartDecoderLayer": [
        *("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
        *("past_key_values", "use_cache", "kwargs"),
    ],
}


def _check_attention(attention) -> str | None:
    from fastpetl.nn.bart import LORA_PROJECTIONS, PROJECTIONS
    from fastpetl.nn.inline import structure_reason
    from fastpetl.nn.lora import LoRALinear

    reason = original_signature(_HF, "BartAttention", _FORWARD)
    if reason is None and isinstance(attention.q_proj, LoRALinear):
        return structure_reason(attention, LORA_PROJECTIONS)
    return reason or attention_check(attention, PROJECTIONS)


def _check_layer(layer) -> str | None:
    from fastpetl.nn import bart
    from fastpetl.nn.inline import structure_reason

    encoder = "encoder_attn" not in layer._modules
    reason = original_signature(_HF, "BartEncoderLayer" if encoder else "BartDecoderLayer", _FORWARD)
    fused = bart.FusedBartEncoderLayer if encoder else bart.FusedBartDecoderLayer
    return reason or structure_reason(layer, fused.structure)


def _layer(kind: str, target: str, replacement: str) -> Rule:
    return Rule(f"bart.{kind}", target, f"{_NN}:{replacement}", _check_layer, ops=("linear", "residual_norm"))


RULES = (
    Rule(
        "bart.attention",
        f"{_HF}:BartAttention",
        f"{_NN}:FusedBartAttention",
        _check_attention,
        ops=("linear", "attention"),
        note=attention_note,
    ),
    _layer("encoder_layer", f"{_HF}:BartEncoderLayer", "FusedBartEncoderLayer"),
    _layer("decoder_layer", f"{_HF}:BartDecoderLayer", "FusedBartDecoderLayer"),
    _layer("encoder_layer", f"{_PLAIN}:AdapterBartEncoderLayer", "FusedAdapterBartEncoderLayer"),
    _layer("decoder_layer", f"{_PLAIN}:AdapterBartDecoderLayer", "FusedAdapterBartDecoderLayer"),
    _layer("encoder_layer", f"{_TASK}:TaskBartEncoderLayer", "FusedTaskBartEncoderLayer"),
    _layer("decoder_layer", f"{_TASK}:TaskBartDecoderLayer", "FusedTaskBartDecoderLayer"),
)


class BartFamily(Seq2SeqFamily):
    """Answers for a BartModel (the host of an encoder and a decoder) what attaching and counting ask."""

    name = "BART (transformers), VL-BART"
    module = _HF
    host_classes = ("BartModel",)
    trains_norms = True
    layers = "layers"
    queries_and_values = ("q_proj", "v_proj")
    lora_layers = ("BartEncoderLayer", "BartDecoderLayer")
    adapterhub = (  # where its adapters stand: (here, there)
        (r"\.(?:self_)?attn_adapter$", ".attention_adapters.adapters"),
        (r"\.enc_attn_adapter$", ".cross_attention_adapters.adapters"),
        (r"\.ff_adapter$", ".output_adapters.adapters"),
    )
    ignored = ("encoder.version", "decoder.version", "position_ids")

    def sites(self) -> dict:
        from fastpetl.nn import bart_adapters as plain

        hf = sys.modules[_HF]
        encoder = {"attn_adapter": False, "ff_adapter": False}
        decoder = {"self_attn_adapter": False, "enc_attn_adapter": True, "ff_adapter": False}
        return {
            hf.BartEncoderLayer: (plain.AdapterBartEncoderLayer, encoder),
            hf.BartDecoderLayer: (plain.AdapterBartDecoderLayer, decoder),
        }

    def prompted(self) -> dict:
        from fastpetl.nn.bart_adapters import PromptBartEncoder
        from fastpetl.nn.prompt import SeesPrompts

        hf = sys.modules[_HF]
        return {"encoder": (hf.BartEncoder, PromptBartEncoder), "decoder": (hf.BartDecoder, SeesPrompts)}

    def std(self, config) -> float:
        return config.init_std  # the original re-draws every Linear with BART's own initialiser


FAMILY = BartFamily()
