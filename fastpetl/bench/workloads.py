"""The models of `bench vilt` and `bench models`: real sizes, random weights from a fixed seed, adapters attached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class Workload:
    """One model and its batches.

    build(tiny): the attached, unpatched fp32 model in eval mode (of BACKBONES: nothing attached yet).
    batch(model, tiny, dtype, seed, batch): the arguments of a training forward, which returns an object with `loss` and
    `logits`. for_inference: what of them inference gets. compile: compiles what of the model compiles without graph
    breaks. bars: (dtype, mode, against) -> the ratio that `patched` must reach.
    """

    name: str
    title: str
    build: Callable[[bool], nn.Module]
    batch: Callable[..., dict]
    for_inference: Callable[[dict], dict] = lambda batch: batch
    compile: Callable[[nn.Module], None] = lambda model: model.compile()
    bars: dict = field(default_factory=dict)


def spread(model: nn.Module, sharpen: tuple[str, ...] = ("query.weight", "key.weight")) -> nn.Module:
    """Semantics: the model in eval mode with adapters random, not zero, biases included, and the weights that end in
    `sharpen` three times as large: at initial size attention is all but uniform and hides its errors.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adapter" in name and p.dim() == 1 and "norm" not in name:
                p.normal_(std=0.02)
            elif name.endswith(sharpen):
                p.mul_(3)
    return model.eval()


# --- ViLT -------------------------------------------------------------------------------------------------------------

_TINY_VILT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "image_size": 32,
    "patch_size": 16,
}


def _vilt(tiny: bool) -> nn.Module:
    from transformers import ViltConfig, ViltForQuestionAnswering

    import fastpetl

    torch.manual_seed(0)
    config = ViltConfig(num_labels=7, **_TINY_VILT) if tiny else ViltConfig(num_labels=3129)
    model = ViltForQuestionAnswering(config)
    fastpetl.attach(model, fastpetl.DASConfig(bottleneck=8 if tiny else 96), patch=False)
    return spread(model)


def _vilt_batch(model, tiny: bool, dtype: torch.dtype, seed: int = 1, batch: int | None = None) -> dict:
    """ViT-B/32: 40 text tokens + 12 x 20 patches + 1 = 281 tokens."""
    batch, text, image = (batch or 2, 8, (32, 48)) if tiny else (batch or 8, 40, (384, 640))
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, model.config.vocab_size, (batch, text), generator=generator),
        "attention_mask": torch.ones(batch, text, dtype=torch.long),
        "pixel_values": torch.randn(batch, 3, *image, generator=generator).to(dtype),
        "labels": torch.rand(batch, model.config.num_labels, generator=generator).to(dtype),
    }


VILT = Workload(
    name="vilt",
    title="ViLT-B/32, DAS adapters r=96, batch 8, 281 tokens",
    build=_vilt,
    batch=_vilt_batch,
    for_inference=lambda batch: {k: v for k, v in batch.items() if k != "labels"},
    # Not the whole model: ViLT's visual embedding has data-dependent shapes, which break the graph anyway.
    compile=lambda model: model.vilt.encoder.compile(),
    bars={
        ("fp32", "inference", "eager"): 2.1,
        ("fp32", "inference", "compile"): 2.1,
        ("fp32", "inference", "routed"): 1.2,
        ("fp32", "train", "eager"): 2.0,
        ("fp32", "train", "compile"): 2.0,
        ("fp32", "train", "routed"): 1.2,
        ("bf16", "inference", "eager"): 1.1,  # never slower than eager
        ("bf16", "train", "eager"): 1.1,
    },
)

# --- VL-BART and VL-T5 ------------------------------------------------------------------------------------------------

_TINY = {"vocab_size": 100, "d_model": 32, "feat_dim": 24, "n_boxes": 9}
_TINY_LAYERS = {
    "vlbart": {
        **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    },
    "vlt5": {"d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
}


def _seq2seq(kind: str, tiny: bool, method: str = "adapter") -> nn.Module:
    import fastpetl
    from fastpetl import models

    torch.manual_seed(0)
    kinds = {cls.method: cls for cls in fastpetl.methods.CONFIGS}
    model_class, config_class = {
        "vlbart": (models.VLBart, models.VLBartConfig),
        "vlt5": (models.VLT5, models.VLT5Config),
    }[kind]
    # Dropout off, so that what is compared are the same numbers in training as well.
    if kind == "vlbart":
        still = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    else:  # random at the usual scale, T5's unscaled attention makes 4e-2 out of fp32's rounding
        still = {"dropout_rate": 0.0, "initializer_factor": 0.1}
    sizes = {**_TINY, **_TINY_LAYERS[kind]} if tiny else {}
    model = model_class(config_class(**still, **sizes))
    small = {"lora": {"rank": 8, "dropout": 0.0}}.get(method, {"bottleneck": 8})
    usual = {"lora": {"dropout": 0.0}}.get(method, {"bottleneck": 96})
    fastpetl.attach(model, kinds[method](**(small if tiny else usual)), patch=False)
    if method == "hyperformer":
        fastpetl.task(model, "vqa")
    return spread(model, ("q_proj.weight", "k_proj.weight", "Attention.q.weight", "Attention.k.weight"))


def _seq2seq_batch(model, tiny: bool, dtype: torch.dtype, seed: int = 1, batch: int | None = None) -> dict:
    """20 text and 36 image tokens, an answer of 5, for VQA."""
    batch, text, image = (batch or 2, 5, 9) if tiny else (batch or 16, 20, 36)
    generator, vocab = torch.Generator().manual_seed(seed), model.config.vocab_size
    return {
        "input_ids": torch.randint(3, vocab - 10, (batch, text), generator=generator),
        "attention_mask": torch.ones(batch, text, dtype=torch.long),
        "vis_feats": torch.randn(batch, image, model.config.feat_dim, generator=generator).to(dtype),
        "labels": torch.randint(3, vocab - 10, (batch, 5), generator=generator),
    }


def _seq2seq_workload(kind: str, title: str, method: str = "adapter", bar: float = 1.7) -> Workload:
    return Workload(
        name=kind if method == "adapter" else f"{kind}_{method}",
        title=f"{title}-base, {method} r={128 if method == 'lora' else 96}, batch 16, 20 + 36 tokens, answer of 5",
        build=lambda tiny: _seq2seq(kind, tiny, method),
        batch=_seq2seq_batch,
        bars={
            **{("fp32", "inference", against): 1.9 for against in ("eager", "compile") if method == "adapter"},
            **{("fp32", "train", against): bar for against in ("eager", "compile")},
        },
    )


VLBART = _seq2seq_workload("vlbart", "VL-BART")
VLT5 = _seq2seq_workload("vlt5", "VL-T5")

# --- T5 and BART, on which AdapterHub is measured beside us -----------------------------------------------------------

_T5 = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
_TINY_T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def _bart_sizes(width: int, layers: int, heads: int, **other) -> dict:
    sides = ("encoder", "decoder")
    layers = {f"{side}_layers": layers for side in sides} | {f"{side}_attention_heads": heads for side in sides}
    return {"d_model": width, **layers, **{f"{side}_ffn_dim": 4 * width for side in sides}, **other}


def _backbone(kind: str, tiny: bool) -> nn.Module:
    """Hugging Face's own, nothing attached, without dropout: what both sides can build, each with its transformers."""
    import transformers as hf

    torch.manual_seed(0)
    if kind == "t5":
        config = hf.T5Config(
            **(_TINY_T5 if tiny else _T5), **{"dropout_rate": 0.0, "initializer_factor": 0.1, "use_cache": False}
        )
        config.decoder_start_token_id = 0
        model = hf.T5ForConditionalGeneration(config)
    else:
        sizes = _bart_sizes(32, 2, 4, vocab_size=100) if tiny else _bart_sizes(768, 6, 12)
        model = hf.BartForConditionalGeneration(hf.BartConfig(**sizes, dropout=0.0, use_cache=False))
    return spread(model, ("q_proj.weight", "k_proj.weight", "Attention.q.weight", "Attention.k.weight"))


def _text_batch(model, tiny: bool, dtype: torch.dtype, seed: int = 1, batch: int | None = None) -> dict:
    """As many tokens as VL-T5's and VL-BART's text and image are, all of them text."""
    batch, length = (batch or 2, 14) if tiny else (batch or 16, 56)
    generator, vocab = torch.Generator().manual_seed(seed), model.config.vocab_size
    return {
        "input_ids": torch.randint(3, vocab - 10, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "labels": torch.randint(3, vocab - 10, (batch, 5), generator=generator),
    }


def norms_alone(model: nn.Module) -> nn.Module:
    """Semantics: the model, of which only the norms train: no matrix gets a gradient, as with adapters."""
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    return model


BACKBONES = [
    Workload(
        name=kind,
        title=f"{title}-base, adapters r=96 at every sublayer, batch 16, 56 tokens, answer of 5",
        build=lambda tiny, kind=kind: _backbone(kind, tiny),
        batch=_text_batch,
        bars={("fp32", mode, "adapterhub"): 1.0 for mode in ("inference", "train")},
    )
    for kind, title in (("t5", "T5"), ("bart", "BART"))
]

# --- METER ------------------------------------------------------------------------------------------------------------

_TINY_METER = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "text_config": {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 64},
}


def _meter(tiny: bool) -> nn.Module:
    import fastpetl
    from fastpetl import models

    torch.manual_seed(0)
    sizes = _TINY_METER if tiny else {"text_config": {}, "vision_config": {"image_size": 384}}
    still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    sizes = {**sizes, "text_config": {**sizes["text_config"], **still}}
    model = models.MeterForQuestionAnswering(
        models.MeterConfig(**still, **sizes, num_labels=7 if tiny else 3129, max_text_length=8 if tiny else 40)
    )
    fastpetl.attach(model, fastpetl.DASConfig(bottleneck=8 if tiny else 96), patch=False)
    return spread(model)


def _meter_batch(model, tiny: bool, dtype: torch.dtype, seed: int = 1, batch: int | None = None) -> dict:
    """40 text tokens, 24 x 24 + 1 = 577 image tokens."""
    batch, text = batch or 2, model.config.max_text_length
    size, generator = model.config.vision_config.image_size, torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, model.config.text_config.vocab_size, (batch, text), generator=generator),
        "attention_mask": torch.ones(batch, text, dtype=torch.long),
        "pixel_values": torch.randn(batch, 3, size, size, generator=generator).to(dtype),
        "labels": torch.rand(batch, model.config.num_labels, generator=generator).to(dtype),
    }


METER = Workload(
    name="meter",
    title="METER (12 + 11 + 6 + 6 layers), DAS adapters r=96, batch 2, 40 + 577 tokens",
    build=_meter,
    batch=_meter_batch,
    for_inference=lambda batch: {k: v for k, v in batch.items() if k != "labels"},
    bars={
        **{("fp32", "inference", against): 1.9 for against in ("eager", "compile")},
        **{("fp32", "train", against): 1.8 for against in ("eager", "compile")},
    },
)

_METHODS = (("compacter", 1.8), ("hyperformer", 1.8), ("lora", 1.7))
BY_METHOD = [_seq2seq_workload("vlbart", "VL-BART", method, bar) for method, bar in _METHODS]

WORKLOADS = {work.name: work for work in (VILT, VLBART, VLT5, METER, *BY_METHOD, *BACKBONES)}
