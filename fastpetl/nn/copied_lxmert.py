"""CLIP-ViL's and LXMERT's own BERT modules, fused: what `fastpetl.patch` puts before the copied classes.

Source: ylsung/VL_adapter, CLIP-ViL/src/lxrt (after airsplay/lxmert): post-LN BERT with an AdapterController before the
dropout. Mixins: the class they join is found by its children and proven by numbers (patching/_probe.py).
"""

from __future__ import annotations

from fastpetl.nn.bert import OUTPUT, PROJECTIONS
from fastpetl.nn.parts import Fused, attend, drop, heads, key_mask


class CopiedLxmertAttention(Fused):
    """Semantics: softmax(q k^T / sqrt(d) + mask) v, q of one stream, k and v of `context`; masks are added."""

    def forward(self, hidden_states, context, attention_mask=None):
        x, size = hidden_states, self.attention_head_size
        if self._declines(PROJECTIONS, x):
            return super().forward(x, context, attention_mask)
        p = self.dropout.p if self.dropout.training else 0.0
        if context is not x:
            q = heads(self._linear(x, self.query, slot="q"), size)
            k, v = (heads(t, size) for t in self._each(context, self.key, self.value, slot="kv"))
            return attend(q, k, v, attention_mask, p)
        qkv = self._linear(x, self.query, self.key, self.value, slot="qkv")
        plain, additive = key_mask(attention_mask, *x.shape[:2])
        if plain and p == 0:
            from fastpetl import ops

            options = {"key_mask": additive, "scale": size**-0.5, "backend": self._op("attention")}
            return ops.attention(qkv, self.num_attention_heads, **options)
        return attend(*(heads(t, size) for t in qkv.chunk(3, -1)), attention_mask, p)


class CopiedLxmertOutput(Fused):
    """Semantics: LN(drop(A(dense(h))) + x), A the AdapterController of the task, where it has one."""

    def forward(self, hidden_states, input_tensor, task):
        if self._declines(OUTPUT, hidden_states):
            return super().forward(hidden_states, input_tensor, task)
        adapter, f = self._modules.get("adapter"), self._linear(hidden_states, self.dense, slot="dense")
        own = adapter is None or not adapter._forward_hooks  # an output somebody may have kept
        f = f if adapter is None else adapter(f, task)
        return self._add_norm(input_tensor, drop(f, self.dropout.p, self.dropout.training), self.LayerNorm, own)
