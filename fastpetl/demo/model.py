"""The demo's four models, made from the shipped backbone through fastpetl's public interface."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from . import data

VARIANTS = ("full", "adapters", "patched", "skipped")
TITLES = {
    "full": "full fine-tuning",
    "adapters": "DAS adapters",
    "patched": "DAS adapters, patched",
    "skipped": "DAS adapters, patched, 4 of 12 skipped",
}
BOTTLENECK = 16  # an eighth of the hidden size, as the paper's 96 of 768
SKIPPED_BLOCKS = (4, 6, 8, 10)


@dataclasses.dataclass
class Settings:
    """What the demo varies; every run of one demo gets the same one."""

    seed: int = 0
    threads: int = 2
    batch: int = 32
    steps: int = 240
    full_lr: float = 5e-4
    adapter_lr: float = 3e-3
    train_limit: int | None = None  # questions; None is all
    test_limit: int | None = None
    timing_pairs: int = 24
    assets: str = str(data.ASSETS)

    def lr(self, variant: str) -> float:
        return self.full_lr if variant == "full" else self.adapter_lr


def skip_mask(n_blocks: int = 12) -> torch.Tensor:
    """bool [n_blocks], True = skip."""
    mask = torch.zeros(n_blocks, dtype=torch.bool)
    mask[list(SKIPPED_BLOCKS)] = True
    return mask


def load_backbone(assets: str | Path = data.ASSETS, seed: int = 0):
    """ViltForQuestionAnswering with the shipped weights in fp32 and a new classifier drawn from ``seed``."""
    data.offline()
    from safetensors.torch import load_file
    from transformers import ViltConfig, ViltForQuestionAnswering

    torch.manual_seed(seed)
    model = ViltForQuestionAnswering(ViltConfig.from_pretrained(str(assets)))
    weights = {name: tensor.float() for name, tensor in load_file(str(Path(assets) / "backbone.safetensors")).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.startswith("classifier."))]
    if wrong:
        raise ValueError(f"load_backbone: backbone.safetensors does not fit config.json: {', '.join(wrong)}")
    return model


def build(variant: str, settings: Settings):
    """The model of ``variant``, ready to train: parameters that need gradients are those to train."""
    if variant not in VARIANTS:
        raise ValueError(f"build: variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    import fastpetl

    model = load_backbone(settings.assets, settings.seed)
    if variant == "full":
        return model
    config = fastpetl.DASConfig(bottleneck=BOTTLENECK, skip_bottleneck=2 * BOTTLENECK)
    fastpetl.attach(model, config, patch=False)
    if variant != "adapters":
        fastpetl.patch(model)
    if variant == "skipped":
        fastpetl.skip(model, skip_mask(), shortcut="adapter")
    return model
