"""CLIP's modules in transformers, vision and text, fused: attention, MLP, and the layer's sum with its norm."""

from __future__ import annotations

from torch import nn
from transformers.models.clip import modeling_clip as hf

from fastpetl._by_torch import norm_by_torch
from fastpetl.nn.adapted import LORA_LINEAR, OUTPUT_LINEAR
from fastpetl.nn.inline import structure
from fastpetl.nn.parts import Fused, attended, exact_gelu, heads, torch_norm, torch_sum
from fastpetl.nn.task_layers import fused_routed

PROJECTIONS = structure(q_proj=LORA_LINEAR, k_proj=nn.Linear, v_proj=LORA_LINEAR, out_proj=OUTPUT_LINEAR)
MLP = structure(fc1=nn.Linear, fc2=OUTPUT_LINEAR)
NORMS = structure(layer_norm1=nn.LayerNorm, layer_norm2=nn.LayerNorm)


class FusedCLIPAttention(Fused, hf.CLIPAttention):
    """CLIPAttention, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""

    _any_linear = True

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        x = hidden_states
        if self._declines(PROJECTIONS, x):
            return super().forward(x, attention_mask, **kwargs)
        dropout = self.dropout if self.training else 0.0
        # The text model says is_causal in the call; where it gives a mask as well, SDPA takes the mask alone.
        causal = kwargs.get("is_causal", self.is_causal) and attention_mask is None
        linears, fused, weights = (self.q_proj, self.k_proj, self.v_proj), not causal and dropout == 0, None
        out, qkv = self._own(x, linears, "qkv", self.num_heads, attention_mask, self.scale, fused)
        if out is None:
            q, k, v = (heads(t, self.head_dim) for t in qkv)
            options = {"dropout": dropout, "scaling": self.scale, **kwargs}
            out, weights = attended(self, hf.eager_attention_forward, q, k, v, attention_mask, **options)
            out = out.flatten(2)
        return self._linear(out, self.out_proj, slot="out"), weights


class FusedCLIPMLP(Fused, hf.CLIPMLP):
    """CLIPMLP, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""

    _any_linear = True

    def forward(self, hidden_states):
        if self._declines(MLP, hidden_states):
            return super().forward(hidden_states)
        if exact_gelu(self.activation_fn):
            return self._linear(hidden_states, self.fc2, slot="fc2", behind=self.fc1)
        h = self._linear(hidden_states, self.fc1, slot="fc1")
        return self._linear(self.activation_fn(h), self.fc2, slot="fc2")


class _FusedLayer(Fused):
    """Mixin of a fused CLIPEncoderLayer, before the original."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        x = hidden_states
        if self._declines(NORMS, x):
            return super().forward(x, attention_mask, **kwargs)
        f, _ = self.self_attn(hidden_states=self.layer_norm1(x), attention_mask=attention_mask, **kwargs)
        norm, own = self.layer_norm2, not self.self_attn._forward_hooks
        if norm_by_torch(self._fastpetl_backend, x):
            s = torch_sum(x, f, own)
            return s + self.mlp(torch_norm(s, norm))
        from fastpetl import ops

        options = {"emit": "both", "backend": self._op("residual_norm"), "overwrite": own}
        s, n = ops.residual_norm(x, f, norm.weight, norm.bias, eps=norm.eps, **options)
        return s + self.mlp(n)


class FusedCLIPEncoderLayer(_FusedLayer, hf.CLIPEncoderLayer):
    """CLIPEncoderLayer, same numbers, fewer kernels. Made by `fastpetl.patch`, never constructed."""


FusedTaskCLIPEncoderLayer = fused_routed(__name__, _FusedLayer, hf.CLIPEncoderLayer)


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
FusedCLIPAttention.__name__ = "CLIPAttention"
FusedCLIPMLP.__name__ = "CLIPMLP"
FusedCLIPEncoderLayer.__name__ = "CLIPEncoderLayer"
