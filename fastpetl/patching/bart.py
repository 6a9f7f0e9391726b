"""BART (Hugging Face transformers) and VL-BART (`fastpetl.models.VLBart`): patch rules, and where adapters go."""

from __future__ import annotations

import sys

from fastpetl.patching._seq2seq import Seq2SeqFamily

_HF = "transformers.models.bart.modeling_bart"

RULES = ()


class BartFamily(Seq2SeqFamily):
    """Answers for a BartModel (the host of an encoder and a decoder) what attaching and counting ask."""

    name = "BART (transformers), VL-BART"
    module = _HF
    host_classes = ("BartModel",)
    trains_norms = True
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

    def std(self, config) -> float:
        return config.init_std  # the original re-draws every Linear with BART's own initialiser


FAMILY = BartFamily()
