"""Hugging Face's BART layers, with and without VL-Adapter's adapters, fused: what `fastpetl.patch` swaps in.

Attention is one module (q|k|v and k|v side by side), a layer another (feed-forward, and each site dropout + residual +
layer norm in one pass); adapters are modules of their own.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.bart import modeling_bart as hf

from fastpetl.nn.adapter_controller import controller_site
from fastpetl.nn.bart_adapters import AdapterBartDecoderLayer, AdapterBartEncoderLayer
from fastpetl.nn.inline import structure
from fastpetl.nn.lora import LoRALinear, beside_others
from fastpetl.nn.parts import Fused, activate, attended, cached_keys, drop, exact_gelu, heads
from fastpetl.nn.task_layers import routed

_FEED_FORWARD = structure(fc1=nn.Linear, fc2=nn.Linear)
LORA_PROJECTIONS = structure(k_proj=nn.Linear, out_proj=nn.Linear)  # LoRALinears are called, or merged
PROJECTIONS = structure(q_proj=nn.Linear, k_proj=nn.Linear, v_proj=nn.Linear, out_proj=nn.Linear)


class FusedBartAttention(Fused, hf.BartAttention):
    """BartAttention, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""

    _any_linear = True

    def forward(
        self, hidden_states, key_value_states=None, past_key_values=None, attention_mask=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, source, size = hidden_states, key_value_states, self.head_dim
        lora = isinstance(self.q_proj, LoRALinear)
        if self._declines(LORA_PROJECTIONS if lora else PROJECTIONS, x):
            return super().forward(x, source, past_key_values, attention_mask, **kwargs)
        lora = lora and not beside_others((self.q_proj, self.v_proj), x)
        if lora:
            q, kv = self.q_proj(x), None
        elif source is None:
            fused = past_key_values is None and not self.is_causal and not (self.training and self.dropout > 0)
            linears = self.q_proj, self.k_proj, self.v_proj
            out, qkv = self._own(x, linears, "qkv", self.num_heads, attention_mask, self.scaling, fused, True)
            if out is not None:
                return self._linear(out, self.out_proj, slot="out"), None
            q, *kv = qkv
        else:
            q, kv = self._linear(x, self.q_proj, slot="q"), None
        dropout = self.dropout if self.training else 0.0
        if source is not None and past_key_values is None:
            options = {"heads": self.num_heads, "scaling": self.scaling, "dropout": dropout, **kwargs}
            out = self._few_queries(q, source, self.k_proj, self.v_proj, attention_mask, **options)
            if out is not None:
                return self._linear(out, self.out_proj, slot="out"), None

        def keys():
            if lora:
                y = x if source is None else source
                both = self._linear(y, self.k_proj, slot="k"), self.v_proj(y)
            else:
                both = kv or self._each(source, self.k_proj, self.v_proj, slot="kv", beside=True)
            return [heads(t, size) for t in both]

        k, v = cached_keys(self, past_key_values, source, keys)
        default, options = hf.eager_attention_forward, {"dropout": dropout, "scaling": self.scaling, **kwargs}
        out, weights = attended(self, default, heads(q, size), k, v, attention_mask, **options)
        return self._linear(out.flatten(2), self.out_proj, slot="out"), weights


class _FusedLayer(Fused):
    structure: dict

    def _site(self, x, f, adapter: str, task, norm, keep: str = "sum"):
        """Semantics: norm(x + drop(A(f))), without A where the layer has no such adapter. keep: see
        `ops.adapter_residual_norm`; the first of two sites keeps its norm's output, from which the second has its sum.
        """
        adapter = self._modules.get(adapter)
        if adapter is not None and not (self.training and self.dropout > 0):
            y = controller_site(adapter, x, f, task, norm, self._op("adapter"), keep)
            if y is not None:
                return y
        own = adapter is not None and not adapter._forward_hooks  # an attention's output somebody may have kept
        f = f if adapter is None else adapter(f, task)
        return self._add_norm(x, drop(f, self.dropout, self.training), norm, own)

    def _hear(self, task) -> None:
        route = getattr(self, "_route", None)  # a layer with LoRA tells its linears
        if route is not None:
            route(task)

    def _feed_forward(self, x):
        dropped = self.training and self.activation_dropout > 0
        if exact_gelu(self.activation_fn) and not dropped:
            return self._linear(x, self.fc2, slot="fc2", behind=self.fc1)
        h = self._linear(x, self.fc1, slot="fc1")
        h = activate(h, self.activation_fn, self.activation_dropout, self.training, self._fastpetl_backend)
        return self._linear(h, self.fc2, slot="fc2")


class _FusedEncoder(_FusedLayer):
    _any_linear = True
    structure = structure(self_attn_layer_norm=nn.LayerNorm, final_layer_norm=nn.LayerNorm, **_FEED_FORWARD)

    def forward(self, hidden_states, attention_mask=None, task=None, **kwargs):
        x = hidden_states
        told = {} if task is None else {"task": task}
        self._hear(task)
        if self._declines(self.structure, x):
            return super().forward(x, attention_mask, **told, **kwargs)
        f, _ = self.self_attn(x, attention_mask=attention_mask, **kwargs)
        x = self._site(x, f, "attn_adapter", task, self.self_attn_layer_norm, "norm")
        x = self._site(x, self._feed_forward(x), "ff_adapter", task, self.final_layer_norm, "inputs")
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


class _FusedDecoder(_FusedLayer):
    _any_linear = True
    structure = _FusedEncoder.structure | structure(encoder_attn_layer_norm=nn.LayerNorm)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=True,
        task=None,
        **kwargs,
    ):
        x, source, past = hidden_states, encoder_hidden_states, past_key_values
        told = {} if task is None else {"task": task}
        self._hear(task)
        if self._declines(self.structure, x):
            return super().forward(x, attention_mask, source, encoder_attention_mask, past, use_cache, **told, **kwargs)
        f, _ = self.self_attn(x, past_key_values=past, attention_mask=attention_mask, **kwargs)
        x = self._site(x, f, "self_attn_adapter", task, self.self_attn_layer_norm, "norm")
        if source is not None:
            f, _ = self.encoder_attn(
                x, key_value_states=source, attention_mask=encoder_attention_mask, past_key_values=past, **kwargs
            )
            x = self._site(x, f, "enc_attn_adapter", task, self.encoder_attn_layer_norm, "inputs")
        return self._site(x, self._feed_forward(x), "ff_adapter", task, self.final_layer_norm)


class FusedBartEncoderLayer(_FusedEncoder, hf.BartEncoderLayer):
    """BartEncoderLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


class FusedBartDecoderLayer(_FusedDecoder, hf.BartDecoderLayer):
    """BartDecoderLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


class FusedAdapterBartEncoderLayer(_FusedEncoder, AdapterBartEncoderLayer):
    """AdapterBartEncoderLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


class FusedAdapterBartDecoderLayer(_FusedDecoder, AdapterBartDecoderLayer):
    """AdapterBartDecoderLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


class FusedTaskBartEncoderLayer(_FusedEncoder, routed(hf.BartEncoderLayer)):
    """TaskBartEncoderLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


class FusedTaskBartDecoderLayer(_FusedDecoder, routed(hf.BartDecoderLayer)):
    """TaskBartDecoderLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
FusedBartAttention.__name__ = "BartAttention"
for _cls in (FusedBartEncoderLayer, FusedAdapterBartEncoderLayer, FusedTaskBartEncoderLayer):
    _cls.__name__ = "BartEncoderLayer"
for _cls in (FusedBartDecoderLayer, FusedAdapterBartDecoderLayer, FusedTaskBartDecoderLayer):
    _cls.__name__ = "BartDecoderLayer"
