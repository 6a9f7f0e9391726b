"""LXMERT (Hugging Face transformers): patch rules and blocks to skip."""

from __future__ import annotations

import sys

from fastpetl.patching._bert_like import intermediate_note
from fastpetl.patching._seq2seq import attention_check, attention_note, original_signature
from fastpetl.patching._turns import Blocks, SkipsTurns
from fastpetl.patching.registry import Rule

_HF = "transformers.models.lxmert.modeling_lxmert"
_NN = "fastpetl.nn.lxmert"
_FORWARD = {  # what the fused classes were written for
    "LxmertAttention": ["hidden_states", "context", "attention_mask", "output_attentions"],
    "LxmertAttentionOutput": ["hidden_states", "input_tensor"],
    "LxmertIntermediate": ["hidden_states"],
    "LxmertOutput": ["hidden_states", "input_tensor"],
}


def _check_attention(attention) -> str | None:
    from fastpetl.nn.bert import PROJECTIONS

    return original_signature(_HF, "LxmertAttention", _FORWARD) or attention_check(attention, PROJECTIONS)


def _check_output(name: str):
    def check(output) -> str | None:
        from fastpetl.nn.bert import OUTPUT
        from fastpetl.nn.inline import structure_reason

        return original_signature(_HF, name, _FORWARD) or structure_reason(output, OUTPUT)

    return check


def _check_intermediate(intermediate) -> str | None:
    from fastpetl.nn.bert import INTERMEDIATE
    from fastpetl.nn.inline import structure_reason

    return original_signature(_HF, "LxmertIntermediate", _FORWARD) or structure_reason(intermediate, INTERMEDIATE)


def _output(name: str) -> Rule:
    ops = ("linear", "residual_norm")
    return Rule("lxmert.output", f"{_HF}:{name}", f"{_NN}:Fused{name}", _check_output(name), ops=ops)


RULES = (
    Rule(
        "lxmert.attention",
        f"{_HF}:LxmertAttention",
        f"{_NN}:FusedLxmertAttention",
        _check_attention,
        ops=("linear", "attention"),
        note=attention_note,
    ),
    _output("LxmertAttentionOutput"),
    Rule(
        "lxmert.intermediate",
        f"{_HF}:LxmertIntermediate",
        f"{_NN}:FusedLxmertIntermediate",
        _check_intermediate,
        ops=("linear",),
        note=intermediate_note,
    ),
    _output("LxmertOutput"),
)


class LxmertFamily(SkipsTurns):
    """Answers for an LxmertModel (the host) what skipping and counting ask. Blocks are the text layers, each text half
    of a cross-modal layer, the image layers and each image half. Both halves read the pair as it was.
    """

    name = "LXMERT (transformers)"
    routes_samples = False
    boxes = 36  # of an image, as LXMERT was trained with

    def hosts(self, module) -> bool:
        library = sys.modules.get(_HF)
        return library is not None and isinstance(module, library.LxmertModel)

    def streams(self, host) -> list[Blocks]:
        from fastpetl.nn.hf_turns import LxmertCalls, LxmertPair

        calls, pair, encoder = LxmertCalls(), LxmertPair(), host.encoder
        text, image, order = (
            host.config.max_position_embeddings,
            self.boxes,
            max(len(encoder.layer), len(encoder.r_layers)),
        )
        return [
            Blocks("encoder.layer", "text", calls, (text,)),
            Blocks("encoder.x_layers", "text", pair, (text, image), order=order, half="lang"),
            Blocks("encoder.r_layers", "image", calls, (image,)),
            Blocks("encoder.x_layers", "image", pair, (image, text), order=order, half="visn"),
        ]

    def example(self, blocks, layer, empty) -> dict:
        if blocks.half is None:
            return super().example(blocks, layer, empty)
        own, other = blocks.lengths
        return {"x": empty(own), "other": empty(other)}


FAMILY = LxmertFamily()
