"""Stand-ins for research code that people copy: the children and the arithmetic of METER's and DAS-METER's BERT."""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN

from copied_vilt import Adapter_Layer


class SelfAttention(nn.Module):
    def __init__(self, width, heads, drop=0.0, source=None):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, width // heads, width
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(source or width, width), nn.Linear(source or width, width)
        self.dropout = nn.Dropout(drop)
        self.position_embedding_type, self.is_decoder = "absolute", False

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
        cross = encoder_hidden_states is not None
        source, mask = (encoder_hidden_states, encoder_attention_mask) if cross else (hidden_states, attention_mask)
        given = ((self.query, hidden_states), (self.key, source), (self.value, source))
        size = self.attention_head_size
        q, k, v = (linear(t).unflatten(-1, (-1, size)).transpose(1, 2) for linear, t in given)
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        p = self.dropout((scores if mask is None else scores + mask).softmax(-1))
        p = p if head_mask is None else p * head_mask
        out = (p @ v).transpose(1, 2).flatten(2)
        return (out, p) if output_attentions else (out,)


class Intermediate(nn.Module):
    """act: METER takes transformers', a function when it was written and a module since."""

    def __init__(self, width, inner, act=None):
        super().__init__()
        self.dense = nn.Linear(width, inner)
        self.intermediate_act_fn = ACT2FN["gelu"] if act is None else act

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states))


class Output(nn.Module):
    def __init__(self, inputs, width, drop=0.0, adapter=None):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(drop)
        if adapter is not None:
            self.adapter = adapter

    def forward(self, hidden_states, input_tensor):
        s = self.dropout(self.dense(hidden_states)) + input_tensor
        if "adapter" in self._modules:
            s = s + self.adapter(input_tensor, add_residual=False)
        return self.LayerNorm(s)


class Attention(nn.Module):
    def __init__(self, width, heads, drop, das):
        super().__init__()
        self.self = SelfAttention(width, heads, drop)
        self.output = Output(width, width, drop, Adapter_Layer(width, 6) if das else None)

    def forward(self, x, *args):
        return self.output(self.self(x, *args)[0], x)


class CrossLayer(nn.Module):
    def __init__(self, width=16, heads=2, drop=0.0, das=True, act=None):
        super().__init__()
        self.attention, self.crossattention = (Attention(width, heads, drop, das) for _ in range(2))
        self.intermediate = Intermediate(width, 2 * width, act)
        self.output = Output(2 * width, width, drop)
        if das:
            self.adapter = Adapter_Layer(width, 6)

    def forward(self, x, memory, mask=None, memory_mask=None):
        x = self.attention(x, mask)
        x = self.crossattention(x, mask, None, memory, memory_mask)
        y = self.output(self.intermediate(x), x)
        return y + self.adapter(x, add_residual=False) if "adapter" in self._modules else y


class Pair(nn.Module):
    """Text and image layers that read each other, as METER's."""

    def __init__(self, **kwargs):
        super().__init__()
        self.text, self.image = CrossLayer(**kwargs), CrossLayer(**kwargs)

    def forward(self, x, y, mask=None):
        return torch.cat([self.text(x, y, mask), self.image(y, x, None, mask)], 1)
