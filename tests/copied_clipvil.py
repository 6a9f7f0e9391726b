"""Stand-ins for research code that people copy: CLIP-ViL's BERT with adapters, and OpenAI's CLIP block."""

import math

import torch
from torch import nn

from copied_bart import Controller
from copied_bert import Intermediate


class Attention(nn.Module):
    def __init__(self, width, heads, drop):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, width // heads, width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(drop)

    def forward(self, hidden_states, context, attention_mask=None):
        given = ((self.query, hidden_states), (self.key, context), (self.value, context))
        q, k, v = (f(t).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for f, t in given)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.attention_head_size)
        p = self.dropout((scores if attention_mask is None else scores + attention_mask).softmax(-1))
        return (p @ v).transpose(1, 2).flatten(2)


class Output(nn.Module):
    def __init__(self, inputs, width, drop, adapters, gate=False):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = (
            nn.Linear(inputs, width),
            nn.LayerNorm(width, 1e-12),
            nn.Dropout(drop),
        )
        self.adapter = None if adapters is None else Controller(width, **adapters)
        if gate:
            for adapter in self.adapter.adapters.values():
                adapter.gate = nn.Parameter(torch.zeros(1))
                adapter.__class__ = Gated

    def forward(self, hidden_states, input_tensor, task):
        f = self.dense(hidden_states)
        f = f if self.adapter is None else self.adapter(f, task)
        return self.LayerNorm(self.dropout(f) + input_tensor)


class Gated(type(Controller(4).adapters["vqa"])):
    def forward(self, x):
        return self.gate * super().forward(x)


def gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Layer(nn.Module):
    def __init__(self, width=16, heads=2, drop=0.0, adapters=None, gate=False):
        super().__init__()
        self.self, self.cross = Attention(width, heads, drop), Attention(width, heads, drop)
        self.first, self.second = (Output(width, width, drop, adapters, gate) for _ in range(2))
        self.intermediate = Intermediate(width, 2 * width, gelu)
        self.output = Output(2 * width, width, drop, adapters, gate)

    def forward(self, x, y, mask=None, task=None):
        x = self.first(self.self(x, x, mask), x, task)
        x = self.second(self.cross(x, y), x, task)
        return self.output(self.intermediate(x), x, task)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width=16, heads=2, mask=None, act=QuickGELU, drop=0.0, batch_first=False):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, drop, batch_first=batch_first)
        self.ln_1, self.ln_2, self.attn_mask = LayerNorm(width), LayerNorm(width), mask
        parts = {"c_fc": nn.Linear(width, 4 * width), "gelu": act(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential()
        for name, part in parts.items():
            self.mlp.add_module(name, part)

    def forward(self, x, x_mask=None):
        n = self.ln_1(x)
        x = x + self.attn(n, n, n, need_weights=False, attn_mask=self.attn_mask, key_padding_mask=x_mask)[0]
        return x + self.mlp(self.ln_2(x))
