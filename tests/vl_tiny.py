"""Tiny random VL-BART and VL-T5, their inputs and golden tensors, for the tests of models, methods and patching."""

import functools
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import fastpetl
from fastpetl.models import VLT5, VLBart, VLBartConfig, VLT5Config

GOLDEN = Path(__file__).parent / "golden"
KINDS = {"vlbart": (VLBart, VLBartConfig), "vlt5": (VLT5, VLT5Config)}
TEXT = {"bart": (BartForConditionalGeneration, BartConfig), "t5": (T5ForConditionalGeneration, T5Config)}
METHODS = ("none", "adapter", "adapter_ln", "multiple_adapter", "half_shared_adapter")
METHODS += ("compacter", "multiple_compacter", "compacter_lowrank", "lowrank_adapter", "hyperformer")
METHODS += ("prompt", "multiple_prompt", "lora", "multiple_lora")
TASKS = ("vqa", "gqa", "nlvr")
SIZES = {
    "vlbart": {
        "vocab_size": 60,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 40,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    },
    "vlt5": {
        "vocab_size": 60,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    },
}
FEATURES = {"feat_dim": 24, "n_boxes": 9}


def tiny(kind, **config):
    """Weights of unit-ish scale, so that attention is not uniform and an error anywhere is seen in the logits."""
    torch.manual_seed(7)
    model_class, config_class = KINDS[kind]
    model = model_class(config_class(**{**SIZES[kind], **FEATURES, **config})).eval()
    model.generation_config.forced_eos_token_id = None
    randomize(model)
    return model


def text_model(kind, **config):
    """Hugging Face's own BART or T5 of the same sizes."""
    model_class, config_class = TEXT[kind]
    torch.manual_seed(7)
    start = {"decoder_start_token_id": 0, "pad_token_id": 0} if kind == "t5" else {}
    model = model_class(config_class(**{**SIZES[f"vl{kind}"], **start, **config})).eval()
    model.generation_config.forced_eos_token_id = None
    randomize(model)
    return model


def randomize(model, std=0.15):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p) * std
            is_gain = p.dim() == 1 and ("norm" in name or "embedding.1" in name) and name.endswith("weight")
            p.copy_(noise + 1 if is_gain else noise)


def tiny_adapters(kind, patch=False, sharing="multiple", config=None, **adapters):
    """The same with adapters that matter (random, not the small initial ones), the task set."""
    model = tiny(kind, **(config or {}))
    adapters = {"tasks": TASKS, "sharing": sharing, "bottleneck": 6, **adapters}
    fastpetl.attach(model, fastpetl.AdapterConfig(**adapters), patch=False)
    randomize(model)
    fastpetl.task(model, "gqa")
    return fastpetl.patch(model) if patch else model


def inputs(batch=3, padded=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (batch, 7), generator=generator)
    mask = torch.ones(batch, 7, dtype=torch.long)
    if padded:
        mask[-1, 4:] = 0
    labels = torch.randint(3, 60, (batch, 5), generator=generator)
    labels[0, 3:] = -100
    feats = torch.randn(batch, 16, FEATURES["feat_dim"], generator=generator).to(dtype)
    return {"input_ids": ids, "attention_mask": mask, "vis_feats": feats, "labels": labels}


def run(model, **kwargs):
    torch.manual_seed(1)
    return model(**{**inputs(dtype=model.dtype), **kwargs})


# --- golden -----------------------------------------------------------------------------------------------------------


@functools.cache
def golden(kind, method):
    with safe_open(GOLDEN / f"{kind}_{method}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["meta"])


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def golden_inputs(tensors, task):
    """Arguments of the forward: the originals pass the two kinds of ids in a tuple with the features, unnamed."""
    return {
        k.replace("vis_img_", "img_").replace("vis_obj_", "obj_"): v for k, v in part(tensors, f"{task}/input/").items()
    }


def original_state(kind, method):
    """A checkpoint as the originals write it: aliased tensors under every name, tasks in their order, not sorted."""
    tensors, meta = golden(kind, method)
    state = part(tensors, "param/")
    state |= {alias: state[name] for alias, name in meta["aliases"].items()}

    def order(name):
        return next((i for i, task in enumerate(meta["tasks"]) if task in name.split(".")), -1)

    return dict(sorted(state.items(), key=lambda item: order(item[0])))


def golden_model(kind, method):
    model_class, config_class = KINDS[kind]
    _, meta = golden(kind, method)
    fields = config_class.__dataclass_fields__
    config = config_class(**{key: value for key, value in meta["config"].items() if key in fields})
    model = model_class.from_original(original_state(kind, method), config)
    if method == "none":
        for name, p in model.named_parameters():
            p.requires_grad_("visual_embedding" in name)
    return model
