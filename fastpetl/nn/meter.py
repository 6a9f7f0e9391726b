"""METER's cross-modal layers in plain torch, with and without DAS adapters: what an unpatched model runs.

BridgeTower's cross layer in transformers has METER's names and math. Source: zdou0830/METER `BertCrossLayer` (CVPR
2022); DoubtedSteam/DAS, METER/meter/modules/bert_model.py (NeurIPS 2023).
"""

from __future__ import annotations

from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bridgetower import modeling_bridgetower as hf

from fastpetl.nn.adapter import BottleneckAdapter


class MeterCrossLayer(GradientCheckpointingLayer, hf.BridgeTowerBertCrossLayer):
    """Semantics: a = LN(Attn(x) + x); c = LN(Attn(a, memory) + a); y = LN(FFN(c) + c), post-norm; x [B, T, d], memory
    [B, S, d], additive masks [B, 1, 1, T] and [B, 1, 1, S] or None. Returns (y, weights, weights), the attention's if
    it makes any.
    """

    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx)
        self.attention.self.is_causal = (
            False  # HF marks it causal, which its eager attention ignores and SDPA would not
        )


class DASSelfOutput(hf.BridgeTowerSelfOutput):
    """Semantics: LN(drop(dense(f)) + x + A(x)); has one more child than BridgeTowerSelfOutput, `adapter`."""

    adapter: BottleneckAdapter

    def forward(self, hidden_states, input_tensor):
        f = self.dropout(self.dense(hidden_states))
        return self.LayerNorm(self.adapter(input_tensor, residual=f + input_tensor))


class DASMeterCrossLayer(MeterCrossLayer):
    """Semantics: as `MeterCrossLayer` with A(x) inside the norm after each attention (`DASSelfOutput`) and, after the
    last norm, y = LN(FFN(c) + c) + A(c): what leaves the layer is not normalised. Has one more child, `adapter`.
    """

    adapter: BottleneckAdapter

    def feed_forward_chunk(self, attention_output):
        return self.adapter(attention_output, residual=super().feed_forward_chunk(attention_output))


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
DASSelfOutput.__name__ = "BridgeTowerSelfOutput"
DASMeterCrossLayer.__name__ = "MeterCrossLayer"
