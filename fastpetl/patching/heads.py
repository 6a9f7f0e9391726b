"""Patch rule for the output projections of language models."""

from __future__ import annotations

from fastpetl.patching.registry import ChildRule

_HF = "transformers.models"


RULES = (
    ChildRule(
        kind="head",
        target="torch.nn.modules.linear:Linear",
        replacement="fastpetl.nn.head:FusedHead",
        check=lambda head: None,
        ops=("linear",),
        owners=(
            f"{_HF}.bart.modeling_bart:BartForConditionalGeneration",
            f"{_HF}.t5.modeling_t5:T5ForConditionalGeneration",
        ),
        child="lm_head",
    ),
)
