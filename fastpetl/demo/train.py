"""One training run of the demo, in a process of its own so that its peak memory is its own.

    python -m fastpetl.demo.train full settings.json result.json

Times are of whole training steps: batch on the spot, forward, backward, optimizer.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

from . import data
from .memory import PeakMemory
from .model import Settings, build

WARM_UP_STEPS = 5  # not in the median


def order(n: int, settings: Settings) -> torch.Tensor:
    """[steps, batch] indices of the training questions: shuffled passes over them, the same for every run of a seed."""
    rng = torch.Generator().manual_seed(settings.seed)
    need, parts = settings.steps * settings.batch, []
    while sum(map(len, parts)) < need:
        parts.append(torch.randperm(n, generator=rng))
    return torch.cat(parts)[:need].view(settings.steps, settings.batch)


def optimizer_for(model, lr: float) -> torch.optim.Optimizer:
    """AdamW over what is trained, as in DAS: weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay to 0."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def train_step(model, optimizer, tensors: data.Tensors, indices: torch.Tensor) -> float:
    """One step; returns the loss."""
    loss = torch.nn.functional.cross_entropy(model(**tensors.batch(indices)).logits, tensors.answers[indices])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(model, tensors: data.Tensors, *, batch: int = 128, desc: str = "evaluate", quiet: bool = False) -> float:
    """Share of questions answered rightly."""
    model.eval()
    right = 0
    for indices in data.progress(torch.arange(len(tensors)).split(batch), desc=desc, unit="batch", quiet=quiet):
        right += (model(**tensors.batch(indices)).logits.argmax(-1) == tensors.answers[indices]).sum().item()
    return right / len(tensors)


def train(model, tensors: data.Tensors, settings: Settings, lr: float, desc: str) -> tuple[list[float], list[float]]:
    """Train in place; (loss, seconds) of each step."""
    optimizer = optimizer_for(model, lr)
    base = [group["lr"] for group in optimizer.param_groups]
    losses, seconds = [], []
    model.train()
    torch.manual_seed(settings.seed)  # ViLT orders the image patches by the global generator
    bar = data.progress(order(len(tensors), settings), desc=desc, unit="step")
    for step, indices in enumerate(bar):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * lr_factor(step, settings.steps)
        start = time.perf_counter()
        losses.append(train_step(model, optimizer, tensors, indices))
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"demo: the loss of step {step} of {desc} is {losses[-1]}")
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, seconds


def run(variant: str, settings: Settings, weights: Path | None = None) -> dict:
    """Train and evaluate ``variant``; the result as a dict that JSON can hold."""
    import fastpetl

    torch.set_num_threads(settings.threads)
    train_set = data.load("train", "downstream", limit=settings.train_limit, assets=Path(settings.assets))
    test_set = data.load("test", "downstream", limit=settings.test_limit, assets=Path(settings.assets))
    memory = PeakMemory()
    model = build(variant, settings)
    losses, seconds = train(model, train_set, settings, settings.lr(variant), f"train {variant}")
    peak = memory.peak_mib()
    accuracy = evaluate(model, test_set, desc=f"test {variant}")
    count = fastpetl.count(model, train_set.batch(torch.arange(1)))
    if weights is not None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(weights))
    step = statistics.median(seconds[WARM_UP_STEPS:] or seconds)
    return {
        "variant": variant,
        "accuracy": accuracy,
        "total_parameters": count.total,
        "trainable_parameters": count.trainable,
        "macs_per_sample": count.macs,
        "seconds_per_step": step,
        "samples_per_second": settings.batch / step,
        "peak_memory_mib": peak,
        "train_seconds": sum(seconds),
        "losses": losses,
    }


def main(argv: list[str]) -> int:
    variant, settings_file, result_file, *weights = argv
    settings = Settings(**json.loads(Path(settings_file).read_text()))
    result = run(variant, settings, Path(weights[0]) if weights else None)
    Path(result_file).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
