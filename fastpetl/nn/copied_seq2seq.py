"""How VL-BART's and VL-T5's own loops call their layers, which `fastpetl.skip` leaves out.

Source: ylsung/VL_adapter (CVPR 2022), BART and T5 as transformers had them in 2021: keys and values go in and come out
as tuples, T5's position biases, the masks in them, are made by the first block and handed on.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import nn

from fastpetl.nn.joined import joined
from fastpetl.nn.turns import Calls, Setting, of_each
from fastpetl.skip import columns
from fastpetl.skip.decided import Decided


class Source(NamedTuple):
    """What a decoder's layer is given of the encoder."""

    states: torch.Tensor | None
    mask: torch.Tensor | None


class LayerCalls(Calls):
    """names: the parameters of a layer, of which those after the first are handed on by their names."""

    names: tuple[str, ...]
    cached = False  # does a decoder's layer give keys and values if not told?

    def __init__(self, form: int, decoder: bool):
        super().__init__(form)
        self.decoder = decoder

    def complete(self, block, args, kwargs):
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return (given.pop("hidden_states"),), given

    def check(self, setting, args, kwargs) -> None:
        if kwargs.get("past_key_value") is not None and setting.values.copies > 1:
            raise ValueError("skip: Candidates with past_key_value, expected use_cache=False")

    def padding(self, args, kwargs):
        if self.decoder:
            return Source(kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask"))
        return super().padding(args, kwargs)

    def present(self, x, kwargs) -> tuple:
        """Semantics: (keys and values,) of a layer nobody runs, if they are asked for: zeros of one head of one number,
        as many as there would be, for others ask for the length.
        """
        if not (self.decoder and kwargs.get("use_cache", self.cached)):
            return ()
        past, source = kwargs.get("past_key_value"), kwargs.get("encoder_hidden_states")
        lengths = [
            x.shape[1] + (0 if past is None else past[0].shape[2]),
            *([] if source is None else [source.shape[1]]),
        ]
        return (tuple(x.new_zeros(x.shape[0], 1, n, 1) for n in lengths for _ in range(2)),)


class BartCalls(LayerCalls):
    """Semantics: (y, the map if asked for, the decoder's keys and values if asked for)."""

    cached = True

    def __init__(self, form: int, decoder: bool):
        super().__init__(form, decoder)
        own, other = ("hidden_states", "attention_mask"), ("encoder_hidden_states", "encoder_attention_mask")
        more = ("past_key_value", "block_adapters", "task", "output_attentions", "use_cache")
        self.names = (*own, *(other if decoder else ()), *more)

    def given(self, y, place: int, args, kwargs):
        maps = [None] * bool(kwargs.get("output_attentions"))
        return (y, *maps, *self.present(y, kwargs)) if self.form else y


class T5Calls(LayerCalls):
    """Semantics: (y, keys and values, own position bias, its map if asked for, and both of the source if there is one),
    the biases of all samples, whoever runs.
    """

    names = (
        *("hidden_states", "attention_mask", "position_bias", "encoder_hidden_states", "encoder_attention_mask"),
        *("encoder_decoder_position_bias", "head_mask", "past_key_value", "use_cache", "output_attentions"),
        *("return_dict", "block_adapters", "task"),
    )

    def complete(self, block, args, kwargs):
        (x,), given = super().complete(block, args, kwargs)
        past, source = given.get("past_key_value"), given.get("encoder_hidden_states")
        n = x.shape[1]
        if given.get("position_bias") is None:  # the first block makes it for all
            keys = n + (0 if past is None else past[0].shape[2])
            bias = block.layer[0].SelfAttention.compute_bias(keys, keys)[:, :, -n:]
            given["position_bias"] = _masked(bias, given.get("attention_mask"))
        if source is not None and given.get("encoder_decoder_position_bias") is None:
            bias = x.new_zeros(1, 1, n, source.shape[1])
            given["encoder_decoder_position_bias"] = _masked(bias, given.get("encoder_attention_mask"))
        return (x,), given

    def _beside(self, present, maps, kwargs) -> tuple:
        biases = [kwargs["position_bias"]]
        if kwargs.get("encoder_hidden_states") is not None:
            biases.append(kwargs["encoder_decoder_position_bias"])
        asked = bool(kwargs.get("output_attentions"))
        return present, *(t for i, bias in enumerate(biases) for t in (bias, *maps[i : i + asked]))

    def given(self, y, place: int, args, kwargs):
        (present,) = self.present(y, kwargs) or (None,)
        return (y, *self._beside(present, [None, None], kwargs))

    def whole(self, out, y, on, args, kwargs):
        maps = of_each(tuple(out[3::2]), on) if kwargs.get("output_attentions") else ()
        return (y, *self._beside(of_each(out[1], on), maps, kwargs))

    def half(self, layer, half: str | None = None):
        left = isinstance(layer, nn.Identity) or "q" in layer.layer[0].SelfAttention._modules
        return layer if left else nn.Identity()

    def pruned(self, layer, half: str | None = None):
        """Semantics: of a first block its position bias stays, which all share."""
        attention = layer.layer[0].SelfAttention
        if not attention.has_relative_attention_bias:
            return nn.Identity()
        for module, kept in ((layer.layer, "0"), (layer.layer[0], "SelfAttention")):
            for name in [name for name in module._modules if name != kept]:
                del module._modules[name]
        for name in [name for name in attention._modules if name != "relative_attention_bias"]:
            del attention._modules[name]
        return layer


def _masked(bias, mask):
    return bias if mask is None else bias + mask


# --- what both stacks share -------------------------------------------------------------------------------------------


class Seq2SeqSetting(Setting):
    """A policy is asked when a batch enters the encoder (stream 0); the decoder's steps keep to what it said."""

    def __init__(self, values, shortcut: str, order: tuple[int, ...]):
        super().__init__(values, shortcut, order)
        self.decided = Decided(values, len(order))

    def columns(self, stream, x, padding, training: bool):
        copies, decided = self.values.copies, self.decided
        if stream.number == 0:
            mask, scale = decided.decide(x, training, padding)
            return columns.columns(mask, scale, self.order, x.device, copies, self.values.capacity)
        states, mask = padding
        asks = (x, training, None) if states is None else (states, training, mask)
        mask, scale, capacity = decided.for_decoder(x.shape[0] * copies, states, asks)
        return columns.columns(mask, scale, self.order, x.device, copies, capacity)


class KnowsItsOutput:
    """Mixin of an encoder, before the original: by its output the decoder knows whose samples they are."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        states = out if isinstance(out, torch.Tensor) else out[0]
        self.__dict__["_fastpetl_setting"].decided.came_out(states)
        return out


@functools.cache
def knowing(original: type) -> type:
    """Semantics: `original`, an encoder, with `KnowsItsOutput` before it."""
    return joined(KnowsItsOutput, original, (knowing,))


def original_of(cls: type) -> type:
    return cls.__bases__[1] if KnowsItsOutput in cls.__bases__ else cls
