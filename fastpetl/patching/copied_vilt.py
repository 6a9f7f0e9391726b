"""ViLT's own code (dandelin/ViLT, DoubtedSteam/DAS) and DAS's adapters, wherever they were copied: patch rules, and the
blocks.
"""

from __future__ import annotations

import torch

from fastpetl.patching._copied_turns import SkipsCopied
from fastpetl.patching.registry import CopiedRule

_NN = "fastpetl.nn.copied_vilt"


def _looks_adapter(module) -> bool:
    names = module._modules
    return {"down_proj", "up_proj", "non_linear_func"} <= names.keys()


def _looks_block(module) -> bool:
    names = module._modules
    return "drop_path" in names and {"norm1", "attn", "norm2", "mlp"} <= names.keys()


def _check_adapter(adapter) -> str | None:
    from fastpetl.nn import copied_vilt as fused
    from fastpetl.nn.inline import structure_reason

    if not fused.is_adapter(adapter):
        return f"its children are {', '.join(adapter._modules)}, expected {', '.join(fused.ADAPTER_CHILDREN)}"
    return structure_reason(adapter, fused.adapter_structure(adapter)) or fused.adapter_reason(adapter)


def _check_block(block) -> str | None:
    from fastpetl.nn import copied_vilt as fused
    from fastpetl.nn.inline import structure_reason

    if not fused.is_block(block):
        expected = ", ".join(fused.BLOCK_CHILDREN)
        return f"its children are {', '.join(block._modules)}, expected {expected} (and adapter0, adapter1)"
    for name in ("adapter0", "adapter1"):
        adapter = block._modules.get(name)
        reason = None if adapter is None else _check_adapter(adapter)
        if reason is not None:
            return f"{name}: {reason}"
    return structure_reason(block, fused.block_structure(block))


def _probe_adapter(adapter):
    x, f = torch.randn(2, 3, 5, adapter.down_proj.in_features, device=adapter.down_proj.weight.device)
    yield (x,), {}
    yield (x,), {"add_residual": False}
    yield (x,), {"residual": f}


def _probe_block(block):
    device = block.norm1.weight.device
    x = torch.randn(2, 5, block.attn.qkv.in_features, device=device)
    yield (x,), {}
    yield (x,), {"mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=device)}


def _note_block(block) -> str:
    notes = ["no attention map: the second output is None"]
    if block.attn.attn_drop.p > 0:
        notes.append(f"attention dropout {block.attn.attn_drop.p}: attention runs in torch while training")
    return "; ".join(notes)


RULES = (
    CopiedRule("das.adapter", f"{_NN}:CopiedAdapter", _looks_adapter, _check_adapter, _probe_adapter, ops=("adapter",)),
    CopiedRule(
        "vilt.block",
        f"{_NN}:CopiedBlock",
        _looks_block,
        _check_block,
        _probe_block,
        ops=("linear", "attention", "adapter"),
        note=_note_block,
        omits=(1,),
    ),
)


class CopiedViltFamily(SkipsCopied):
    """Answers for a module that has a list of ViLT's blocks, and DAS's `adapter_list` beside it or around, what
    skipping and counting ask.
    """

    name = "ViLT (copied)"
    shortcuts = {"multimodal": "adapter_list"}  # noqa: RUF012
    lengths = {"multimodal": (40 + 144 + 1,)}  # noqa: RUF012  at 384 x 384

    def looks(self, module) -> bool:
        from fastpetl.nn.copied_vilt import is_block

        return is_block(module)

    def kind(self, name: str, block) -> str:
        return "multimodal"

    def calls(self, block, form: int):
        from fastpetl.nn.copied_vilt import BlockCalls

        return BlockCalls(form)


FAMILY = CopiedViltFamily()
