"""Stacks of encoder or decoder layers (BART's, T5's) that leave out blocks, and the cache rows of those that stay.

The library's own forward goes on calling "its layers": while blocks are skipped these are turns, which run a layer on
the samples that keep it, or not at all.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache

from fastpetl.nn.joined import joined
from fastpetl.skip import compaction
from fastpetl.skip.decided import Decided


class Setting(Decided):
    """What an encoder and its decoder share. values: a bool per block or a policy, encoder first."""

    def __init__(self, values, shortcut: str, n_encoder: int, n_blocks: int):
        super().__init__(values, n_blocks)
        self.shortcut, self.n_encoder = shortcut, n_encoder

    @property
    def per_sample(self) -> bool:
        return not isinstance(self.values, tuple)


class Skipping:
    """Mixin of a stack, before the original. Semantics: x = x where layer i is skipped, else layer_i(x).

    A per-sample policy is asked when a batch enters the encoder; the decoder's steps keep to what it said, each
    sample's row standing for as many decoder rows in a row as there are (beams; capacity counts samples). A decoder
    that is given other encoder states than those that came out last asks with these. In a cache a skipped sample's rows
    are zeros nobody reads: the length is everybody's. Attention maps and hidden states are those of the layers that ran
    (static plans only).
    """

    def forward(self, *args, **kwargs):
        setting = self.__dict__["_fastpetl_setting"]
        asked = [f"output_{what}" for what in ("hidden_states", "attentions")]
        asked = [name for name in asked if kwargs.get(name, getattr(self.config, name, False))]
        if asked and setting.per_sample:
            raise ValueError(f"skip: {asked[0]} is True while samples skip blocks of their own, expected not")
        replica = self.__dict__.get("_is_replica", False)  # their threads would share what is decided
        if replica and setting.per_sample:
            raise ValueError("skip: nn.DataParallel while samples skip blocks of their own, expected DDP")
        if self.training and getattr(self, "layerdrop", 0) > 0:
            raise ValueError(f"skip: layerdrop is {self.layerdrop}, expected 0 in training while blocks are skipped")
        running, turns = self.__dict__["_fastpetl_turns"], _Turns(self, setting)
        before = running.get()
        running.set(turns.turns)
        copies, source = getattr(setting.values, "copies", 1), kwargs.get("encoder_hidden_states")
        if turns.decoder and copies > 1 and source is not None:  # the library makes masks for one copy
            turns.source, kwargs["encoder_hidden_states"] = source, source[: source.shape[0] // copies]
        try:
            out = super().forward(*args, **kwargs)
        finally:
            running.drop() if before is None else running.set(before)
        if setting.per_sample and not turns.decoder:
            setting.came_out(out[0])
        return out


@functools.cache
def skipping(original: type, layers: str) -> type:
    """Semantics: `original`, a stack whose child `layers` are its blocks, with `Skipping` before it."""

    def turns(self):
        turns = self.__dict__["_fastpetl_turns"].get()
        return self._modules[layers] if turns is None else turns

    return joined(Skipping, original, (skipping, layers), **{layers: property(turns)})


def original_of(cls: type) -> type:
    return cls.__bases__[1] if Skipping in cls.__bases__ else cls


class _Turn:
    def __init__(self, turns, i: int, layer):
        self._run, self._i, self._layer = turns.run, i, layer

    def __call__(self, x, *args, **kwargs):
        return self._run(self._i, self._layer, x, args, kwargs)

    def __getattr__(self, name):
        return getattr(self._layer, name)


class _Turns:
    """One forward of a stack. Between layers the library carries a stand-in: the rows are in `stream`."""

    def __init__(self, stack, setting):
        self.blocks_are_t5 = "block" in stack._modules
        layers = stack._modules["block" if self.blocks_are_t5 else "layers"]
        self.turns = [_Turn(self, i, layer) for i, layer in enumerate(layers)]
        self.setting, self.training, self.first = setting, stack.training, layers[0]
        self.decoder = not hasattr(stack, "max_source_positions") if not self.blocks_are_t5 else stack.is_decoder
        self.offset = setting.n_encoder if self.decoder else 0
        self.stream = self.source = None

    def run(self, i: int, layer, x, args, kwargs):
        if self.setting.per_sample:
            return self._run_per_sample(i, layer, x, args, kwargs)
        if self.setting.values[self.offset + i]:
            return self._given(x, i, args, kwargs.get("past_key_values"))
        return compaction.call(layer, x, *args, batch=x.shape[0], **kwargs)

    def _run_per_sample(self, i: int, layer, x, args, kwargs):
        if self.source is not None:
            at = 2 if self.blocks_are_t5 else 1
            args = (*args[:at], self.source, *args[at + 1 :])
        if self.stream is None:
            self._begin(x, args, kwargs)
        found = []

        def block(rows, take):
            out = compaction.call(layer, rows, *self._rows(args, take), **self._options(i, layer, kwargs, take))
            found.append(out)
            return out[0] if self.blocks_are_t5 else out

        self.stream.run(i, block, lambda rows: rows, layer.parameters())
        y = self.stream.whole() if i == len(self.turns) - 1 else x
        if not found:
            return self._given(y, i, args, kwargs.get("past_key_values"))
        return (y, *found[0][1:]) if self.blocks_are_t5 else y

    def _begin(self, x, args, kwargs) -> None:
        policy, past = self.setting.values, kwargs.get("past_key_values")
        if past is not None and policy.copies > 1:
            raise ValueError("skip: Candidates with past_key_values, expected use_cache=False")
        if self.decoder:
            source = args[2 if self.blocks_are_t5 else 1]
            asks = (
                (x, self.training, None)
                if source is None
                else (source, self.training, args[3] if self.blocks_are_t5 else kwargs["encoder_attention_mask"])
            )
            mask, scale, capacity = self.setting.for_decoder(x.shape[0] * policy.copies, source, asks)
            mask, scale = (t if t is None else t[:, self.offset :] for t in (mask, scale))
            x = compaction.repeated(x, policy.copies)
            self.stream = compaction.stream(x, mask, scale, capacity)
        else:
            mask, scale = self.setting.decide(x, self.training, args[0])
            mask, scale = (t if t is None else t[:, : len(self.turns)] for t in (mask, scale))
            self.stream = compaction.stream(x, mask, scale, policy.capacity, policy.copies)
        self.copies = policy.copies if self.decoder else 1
        self.batch, self.repeats = x.shape[0] // self.copies, {}

    def _rows(self, values, take):
        return [self._of(take, value) for value in values]

    def _of(self, take, value):
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[0] == 1:
            return value
        if self.copies > 1 and value.shape[0] == self.batch:  # the decoder's own; encoder states come repeated
            if id(value) not in self.repeats:
                self.repeats[id(value)] = value, compaction.repeated(value, self.copies)
            value = self.repeats[id(value)][1]
        return take(value)

    def _options(self, i: int, layer, kwargs, take) -> dict:
        options = {name: self._of(take, value) for name, value in kwargs.items()}
        kept = self.stream.kept(i)
        past = kwargs.get("past_key_values")
        if past is not None and kept is not None:
            options["past_key_values"] = _cache_rows(past, kept, self.batch)
        task = kwargs.get("task")
        task = getattr(layer, "_fastpetl_task", None) if task is None else task
        if isinstance(task, tuple | list) and kept is not None:
            n = self.batch // len(task)
            each = [name for name in task for _ in range(n)]
            options["task"] = [each[row % self.batch] for row in kept.tolist()]
        return options

    def _given(self, x, i: int, args, past):
        """What a layer nobody runs gives."""
        seen = keys = 0
        if past is not None:
            cache = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
            seen = cache.get_seq_length(i)
            seen = seen.clone() if isinstance(seen, torch.Tensor) else seen
            keys = hold(cache, i, x)
        if not self.blocks_are_t5:
            return x
        args = (*args, *[None] * (5 - len(args)))
        bias = args[1]
        if bias is None:  # the first block makes it for all
            n = x.shape[1]
            attention = self.first.layer[0].SelfAttention
            bias = attention.compute_bias(n, keys or n, device=x.device, past_seen_tokens=seen)
        return x, bias, args[4]


# --- caches -----------------------------------------------------------------------------------------------------------


def hold(cache, index: int, x) -> int:
    """Semantics: the layer's cache grows by the tokens of x, though nothing is there to be kept: other layers ask the
    first one for the length. Returns it.
    """
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layer = cache.layers[index] if index < len(cache.layers) else None
    there = layer is not None and layer.is_initialized
    heads, size = (layer.keys.shape[1], layer.keys.shape[3]) if there else (1, 1)
    zeros = x.new_zeros(x.shape[0], heads, x.shape[1], size)
    return cache.update(zeros, zeros, index)[0].shape[-2]


def _cache_rows(past, rows: torch.Tensor, batch: int):
    if not isinstance(past, EncoderDecoderCache):
        return _Rows(past, rows, batch)
    both = EncoderDecoderCache.__new__(EncoderDecoderCache)
    both.self_attention_cache = _Rows(past.self_attention_cache, rows, batch)
    both.cross_attention_cache = _Rows(past.cross_attention_cache, rows, batch)
    both.is_updated = past.is_updated
    return both


class _Rows:
    """A cache as the samples that run a layer see it; the cache itself has everybody's rows, which beam search moves
    about.
    """

    def __init__(self, cache, rows: torch.Tensor, batch: int):
        self._cache, self._at, self._batch = cache, rows, batch

    def update(self, keys, values, index: int, *args, **kwargs):
        full = [t.new_zeros(self._batch, *t.shape[1:]).index_copy(0, self._at, t) for t in (keys, values)]
        return tuple(t.index_select(0, self._at) for t in self._cache.update(*full, index, *args, **kwargs))

    def get_seq_length(self, index: int = 0):
        return self._cache.get_seq_length(index)

    @property
    def layers(self):
        return _Layers(self)


class _Layers:
    def __init__(self, rows: _Rows):
        self._rows = rows

    def __getitem__(self, index: int):
        layer, at = self._rows._cache.layers[index], self._rows._at
        return _Layer(layer.keys.index_select(0, at), layer.values.index_select(0, at))


class _Layer:
    def __init__(self, keys, values):
        self.keys, self.values = keys, values


# --- what a pruned T5 keeps of its first block ------------------------------------------------------------------------


class RelativeBias(nn.Module):
    """A T5Attention of which the position bias is left, which all blocks share."""

    def __init__(self, attention):
        super().__init__()
        self.is_decoder = attention.is_decoder
        self.relative_attention_num_buckets = attention.relative_attention_num_buckets
        self.relative_attention_max_distance = attention.relative_attention_max_distance
        self.relative_attention_bias = attention.relative_attention_bias

    def compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0):
        from transformers.models.t5.modeling_t5 import T5Attention

        return T5Attention.compute_bias(self, query_length, key_length, device, past_seen_tokens)

    @staticmethod
    def _relative_position_bucket(*args, **kwargs):
        from transformers.models.t5.modeling_t5 import T5Attention

        return T5Attention._relative_position_bucket(*args, **kwargs)


class Pruned(nn.Identity):
    """Stands where a block was; `layer.0.SelfAttention.relative_attention_bias` is what others need of it."""


def pruned(layer: nn.Module) -> nn.Module:
    """Semantics: what is left of a block that never runs."""
    left = Pruned()
    attention = getattr(layer.layer[0], "SelfAttention", None) if "layer" in layer._modules else None
    if attention is not None and attention.has_relative_attention_bias:
        first = nn.Module()
        first.SelfAttention = RelativeBias(attention)
        left.layer = nn.ModuleList([first])
    return left
