"""DAS on Hugging Face's ViLT in plain torch: what the paper does, written as one would write it with ViltLayer's own
children.

This is the path an attached, unpatched model runs; `fastpetl.patch` swaps in the fused classes of `fastpetl.nn.vilt`.
Source: DoubtedSteam/DAS, ViLT/vilt/modules/{vision_transformer_PA,vilt_module_train}.py.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vilt import modeling_vilt

from fastpetl.nn.adapter import BottleneckAdapter


class DASViltLayer(modeling_vilt.ViltLayer):
    """Semantics: x = x + Attn(LN(x)) + A0(x); y = x + MLP(LN(x)) + A1(x), returned as ViltLayer returns it: (y,
    [attention]).

    Has two more children than ViltLayer, `adapter0` and `adapter1`; both read the residual stream, not the normalised
    input.
    """

    adapter0: BottleneckAdapter
    adapter1: BottleneckAdapter

    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        outputs = self.attention(
            self.layernorm_before(hidden_states), attention_mask, output_attentions=output_attentions
        )
        hidden_states = self.adapter0(hidden_states, residual=outputs[0] + hidden_states)
        layer_output = self.intermediate(self.layernorm_after(hidden_states))
        layer_output = self.output(layer_output, hidden_states)
        return (self.adapter1(hidden_states, residual=layer_output), *outputs[1:])


class SkipViltEncoder(modeling_vilt.ViltEncoder):
    """ViltEncoder that leaves out the blocks of a skip set.

    Semantics: x = shortcut_i(x) if skip[i] else layer_i(x), i = 0, 1, ...; shortcut "identity" is x, "adapter" is
    `adapter_list[i](x)` = x + A_skip(x); a policy (`fastpetl.skip.policies`) says skip[b, i] for each sample. The skip
    set is read once, when the forward starts: layers recomputed in the backward (gradient checkpointing) are those that
    ran. A block skipped by all has no attention map: None stands in its place; a sample that skips has a map of zeros.
    """

    adapter_list: nn.ModuleList
    # the skip set (None, a bool per block, or a policy), and the shortcut
    _fastpetl_skip: tuple = (None, "identity")

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
    ):
        skip, shortcut = self._fastpetl_skip
        per_sample = not isinstance(skip, tuple | None)
        if not per_sample and not any(skip or ()):
            return super().forward(hidden_states, attention_mask, output_attentions, output_hidden_states, return_dict)
        run = self._run_per_sample if per_sample else self._run
        hidden_states, states, attentions = run(
            hidden_states, attention_mask, skip, shortcut, output_attentions, output_hidden_states
        )
        states = (*states, hidden_states) if output_hidden_states else None
        attentions = tuple(attentions) if output_attentions else None
        if not return_dict:
            return tuple(v for v in (hidden_states, states, attentions) if v is not None)
        return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=states, attentions=attentions)

    def _run(self, x, mask, skip, shortcut, output_attentions, output_hidden_states):
        from fastpetl.skip.compaction import call

        states, attentions = [], []
        for i, layer in enumerate(self.layer):
            if output_hidden_states:
                states.append(x)
            outputs = (x, None)
            if not skip[i]:
                outputs = call(layer, x, mask, output_attentions, batch=len(x))
            elif shortcut == "adapter":
                outputs = (call(self.adapter_list[i], x, batch=len(x)), None)
            x = outputs[0]
            if output_attentions:
                attentions.append(outputs[1])
        return x, states, attentions

    def _run_per_sample(self, x, mask, policy, shortcut, output_attentions, output_hidden_states):
        from fastpetl.skip.compaction import call, samples

        stream, states, attentions = samples(x, policy, len(self.layer), self.training, mask), [], []
        for i, layer in enumerate(self.layer):
            if output_hidden_states:
                states.append(stream.whole())
            attention = []

            def block(rows, take, layer=layer, attention=attention):
                outputs = call(layer, rows, take(mask), output_attentions)
                attention += outputs[1:]
                return outputs[0]

            adapter = self.adapter_list[i] if shortcut == "adapter" else nn.Identity()
            stream.run(i, block, adapter, layer.parameters(), adapter.parameters())
            if output_attentions:
                attentions.append(stream.on(i, attention[0]) if attention else None)
        return stream.whole(), states, attentions


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
DASViltLayer.__name__ = "ViltLayer"
SkipViltEncoder.__name__ = "ViltEncoder"
