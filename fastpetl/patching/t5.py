"""T5 (Hugging Face transformers) and VL-T5 (`fastpetl.models.VLT5`): patch rules, and where adapters go."""

from __future__ import annotations

import sys

from fastpetl.patching._seq2seq import Seq2SeqFamily

_HF = "transformers.models.t5.modeling_t5"

RULES = ()


class T5Family(Seq2SeqFamily):
    """Answers for a T5 with encoder and decoder (the host) what attaching and counting ask."""

    name = "T5 (transformers), VL-T5"
    module = _HF
    host_classes = ("T5Model", "T5ForConditionalGeneration")
    trains_norms = False
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

    def std(self, config) -> None:
        return None  # the original leaves T5's adapters as torch makes them


FAMILY = T5Family()
