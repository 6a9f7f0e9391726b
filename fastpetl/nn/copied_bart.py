"""VL-Adapter's own BART layers and AdapterController, fused: what `fastpetl.patch` puts before the copied classes.

Source: ylsung/VL_adapter (CVPR 2022), a BART as transformers had it in 2021. Mixins: the class they join is found by
its children and proven by numbers (patching/_probe.py). Its AdapterController is VL-T5's too.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastpetl.nn.activations import activation_name
from fastpetl.nn.adapter import ACTIVATIONS
from fastpetl.nn.bart import PROJECTIONS, _FusedDecoder, _FusedEncoder, _FusedLayer
from fastpetl.nn.inline import Inlined, note_fallback, structure
from fastpetl.nn.parts import Fused, attend, heads, key_mask

ADAPTER = {"activation", "down_sampler", "up_sampler"}


def controller_structure(controller: nn.Module, task: str | None = None) -> dict[str, Inlined]:
    """What a fused controller reads past its children's forward: of `task` only, or of all tasks."""
    named = controller.adapters._modules
    parts = {"down_sampler": Inlined(nn.Linear), "up_sampler": Inlined(nn.Linear)}
    adapters = {}
    for name in named if task is None else (task,):
        act = named[name]._modules.get("activation")
        inner = {key: Inlined(type(child)) for key, child in ({} if act is None else act._modules).items()}
        adapters[name] = Inlined(type(named[name]), parts | {"activation": Inlined(type(act), inner)})
    there = Inlined(type(controller.adapters), adapters, called=named)
    norms = {name: nn.LayerNorm for name in ("pre_layer_norm", "post_layer_norm") if name in controller._modules}
    return structure(adapters=there, **norms)


def adapter_reason(adapter: nn.Module) -> str | None:
    """Semantics: why the adapter, as it stands now, is not two linears around one of ACTIVATIONS, or None."""
    if adapter._modules.keys() != ADAPTER:
        return f"its children are {', '.join(adapter._modules)}, expected {', '.join(sorted(ADAPTER))}"
    if adapter.__dict__.get("track_z"):
        return "track_z is set: it keeps what is between its linears"
    if activation_name(adapter.activation) is None:
        return f"its activation is none of {', '.join(ACTIVATIONS)}"
    return None


class CopiedAdapterController(Fused):
    """Semantics: y = x + post(g * U_task(pre(x))), U a bottleneck adapter; pre and post LayerNorms and a gate g where
    it has them.
    """

    def forward(self, inputs, task):
        adapter = self.adapters._modules.get(task)
        reason = f"task is {task!r}" if adapter is None else adapter_reason(adapter)
        for name in ("before", "after"):
            norm = f"{'pre' if name == 'before' else 'post'}_layer_norm"
            if bool(self.__dict__.get(f"add_layer_norm_{name}_adapter")) != (norm in self._modules):
                reason = f"add_layer_norm_{name}_adapter was changed"
        if reason is not None:
            note_fallback(self, reason)
        if reason is not None or self._declines(controller_structure(self, task), inputs):
            return super().forward(inputs, task)
        from fastpetl import ops

        pre, post = self._modules.get("pre_layer_norm"), self._modules.get("post_layer_norm")
        down, up, gate = adapter.down_sampler, adapter.up_sampler, adapter._parameters.get("gate")  # CLIP-ViL's gate
        h = ops.adapter(
            inputs,
            *(down.weight, down.bias, up.weight, up.bias),
            norm_weight=None if pre is None else pre.weight,
            norm_bias=None if pre is None else pre.bias,
            eps=1e-5 if pre is None else pre.eps,
            activation=activation_name(adapter.activation),
            residuals=(inputs,) if post is None and gate is None else (),
            backend=self._op("adapter"),
        )
        h = h if gate is None else gate * h
        if post is None:
            return h if gate is None else h + inputs
        return F.layer_norm(h, post.normalized_shape, post.weight, post.bias, post.eps) + inputs


class CopiedBartAttention(Fused):
    """Semantics: (attention's output, None, the keys and values if it is a decoder's); masks [B, 1, T, S], added."""

    def forward(self, hidden_states, key_value_states=None, past_key_value=None, attention_mask=None, *more, **named):
        x, source, past = hidden_states, key_value_states, past_key_value
        asked = [*(f"argument {5 + i}" for i, v in enumerate(more) if v), *(n for n, v in named.items() if v)]
        if asked:
            note_fallback(self, f"{asked[0]} is given")
        if asked or self._declines(PROJECTIONS, x):
            return super().forward(x, source, past, attention_mask, *more, **named)
        size, p = self.head_dim, self.dropout if self.training else 0.0
        if source is None:
            qkv = self._linear(x, self.q_proj, self.k_proj, self.v_proj, slot="qkv")
            if not self.is_decoder and past is None and p == 0:
                plain, additive = key_mask(attention_mask, *x.shape[:2])
                if plain:
                    from fastpetl import ops

                    options = {"key_mask": additive, "scale": self.scaling, "backend": self._op("attention")}
                    out = ops.attention(qkv, self.num_heads, **options)
                    return self._linear(out, self.out_proj, slot="out"), None, None
            q, k, v = (heads(t, size) for t in qkv.chunk(3, -1))
            if past is not None:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        else:
            q = heads(self._linear(x, self.q_proj, slot="q"), size)
            if past is not None:
                k, v = past
            else:
                k, v = (heads(t, size) for t in self._each(source, self.k_proj, self.v_proj, slot="kv"))
        out = self._linear(attend(q, k, v, attention_mask, p), self.out_proj, slot="out")
        return out, None, (k, v) if self.is_decoder else past


class _CopiedLayer(_FusedLayer):
    def _attention(self, name, x, task, **given):
        lora = {"task": task} if self.__dict__.get("use_lora") else {}
        return self._modules[name](hidden_states=x, **given, **lora)

    def _composes(self, x, output_attentions) -> bool:
        reason = "output_attentions is given" if output_attentions else None
        if "adapter_hypernet" in self._modules:
            reason = "its adapters' weights are generated"
        if reason is not None:
            note_fallback(self, reason)
        return reason is not None or self._declines(self.structure, x)


class CopiedBartEncoderLayer(_CopiedLayer):
    """Semantics: (x,), x through attention, adapter, norm, feed-forward, adapter, norm."""

    structure = _FusedEncoder.structure

    def forward(
        self,
        hidden_states,
        attention_mask,
        past_key_value=None,
        block_adapters=None,
        task=None,
        output_attentions=False,
    ):
        x = hidden_states
        if self._composes(x, output_attentions):
            return super().forward(x, attention_mask, past_key_value, block_adapters, task, output_attentions)
        given = {"attention_mask": attention_mask, "past_key_value": past_key_value}
        x = self._site(
            x, self._attention("self_attn", x, task, **given)[0], "attn_adapter", task, self.self_attn_layer_norm
        )
        x = self._site(x, self._feed_forward(x), "ff_adapter", task, self.final_layer_norm)
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return (x,)


class CopiedBartDecoderLayer(_CopiedLayer):
    """Semantics: (x,) and, with use_cache, the keys and values of both attentions."""

    structure = _FusedDecoder.structure

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        block_adapters=None,
        task=None,
        output_attentions=False,
        use_cache=True,
    ):
        x, source, past = hidden_states, encoder_hidden_states, past_key_value
        if self._composes(x, output_attentions):
            masks = (attention_mask, source, encoder_attention_mask)
            return super().forward(x, *masks, past, block_adapters, task, output_attentions, use_cache)
        given = {"attention_mask": attention_mask, "past_key_value": None if past is None else past[:2]}
        f, _, present = self._attention("self_attn", x, task, **given)
        x = self._site(x, f, "self_attn_adapter", task, self.self_attn_layer_norm)
        if source is not None:
            given = {"attention_mask": encoder_attention_mask, "key_value_states": source}
            given["past_key_value"] = past[-2:] if past is not None and len(past) == 4 else None
            f, _, cross = self._attention("encoder_attn", x, task, **given)
            x = self._site(x, f, "enc_attn_adapter", task, self.encoder_attn_layer_norm)
            present = present + cross
        x = self._site(x, self._feed_forward(x), "ff_adapter", task, self.final_layer_norm)
        return (x, present) if use_cache else (x,)
