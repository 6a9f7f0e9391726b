"""T5 (Hugging Face transformers) and VL-T5 (`fastpetl.models.VLT5`): patch rules, and where adapters go."""

from __future__ import annotations

import sys

from fastpetl.patching._seq2seq import Seq2SeqFamily, attention_check, attention_note, original_signature
from fastpetl.patching.registry import Rule

_HF = "transformers.models.t5.modeling_t5"
_NN = "fastpetl.nn.t5"
_FORWARD = {  # what the fused classes were written for
    "T5Attention": ["hidden_states", "mask", "key_value_states", "position_bias", "past_key_values", "kwargs"],
    "T5LayerNorm": ["hidden_states"],
    "T5DenseActDense": ["hidden_states"],
    "T5DenseGatedActDense": ["hidden_states"],
}


def _check_attention(attention) -> str | None:
    from fastpetl.nn.inline import structure_reason
    from fastpetl.nn.lora import LoRALinear
    from fastpetl.nn.t5 import LORA_PROJECTIONS, PROJECTIONS

    reason = original_signature(_HF, "T5Attention", _FORWARD)
    if reason is None and isinstance(attention.q, LoRALinear):
        return structure_reason(attention, LORA_PROJECTIONS)
    return reason or attention_check(attention, PROJECTIONS)


def _check_norm(norm) -> str | None:
    return original_signature(_HF, "T5LayerNorm", _FORWARD)


def _check_dense(dense) -> str | None:
    from fastpetl.nn import t5
    from fastpetl.nn.inline import structure_reason

    gated = "wi_1" in dense._modules
    name = "T5DenseGatedActDense" if gated else "T5DenseActDense"
    return original_signature(_HF, name, _FORWARD) or structure_reason(dense, t5.GATED if gated else t5.DENSE)


def _rule(kind: str, name: str, check, *ops: str, **options) -> Rule:
    return Rule(f"t5.{kind}", f"{_HF}:{name}", f"{_NN}:Fused{name}", check, ops=ops, **options)


RULES = (
    _rule("attention", "T5Attention", _check_attention, "linear", note=attention_note),
    _rule("norm", "T5LayerNorm", _check_norm, "residual_norm"),
    _rule("feed_forward", "T5DenseActDense", _check_dense, "linear"),
    _rule("feed_forward", "T5DenseGatedActDense", _check_dense, "linear"),
)


class T5Family(Seq2SeqFamily):
    """Answers for a T5 with encoder and decoder (the host) what attaching and counting ask."""

    name = "T5 (transformers), VL-T5"
    module = _HF
    host_classes = ("T5Model", "T5ForConditionalGeneration")
    trains_norms = False
    layers = "block"
    queries_and_values = ("q", "v")
    lora_layers = ("T5Block",)
    adapterhub = ((r"\.(?:enc_attn|attn|ff)_adapter$", ".adapters"),)  # where its adapters stand: (here, there)
    ignored = ("layer.1.EncDecAttention.relative_attention_bias.weight",)

    def sites(self) -> dict:
        from fastpetl.nn import t5_adapters as plain

        hf = sys.modules[_HF]
        return {
            hf.T5Block: (plain.AdapterT5Block, {}),
            hf.T5LayerSelfAttention: (plain.AdapterT5LayerSelfAttention, {"attn_adapter": False}),
            hf.T5LayerCrossAttention: (plain.AdapterT5LayerCrossAttention, {"enc_attn_adapter": True}),
            hf.T5LayerFF: (plain.AdapterT5LayerFF, {"ff_adapter": False}),
        }

    def prompted(self) -> dict:
        from fastpetl.nn.prompt import SeesPrompts
        from fastpetl.nn.t5_adapters import PromptT5Encoder

        stack = sys.modules[_HF].T5Stack
        return {"encoder": (stack, PromptT5Encoder), "decoder": (stack, SeesPrompts)}

    def std(self, config) -> None:
        return None  # the original leaves T5's adapters as torch makes them


FAMILY = T5Family()
