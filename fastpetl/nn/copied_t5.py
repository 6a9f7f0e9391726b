"""VL-T5's own T5 modules, fused: what `fastpetl.patch` puts before the copied classes.

Source: ylsung/VL_adapter (CVPR 2022), a T5 as transformers had it in 2021 with an AdapterController after every
sublayer (patching/copied_bart.py fuses that one). Mixins: the class they join is found by its children and proven by
numbers (patching/_probe.py). The sublayers between them only compose; they run as they are.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastpetl.nn.inline import note_fallback, tensor_reason
from fastpetl.nn.parts import Fused, activate, attend, drop, heads, inlined
from fastpetl.nn.t5 import DENSE, GATED, PROJECTIONS


class CopiedT5Attention(Fused):
    """Semantics: (softmax(q k^T + bias) v, the keys and values if it is a decoder's with use_cache, bias); a bias that
    is not given is made of the relative positions, where it has them, and the mask, which is added.
    """

    def forward(
        self,
        hidden_states,
        mask=None,
        key_value_states=None,
        position_bias=None,
        past_key_value=None,
        head_mask=None,
        query_length=None,
        use_cache=False,
        output_attentions=False,
    ):
        x, source, past, size = hidden_states, key_value_states, past_key_value, self.key_value_proj_dim
        asked = {"head_mask": head_mask is not None, "output_attentions": output_attentions}
        reason = next((f"{name} is given" for name, given in asked.items() if given), None)
        if reason is not None:
            note_fallback(self, reason)
        if reason is not None or self._declines(PROJECTIONS, x):
            more = (past, head_mask, query_length, use_cache, output_attentions)
            return super().forward(x, mask, source, position_bias, *more)
        if source is None:
            q, k, v = (heads(t, size) for t in self._each(x, self.q, self.k, self.v, slot="qkv"))
            if past is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        else:
            q = heads(self._linear(x, self.q, slot="q"), size)
            if past is not None:
                k, v = past
            else:
                k, v = (heads(t, size) for t in self._each(source, self.k, self.v, slot="kv"))
        if position_bias is None:
            seen = 0 if past is None else past[0].shape[2] if query_length is None else query_length
            position_bias = self._bias(q, seen, source, mask, past)
        out = attend(q, k, v, position_bias.to(q.dtype), self.dropout if self.training else 0.0, 1.0)
        present = (k, v) if self.is_decoder and use_cache else None
        return self._linear(out, self.o, slot="o"), present, position_bias

    def _bias(self, q, seen: int, source, mask, past):
        length = q.shape[2]
        keys = seen + length if source is None else source.shape[1]
        if self.has_relative_attention_bias:
            bias = self.compute_bias(seen + length, keys)
        else:
            bias = q.new_zeros(1, q.shape[1], seen + length, keys)
        bias = bias if past is None else bias[:, :, -length:]
        return bias if mask is None else bias + mask


class CopiedT5LayerNorm(Fused):
    """Semantics: x / sqrt(mean(x^2) + eps) * weight, the statistics in fp32, in the original's dtype."""

    def forward(self, hidden_states):
        x = hidden_states
        reason = tensor_reason(self.weight, x.dtype, x.device)
        reason = None if reason is None else f"weight {reason}"
        if reason is None and not self._keeps_dtype(x):
            reason = f"the original does not give {x.dtype} for {x.dtype}"
        if reason is not None:
            note_fallback(self, reason)
        if reason is not None or self._declines({}, x):
            return super().forward(x)
        from fastpetl import ops

        eps, backend = self.variance_epsilon, self._op("residual_norm")
        return ops.residual_norm(x, None, self.weight, tail="rmsnorm", eps=eps, emit="norm", backend=backend)

    def _keeps_dtype(self, x) -> bool:
        """bfloat16 only: transformers of 2021 casts back to float16 alone, later ones to either."""
        return x.dtype != torch.bfloat16 or super().forward(x.new_ones(1, x.shape[-1])).dtype == x.dtype


class CopiedT5DenseReluDense(Fused):
    """Semantics: wo(drop(act(wi(x)))), act a ReLU unless it says another."""

    def forward(self, hidden_states):
        if self._declines(DENSE, hidden_states):
            return super().forward(hidden_states)
        act = getattr(self, "act", F.relu)
        name = None if self.dropout.training and self.dropout.p > 0 else inlined(act)
        if name is not None:
            return self._linear(hidden_states, self.wo, slot="wo", behind=self.wi, activation=name)
        h = self._linear(hidden_states, self.wi, slot="wi")
        h = activate(h, act, self.dropout.p, self.dropout.training, self._fastpetl_backend)
        return self._linear(h, self.wo, slot="wo")


class CopiedT5DenseGatedDense(Fused):
    """Semantics: wo(drop(act(wi_0(x)) * wi_1(x))), both input projections side by side."""

    def forward(self, hidden_states):
        if self._declines(GATED, hidden_states):
            return super().forward(hidden_states)
        act = self.gelu_act if hasattr(self, "gelu_act") else self.act
        gate, h = self._each(hidden_states, self.wi_0, self.wi_1, slot="wi")
        h = drop(act(gate) * h, self.dropout.p, self.dropout.training)
        return self._linear(h, self.wo, slot="wo")


class CopiedT5Block(Fused):
    """Semantics: the block's sublayers one after the other, told the task: (x, keys and values, then each attention's
    position bias and, if asked for, map). Infinities are cut in float16, where sums overflow, not in the other dtypes:
    the original looks for them after each sublayer, which waits for the device.
    """

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        encoder_decoder_position_bias=None,
        head_mask=None,
        past_key_value=None,
        use_cache=False,
        output_attentions=False,
        return_dict=True,
        block_adapters=None,
        task=None,
    ):
        x, source, past = hidden_states, encoder_hidden_states, past_key_value
        cross = self.is_decoder and source is not None
        reason = "float16: overflow is cut to a number" if x.dtype == torch.float16 else None
        if past is not None and (not self.is_decoder or len(past) != (2 if source is None else 4)):
            reason = "past_key_value is not the block's"  # the original says what it expected
        if reason is not None:
            note_fallback(self, reason)
            biases = (position_bias, source, encoder_attention_mask, encoder_decoder_position_bias)
            more = (head_mask, past, use_cache, output_attentions, return_dict, block_adapters, task)
            return super().forward(x, attention_mask, *biases, *more)
        told = {"head_mask": head_mask, "use_cache": use_cache, "output_attentions": output_attentions}
        told |= {"block_adapters": block_adapters, "task": task}
        given = {"attention_mask": attention_mask, "position_bias": position_bias}
        given["past_key_value"] = None if past is None else past[:2]
        x, present, *maps = self.layer[0](x, **given, **told)
        if cross:
            given = {"attention_mask": encoder_attention_mask, "position_bias": encoder_decoder_position_bias}
            given["past_key_value"] = None if past is None else past[2:]
            given["query_length"] = None if present is None else present[0].shape[2]
            x, keys, *more = self.layer[1](x, key_value_states=source, **given, **told)
            present, maps = None if present is None else present + keys, maps + more
        return (self.layer[-1](x, block_adapters, task), present, *maps)
