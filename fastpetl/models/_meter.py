"""Checkpoints of METER's and DAS-METER's own code: their sizes, and their position embedding at another resolution."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from fastpetl.models._vl import count_layers, read_original

_HEADS = ("classifier", "rank_output")
_POSITIONS = "vit_model.visual.positional_embedding"


def load_original(model_class, source, config):
    """Semantics: what MeterPreTrainedModel.from_original says."""
    from fastpetl.methods import attach
    from fastpetl.methods.das import DASConfig
    from fastpetl.patching.meter import FAMILY

    state = read_original(source)
    state = state.get("state_dict", state)  # Lightning's
    if _POSITIONS not in state:
        raise ValueError(f"from_original: the state_dict has no {_POSITIONS}, expected a METER's with a CLIP encoder")
    if config is None:
        config = model_class.config_class(**_sizes(state))
    image_size, patch = config.vision_config.image_size, config.vision_config.patch_size
    state = {**state, _POSITIONS: resize_positions(state[_POSITIONS], image_size // patch)}
    model = model_class(config)
    adapters = _das(state)
    if adapters is not None:
        attach(model, DASConfig(**adapters), patch=False)
    renamed = FAMILY.from_original(state)
    own = model.state_dict().keys()
    if not hasattr(model, "meter"):
        renamed = {name.removeprefix("meter."): value for name, value in renamed.items()}
    renamed = {name: value for name, value in renamed.items() if name in own or name.split(".")[0] not in _HEADS}
    if not any(name.startswith(_HEADS) for name in renamed):  # a pre-trained checkpoint: the head stays as made
        renamed.update((name, value) for name, value in model.state_dict().items() if name.startswith(_HEADS))
    model.load_state_dict(renamed)
    return model.eval()


def resize_positions(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Semantics: [1 + n * n, width] as [1 + grid * grid, width], bicubically, the class token's row as it is."""
    before = math.isqrt(positions.shape[0] - 1)
    if before == grid:
        return positions
    image = positions[1:].view(1, before, before, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=(grid, grid), mode="bicubic").to(positions.dtype)
    return torch.cat([positions[:1], image.permute(0, 2, 3, 1).flatten(0, 2)])


def _das(state) -> dict | None:
    """DASConfig's fields for the adapters in `state`, None without any."""
    down = "cross_modal_text_layers.0.adapter.down_proj.weight"
    if down not in state:
        return None
    skip = state.get("adapter_list_l.0.0.down_proj.weight")
    return {
        "bottleneck": state[down].shape[0],
        "skip_bottleneck": None if skip is None else skip.shape[0],
        "shortcut": "identity" if skip is None else "adapter",
        "classifier_token": "token4classifier" in state,
    }


def _sizes(state) -> dict:
    text, image = "text_transformer", "vit_model.visual"
    words, d_text = state[f"{text}.embeddings.word_embeddings.weight"].shape
    width, _, patch, _ = state[f"{image}.conv1.weight"].shape
    hidden = state["cross_modal_text_transform.weight"].shape[0]
    head = next((v for n, v in state.items() if n.endswith("_classifier.3.weight")), None)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": count_layers(state, "cross_modal_text_layers"),
        "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": state["cross_modal_text_layers.0.intermediate.dense.weight"].shape[0],
        "type_vocab_size": state["token_type_embeddings.weight"].shape[0],
        **({} if head is None else {"num_labels": head.shape[0]}),
        "text_config": {
            "vocab_size": words,
            "hidden_size": d_text,
            "num_hidden_layers": count_layers(state, f"{text}.encoder.layer"),
            "num_attention_heads": max(1, d_text // 64),
            "intermediate_size": state[f"{text}.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "max_position_embeddings": state[f"{text}.embeddings.position_embeddings.weight"].shape[0],
            "type_vocab_size": state[f"{text}.embeddings.token_type_embeddings.weight"].shape[0],
        },
        "vision_config": {
            "hidden_size": width,
            "num_hidden_layers": count_layers(state, f"{image}.transformer.resblocks"),
            "num_attention_heads": max(1, width // 64),
            "intermediate_size": state[f"{image}.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "patch_size": patch,
            "image_size": patch * math.isqrt(state[_POSITIONS].shape[0] - 1),
        },
    }
