"""Stand-ins for research code that people copy: the children and the arithmetic of VL-T5's T5 of 2021."""

import torch
import torch.nn.functional as F
from torch import nn

from copied_bart import Controller


class Norm(nn.Module):
    def __init__(self, width, later=False):
        super().__init__()
        self.weight, self.variance_epsilon, self.later = nn.Parameter(torch.ones(width)), 1e-6, later

    def forward(self, x):
        y = x * (x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        halves = (torch.float16, torch.bfloat16) if self.later else (torch.float16,)
        return self.weight * (y.to(self.weight.dtype) if self.weight.dtype in halves else y)


class Dense(nn.Module):
    def __init__(self, width, drop):
        super().__init__()
        self.wi, self.wo = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(drop)

    def forward(self, x):
        return self.wo(self.dropout(F.relu(self.wi(x))))


class Gated(nn.Module):
    def __init__(self, width, drop):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.wo, self.dropout = nn.Linear(2 * width, width, bias=False), nn.Dropout(drop)
        self.gelu_act = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.wo(self.dropout(self.gelu_act(self.wi_0(x)) * self.wi_1(x)))


class Attention(nn.Module):
    def __init__(self, width, heads, size, drop, decoder, relative):
        super().__init__()
        self.is_decoder, self.has_relative_attention_bias, self.dropout = decoder, relative, drop
        self.n_heads, self.key_value_proj_dim = heads, size
        self.q, self.k, self.v = (nn.Linear(width, heads * size, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * size, width, bias=False)
        if relative:
            self.relative_attention_bias = nn.Embedding(8, heads)

    def compute_bias(self, query_length, key_length):
        apart = torch.arange(key_length)[None] - torch.arange(query_length)[:, None]
        return self.relative_attention_bias(apart.clamp(-4, 3) + 4).permute(2, 0, 1)[None]

    def forward(
        self,
        hidden_states,
        mask=None,
        key_value_states=None,
        position_bias=None,
        past_key_value=None,
        head_mask=None,
        query_length=None,
        use_cache=False,
        output_attentions=False,
    ):
        split = lambda t: t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # noqa: E731
        x, source, past, length = hidden_states, key_value_states, past_key_value, hidden_states.shape[1]
        q = split(self.q(x))
        if source is not None and past is not None:
            k, v = past
        else:
            k, v = (split(linear(x if source is None else source)) for linear in (self.k, self.v))
            if past is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        scores = q @ k.transpose(-1, -2)
        if position_bias is None:
            whole = length
            if past is not None:
                whole += past[0].shape[2] if query_length is None else query_length
            keys = whole if source is None else source.shape[1]
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(whole, keys)
            else:
                position_bias = torch.zeros(1, self.n_heads, whole, keys, dtype=scores.dtype)
            position_bias = position_bias[:, :, -length:]
            position_bias = position_bias if mask is None else position_bias + mask
        p = F.dropout((scores + position_bias).float().softmax(-1).type_as(scores), self.dropout, self.training)
        p = p if head_mask is None else p * head_mask
        out = self.o((p @ v).transpose(1, 2).flatten(2))
        present = (k, v) if self.is_decoder and use_cache else None
        return (out, present, position_bias, *([p] if output_attentions else []))


class _Layer(nn.Module):
    """One sublayer; `attention` and `adapter` name its children."""

    def __init__(self, width, drop, adapters, adapter):
        super().__init__()
        self.layer_norm, self.dropout = Norm(width), nn.Dropout(drop)
        self.adapter_hypernet = None
        setattr(self, adapter, None if adapters is None else Controller(width, **adapters))

    def add(self, x, f, adapter, task):
        return x + self.dropout(f if adapter is None else adapter(f, task))


class SelfLayer(_Layer):
    def __init__(self, width, drop, adapters, *attention):
        super().__init__(width, drop, adapters, "attn_adapter")
        self.SelfAttention = Attention(width, *attention)

    def forward(self, x, attention_mask=None, block_adapters=None, task=None, **given):
        f, *more = self.SelfAttention(self.layer_norm(x), mask=attention_mask, **given)
        return (self.add(x, f, self.attn_adapter, task), *more)


class CrossLayer(_Layer):
    def __init__(self, width, drop, adapters, *attention):
        super().__init__(width, drop, adapters, "enc_attn_adapter")
        self.EncDecAttention = Attention(width, *attention)

    def forward(self, x, key_value_states, attention_mask=None, block_adapters=None, task=None, **given):
        f, *more = self.EncDecAttention(self.layer_norm(x), attention_mask, key_value_states, **given)
        return (self.add(x, f, self.enc_attn_adapter, task), *more)


class FF(_Layer):
    def __init__(self, width, drop, adapters, gated):
        super().__init__(width, drop, adapters, "ff_adapter")
        self.DenseReluDense = (Gated if gated else Dense)(width, drop)

    def forward(self, x, block_adapters, task):
        return self.add(x, self.DenseReluDense(self.layer_norm(x)), self.ff_adapter, task)


class Block(nn.Module):
    def __init__(self, decoder, relative=True, width=16, heads=2, size=6, drop=0.0, adapters=None, gated=False):
        super().__init__()
        self.is_decoder = decoder
        given = (width, drop, adapters, heads, size, drop, decoder)
        cross = [CrossLayer(*given, False)] if decoder else []
        self.layer = nn.ModuleList([SelfLayer(*given, relative), *cross, FF(width, drop, adapters, gated)])

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        encoder_decoder_position_bias=None,
        head_mask=None,
        past_key_value=None,
        use_cache=False,
        output_attentions=False,
        return_dict=True,
        block_adapters=None,
        task=None,
    ):
        finite = lambda x: x.clamp(-torch.finfo(x.dtype).max + 1000, torch.finfo(x.dtype).max - 1000)  # noqa: E731
        past, source = past_key_value, encoder_hidden_states
        if past is not None:
            assert self.is_decoder and len(past) == (2 if source is None else 4), "past states"
        given = {"head_mask": head_mask, "use_cache": use_cache, "output_attentions": output_attentions, "task": task}
        own = {"attention_mask": attention_mask, "position_bias": position_bias, **given}
        x, present, *maps = self.layer[0](hidden_states, past_key_value=None if past is None else past[:2], **own)
        x = finite(x)
        if source is not None:
            other = {"attention_mask": encoder_attention_mask, "position_bias": encoder_decoder_position_bias, **given}
            other |= {"past_key_value": None if past is None else past[2:]}
            length = None if present is None else present[0].shape[2]
            x, keys, *more = self.layer[1](x, source, query_length=length, **other)
            x, maps, present = finite(x), maps + more, None if present is None else present + keys
        return (finite(self.layer[-1](x, block_adapters, task)), present, *maps)


class Net(nn.Module):
    """Two blocks of each, the first with the bias that both use: forward(x, y, mask, causal, task) -> (output, the
    decoder's keys and values).
    """

    def __init__(self, **kwargs):
        super().__init__()
        self.encoder, self.decoder = (
            nn.ModuleList(Block(decoder, relative=i == 0, **kwargs) for i in range(2)) for decoder in (False, True)
        )
        self.final = Norm(kwargs.get("width", 16))

    def forward(self, x, y, mask=None, causal=None, task=None, past=(None, None)):
        bias, cross_bias, kept = None, None, []
        for block in self.encoder:
            x, _, bias = block(x, None if mask is None else mask[:, :, :1], bias, task=task)
        x, bias = self.final(x), None
        memory_mask = None if mask is None else mask[:, :, :1]
        for block, seen in zip(self.decoder, past, strict=True):
            more = {"encoder_hidden_states": x, "encoder_attention_mask": memory_mask, "use_cache": True}
            more |= {"encoder_decoder_position_bias": cross_bias, "past_key_value": seen, "task": task}
            y, present, bias, cross_bias = block(y, causal, bias, **more)
            kept.append(present)
        return y, kept
