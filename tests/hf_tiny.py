"""Small BERT, RoBERTa, CLIP, BridgeTower, LXMERT and METER models, their arguments, and what `patch` fuses of them."""

import torch
import transformers as hf
from torch import nn

import meter_tiny
from vilt_tiny import randomize

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 40}
DROP = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def ids(batch=3, tokens=7, padded=True, seed=5):
    generator = torch.Generator().manual_seed(seed)
    given = {"input_ids": torch.randint(3, 60, (batch, tokens), generator=generator)}
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if padded:
        mask[0, 4:] = 0
        mask[1, 6:] = 0
    return {**given, "attention_mask": mask}


def pixels(size=32, seed=6):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))


def bert(**c):
    return hf.BertModel(hf.BertConfig(**{**TEXT, **c}))


def decoder(**c):
    return hf.BertModel(hf.BertConfig(**{**TEXT, "is_decoder": True, "add_cross_attention": True, **c}))


def decoder_inputs(padded):
    states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(8))
    return {**ids(padded=padded), "encoder_hidden_states": states, "use_cache": False}


def roberta(**c):
    return hf.RobertaModel(hf.RobertaConfig(**{**TEXT, "pad_token_id": 1, **c}))


def clip_vision(**c):
    c.pop(DROP[0], None)
    dropped = c.pop(DROP[1], 0.0)
    return hf.CLIPVisionModel(
        hf.CLIPVisionConfig(**{**SIZES, "image_size": 32, "patch_size": 8, "attention_dropout": dropped, **c})
    )


def clip_text(**c):
    c.pop(DROP[0], None)
    dropped = c.pop(DROP[1], 0.0)
    return hf.CLIPTextModel(
        hf.CLIPTextConfig(**{**SIZES, "vocab_size": 60, "eos_token_id": 59, "attention_dropout": dropped, **c})
    )


def clip():
    """Both sides, of different widths, with random weights."""
    text = {**SIZES, "vocab_size": 60, "eos_token_id": 59, "max_position_embeddings": 40}
    vision = {**SIZES, "hidden_size": 48, "image_size": 32, "patch_size": 8}
    torch.manual_seed(7)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    randomize(model)
    return model


def bridgetower(**c):
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": c.pop("image_size", 32), "patch_size": 16}
    top = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    return hf.BridgeTowerModel(
        hf.BridgeTowerConfig(text_config={**TEXT, "num_hidden_layers": 2, **c}, vision_config=vision, **top)
    )


def lxmert(**c):
    layers = {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 12}
    sizes = {**TEXT, **layers, **c}
    sizes.pop("num_hidden_layers")
    return hf.LxmertModel(hf.LxmertConfig(**sizes))


def lxmert_inputs(padded):
    generator = torch.Generator().manual_seed(9)
    feats, boxes = torch.randn(3, 4, 12, generator=generator), torch.rand(3, 4, 4, generator=generator)
    seen = torch.ones(3, 4)
    seen[2, 3] = 0 if padded else 1
    return {**ids(padded=padded), "visual_feats": feats, "visual_pos": boxes, "visual_attention_mask": seen}


def meter(das=True, **c):
    model = meter_tiny.tiny(das, num_hidden_layers=2)
    for module in model.modules():  # dropout reaches what the configuration was read for already
        if isinstance(module, nn.Dropout):
            module.p = c.get(DROP[0], 0.0)
    return model


def meter_inputs(padded):
    return {**ids(tokens=12, padded=padded), "pixel_values": pixels(64)}


FAMILIES = {
    "bert": (bert, lambda padded: ids(padded=padded), {"bert.attention", "bert.output", "bert.layer"}),
    "decoder": (decoder, decoder_inputs, {"bert.attention", "bert.output", "bert.layer"}),
    "roberta": (roberta, lambda padded: ids(padded=padded), {"roberta.attention", "roberta.output", "roberta.layer"}),
    "clip_vision": (
        clip_vision,
        lambda padded: {"pixel_values": pixels()},
        {"clip.attention", "clip.mlp", "clip.layer"},
    ),
    "clip_text": (clip_text, lambda padded: ids(padded=padded), {"clip.attention", "clip.mlp", "clip.layer"}),
    "bridgetower": (
        bridgetower,
        lambda padded: {**ids(padded=padded), "pixel_values": pixels()},
        {"bridgetower.attention", "bridgetower.output", "bridgetower.layer"},
    ),
    "lxmert": (lxmert, lxmert_inputs, {"lxmert.attention", "lxmert.intermediate", "lxmert.output"}),
    "meter": (
        lambda **c: meter(False, **c),
        meter_inputs,
        {"meter.layer", *(f"bridgetower.{kind}" for kind in ("attention", "output"))}
        | {f"roberta.{kind}" for kind in ("attention", "output", "layer")}
        | {f"clip.{kind}" for kind in ("attention", "mlp", "layer")},
    ),
    "das_meter": (
        meter,
        meter_inputs,
        {"meter.das_layer", "meter.das_output", "bridgetower.attention", "adapter"}
        | {f"roberta.{kind}" for kind in ("attention", "output", "layer")}
        | {f"clip.{kind}" for kind in ("attention", "mlp", "layer")},
    ),
}
NAMES = list(FAMILIES)


def build(name, dropout=0.0, **config):
    torch.manual_seed(7)
    model = FAMILIES[name][0](**dict.fromkeys(DROP, dropout), **config).eval()
    randomize(model)
    return model
