"""LXMERT's modules in transformers, fused: attention to the own or another stream, and what follows a sublayer."""

from __future__ import annotations

import math

from transformers.models.lxmert import modeling_lxmert as hf

from fastpetl.nn.bert import PROJECTIONS, Intermediate, Output
from fastpetl.nn.inline import note_fallback
from fastpetl.nn.parts import Fused, attend, heads, key_mask


class FusedLxmertAttention(Fused, hf.LxmertAttention):
    """LxmertAttention, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""

    def forward(self, hidden_states, context, attention_mask=None, output_attentions=False):
        x, size = hidden_states, self.attention_head_size
        declines = self._declines(PROJECTIONS, x)
        if output_attentions:
            note_fallback(self, "output_attentions=True: the original forward makes the maps")
        if declines or output_attentions:
            return super().forward(x, context, attention_mask, output_attentions)
        dropped = self.dropout.training and self.dropout.p > 0
        if context is x:
            qkv = self._linear(x, self.query, self.key, self.value, slot="qkv")
            plain, additive = key_mask(attention_mask, *x.shape[:2])
            if plain and not dropped:
                from fastpetl import ops

                scale, backend = 1.0 / math.sqrt(size), self._op("attention")
                return (ops.attention(qkv, self.num_attention_heads, key_mask=additive, scale=scale, backend=backend),)
            q, k, v = (heads(t, size) for t in qkv.chunk(3, -1))
        else:
            q = heads(self._linear(x, self.query, slot="q"), size)
            k, v = (heads(t, size) for t in self._each(context, self.key, self.value, slot="kv"))
        return (attend(q, k, v, attention_mask, self.dropout.p if dropped else 0.0),)


class FusedLxmertAttentionOutput(Output, hf.LxmertAttentionOutput):
    """LxmertAttentionOutput, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


class FusedLxmertIntermediate(Intermediate, hf.LxmertIntermediate):
    """LxmertIntermediate, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


class FusedLxmertOutput(Output, hf.LxmertOutput):
    """LxmertOutput, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
for _cls in (FusedLxmertAttention, FusedLxmertAttentionOutput, FusedLxmertIntermediate, FusedLxmertOutput):
    _cls.__name__ = _cls.__name__.removeprefix("Fused")
