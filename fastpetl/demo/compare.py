"""Patched against unpatched in one process: largest difference of the logits, and training steps timed in turns.

    python -m fastpetl.demo.compare settings.json weights.safetensors result.json

On a shared machine two runs a minute apart are no comparison.  Here the models take one training step each, round after
round, so that whatever slows the machine slows all of them; the ratio is one of medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from . import data
from .model import VARIANTS, Settings, build, skip_mask
from .train import optimizer_for, order, train_step

WARM_UP_ROUNDS = 2


@torch.no_grad()
def logits(model, tensors: data.Tensors, indices: torch.Tensor, seed: int) -> torch.Tensor:
    """Logits in eval mode; the seed fixes the order in which ViLT takes the image patches."""
    model.eval()
    torch.manual_seed(seed)
    return model(**tensors.batch(indices)).logits


def differences(models: dict, tensors: data.Tensors, settings: Settings) -> dict[str, dict[str, float]]:
    """Largest |difference| of the logits from the unpatched model's: same weights, same inputs, same blocks skipped."""
    import fastpetl

    indices = torch.arange(min(len(tensors), 2 * settings.batch))
    plain = models["adapters"]
    expected = {"patched": logits(plain, tensors, indices, settings.seed)}
    with fastpetl.skip(plain, skip_mask(), shortcut="adapter"):
        expected["skipped"] = logits(plain, tensors, indices, settings.seed)
    found = {}
    for variant, reference in expected.items():
        delta = (logits(models[variant], tensors, indices, settings.seed) - reference).abs().max().item()
        found[variant] = {"max_abs": delta, "relative": delta / reference.abs().max().item()}
    return found


def step_seconds(models: dict, tensors: data.Tensors, settings: Settings) -> dict[str, float]:
    """Median seconds of a training step of each model, taken in turns."""
    optimizers = {variant: optimizer_for(model, 1e-5) for variant, model in models.items()}
    batches = order(len(tensors), settings)
    seconds = {variant: [] for variant in models}
    for model in models.values():
        model.train()
    rounds = range(WARM_UP_ROUNDS + settings.timing_pairs)
    for turn in data.progress(rounds, desc="time in turns", unit="round"):
        indices = batches[turn % len(batches)]
        for variant, model in models.items():
            start = time.perf_counter()
            train_step(model, optimizers[variant], tensors, indices)
            seconds[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(times[WARM_UP_ROUNDS:]) for variant, times in seconds.items()}


def run(settings: Settings, weights: Path) -> dict:
    from safetensors.torch import load_file

    torch.set_num_threads(settings.threads)
    # a few hundred questions: timing and differences need no more, and 48 px images fill memory otherwise
    tensors = data.load("test", "downstream", limit=min(settings.test_limit or 512, 512), assets=Path(settings.assets))
    models, trained = {variant: build(variant, settings) for variant in VARIANTS}, load_file(str(weights))
    for variant in VARIANTS[1:]:
        models[variant].load_state_dict(trained)
    found = differences(models, tensors, settings)
    seconds = step_seconds(models, tensors, settings)
    return {
        "delta_logits": found,
        "seconds_per_step": seconds,
        "speedup_over_unpatched": {variant: seconds["adapters"] / own for variant, own in seconds.items()},
    }


def main(argv: list[str]) -> int:
    settings_file, weights, result_file = argv
    result = run(Settings(**json.loads(Path(settings_file).read_text())), Path(weights))
    Path(result_file).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
