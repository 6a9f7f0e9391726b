"""Small METER models and the golden runs of the original code."""

import functools
import json
from pathlib import Path

import torch
from safetensors import safe_open

from fastpetl.models import MeterConfig, MeterForQuestionAnswering

GOLDEN = Path(__file__).parent / "golden"
SKIPS = {0: (), 1: (1, 4, 7, 10), 2: tuple(range(12))}


@functools.cache
def golden(name: str) -> tuple[dict, dict]:
    """(tensors, metadata) of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["meta"])


def part(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def config(dropout: float = 0.0, **changes) -> MeterConfig:
    """The golden runs' sizes."""
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128}
    text = {**sizes, **drop, "vocab_size": 60, "num_hidden_layers": 2, "max_position_embeddings": 16}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 256}
    vision |= {"patch_size": 16, "image_size": 64, "attention_dropout": 0.0}
    made = {**sizes, **drop, "num_hidden_layers": 6, "num_labels": 17, "max_text_length": 12}
    return MeterConfig(**{**made, "text_config": text, "vision_config": vision, **changes})


def original_state(kind: str) -> dict:
    return part(golden(f"{kind}_weights")[0], "param/")


def golden_model(kind: str) -> MeterForQuestionAnswering:
    return MeterForQuestionAnswering.from_original(original_state(kind), config())


def inputs(batch: int = 2, seed: int = 0, tokens: int = 12) -> dict:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, tokens - 4 :] = 0
    ids = torch.randint(3, 60, (batch, tokens), generator=generator)
    return {
        "input_ids": ids.masked_fill(mask == 0, 1),
        "pixel_values": torch.randn(batch, 3, 64, 64, generator=generator),
        "attention_mask": mask,
    }


def tiny(das: bool = True, seed: int = 0, **changes) -> MeterForQuestionAnswering:
    """A small random model, adapters random too, unpatched, in eval mode."""
    import fastpetl

    torch.manual_seed(seed)
    model = MeterForQuestionAnswering(config(**changes))
    if das:
        fastpetl.attach(model, fastpetl.DASConfig(bottleneck=12, skip_bottleneck=20), patch=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()
