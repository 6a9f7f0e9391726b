"""Stand-ins for research code that people copy: the children and the arithmetic of VL-Adapter's BART of 2021."""

import torch
import torch.nn.functional as F
from torch import nn


class Act(nn.Module):
    def __init__(self, kind):
        super().__init__()
        tanh = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731
        self.kind, self.known = kind, {"gelu_new": tanh, "relu": F.relu, "sin": torch.sin}

    def forward(self, x):
        return self.known[self.kind](x)

    def __getstate__(self):
        return {**self.__dict__, "known": None}

    def __setstate__(self, state):
        kind = state["kind"]
        self.__init__(kind)
        self.training = state["training"]


class Adapter(nn.Module):
    def __init__(self, width, inner, act="gelu_new"):
        super().__init__()
        self.activation = Act(act)
        self.down_sampler, self.up_sampler = nn.Linear(width, inner), nn.Linear(inner, width)
        self.track_z = False

    def forward(self, x):
        return self.up_sampler(self.activation(self.down_sampler(x)))


class Controller(nn.Module):
    def __init__(self, width, tasks=("vqa", "gqa"), single=False, norms=False, act="gelu_new"):
        super().__init__()
        first = Adapter(width, 4, act)
        self.adapters = nn.ModuleDict({t: first if single or t == tasks[0] else Adapter(width, 4, act) for t in tasks})
        self.add_layer_norm_before_adapter = self.add_layer_norm_after_adapter = norms
        if norms:
            self.pre_layer_norm, self.post_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, inputs, task):
        h = self.adapters[task](self.pre_layer_norm(inputs) if self.add_layer_norm_before_adapter else inputs)
        return (self.post_layer_norm(h) if self.add_layer_norm_after_adapter else h) + inputs


class Attention(nn.Module):
    def __init__(self, width, heads, dropout=0.0, decoder=False):
        super().__init__()
        self.num_heads, self.head_dim, self.dropout, self.is_decoder = heads, width // heads, dropout, decoder
        self.scaling, self.embed_dim = self.head_dim**-0.5, width
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, hidden_states, key_value_states=None, past_key_value=None, attention_mask=None, output_attentions=False
    ):
        split = lambda t: t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # noqa: E731
        source = hidden_states if key_value_states is None else key_value_states
        q = split(self.q_proj(hidden_states) * self.scaling)
        if key_value_states is not None and past_key_value is not None:
            k, v = past_key_value
        else:
            k, v = split(self.k_proj(source)), split(self.v_proj(source))
            if past_key_value is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(past_key_value, (k, v), strict=True))
        scores = q @ k.transpose(-1, -2)
        p = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        out = (F.dropout(p, self.dropout, self.training) @ v).transpose(1, 2).flatten(2)
        past = (k, v) if self.is_decoder else past_key_value
        return self.out_proj(out), p if output_attentions else None, past


class _Layer(nn.Module):
    def __init__(self, width, heads, drop, cross, adapters):
        super().__init__()
        self.embed_dim, self.dropout, self.activation_dropout, self.use_lora = width, drop, drop, False
        self.self_attn = Attention(width, heads, drop, cross)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.activation_fn, self.adapter_hypernet = F.gelu, None
        if cross:
            self.encoder_attn, self.encoder_attn_layer_norm = Attention(width, heads, drop, True), nn.LayerNorm(width)
        for name in (
            ("self_attn_adapter", "enc_attn_adapter", "ff_adapter") if cross else ("attn_adapter", "ff_adapter")
        ):
            setattr(self, name, None if adapters is None else Controller(width, **adapters))

    def site(self, x, f, adapter, task, norm):
        f = f if adapter is None else adapter(f, task)
        return norm(x + F.dropout(f, self.dropout, self.training))

    def feed_forward(self, x, task):
        h = F.dropout(self.activation_fn(self.fc1(x)), self.activation_dropout, self.training)
        return self.site(x, self.fc2(h), self.ff_adapter, task, self.final_layer_norm)


class EncoderLayer(_Layer):
    def __init__(self, width=16, heads=2, drop=0.0, adapters=None):
        super().__init__(width, heads, drop, False, adapters)

    def forward(
        self,
        hidden_states,
        attention_mask,
        past_key_value=None,
        block_adapters=None,
        task=None,
        output_attentions=False,
    ):
        f, weights, _ = self.self_attn(hidden_states, None, past_key_value, attention_mask, output_attentions)
        x = self.site(hidden_states, f, self.attn_adapter, task, self.self_attn_layer_norm)
        x = self.feed_forward(x, task)
        return (x, weights) if output_attentions else (x,)


class DecoderLayer(_Layer):
    def __init__(self, width=16, heads=2, drop=0.0, adapters=None):
        super().__init__(width, heads, drop, True, adapters)

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
        past = past_key_value
        f, weights, present = self.self_attn(
            hidden_states, None, None if past is None else past[:2], attention_mask, output_attentions
        )
        x = self.site(hidden_states, f, self.self_attn_adapter, task, self.self_attn_layer_norm)
        if encoder_hidden_states is not None:
            past = past[-2:] if past is not None and len(past) == 4 else None
            f, _, cross = self.encoder_attn(x, encoder_hidden_states, past, encoder_attention_mask)
            x = self.site(x, f, self.enc_attn_adapter, task, self.encoder_attn_layer_norm)
            present = present + cross
        x = self.feed_forward(x, task)
        return (x, *([weights] if output_attentions else []), *([present] if use_cache else []))


class Net(nn.Module):
    """One layer of each; forward(x, y, mask, causal, task) -> (output, the decoder's keys and values)."""

    def __init__(self, drop=0.0, adapters=None):
        super().__init__()
        self.encoder, self.decoder = (
            EncoderLayer(drop=drop, adapters=adapters),
            DecoderLayer(drop=drop, adapters=adapters),
        )

    def forward(self, x, y, mask=None, causal=None, task=None, past=None):
        (memory,) = self.encoder(x, mask, task=task)
        return self.decoder(y, causal, memory, None if mask is None else mask[:, :, :1], past, task=task)
