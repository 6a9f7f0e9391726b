"""VL-Adapter's own BART layers and AdapterController (VL-T5's too), wherever they were copied: patch rules, and the
blocks.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpetl.patching._copied import has, is_copied, mask, tasks, told
from fastpetl.patching._copied_turns import SkipsCopiedSeq2Seq
from fastpetl.patching._seq2seq import attention_check, attention_note
from fastpetl.patching.registry import CopiedRule

_NN = "fastpetl.nn.copied_bart"
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "out_proj"}
_LAYER = {"self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"}


def _looks_controller(module) -> bool:
    return isinstance(module._modules.get("adapters"), nn.ModuleDict) and (
        is_copied(module) and "add_layer_norm_before_adapter" in module.__dict__
    )


def _looks_attention(module) -> bool:
    return module._modules.keys() == _PROJECTIONS and "is_decoder" in module.__dict__ and is_copied(module)


def _looks_layer(module, cross: bool) -> bool:
    names = module._modules.keys()
    adapter = "self_attn_adapter" if cross else "attn_adapter"
    return _LAYER <= names and ("encoder_attn" in names) == cross and has(module, adapter) and is_copied(module)


def _check_controller(controller) -> str | None:
    from fastpetl.nn import copied_bart as fused
    from fastpetl.nn.inline import structure_reason

    for task, adapter in controller.adapters._modules.items():
        reason = fused.adapter_reason(adapter)
        if reason is not None:
            return f"adapters.{task}: {reason}"
    return structure_reason(controller, fused.controller_structure(controller))


def _check_attention(attention) -> str | None:
    from fastpetl.nn.bart import PROJECTIONS

    return attention_check(attention, PROJECTIONS)


def _check_layer(layer) -> str | None:
    from fastpetl.nn import copied_bart as fused
    from fastpetl.nn.inline import structure_reason

    cls = fused.CopiedBartDecoderLayer if "encoder_attn" in layer._modules else fused.CopiedBartEncoderLayer
    if "adapter_hypernet" in layer._modules:
        return "its adapters' weights are generated (Hyperformer)"
    return structure_reason(layer, cls.structure)


def _draw(module, *lengths: int) -> list[torch.Tensor]:
    weight = next(p for p in module.parameters() if p.dim() == 2)
    width = module.embed_dim if hasattr(module, "embed_dim") else weight.shape[1]
    return [torch.randn(2, n, width, device=weight.device) for n in lengths]


def _mask(x, keys: int) -> torch.Tensor:
    return mask(2, x.shape[1], keys, x.device)


def _probe_controller(controller):
    adapters = controller.adapters._modules
    width = next(iter(adapters.values())).down_sampler.in_features
    device = next(controller.parameters()).device
    for task in adapters:
        yield (torch.randn(2, 5, width, device=device), task), {}


def _probe_attention(attention):
    x, source = _draw(attention, 5, 4)
    yield (x,), {}
    yield (x,), {"attention_mask": _mask(x, 5)}
    yield (x, source, None, _mask(x, 4)), {}
    if attention.is_decoder:
        size = (2, attention.num_heads, 3, attention.head_dim)
        past = tuple(torch.randn(size, device=x.device) for _ in range(2))
        yield (x,), {"past_key_value": past, "attention_mask": _mask(x, 8)}
        yield (x, source), {"past_key_value": past}


def _probe_encoder(layer):
    (x,) = _draw(layer, 5)
    for task in tasks(layer):
        yield (x, _mask(x, 5)), {"task": task}


def _probe_decoder(layer):
    x, source = _draw(layer, 5, 4)
    for task in tasks(layer):
        yield (x, _mask(x, 5), source, _mask(x, 4)), {"task": task}
    yield (x,), {"task": task, "use_cache": False}
    attention = layer.self_attn
    past = tuple(torch.randn(2, attention.num_heads, n, attention.head_dim, device=x.device) for n in (3, 3, 4, 4))
    yield (x, _mask(x, 8), source), {"task": task, "past_key_value": past}


def _rule(kind: str, replacement: str, looks, check, probe, ops, note=None) -> CopiedRule:
    note = note or (lambda module: "")
    return CopiedRule(f"vlbart.copied_{kind}", f"{_NN}:{replacement}", looks, check, probe, ops=ops, note=note)


RULES = (
    _rule(
        "controller", "CopiedAdapterController", _looks_controller, _check_controller, _probe_controller, ("adapter",)
    ),
    _rule(
        "attention",
        "CopiedBartAttention",
        _looks_attention,
        _check_attention,
        _probe_attention,
        ("linear", "attention"),
        attention_note,
    ),
    _rule(
        "encoder_layer",
        "CopiedBartEncoderLayer",
        lambda module: _looks_layer(module, False),
        _check_layer,
        _probe_encoder,
        ("linear", "residual_norm"),
    ),
    _rule(
        "decoder_layer",
        "CopiedBartDecoderLayer",
        lambda module: _looks_layer(module, True),
        _check_layer,
        _probe_decoder,
        ("linear", "residual_norm"),
    ),
)


class CopiedVLBartFamily(SkipsCopiedSeq2Seq):
    """Answers for a module with a copied BART's encoder and decoder what skipping and counting ask."""

    name = "VL-BART (copied)"

    def looks(self, module) -> bool:
        return module._modules.keys() >= _LAYER and is_copied(module)

    def is_decoder(self, block) -> bool:
        return "encoder_attn" in block._modules

    def calls(self, block, form: int):
        from fastpetl.nn.copied_seq2seq import BartCalls

        return BartCalls(form, self.is_decoder(block))

    def example(self, blocks, layer, empty) -> dict:
        given = {"hidden_states": empty(blocks.lengths[0]), "attention_mask": None, **told(layer)}
        return given | ({"encoder_hidden_states": empty(blocks.lengths[1])} if self.is_decoder(layer) else {})


FAMILY = CopiedVLBartFamily()
