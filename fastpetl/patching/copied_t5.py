"""VL-T5's own T5 modules, wherever they were copied: patch rules, and the blocks. Their AdapterController is of
VL-BART.
"""

from __future__ import annotations

import torch

from fastpetl.patching._copied import has, is_copied, mask, tasks, told
from fastpetl.patching._copied_turns import SkipsCopiedSeq2Seq
from fastpetl.patching._seq2seq import attention_check, attention_note
from fastpetl.patching.registry import CopiedRule

_NN = "fastpetl.nn.copied_t5"
_ATTENTION = {"q", "k", "v", "o"}


def _looks_attention(module) -> bool:
    names = module._modules.keys() - {"relative_attention_bias"}
    return names == _ATTENTION and has(module, "key_value_proj_dim") and is_copied(module)


def _looks_norm(module) -> bool:
    weight_only = not module._modules and module._parameters.keys() == {"weight"}
    return weight_only and "variance_epsilon" in module.__dict__ and is_copied(module)


def _looks_dense(module) -> bool:
    return module._modules.keys() - {"act"} == {"wi", "wo", "dropout"} and is_copied(module)


def _looks_gated(module) -> bool:
    inputs = module._modules.keys() - {"act", "gelu_act"} == {"wi_0", "wi_1", "wo", "dropout"}
    return inputs and (has(module, "act") or has(module, "gelu_act")) and is_copied(module)


def _looks_block(module) -> bool:
    layers = getattr(module._modules.get("layer"), "_modules", {})
    return "0" in layers and has(layers["0"], "attn_adapter") and has(module, "is_decoder") and is_copied(module)


def _check_attention(attention) -> str | None:
    from fastpetl.nn.t5 import PROJECTIONS

    return attention_check(attention, PROJECTIONS)


def _check_dense(dense) -> str | None:
    from fastpetl.nn import t5
    from fastpetl.nn.inline import structure_reason

    return structure_reason(dense, t5.GATED if "wi_1" in dense._modules else t5.DENSE)


def _check_block(block) -> str | None:
    for i, layer in block.layer._modules.items():
        if layer._modules.get("adapter_hypernet") is not None:
            return f"layer.{i}: its adapters' weights are generated (Hyperformer)"
    return None


def _width(module) -> int:
    return next(p for p in module.parameters() if p.dim() == 2).shape[1]


def _draw(module, *lengths: int) -> list[torch.Tensor]:
    device = next(module.parameters()).device
    return [torch.randn(2, n, _width(module), device=device) for n in lengths]


def _probe_attention(attention):
    x, source = _draw(attention, 5, 4)
    bias = torch.randn(2, attention.n_heads, 5, 5, device=x.device)
    yield (x,), {}
    yield (x, mask(2, 5, 5, x.device)), {"use_cache": True}
    yield (x, None, None, bias), {}
    yield (x, mask(2, 1, 4, x.device), source), {}
    if attention.is_decoder:
        size = (2, attention.n_heads, 3, attention.key_value_proj_dim)
        past = tuple(torch.randn(size, device=x.device) for _ in range(2))
        yield (x, mask(2, 5, 8, x.device)), {"past_key_value": past, "use_cache": True}
        yield (x, None, source[:, :3]), {"past_key_value": past, "query_length": 5}


def _probe_norm(norm):
    yield (torch.randn(2, 5, norm.weight.shape[0], device=norm.weight.device),), {}


def _probe_dense(dense):
    yield (_draw(dense, 5)[0],), {}


def _probe_block(block):
    x, source = _draw(block, 5, 4)
    attention = block.layer[0].SelfAttention
    for task in tasks(block):
        if not block.is_decoder:
            yield (x, mask(2, 1, 5, x.device)), {"task": task}
            continue
        options = {"encoder_hidden_states": source, "task": task, "use_cache": True, "output_attentions": True}
        yield (x, mask(2, 5, 5, x.device)), {**options, "encoder_attention_mask": mask(2, 1, 4, x.device)}
        size = (attention.n_heads, attention.key_value_proj_dim)
        past = tuple(torch.randn(2, size[0], n, size[1], device=x.device) for n in (3, 3, 4, 4))
        yield (x,), {**options, "past_key_value": past, "output_attentions": False}
        yield (x,), {"task": task}


def _rule(kind: str, replacement: str, looks, check, probe, *ops, note=lambda module: "") -> CopiedRule:
    return CopiedRule(f"vlt5.copied_{kind}", f"{_NN}:{replacement}", looks, check, probe, ops=ops, note=note)


def _no_check(module) -> None:
    return None


RULES = (
    _rule(
        "attention", "CopiedT5Attention", _looks_attention, _check_attention, _probe_attention, "linear",
        note=attention_note,
    ),
    _rule("norm", "CopiedT5LayerNorm", _looks_norm, _no_check, _probe_norm, "residual_norm"),
    _rule("feed_forward", "CopiedT5DenseReluDense", _looks_dense, _check_dense, _probe_dense, "linear"),
    _rule("feed_forward", "CopiedT5DenseGatedDense", _looks_gated, _check_dense, _probe_dense, "linear"),
    _rule("block", "CopiedT5Block", _looks_block, _check_block, _probe_block),
)  # fmt: skip


def _children(module, name: str) -> dict:
    return getattr(module._modules.get(name), "_modules", {})


class CopiedVLT5Family(SkipsCopiedSeq2Seq):
    """Answers for a module with a copied T5's encoder and decoder what skipping and counting ask."""

    name = "VL-T5 (copied)"

    def looks(self, module) -> bool:
        layers = list(_children(module, "layer").values())
        there = layers and _ATTENTION <= _children(layers[0], "SelfAttention").keys()
        there = there and "wo" in _children(layers[-1], "DenseReluDense")
        return bool(there) and has(module, "is_decoder") and is_copied(module)

    def is_decoder(self, block) -> bool:
        return block.is_decoder

    def width(self, layer) -> int:
        return layer.layer[0].layer_norm.weight.shape[0]

    def calls(self, block, form: int):
        from fastpetl.nn.copied_seq2seq import T5Calls

        return T5Calls(form, block.is_decoder)

    def example(self, blocks, layer, empty) -> dict:
        n, *source = blocks.lengths
        x, heads = empty(n), layer.layer[0].SelfAttention.n_heads
        given = {"hidden_states": x, "position_bias": x.new_zeros(1, heads, n, n), **told(layer)}
        if not layer.is_decoder:
            return given
        bias = x.new_zeros(1, heads, n, *source)
        return {**given, "encoder_hidden_states": empty(*source), "encoder_decoder_position_bias": bias}


FAMILY = CopiedVLT5Family()
