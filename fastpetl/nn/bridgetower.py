"""BridgeTower's modules in transformers, fused: BERT's under other names, in its text and cross-modal layers."""

from __future__ import annotations

from transformers.models.bridgetower import modeling_bridgetower as hf

from fastpetl.nn.bert import fuse

globals().update(fuse(__name__, hf, "BridgeTower", ("BridgeTowerTextLayer", "BridgeTowerBertCrossLayer")))
