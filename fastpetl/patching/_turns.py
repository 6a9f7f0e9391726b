"""What families answer about skipping whose blocks stand in lists somebody else loops over (`fastpetl.nn.turns`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastpetl.patching._macs import layer_macs, weightless


@dataclass(frozen=True)
class Blocks:
    """A stream of blocks: the list `path` of the host, or with `half` a half of each of its layers.

    kind: "text", "image", ...; calls: how they are called (`fastpetl.nn.turns.Calls`); lengths: tokens of the longest
    x, and of what else its blocks look at; shortcuts: the list of what stands in for them; order: when the turn of the
    first one comes; group: equal for streams of one batch.
    """

    path: str
    kind: str
    calls: object
    lengths: tuple[int, ...]
    shortcuts: str | None = None
    order: int = 0
    group: int = 0
    half: str | None = None


class SkipsTurns:
    """The part of a family that `fastpetl.skip` asks. A subclass says which streams a host has, in gate order."""

    def streams(self, host) -> list[Blocks]:
        raise NotImplementedError

    def example(self, blocks: Blocks, layer, empty) -> dict:
        """Semantics: the arguments of a call of the layer; empty(tokens) makes one sample of so many."""
        return {"hidden_states": empty(blocks.lengths[0])}

    def n_blocks(self, host) -> int:
        return sum(len(host.get_submodule(blocks.path)) for blocks in self.streams(host))

    def blocks(self, model: nn.Module, host) -> list:
        from fastpetl.skip.plan import Block

        prefix = next(name for name, module in model.named_modules() if module is host)
        found, (_, shortcut) = [], self.get_skip(host)
        for blocks in self.streams(host):
            for place, layer in enumerate(host.get_submodule(blocks.path)._modules.values()):
                name = f"{prefix}.{blocks.path}.{place}".lstrip(".") + (f".{blocks.half}" if blocks.half else "")
                instead = self._shortcuts(host, blocks)[place] if shortcut == "adapter" else None
                costs = self._macs(blocks, layer), _linear_macs(instead) * blocks.lengths[0]
                found.append(
                    Block(index=len(found), name=name, macs=costs[0], kind=blocks.kind, shortcut_macs=costs[1])
                )
        return found

    def _macs(self, blocks: Blocks, layer) -> int:
        """One sample through the layer."""
        layer = _part(blocks, layer)
        if isinstance(layer, nn.Identity):  # pruned
            return 0
        layer = weightless(layer)
        weight = next(p for p in layer.parameters() if p.is_floating_point())
        width = self.width(layer)
        empty = lambda tokens, width=width: weight.new_empty(1, tokens, width, device="meta")  # noqa: E731
        return layer_macs(layer, self.example(blocks, layer, empty))

    def width(self, layer) -> int:
        """Semantics: the size of the layer's x."""
        return next(m for m in layer.modules() if isinstance(m, nn.LayerNorm)).normalized_shape[0]

    def _shortcuts(self, host, blocks: Blocks):
        return None if blocks.shortcuts is None else list(host.get_submodule(blocks.shortcuts)._modules.values())

    def has_shortcut_adapters(self, host) -> bool:
        return any(blocks.shortcuts is not None for blocks in self.streams(host))

    def get_skip(self, host) -> tuple:
        setting = host.__dict__.get("_fastpetl_setting")
        if setting is None:
            return None, "adapter" if self.has_shortcut_adapters(host) else "identity"
        return setting.values, setting.shortcut

    def set_skip(self, host, values, shortcut: str) -> None:
        """Semantics: set what the model skips: None, a bool per block, or a policy of skip/policies.py. With nothing
        set the lists' classes are the originals again.
        """
        from fastpetl.nn.turns import Stream, original_of, taking_turns

        streams = self.streams(host)
        containers = [host.get_submodule(blocks.path) for blocks in streams]
        host.__dict__.pop("_fastpetl_setting", None)
        for container in containers:
            container.__dict__.pop("_fastpetl_streams", None)
            container.__class__ = original_of(type(container))
        if values is None:
            return
        order = [blocks.order + i for blocks, c in zip(streams, containers, strict=True) for i in range(len(c))]
        setting = host.__dict__["_fastpetl_setting"] = self.setting_class()(values, shortcut, tuple(order))
        first = 0
        for number, (blocks, container) in enumerate(zip(streams, containers, strict=True)):
            if len(container):
                shortcuts = self._shortcuts(host, blocks) if shortcut == "adapter" else None
                stream = Stream(setting, blocks.calls, number, first, blocks.group, shortcuts)
                container.__dict__.setdefault("_fastpetl_streams", []).append(stream)
                container.__class__ = taking_turns(original_of(type(container)))
            first += len(container)

    def setting_class(self) -> type:
        from fastpetl.nn.turns import Setting

        return Setting

    def is_pruned(self, host) -> bool:
        lists = ((blocks, host.get_submodule(blocks.path)._modules.values()) for blocks in self.streams(host))
        return any(isinstance(_part(blocks, layer), nn.Identity) for blocks, layers in lists for layer in layers)

    def prune(self, host) -> None:
        """Semantics: an Identity stands where a block, or a kept block's shortcut adapter, was."""
        values, shortcut = self.get_skip(host)
        values = iter(values)
        for blocks in self.streams(host):
            container = host.get_submodule(blocks.path)._modules
            shortcuts = {} if blocks.shortcuts is None else host.get_submodule(blocks.shortcuts)._modules
            for name, layer in list(container.items()):
                skipped = next(values)
                if skipped:
                    container[name] = blocks.calls.pruned(layer, blocks.half)
                if name in shortcuts and (not skipped or shortcut == "identity"):
                    shortcuts[name] = nn.Identity()
        self.set_skip(host, *self.get_skip(host))  # of what is left


def _part(blocks: Blocks, layer):
    return blocks.calls.half(layer, blocks.half)


def _linear_macs(module: nn.Module | None) -> int:
    linears = () if module is None else (m for m in module.modules() if isinstance(m, nn.Linear))
    return sum(linear.in_features * linear.out_features for linear in linears)
