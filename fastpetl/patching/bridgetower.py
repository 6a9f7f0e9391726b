"""BridgeTower (Hugging Face transformers): patch rules for its text and cross-modal layers."""

from __future__ import annotations

from fastpetl.patching._bert_like import bert_rules

_HF = "transformers.models.bridgetower.modeling_bridgetower"
_LAYERS = ("BridgeTowerTextLayer", "BridgeTowerBertCrossLayer")
RULES = bert_rules("bridgetower", _HF, "BridgeTower", _LAYERS, "fastpetl.nn.bridgetower")
