"""LXMERT (Hugging Face transformers): patch rules."""

from __future__ import annotations

from fastpetl.patching._seq2seq import attention_check, attention_note, original_signature
from fastpetl.patching.registry import Rule

_HF = "transformers.models.lxmert.modeling_lxmert"
_NN = "fastpetl.nn.lxmert"
_FORWARD = {  # what the fused classes were written for
    "LxmertAttention": ["hidden_states", "context", "attention_mask", "output_attentions"],
    "LxmertAttentionOutput": ["hidden_states", "input_tensor"],
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
    _output("LxmertOutput"),
)
