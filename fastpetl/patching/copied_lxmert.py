"""CLIP-ViL's and LXMERT's own BERT modules, wherever they were copied: patch rules, and the blocks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastpetl.patching._copied import has, is_copied, mask, tasks, told
from fastpetl.patching._copied_turns import SkipsCopied
from fastpetl.patching._macs import without_hooks
from fastpetl.patching._seq2seq import attention_check, attention_note
from fastpetl.patching._turns import Blocks
from fastpetl.patching.registry import CopiedRule

_NN = "fastpetl.nn.copied_lxmert"
_ATTENTION = {"query", "key", "value", "dropout"}
_OUTPUT = {"dense", "LayerNorm", "dropout"}


def _looks_attention(module) -> bool:
    later = "position_embedding_type" in module.__dict__  # transformers' BERT, as METER copied it
    return module._modules.keys() == _ATTENTION and has(module, "all_head_size") and not later and is_copied(module)


def routed_output(module) -> bool:
    """Semantics: has it the children of an output that is told the task? Without adapters, `adapter` is None."""
    adapter = module._modules.get("adapter")
    routed = adapter is None or isinstance(adapter._modules.get("adapters"), nn.ModuleDict)
    return module._modules.keys() - {"adapter"} == _OUTPUT and has(module, "adapter") and routed and is_copied(module)


def _check_attention(attention) -> str | None:
    from fastpetl.nn.inline import structure_reason
    from fastpetl.nn.lxmert import PROJECTIONS

    return structure_reason(attention, PROJECTIONS) or attention_check(attention, PROJECTIONS)


def _check_output(output) -> str | None:
    from fastpetl.nn.bert import OUTPUT
    from fastpetl.nn.inline import structure_reason

    return structure_reason(output, OUTPUT)


def _probe_attention(attention):
    device = attention.query.weight.device
    x = torch.randn(2, 5, attention.query.in_features, device=device)
    source = torch.randn(2, 4, attention.key.in_features, device=device)
    if attention.key.in_features == attention.query.in_features:
        yield (x, x), {}
        yield (x, x, mask(2, 1, 5, device)), {}
    yield (x, source, mask(2, 1, 4, device)), {}


def _probe_output(output):
    inputs, width = output.dense.in_features, output.dense.out_features
    device = output.dense.weight.device
    for task in tasks(output):
        yield (torch.randn(2, 5, inputs, device=device), torch.randn(2, 5, width, device=device), task), {}


RULES = (
    CopiedRule(
        "lxmert.copied_attention",
        f"{_NN}:CopiedLxmertAttention",
        _looks_attention,
        _check_attention,
        _probe_attention,
        ops=("linear", "attention"),
        note=attention_note,
    ),
    CopiedRule(
        "lxmert.copied_output",
        f"{_NN}:CopiedLxmertOutput",
        routed_output,
        _check_output,
        _probe_output,
        ops=("linear", "residual_norm"),
    ),
)


class CopiedBertFamily(SkipsCopied):
    """Answers for a module that has a list of BERT's layers, CLIP-ViL's with adapters or plain ones, what skipping and
    counting ask. LXMERT has a list of image layers too, and one of pairs, of which CLIP-ViL has none: blocks are then
    numbered as those of transformers' LXMERT.
    """

    name = "BERT (copied)"
    lengths = {"text": (512,), "image": (36,)}  # noqa: RUF012

    def looks(self, module) -> bool:
        return module._modules.keys() == {"attention", "intermediate", "output"} and is_copied(module)

    def kind(self, name: str, block) -> str:
        return "image" if name.startswith("r_") else "text"

    def calls(self, block, form: int):
        from fastpetl.nn.turns import Calls

        return Calls(form)

    def example(self, blocks, layer, empty) -> tuple:
        if blocks.half is not None:
            return tuple(map(empty, blocks.lengths))
        tokens = blocks.lengths[0]
        x = empty(tokens)
        return (x, x.new_zeros(1, 1, 1, tokens), *told(layer).values())

    def streams(self, host) -> list:
        from fastpetl.nn.hf_turns import LxmertPair

        lists = super().streams(host)
        for prefix, module in host.named_modules():
            pairs = module._modules.get("x_layers")
            if not _is_pairs(pairs):
                continue
            path, order = f"{prefix}.x_layers".lstrip("."), max(len(host.get_submodule(one.path)) for one in lists)
            known = pairs.__dict__.get("_fastpetl_streams")
            calls = LxmertPair() if known is None else known[0].calls
            if known is None:
                _check_pair(path, next(iter(pairs._modules.values())))
            text, image = self.lengths["text"] + self.lengths["image"]
            lang = Blocks(path, "text", calls, (text, image), order=order, half="lang")
            visn = Blocks(path, "image", calls, (image, text), order=order, half="visn")
            texts, images = ([one for one in lists if one.kind == kind] for kind in ("text", "image"))
            lists = [*texts, lang, *images, visn]
        return lists


def _is_pairs(module) -> bool:
    """Is it a list of LXMERT's pairs, be some of them pruned?"""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return False
    pairs = {"visual_attention", "lang_self_att", "visn_self_att", "lang_output", "visn_output"}
    return "_fastpetl_streams" in module.__dict__ or all(
        pairs <= pair._modules.keys() and is_copied(pair) for pair in module._modules.values()
    )


def _check_pair(path: str, pair) -> None:
    """Semantics: ValueError if a copy of a pair does not take the original's call, or does not give the pair that its
    two halves give.
    """
    from fastpetl.nn.hf_turns import PARTS, LxmertPair

    trial = without_hooks(copy.deepcopy(pair)).float().eval().requires_grad_(False)
    device = next(trial.parameters()).device
    width = next(m for m in trial.modules() if isinstance(m, nn.LayerNorm)).normalized_shape[0]
    x, y = (torch.linspace(-1, 1, n * width, device=device).view(1, n, width) for n in (5, 3))
    halves, masks = LxmertPair(), [x.new_zeros(1, 1, 1, n) for n in (5, 3)]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            got = trial(x, masks[0], y, masks[1])
            want = [halves.half(trial, half)(*own) for half, own in zip(PARTS, ((x, y), (y, x)), strict=True)]
            pairs = list(zip(got, want, strict=True))
            same = x.is_meta or all(torch.allclose(*two, atol=1e-4) for two in pairs)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"skip: {path}.0 does not take the original's call ({reason})") from error
    if not same:
        raise ValueError(f"skip: {path}.0 gives another pair than its halves give, expected the original's")


FAMILY = CopiedBertFamily()
