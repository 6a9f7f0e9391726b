"""METER's and DAS-METER's own BERT modules, wherever they were copied: patch rules, and the blocks. Their
`BertIntermediate` is CLIP-ViL's and LXMERT's too.
"""

from __future__ import annotations

import torch

from fastpetl.patching._bert_like import intermediate_note
from fastpetl.patching._copied import has, is_copied
from fastpetl.patching._copied_turns import SkipsCopied
from fastpetl.patching._seq2seq import attention_check, attention_note
from fastpetl.patching.copied_lxmert import routed_output
from fastpetl.patching.registry import CopiedRule

_NN = "fastpetl.nn.copied_bert"
_ATTENTION = {"query", "key", "value", "dropout"}
_OUTPUT = {"dense", "LayerNorm", "dropout"}


def _looks_attention(module) -> bool:
    # transformers' own of today have no such attribute, and rules of their own.
    return module._modules.keys() == _ATTENTION and "position_embedding_type" in module.__dict__


def _looks_output(module) -> bool:
    return module._modules.keys() - {"adapter"} == _OUTPUT and is_copied(module) and not routed_output(module)


def _looks_intermediate(module) -> bool:
    own = module._modules.keys() - {"intermediate_act_fn"} == {"dense"}
    return own and has(module, "intermediate_act_fn") and is_copied(module)


def _check_attention(attention) -> str | None:
    from fastpetl.nn import copied_bert as fused

    return fused.attention_reason(attention) or attention_check(attention, fused.PROJECTIONS)


def _check_output(output) -> str | None:
    from fastpetl.nn import copied_bert as fused
    from fastpetl.nn import copied_vilt
    from fastpetl.nn.inline import structure_reason

    adapter = output._modules.get("adapter")
    if adapter is not None:
        if not copied_vilt.is_adapter(adapter):
            return f"adapter is {type(adapter).__name__}, expected DAS's ParallelAdapter"
        reason = copied_vilt.adapter_reason(adapter)
        if reason is not None:
            return f"adapter: {reason}"
    return structure_reason(output, fused.output_structure(output))


def _check_intermediate(intermediate) -> str | None:
    from fastpetl.nn.bert import INTERMEDIATE
    from fastpetl.nn.inline import structure_reason

    return structure_reason(intermediate, INTERMEDIATE)


def _probe_attention(attention):
    device, width = attention.query.weight.device, attention.query.in_features
    x, source = (torch.randn(2, n, width, device=device) for n in (5, 4))
    mask, other = (torch.zeros(2, 1, 1, n, device=device) for n in (5, 4))
    mask[0, ..., 3:] = other[1, ..., :2] = torch.finfo(torch.float32).min
    yield (x,), {}
    yield (x, mask), {}
    yield (x, mask, None, source, other), {}
    yield (x,), {"encoder_hidden_states": source}


def _probe_output(output):
    device = output.dense.weight.device
    h = torch.randn(2, 5, output.dense.in_features, device=device)
    yield (h, torch.randn(2, 5, output.dense.out_features, device=device)), {}


def _probe_intermediate(intermediate):
    dense = intermediate.dense
    yield (torch.randn(2, 5, dense.in_features, device=dense.weight.device),), {}


RULES = (
    CopiedRule(
        "meter.copied_attention",
        f"{_NN}:CopiedBertSelfAttention",
        _looks_attention,
        _check_attention,
        _probe_attention,
        ops=("linear", "attention"),
        note=attention_note,
    ),
    CopiedRule(
        "meter.copied_output",
        f"{_NN}:CopiedBertOutput",
        _looks_output,
        _check_output,
        _probe_output,
        ops=("linear", "residual_norm"),
    ),
    CopiedRule(
        "bert.copied_intermediate",
        f"{_NN}:CopiedBertIntermediate",
        _looks_intermediate,
        _check_intermediate,
        _probe_intermediate,
        ops=("linear",),
        note=intermediate_note,
    ),
)


class CopiedMeterFamily(SkipsCopied):
    """Answers for a module that has lists of METER's cross-modal layers, and DAS's shortcut adapters, what skipping and
    counting ask; blocks are numbered as DAS's gates: the text layers, then the image layers. The loop that was copied
    gives both of a pair what the pair before gave.
    """

    name = "METER (copied)"
    shortcuts = {"text": "adapter_list_l", "image": "adapter_list_v"}  # noqa: RUF012
    lengths = {"text": (50, 577), "image": (577, 50)}  # noqa: RUF012  at 384 x 384

    def looks(self, module) -> bool:
        return {"attention", "crossattention", "intermediate", "output"} <= module._modules.keys() and is_copied(module)

    def kind(self, name: str, block) -> str:
        return "image" if "image" in name else "text"

    def calls(self, block, form: int):
        from fastpetl.nn.turns import Calls

        return Calls(form, mask_at=2)


FAMILY = CopiedMeterFamily()
