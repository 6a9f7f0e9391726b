"""How transformers calls the layers that `fastpetl.nn.turns` leaves out; LXMERT's own code calls its pairs alike."""

from __future__ import annotations

import torch
from torch import nn

from fastpetl.nn.turns import Calls
from fastpetl.skip import compaction


class HFCalls(Calls):
    """Of a model that collects attention maps and hidden states by hooks on its layers: those that ran gave them.
    config: the model's, which says whether they are asked for where the call does not.
    """

    def __init__(self, config, one_copy: str | None = None):
        super().__init__(one_copy=one_copy)
        self.config = config

    def check(self, setting, args, kwargs) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise ValueError(f"skip: {name} is True while samples skip blocks of their own, expected not")
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "skip: past_key_values are given while samples skip blocks of their own, expected use_cache=False"
            )

    def given(self, y, place: int, args, kwargs):
        past = kwargs.get("past_key_values")
        if past is not None:  # other layers ask it for the length
            from fastpetl.nn.seq2seq_skip import hold

            hold(past, place, y)
        return super().given(y, place, args, kwargs)


class LxmertCalls(Calls):
    """Of LxmertLayers. Semantics: (y,), or (y, attention map) where maps are asked for."""

    def given(self, y, place: int, args, kwargs):
        return (y, None) if kwargs.get("output_attentions") else (y,)


PARTS = {
    "lang": ("lang_self_att", "lang_inter", "lang_output"),
    "visn": ("visn_self_att", "visn_inter", "visn_output"),
}


def _half(parts, x, other, mask=None, other_mask=None, output_attentions=False):
    """Semantics: (y, its map of `other` if asked for): attention to `other`, to itself, feed-forward."""
    cross, own, inner, outer = parts
    asked = {"output_attentions": True} if output_attentions else {}
    x, *maps = _several(cross(x, other, ctx_att_mask=other_mask, **asked))
    x, *_ = _several(own(x, mask))
    return outer(inner(x), x), *maps


def _several(out):  # the original's parts give a tensor, the library's a tuple
    return (out,) if isinstance(out, torch.Tensor) else out


def _parts(layer, half: str) -> list[nn.Module]:
    return [layer._modules[name] for name in ("visual_attention", *PARTS[half])]  # the first attention is that of both


class LxmertHalf(nn.ModuleList):
    """What an LxmertXLayer does to one of its two streams, as a module: to be counted."""

    def forward(self, x, other):
        return _half(self, x, other)[0]


class LxmertPair(Calls):
    """Of LxmertXLayers. Semantics: both halves read the pair as it was; (lang, visn), and lang's map if asked for."""

    def half(self, layer, half: str):
        if isinstance(layer, nn.Identity) or isinstance(getattr(layer, PARTS[half][0]), nn.Identity):
            return nn.Identity()
        return LxmertHalf(_parts(layer, half))

    def pruned(self, layer, half: str):
        """Semantics: what is left of a layer without this half."""
        for name in PARTS[half]:
            layer._modules[name] = nn.Identity()
        left = any(not isinstance(self.half(layer, other), nn.Identity) for other in PARTS)
        return layer if left else nn.Identity()

    def run(self, turn, streams, args, kwargs):
        """Semantics: the call of a layer whose two halves are blocks of two streams."""
        names = ("lang_feats", "lang_attention_mask", "visual_feats", "visual_attention_mask", "output_attentions")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        lang, lang_mask, visn, visn_mask, maps = (given.get(name) for name in names)
        per_sample = streams[0].setting.per_sample
        skipped = [not per_sample and stream.skips(turn.place) for stream in streams]
        if not per_sample and not any(skipped):
            return compaction.call(turn.block, *args, batch=len(lang), **kwargs)
        found, shown = [], None
        for k, own in enumerate(((lang, visn, lang_mask, visn_mask), (visn, lang, visn_mask, lang_mask))):
            x, asked, seen = own[0], bool(maps) and k == 0, []
            parts = [] if skipped[k] else _parts(turn.block, tuple(PARTS)[k])  # it may have none
            if per_sample:

                def block(rows, take, own=own, parts=parts, asked=asked, seen=seen):
                    y, *of_rows = _half(parts, rows, *map(take, own[1:]), output_attentions=asked)
                    seen.extend(of_rows)
                    return y

                trained = [p for part in parts for p in part.parameters()]
                x, on = streams[k].run(turn, x, block, trained, lang_mask)
                shown = on(seen[0]) if seen else shown
            elif not skipped[k]:
                x, *of_all = compaction.call(_half, parts, *own, batch=len(x), output_attentions=asked)
                shown = of_all[0] if of_all else shown
            found.append(x)
        return (*found, shown) if maps else tuple(found)
