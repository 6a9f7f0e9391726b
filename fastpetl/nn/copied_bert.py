"""BERT's modules as transformers had them when METER and DAS copied them, fused: what `fastpetl.patch` puts before a
copied `BertSelfAttention`, `BertSelfOutput` (DAS's with its adapter), `BertIntermediate` (CLIP-ViL's and LXMERT's is
the same) or `BertOutput`.

Sources: zdou0830/METER (CVPR 2022), DoubtedSteam/DAS (NeurIPS 2023). Mixins: the class they join is found by its
children and proven by numbers (patching/_probe.py).
"""

from __future__ import annotations

from torch import nn

from fastpetl.nn import copied_vilt
from fastpetl.nn.adapter import fused_adapter
from fastpetl.nn.bert import OUTPUT, PROJECTIONS, Intermediate
from fastpetl.nn.inline import Inlined, note_fallback, structure
from fastpetl.nn.parts import Fused, attend, drop, heads, key_mask


def attention_reason(attention: nn.Module) -> str | None:
    """Semantics: why the attention, as its attributes stand now, is not softmax(q k^T / sqrt(d) + mask) v, or None."""
    kind = attention.__dict__.get("position_embedding_type", "absolute")
    if kind != "absolute":
        return f"position_embedding_type is {kind!r}, expected 'absolute'"
    return "it is a decoder's, which returns its keys and values" if attention.__dict__.get("is_decoder") else None


class CopiedBertSelfAttention(Fused):
    """Semantics: (softmax(q k^T / sqrt(d) + mask) v,) of the own or another stream; masks [B, 1, 1 or Q, K], added."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
    ):
        x, source = hidden_states, encoder_hidden_states
        asked = {
            "head_mask": head_mask,
            "past_key_value": past_key_value,
            "output_attentions": output_attentions or None,
        }
        reason = next((f"{name} is given" for name, value in asked.items() if value is not None), None)
        reason = reason or attention_reason(self)
        if reason is not None:
            note_fallback(self, reason)
        if reason is not None or self._declines(PROJECTIONS, x):
            masks = (attention_mask, head_mask, source, encoder_attention_mask)
            return super().forward(x, *masks, past_key_value, output_attentions)
        size, p = self.attention_head_size, self.dropout.p if self.dropout.training else 0.0
        if source is None:
            qkv = self._linear(x, self.query, self.key, self.value, slot="qkv")
            plain, additive = key_mask(attention_mask, *x.shape[:2])
            if plain and p == 0:
                from fastpetl import ops

                options = {"key_mask": additive, "scale": size**-0.5, "backend": self._op("attention")}
                return (ops.attention(qkv, self.num_attention_heads, **options),)
            q, k, v = (heads(t, size) for t in qkv.chunk(3, -1))
            return (attend(q, k, v, attention_mask, p),)
        q = heads(self._linear(x, self.query, slot="q"), size)
        k, v = (heads(t, size) for t in self._each(source, self.key, self.value, slot="kv"))
        return (attend(q, k, v, encoder_attention_mask, p),)


class CopiedBertIntermediate(Intermediate):
    """Semantics: act(dense(x))."""


def output_structure(output: nn.Module) -> dict[str, Inlined]:
    """What a fused output reads past its children's forward."""
    adapter = output._modules.get("adapter")
    if adapter is None:
        return OUTPUT
    return OUTPUT | structure(adapter=Inlined(type(adapter), copied_vilt.adapter_structure(adapter)))


class CopiedBertOutput(Fused):
    """Semantics: LN(drop(dense(h)) + x), or with DAS's adapter LN(drop(dense(h)) + x + A(x))."""

    def forward(self, hidden_states, input_tensor):
        adapter = self._modules.get("adapter")
        reason = None if adapter is None else copied_vilt.adapter_reason(adapter)
        if reason is not None:
            note_fallback(self, f"adapter: {reason}")
        if reason is not None or self._declines(output_structure(self), hidden_states):
            return super().forward(hidden_states, input_tensor)
        f = self._linear(hidden_states, self.dense, slot="dense")
        f, norm = drop(f, self.dropout.p, self.dropout.training), self.LayerNorm
        if adapter is None:
            return self._add_norm(input_tensor, f, norm)
        from fastpetl import ops

        s = fused_adapter(adapter, input_tensor, (input_tensor, f), self._op("adapter"), "relu")
        backend = self._op("residual_norm")
        return ops.residual_norm(s, None, norm.weight, norm.bias, eps=norm.eps, emit="norm", backend=backend)
