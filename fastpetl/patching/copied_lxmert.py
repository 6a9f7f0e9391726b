"""CLIP-ViL's and LXMERT's own BERT modules, wherever they were copied: patch rules, and the blocks."""

from __future__ import annotations

import torch
from torch import nn

from fastpetl.patching._copied import has, is_copied, mask, tasks, told
from fastpetl.patching._copied_turns import SkipsCopied
from fastpetl.patching._seq2seq import attention_check, attention_note
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
    counting ask; LXMERT's image layers are a list of their own. Its cross-modal layers, of which CLIP-ViL has none, are
    no blocks.
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
        tokens = blocks.lengths[0]
        x = empty(tokens)
        return (x, x.new_zeros(1, 1, 1, tokens), *told(layer).values())


FAMILY = CopiedBertFamily()
