"""What families answer about skipping whose blocks are research code that people copy."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from fastpetl.patching._macs import without_hooks
from fastpetl.patching._turns import Blocks, SkipsTurns

_FORMS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class SkipsCopied(SkipsTurns):
    """A host is a module with lists of blocks, which are known by their children as those that are patched are. What a
    block gives is seen in a call of a copy of the first one.
    """

    name: str
    routes_samples = False
    shortcuts: dict[str, str] = {}  # noqa: RUF012  the name of the list of shortcut adapters, by kind of blocks
    lengths: dict[str, tuple[int, ...]]  # tokens, by kind of blocks: the papers', there is no configuration

    def looks(self, module: nn.Module) -> bool:
        """Semantics: has it the children of a block?"""
        raise NotImplementedError

    def calls(self, block: nn.Module, form: int):
        """Semantics: how blocks like this are called, which give `form` values (0: one that is no tuple)."""
        raise NotImplementedError

    def kind(self, name: str, block: nn.Module) -> str:
        """Semantics: of the blocks in the list of this name."""
        raise NotImplementedError

    def _lists(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(name, list) of those right in it, text first; what was pruned is an Identity in a list that gives turns."""
        for name, child in module._modules.items():
            if not isinstance(child, nn.ModuleList | nn.Sequential) or not len(child):
                continue
            streams = child.__dict__.get("_fastpetl_streams")
            if streams is not None and streams[0].calls.owner is not None:
                known = streams[0].calls.owner == self.name
            else:
                known = all(map(self.looks, child._modules.values()))
            if known:
                yield name, child

    def _shortcuts_of(self, module: nn.Module, kind: str, n: int) -> str | None:
        from fastpetl.nn.copied_vilt import is_adapter

        name = self.shortcuts.get(kind)
        found = getattr(module._modules.get(name), "_modules", {}).values()
        inner = (next(iter(one._modules.values()), one) if isinstance(one, nn.Sequential) else one for one in found)
        known = all(isinstance(one, nn.Identity) or is_adapter(one) for one in inner)
        return name if len(found) == n and known else None

    def hosts(self, module: nn.Module) -> bool:
        if next(self._lists(module), None) is not None:
            return True
        outer = any(name in module._modules for name in self.shortcuts.values())
        return outer and any(True for inner in module.modules() for _ in self._lists(inner))

    def streams(self, host) -> list[Blocks]:
        found = []
        for prefix, module in host.named_modules():
            for name, blocks in self._lists(module):
                path = f"{prefix}.{name}".lstrip(".")
                calls = self._calls(path, blocks)
                shortcuts = self._shortcuts_of(host, calls.kind, len(blocks))
                found.append(Blocks(path, calls.kind, calls, self.lengths[calls.kind], shortcuts))
        return sorted(found, key=lambda blocks: blocks.kind != "text")

    def _calls(self, path: str, blocks):
        if "_fastpetl_streams" in blocks.__dict__:
            return blocks.__dict__["_fastpetl_streams"][0].calls
        block = next(iter(blocks._modules.values()))
        kind = self.kind(path.rpartition(".")[2], block)
        if blocks not in _FORMS:
            _FORMS[blocks] = self._form(path, block, kind)
        calls = self.calls(block, _FORMS[blocks])
        calls.owner, calls.kind = self.name, kind
        return calls

    def _form(self, path: str, block, kind: str) -> int:
        trial = without_hooks(copy.deepcopy(block)).float().eval().requires_grad_(False)
        width, device = self.width(trial), next(block.parameters()).device
        empty = lambda tokens, width=width: torch.zeros(1, tokens, width, device=device)  # noqa: E731
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            given = self.example(self._example_of(kind), trial, empty)
            named = given if isinstance(given, dict) else {}
            x, *more = named.values() if named else given
            try:
                out = trial(**named) if named else trial(x, *more)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"skip: {path}.0 does not take the original's call ({reason})") from error
        first = out[0] if isinstance(out, tuple) and out else out
        if not isinstance(first, torch.Tensor) or first.shape != x.shape:
            raise ValueError(f"skip: {path}.0 gives a {type(out).__name__}, expected its new state, alone or first")
        return len(out) if isinstance(out, tuple) else 0

    def _example_of(self, kind: str) -> Blocks:
        return Blocks("", kind, None, tuple(range(5, 5 + len(self.lengths[kind]))))

    def example(self, blocks: Blocks, layer, empty) -> tuple | dict:
        return tuple(map(empty, blocks.lengths))


class SkipsCopiedSeq2Seq(SkipsCopied):
    """A host has an `encoder` and a `decoder`, children of these, in each the list of its layers; blocks are the
    encoder's, then the decoder's.
    """

    lengths = {"encoder": (56,), "decoder": (20, 56)}  # noqa: RUF012  20 words and 36 boxes

    def _path(self, host, kind: str) -> str | None:
        found = [name for name, _ in self._lists(host._modules[kind])] if kind in host._modules else []
        return f"{kind}.{found[0]}" if len(found) == 1 else None

    def hosts(self, module: nn.Module) -> bool:
        return all(self._path(module, kind) for kind in self.lengths)

    def kind(self, name: str, block) -> str:
        return "decoder" if self.is_decoder(block) else "encoder"

    def is_decoder(self, block) -> bool:
        raise NotImplementedError

    def streams(self, host) -> list[Blocks]:
        found, order = [], 0
        for group, kind in enumerate(self.lengths):
            path = self._path(host, kind)
            layers = host.get_submodule(path)
            found.append(Blocks(path, kind, self._calls(path, layers), self.lengths[kind], order=order, group=group))
            order += len(layers)
        return found

    def setting_class(self) -> type:
        from fastpetl.nn.copied_seq2seq import Seq2SeqSetting

        return Seq2SeqSetting

    def set_skip(self, host, values, shortcut: str) -> None:
        """Semantics: as of `SkipsTurns`; the encoder notes what came out of it."""
        from fastpetl.nn.copied_seq2seq import knowing, original_of

        super().set_skip(host, values, shortcut)
        encoder = host.encoder
        encoder.__dict__.pop("_fastpetl_setting", None)
        encoder.__class__ = original_of(type(encoder))
        setting = host.__dict__.get("_fastpetl_setting")
        if setting is not None and setting.per_sample:
            encoder.__dict__["_fastpetl_setting"] = setting
            encoder.__class__ = knowing(type(encoder))
