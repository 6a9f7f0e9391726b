"""VL-Adapter on Hugging Face's T5 blocks in plain torch: what an attached, unpatched model runs.

Source: ylsung/VL_adapter, VL-T5/src/my_transformers/modeling_t5.py; names of the new children are theirs.
"""

from __future__ import annotations

import torch
from transformers.models.t5 import modeling_t5 as hf

from fastpetl.nn.prompt import prompted, seen_in_front
from fastpetl.nn.tasks import TaskRouted


def _adapt(layer, name: str, f, task):
    adapter = layer._modules.get(name)
    return f if adapter is None else adapter(f, task)


class AdapterT5LayerSelfAttention(hf.T5LayerSelfAttention):
    """T5LayerSelfAttention with one more child, `attn_adapter`: x + drop(A(Attn(norm(x))))."""

    def forward(self, hidden_states, task=None, attention_mask=None, **kwargs):
        f, bias, weights = self.SelfAttention(self.layer_norm(hidden_states), mask=attention_mask, **kwargs)
        return hidden_states + self.dropout(_adapt(self, "attn_adapter", f, task)), bias, weights


class AdapterT5LayerCrossAttention(hf.T5LayerCrossAttention):
    """T5LayerCrossAttention with one more child, `enc_attn_adapter`: x + drop(A(Attn(norm(x), states)))."""

    def forward(self, hidden_states, key_value_states, task=None, attention_mask=None, **kwargs):
        f, bias, weights = self.EncDecAttention(
            self.layer_norm(hidden_states), mask=attention_mask, key_value_states=key_value_states, **kwargs
        )
        return hidden_states + self.dropout(_adapt(self, "enc_attn_adapter", f, task)), bias, weights


class AdapterT5LayerFF(hf.T5LayerFF):
    """T5LayerFF with one more child, `ff_adapter`: x + drop(A(FF(norm(x))))."""

    def forward(self, hidden_states, task=None):
        f = self.DenseReluDense(self.layer_norm(hidden_states))
        return hidden_states + self.dropout(_adapt(self, "ff_adapter", f, task))


class AdapterT5Block(TaskRouted, hf.T5Block):
    """T5Block whose layers are the adapter kind: they are told the task."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        encoder_decoder_position_bias=None,
        past_key_values=None,
        task=None,
        **kwargs,
    ):
        x, position_bias, _ = self.layer[0](
            hidden_states,
            task,
            attention_mask=attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
        x, cross_bias = _finite(x), None
        if self.is_decoder and encoder_hidden_states is not None:
            x, cross_bias, _ = self.layer[1](
                x,
                encoder_hidden_states,
                task,
                attention_mask=encoder_attention_mask,
                position_bias=encoder_decoder_position_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
            x = _finite(x)
        return _finite(self.layer[-1](x, task)), position_bias, cross_bias


def _finite(x):
    """float16 only: overflow is cut to the largest number, as T5Block does."""
    if x.dtype != torch.float16:
        return x
    top = torch.finfo(x.dtype).max
    limit = torch.where(torch.isinf(x).any(), top - 1000, top)
    return torch.clamp(x, min=-limit, max=limit)


class PromptT5Encoder:
    """Mixin of a T5Stack (`with_prompts`). Semantics: T5Stack, an encoder, over [prompts; text]; the prompts have
    positions like words.

    Has one more child, `prompt_modules`; attention_mask [B, T] is about the text.
    """

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        inputs_embeds=None,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("T5Stack: expected exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x, _ = prompted(self, x, kwargs.get("task"))
        mask = seen_in_front(attention_mask, x.shape[1])
        return super().forward(attention_mask=mask, inputs_embeds=x, **kwargs)


# Same names as the originals: accelerate and others match modules by class name. Pickle finds them by __qualname__.
AdapterT5LayerSelfAttention.__name__ = "T5LayerSelfAttention"
AdapterT5LayerCrossAttention.__name__ = "T5LayerCrossAttention"
AdapterT5LayerFF.__name__ = "T5LayerFF"
AdapterT5Block.__name__ = "T5Block"
