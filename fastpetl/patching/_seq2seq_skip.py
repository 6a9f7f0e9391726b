"""What the encoder-decoder families answer about skipping: blocks are the encoder's layers, then the decoder's."""

from __future__ import annotations

import torch
from torch import nn

from fastpetl.patching._macs import layer_macs, weightless

_LENGTH = 512  # tokens of a text where the configuration has no limit: what T5 was trained with


class SkipsSeq2Seq:
    """The part of a family that `fastpetl.skip` asks; hosts have an `encoder` and a `decoder`, children of these."""

    layers: str  # the name of the layers in both

    def _stacks(self, host) -> tuple:
        return host.encoder, host.decoder

    def _modules(self, host) -> list[nn.ModuleList]:
        return [stack._modules[self.layers] for stack in self._stacks(host)]

    def n_blocks(self, host) -> int:
        return sum(map(len, self._modules(host)))

    def blocks(self, model: nn.Module, host) -> list:
        from fastpetl.skip.plan import Block

        prefix = next(name for name, module in model.named_modules() if module is host)
        found, lengths = [], _lengths(host.config)
        for kind, layers in zip(("encoder", "decoder"), self._modules(host), strict=True):
            for i, layer in enumerate(layers):
                name = f"{prefix}.{kind}.{self.layers}.{i}".lstrip(".")
                macs = self._macs(layer, kind == "decoder", host.config.d_model, *lengths)
                found.append(Block(index=len(found), name=name, macs=macs, kind=kind))
        return found

    def _macs(self, layer, decoder: bool, hidden: int, source: int, target: int) -> int:
        """One sample through the layer, from a copy of it without weights."""
        from fastpetl.nn.seq2seq_skip import Pruned

        if isinstance(layer, Pruned):
            return 0
        layer = weightless(layer)
        dtype = next(layer.parameters()).dtype
        given = {"hidden_states": torch.empty(1, target if decoder else source, hidden, device="meta", dtype=dtype)}
        if decoder:
            given["encoder_hidden_states"] = torch.empty(1, source, hidden, device="meta", dtype=dtype)
        elif self.layers == "layers":
            given["attention_mask"] = None
        return layer_macs(layer, given)

    def has_shortcut_adapters(self, host) -> bool:
        return False

    def get_skip(self, host) -> tuple:
        setting = host.__dict__.get("_fastpetl_setting")
        return (None, "identity") if setting is None else (setting.values, setting.shortcut)

    def set_skip(self, host, values, shortcut: str) -> None:
        """Semantics: set what the model skips: None, a bool per block, or a policy of skip/policies.py. With nothing
        set the stacks' classes are the originals again.
        """
        from fastpetl.nn.seq2seq_skip import Setting, original_of, skipping
        from fastpetl.skip.per_thread import PerThread

        setting = None
        if values is not None:
            setting = Setting(values, shortcut, len(self._modules(host)[0]), self.n_blocks(host))
        for module in (host, *self._stacks(host)):
            module.__dict__.pop("_fastpetl_setting", None)
            module.__dict__.pop("_fastpetl_turns", None)
            if setting is not None:
                module.__dict__["_fastpetl_setting"] = setting
        for stack in self._stacks(host):
            original = original_of(type(stack))
            if setting is not None:
                stack.__dict__["_fastpetl_turns"] = PerThread()
            stack.__class__ = original if setting is None else skipping(original, self.layers)

    def is_pruned(self, host) -> bool:
        from fastpetl.nn.seq2seq_skip import Pruned

        return any(isinstance(layer, Pruned) for layers in self._modules(host) for layer in layers)

    def prune(self, host) -> None:
        """Semantics: in place of a skipped block stands what others need of it: of T5's first one the position bias."""
        from fastpetl.nn.seq2seq_skip import pruned

        every = [(layers, i) for layers in self._modules(host) for i in range(len(layers))]
        for (layers, i), skipped in zip(every, self.get_skip(host)[0], strict=True):
            if skipped:
                layers[i] = pruned(layers[i])


def _lengths(config) -> tuple[int, int]:
    """Tokens of the longest source and target: the visual ones stand beside the text."""
    text = getattr(config, "max_position_embeddings", None) or _LENGTH
    return text + getattr(config, "n_boxes", 0) * getattr(config, "n_images", 0), text
