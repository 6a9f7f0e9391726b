"""OpenAI's own CLIP block, as METER and CLIP-ViL have it, wherever it was copied: patch rule, and the blocks."""

from __future__ import annotations

import torch
from torch import nn

from fastpetl.patching._copied import is_copied
from fastpetl.patching._copied_turns import SkipsCopied
from fastpetl.patching.registry import CopiedRule


def _looks(module) -> bool:
    children = module._modules
    return (
        children.keys() == {"attn", "ln_1", "mlp", "ln_2"}
        and isinstance(children["attn"], nn.MultiheadAttention)
        and children["mlp"]._modules.keys() == {"c_fc", "gelu", "c_proj"}
        and is_copied(module)
    )


def _check(block) -> str | None:
    from fastpetl.nn import copied_clip as fused
    from fastpetl.nn.inline import structure_reason

    return structure_reason(block, fused.STRUCTURE) or fused.block_reason(block)


def _probe(block):
    mask = block.__dict__.get("attn_mask")
    tokens = 5 if mask is None else mask.shape[-1]
    shape = (3, tokens) if block.attn.batch_first else (tokens, 3)
    yield (torch.randn(*shape, block.attn.embed_dim, device=block.mlp.c_fc.weight.device),), {}


RULES = (
    CopiedRule(
        "clip.copied_block", "fastpetl.nn.copied_clip:CopiedCLIPBlock", _looks, _check, _probe,
        ops=("linear", "attention"),
    ),
)  # fmt: skip


class CopiedClipFamily(SkipsCopied):
    """Answers for a module that has a list of CLIP's blocks, of one side, what skipping and counting ask."""

    name = "CLIP (copied)"
    lengths = {"image": (577,), "text": (77,)}  # noqa: RUF012  ViT-B/16 at 384 x 384

    def looks(self, module) -> bool:
        return _looks(module)

    def kind(self, name: str, block) -> str:
        return "image" if block.__dict__.get("attn_mask") is None else "text"

    def calls(self, block, form: int):
        from fastpetl.nn.copied_clip import BlockCalls

        return BlockCalls(form, block.attn.batch_first)

    def example(self, blocks, layer, empty) -> tuple:
        mask = layer.__dict__.get("attn_mask")
        x = empty(blocks.lengths[0] if mask is None else mask.shape[-1])
        layer.attn_mask = mask if mask is None else mask.to(x.device)  # it is a copy
        return (x if layer.attn.batch_first else x.transpose(0, 1),)


FAMILY = CopiedClipFamily()
