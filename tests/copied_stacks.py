"""Stand-ins for the loops around research code that people copy: ViLT's, METER's, CLIP's and BERT's, with a stem that
trains. reentrant: how the loop checkpoints its blocks, None if it does not. forward gives (states, pooled).
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import copied_bart
import copied_bert
import copied_clipvil
import copied_t5
import copied_vilt
from copied_vilt import Adapter_Layer


class _Net(nn.Module):
    reentrant = None

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(16, 16)

    def call(self, block, *args, **kwargs):
        if self.reentrant is None:
            return block(*args, **kwargs)
        names = tuple(kwargs)
        given = lambda *a: block(*a[: len(args)], **dict(zip(names, a[len(args) :], strict=True)))  # noqa: E731
        return checkpoint(given, *args, *kwargs.values(), use_reentrant=self.reentrant)


def _shortcuts(layers):
    return nn.ModuleList(nn.Sequential(Adapter_Layer(16, 8)) for _ in range(layers))


class Vilt(_Net):
    """The adapters of DAS stand on the outer module, the blocks in its transformer, the loop is the outer one's."""

    def __init__(self, das=False, layers=4):
        super().__init__()
        self.transformer = nn.Module()
        block = copied_vilt.AdapterBlock if das else copied_vilt.Block
        self.transformer.blocks = nn.ModuleList(block() for _ in range(layers))
        self.transformer.norm = nn.LayerNorm(16, eps=1e-6)
        if das:
            self.adapter_list = _shortcuts(layers)

    def forward(self, x, mask=None):
        x = self.stem(x)
        for block in self.transformer.blocks:
            x, _weights = self.call(block, x, mask=mask)
        x = self.transformer.norm(x)
        return {"states": x, "pooled": x[:, 0]}


class MeterLayer(copied_bert.CrossLayer):
    def forward(self, *args):
        return (super().forward(*args),)  # as the original's


class Meter(_Net):
    def __init__(self, das=False, layers=2):
        super().__init__()
        self.image_stem = nn.Linear(16, 16)
        # in the original's order
        self.cross_modal_image_layers = nn.ModuleList(MeterLayer(das=das) for _ in range(layers))
        self.cross_modal_text_layers = nn.ModuleList(MeterLayer(das=das) for _ in range(layers))
        if das:
            self.adapter_list_l, self.adapter_list_v = _shortcuts(layers), _shortcuts(layers)

    def forward(self, x, mask=None, y=None):
        y = self.image_stem(x[:, :12].flip(-1)) if y is None else y
        x = self.stem(x)
        no_mask = torch.zeros(x.shape[0], 1, 1, y.shape[1])
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            x1 = self.call(text_layer, x, y, mask, no_mask)
            y1 = self.call(image_layer, y, x, no_mask, mask)
            x, y = x1[0], y1[0]
        return {"states": x, "image": y, "pooled": torch.cat([x[:, 0], y[:, 0]], -1)}


class Clip(_Net):
    """Tokens first, as OpenAI has it; the text side through its Sequential, the image side block by block."""

    def __init__(self, text=False, layers=4):
        super().__init__()
        causal = torch.full((16, 16), float("-inf")).triu(1) if text else None
        make = copied_clipvil.ResidualAttentionBlock
        self.resblocks = nn.Sequential(*(make(mask=causal, batch_first=False) for _ in range(layers)))
        self.text = text

    def forward(self, x, mask=None):
        x = self.stem(x).transpose(0, 1)
        if self.text and self.reentrant is None:
            x = self.resblocks(x)
        else:
            for block in self.resblocks:
                x = self.call(block, x, mask)
        x = x.transpose(0, 1)
        return {"states": x, "pooled": x[:, 0]}


class BertLayer(nn.Module):
    """CLIP-ViL's, with adapters and the task, or BERT's."""

    def __init__(self, adapters):
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = copied_clipvil.Attention(16, 2, 0.0)
        self.attention.output = copied_clipvil.Output(16, 16, 0.0, adapters)
        self.intermediate = copied_bert.Intermediate(16, 32, copied_clipvil.gelu)
        self.output = copied_clipvil.Output(32, 16, 0.0, adapters)

    def forward(self, hidden_states, attention_mask, task=None):
        x = hidden_states
        x = self.attention.output(self.attention.self(x, x, attention_mask), x, task)
        return self.output(self.intermediate(x), x, task)


class SelfLayer(nn.Module):
    """Attention of LXMERT, to itself or (cross) to another stream."""

    def __init__(self, cross):
        super().__init__()
        self.att = copied_clipvil.Attention(16, 2, 0.0)
        self.output = copied_clipvil.Output(16, 16, 0.0, None)
        self.cross = cross

    def forward(self, x, *other, ctx_att_mask=None):
        other, mask = (*other, ctx_att_mask) if self.cross else (x, *other)
        return self.output(self.att(x, other, mask), x, None)


class Out(copied_clipvil.Output):
    def forward(self, x, y):
        return super().forward(x, y, None)


class Pair(nn.Module):
    """LXMERT's: both halves share the attention to each other."""

    def __init__(self):
        super().__init__()
        self.visual_attention = SelfLayer(True)
        self.lang_self_att, self.visn_self_att = SelfLayer(False), SelfLayer(False)
        self.lang_inter, self.visn_inter = (copied_bert.Intermediate(16, 32, copied_clipvil.gelu) for _ in range(2))
        self.lang_output, self.visn_output = (Out(32, 16, 0.0, None) for _ in range(2))

    def forward(self, x, mask, y, y_mask):
        new = self.visual_attention(x, y, ctx_att_mask=y_mask), self.visual_attention(y, x, ctx_att_mask=mask)
        x, y = self.lang_self_att(new[0], mask), self.visn_self_att(new[1], y_mask)
        return self.lang_output(self.lang_inter(x), x), self.visn_output(self.visn_inter(y), y)


class Lxmert(_Net):
    def __init__(self):
        super().__init__()
        self.image_stem, self.encoder = nn.Linear(16, 16), nn.Module()
        self.encoder.layer = nn.ModuleList(BertLayer(None) for _ in range(2))
        self.encoder.x_layers = nn.ModuleList(Pair() for _ in range(2))
        self.encoder.r_layers = nn.ModuleList(BertLayer(None) for _ in range(1))

    def forward(self, x, mask=None, y=None):
        y = self.image_stem(x[:, :12].flip(-1))
        x, no_mask = self.stem(x), torch.zeros(x.shape[0], 1, 1, 12)
        for layer_module in self.encoder.layer:
            x = self.call(layer_module, x, mask)
        for layer_module in self.encoder.r_layers:
            y = self.call(layer_module, y, no_mask)
        for layer_module in self.encoder.x_layers:
            x, y = self.call(layer_module, x, mask, y, no_mask)
        return {"states": x, "image": y, "pooled": torch.cat([x[:, 0], y[:, 0]], -1)}


class Bert(_Net):
    def __init__(self, adapters=None, layers=4):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(BertLayer(adapters) for _ in range(layers))

    def forward(self, x, mask=None, task=None):
        x = self.stem(x)
        for layer_module in self.encoder.layer:
            x = self.call(layer_module, x, mask, task)
        return {"states": x, "pooled": x[:, 0]}


class BartStack(nn.Module):
    def __init__(self, net, layers):
        super().__init__()
        self.layers, self.call = nn.ModuleList(layers), net.call

    def forward(self, x, *given, pasts=None, **named):
        kept = []
        for i, layer in enumerate(self.layers):
            named |= {} if pasts is None else {"past_key_value": pasts[i]}
            x, *presents = self.call(layer, x, *given, **named)
            kept += presents
        return x, kept


class T5Stack(nn.Module):
    def __init__(self, net, blocks):
        super().__init__()
        self.block, self.call = nn.ModuleList(blocks), net.call
        self.final_layer_norm = copied_t5.Norm(16)

    def forward(self, x, mask, source=None, source_mask=None, pasts=None, use_cache=False, task=None):
        kept, bias, cross_bias = [], None, None
        if source is None:  # a joint encoder makes them itself
            text = self.block[0].layer[0].SelfAttention.compute_bias(8, 8)
            bias = nn.functional.pad(text, (0, x.shape[1] - 8, 0, x.shape[1] - 8)) + mask
        for i, block in enumerate(self.block):
            named = {"attention_mask": mask, "position_bias": bias, "encoder_hidden_states": source}
            named |= {"encoder_attention_mask": source_mask, "encoder_decoder_position_bias": cross_bias, "task": task}
            out = self.call(block, x, **named, past_key_value=pasts and pasts[i], use_cache=use_cache)
            x, present, bias = out[:3]
            cross_bias = cross_bias if source is None else out[3]
            kept.append(present)
        return self.final_layer_norm(x), kept


class Seq2Seq(_Net):
    """VL-BART or VL-T5: words and boxes x through an encoder, y through a decoder that reads them."""

    def __init__(self, t5=False, layers=2):
        super().__init__()
        self.t5, adapters = t5, {}
        kinds = (False, True)
        if t5:
            stacks = (
                T5Stack(self, [copied_t5.Block(cross, i == 0, adapters=adapters) for i in range(layers)])
                for cross in kinds
            )
        else:
            made = (copied_bart.EncoderLayer, copied_bart.DecoderLayer)
            stacks = (BartStack(self, [make(adapters=adapters) for _ in range(layers)]) for make in made)
        self.encoder, self.decoder = stacks

    def encode(self, x, mask, task=None):
        x = self.stem(x)
        return self.encoder(x, mask if self.t5 else mask.expand(-1, -1, x.shape[1], -1), task=task)[0]

    def decode(self, y, source, mask, pasts=None, use_cache=True, task=None):
        n, seen = y.shape[1], 0 if pasts is None else pasts[0][0].shape[2]
        causal = torch.full((n, seen + n), -1e4).triu(1 + seen).expand(y.shape[0], 1, -1, -1)
        mask = mask if self.t5 else mask.expand(-1, -1, n, -1)
        return self.decoder(y, causal, source, mask, pasts=pasts, use_cache=use_cache, task=task)

    def forward(self, x, mask, y, task=None):
        source = self.encode(x, mask, task)
        y, _ = self.decode(self.stem(y), source, mask, use_cache=False, task=task)
        y = y + source.repeat(len(y) // len(source), 1, 1)[:, :1]  # the encoder trains, whatever the decoder skips
        return {"states": y, "pooled": y[:, 0]}
