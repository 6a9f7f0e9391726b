"""CLIP (Hugging Face transformers), vision and text: patch rules, and where VL-Adapter's methods go."""

from __future__ import annotations

import sys

from fastpetl.patching._prompts import TakesPrompts
from fastpetl.patching._seq2seq import attention_check, attention_note, original_signature
from fastpetl.patching._sites import LayerFamily
from fastpetl.patching._turns import Blocks
from fastpetl.patching.registry import Rule

_HF = "transformers.models.clip.modeling_clip"
_NN = "fastpetl.nn.clip"
_FORWARD = {  # what the fused classes were written for
    "CLIPAttention": ["hidden_states", "attention_mask", "kwargs"],
    "CLIPMLP": ["hidden_states"],
    "CLIPEncoderLayer": ["hidden_states", "attention_mask", "kwargs"],
}


def _check(name: str, structure: str):
    def check(module) -> str | None:
        from fastpetl.nn import clip
        from fastpetl.nn.inline import structure_reason

        reason = original_signature(_HF, name, _FORWARD)
        if reason is None and structure == "PROJECTIONS":
            return attention_check(module, clip.PROJECTIONS)
        return reason or structure_reason(module, getattr(clip, structure))

    return check


def _rule(kind: str, name: str, structure: str, *ops: str, **more) -> Rule:
    return Rule(f"clip.{kind}", f"{_HF}:{name}", f"{_NN}:Fused{name}", _check(name, structure), ops=ops, **more)


RULES = (
    _rule("attention", "CLIPAttention", "PROJECTIONS", "linear", "attention", note=attention_note),
    _rule("mlp", "CLIPMLP", "MLP", "linear"),
    _rule("layer", "CLIPEncoderLayer", "NORMS", "residual_norm"),
    Rule(
        "clip.layer",
        "fastpetl.nn.task_layers:TaskCLIPEncoderLayer",
        f"{_NN}:FusedTaskCLIPEncoderLayer",
        _check("CLIPEncoderLayer", "NORMS"),
        ops=("residual_norm",),
    ),
)


class ClipFamily(TakesPrompts, LayerFamily):
    """Answers for a CLIPModel, or one of its two sides, what attaching, skipping and counting ask."""

    name = "CLIP (transformers)"
    module = _HF
    host_classes = ("CLIPModel", "CLIPTextModel", "CLIPVisionModel")
    layer_classes = (f"{_HF}:CLIPEncoderLayer",)
    outputs = {"self_attn.out_proj": False, "mlp.fc2": False}
    queries_and_values = ("q_proj", "v_proj")
    prompted = {
        (_HF, "CLIPTextModel"): {
            "": ("CLIPTextModel", "PromptedCLIPText"),
            "embeddings": ("CLIPTextEmbeddings", "PromptedEmbeddings"),
            "encoder": ("CLIPEncoder", "PromptedEncoder"),
        },
        (_HF, "CLIPVisionModel"): {
            "": ("CLIPVisionModel", "Prompted"),
            "embeddings": ("CLIPVisionEmbeddings", "PromptedEmbeddings"),
        },
    }
    adapterhub = (  # where its adapters stand: (here, there)
        (r"\.self_attn\.out_proj\.output_adapter$", ".attention_adapters.adapters"),
        (r"\.mlp\.fc2\.output_adapter$", ".output_adapters.adapters"),
    )

    def streams(self, host) -> list:
        from fastpetl.nn.hf_turns import HFCalls

        sides = [name for name in ("text_model", "vision_model") if name in host._modules]
        found = []
        for group, side in enumerate(sides or [""]):  # a batch of texts and one of images
            config = (host._modules[side] if side else host).config
            text = hasattr(config, "vocab_size")
            tokens = config.max_position_embeddings if text else (config.image_size // config.patch_size) ** 2 + 1
            reason = "CLIPTextModel, which looks for each text's end in its tokens," if text else None
            reason = "CLIPModel, which compares all texts with all images," if sides else reason
            path, calls = f"{side}.encoder.layers".lstrip("."), HFCalls(config, one_copy=reason)
            found.append(Blocks(path, "text" if text else "image", calls, (tokens,), group=group))
        return found

    def example(self, blocks, layer, empty) -> dict:
        return {**super().example(blocks, layer, empty), "attention_mask": None}

    # One side alone is named so there, and in transformers before 5.
    adapterhub_side = {"CLIPTextModel": "text_model.", "CLIPVisionModel": "vision_model."}

    def stacks(self, host) -> list:
        """Semantics: the two sides, which differ in width."""
        return [host.text_model, host.vision_model] if isinstance(host, sys.modules[_HF].CLIPModel) else [host]


FAMILY = ClipFamily()
