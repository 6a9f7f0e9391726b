"""METER's cross-modal layers fused, with and without DAS adapters; what is inside them are BridgeTower's modules."""

from __future__ import annotations

from transformers.models.bridgetower import modeling_bridgetower as hf

from fastpetl.nn.adapter import INLINED_ADAPTER, fused_site
from fastpetl.nn.bert import OUTPUT, FeedForward, feed_forward
from fastpetl.nn.inline import structure
from fastpetl.nn.meter import DASMeterCrossLayer, DASSelfOutput, MeterCrossLayer
from fastpetl.nn.parts import Fused, drop
from fastpetl.nn.task_layers import fused_routed

DAS_OUTPUT = OUTPUT | structure(adapter=INLINED_ADAPTER)


class FusedMeterCrossLayer(FeedForward, MeterCrossLayer):
    """MeterCrossLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""

    structures = feed_forward(hf.BridgeTowerIntermediate, hf.BridgeTowerOutput)


FusedTaskMeterCrossLayer = fused_routed(
    __name__, FeedForward, MeterCrossLayer, structures=FusedMeterCrossLayer.structures
)


class FusedDASMeterCrossLayer(FeedForward, DASMeterCrossLayer):
    """DASMeterCrossLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""

    structures = FusedMeterCrossLayer.structures

    def feed_forward_chunk(self, attention_output):
        y = self._chunk(attention_output)
        if y is None:
            return DASMeterCrossLayer.feed_forward_chunk(self, attention_output)
        return self.adapter(attention_output, residual=y)


class FusedDASSelfOutput(Fused, DASSelfOutput):
    """DASSelfOutput, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""

    def forward(self, hidden_states, input_tensor):
        if self._declines(DAS_OUTPUT, hidden_states):
            return super().forward(hidden_states, input_tensor)
        f = drop(self._linear(hidden_states, self.dense, slot="dense"), self.dropout.p, self.dropout.training)
        # The next adapter reads the norm's output and keeps it; a hook might write to it.
        keep = "sum" if self._forward_hooks else "norm"
        return fused_site(self.adapter, input_tensor, f, self.LayerNorm, "norm", self._op("adapter"), keep=keep)


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
FusedMeterCrossLayer.__name__ = FusedDASMeterCrossLayer.__name__ = "MeterCrossLayer"
FusedDASSelfOutput.__name__ = "BridgeTowerSelfOutput"
