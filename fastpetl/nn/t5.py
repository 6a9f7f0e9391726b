"""Hugging Face's T5 modules fused: attention, RMS norm and feed-forward; blocks and the adapters in them call these."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.t5 import modeling_t5 as hf

from fastpetl._by_torch import norm_by_torch
from fastpetl.nn.inline import around_reason, note_fallback, read_dtype, structure, tensor_reason
from fastpetl.nn.lora import LoRALinear, beside_others
from fastpetl.nn.parts import Fused, activate, cached_keys, drop, heads, inlined, interface

LORA_PROJECTIONS = structure(k=nn.Linear, o=nn.Linear)  # LoRALinears are called, or merged
PROJECTIONS = structure(q=nn.Linear, k=nn.Linear, v=nn.Linear, o=nn.Linear)
DENSE = structure(wi=nn.Linear, wo=nn.Linear, dropout=nn.Dropout)
GATED = structure(wi_0=nn.Linear, wi_1=nn.Linear, wo=nn.Linear, dropout=nn.Dropout)


class FusedT5Attention(Fused, hf.T5Attention):
    """T5Attention, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""

    _any_linear = True

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None, **kwargs
    ):
        x, source, past, size = hidden_states, key_value_states, past_key_values, self.key_value_proj_dim
        lora = isinstance(self.q, LoRALinear)
        if self._declines(LORA_PROJECTIONS if lora else PROJECTIONS, x):
            return super().forward(x, mask, source, position_bias, past, **kwargs)
        lora = lora and not beside_others((self.q, self.v), x)
        seen = past.get_seq_length(self.layer_idx) if past is not None else 0
        seen = seen.clone() if isinstance(seen, torch.Tensor) else seen  # a static cache counts in place
        if lora:
            q, kv = self.q(x), None
        elif source is None:
            q, *kv = self._each(x, self.q, self.k, self.v, slot="qkv", beside=True)
        else:
            q, kv = self._linear(x, self.q, slot="q"), None
        dropout = self.dropout if self.training else 0.0
        if source is not None and past is None and (mask is not None or not self.is_causal):
            if position_bias is None:
                position_bias = self._bias(q, source.shape[1], seen)
            bias = position_bias
            if mask is not None:  # as transformers joins them for SDPA
                joined = mask.dtype == torch.bool
                bias = torch.where(mask, bias, torch.finfo(q.dtype).min) if joined else bias + mask
            options = {"heads": self.n_heads, "scaling": self.scaling, "dropout": dropout, **kwargs}
            out = self._few_queries(q, source, self.k, self.v, bias, **options)
            if out is not None:
                return self._linear(out, self.o, slot="o"), position_bias, None

        def keys():
            if lora:
                y = x if source is None else source
                both = self._linear(y, self.k, slot="k"), self.v(y)
            else:
                both = kv or self._each(source, self.k, self.v, slot="kv", beside=True)
            return [heads(t, size) for t in both]

        k, v = cached_keys(self, past, source, keys)
        if position_bias is None:
            position_bias = self._bias(q, k.shape[-2], seen)
        attend = interface(self, hf.eager_attention_forward)
        out, weights = attend(
            self,
            heads(q, size),
            k,
            v,
            mask,
            dropout=dropout,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        return self._linear(out.flatten(2), self.o, slot="o"), position_bias, weights

    def _bias(self, q, keys: int, seen):
        if self.has_relative_attention_bias:
            return self.compute_bias(q.shape[1], keys, device=q.device, past_seen_tokens=seen)
        zeros = q.new_zeros(1, self.n_heads, q.shape[1], keys)
        return zeros.requires_grad_(self.gradient_checkpointing and self.training)


class FusedT5LayerNorm(Fused, hf.T5LayerNorm):
    """T5LayerNorm in one pass, the statistics in fp32. Made by `fastpetl.patch`, never constructed."""

    def forward(self, hidden_states):
        x, weight = hidden_states, self._parameters.get("weight")
        if read_dtype(x) is None and weight is not None and weight.dtype is torch.float32:
            x = x.float()  # under autocast, which leaves this norm alone: the product with its weight is of float32
        plain = type(weight) is nn.Parameter and weight.dtype is x.dtype
        if plain and norm_by_torch(self._fastpetl_backend, x) and around_reason(x) is None:
            return torch.rms_norm(x, x.shape[-1:], weight, self.variance_epsilon)
        if self._declines({}, x):
            return super().forward(hidden_states)
        reason = tensor_reason(self.weight, x.dtype, x.device)
        if reason is not None:
            note_fallback(self, f"weight {reason}")
            return super().forward(hidden_states)
        from fastpetl import ops

        eps, backend = self.variance_epsilon, self._op("residual_norm")
        return ops.residual_norm(x, None, self.weight, tail="rmsnorm", eps=eps, emit="norm", backend=backend)


class FusedT5DenseActDense(Fused, hf.T5DenseActDense):
    """T5DenseActDense, same numbers. Made by `fastpetl.patch`, never constructed."""

    def forward(self, hidden_states):
        if self._declines(DENSE, hidden_states):
            return super().forward(hidden_states)
        name = None if self.dropout.training and self.dropout.p > 0 else inlined(self.act)
        if name is not None:
            return self._linear(hidden_states, self.wo, slot="wo", behind=self.wi, activation=name)
        h = self._linear(hidden_states, self.wi, slot="wi")
        h = activate(h, self.act, self.dropout.p, self.dropout.training, self._fastpetl_backend)
        return self._linear(h, self.wo, slot="wo")


class FusedT5DenseGatedActDense(Fused, hf.T5DenseGatedActDense):
    """T5DenseGatedActDense, both input projections side by side. Made by `fastpetl.patch`, never constructed."""

    def forward(self, hidden_states):
        if self._declines(GATED, hidden_states):
            return super().forward(hidden_states)
        gate, h = self._each(hidden_states, self.wi_0, self.wi_1, slot="wi")
        h = drop(self.act(gate) * h, self.dropout.p, self.dropout.training)
        return self._linear(h, self.wo, slot="wo")


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
for _cls in (FusedT5Attention, FusedT5LayerNorm, FusedT5DenseActDense, FusedT5DenseGatedActDense):
    _cls.__name__ = _cls.__name__.removeprefix("Fused")
