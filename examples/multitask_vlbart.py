"""One VL-BART for four tasks at once: VL-Adapter's comparison of methods (CVPR 2022, Table 1) in small.

    python examples/multitask_vlbart.py --out multitask

Colour, shape and yes/no questions and captions on easy-VQA, with task prefixes; every batch mixes the tasks, drawn in
proportion to their samples, and each sample runs its own task's weights (`fastpetl.task(model, [...])`). The frozen
backbone comes from make_backbone.py. Prints accuracy per task (answers generated greedily, counted if they are right
to the word), what is trained and the time of a step; writes results.json and results.png.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import easy_vl as ev
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import fastpetl
from fastpetl.models import VLBart, VLBartConfig

# name -> (configuration, learning rate); bottlenecks and ranks in the paper's proportion to the hidden size
METHODS = {
    "full fine-tuning": (fastpetl.BaselineConfig(train="all"), 5e-4),
    "adapters, single": (fastpetl.AdapterConfig(tasks=ev.TASKS), 3e-3),
    "adapters, half-shared": (fastpetl.AdapterConfig(tasks=ev.TASKS, sharing="half"), 3e-3),
    "adapters, multiple": (fastpetl.AdapterConfig(tasks=ev.TASKS, sharing="multiple"), 3e-3),
    "Hyperformer": (fastpetl.HyperformerConfig(tasks=ev.TASKS), 3e-3),
    "Compacter": (fastpetl.CompacterConfig(tasks=ev.TASKS), 3e-3),
    "LoRA": (fastpetl.LoRAConfig(tasks=ev.TASKS, rank=16, alpha=16), 3e-3),
    "prompts": (fastpetl.PromptConfig(tasks=ev.TASKS, length=8, middle=96), 3e-3),
}


def backbone() -> VLBart:
    config = json.loads((ev.ASSETS / "config.json").read_text(encoding="utf-8"))
    model = VLBart(VLBartConfig(**config))
    weights = {name: w.float() for name, w in load_file(ev.ASSETS / "backbone.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if name in dict(model.named_parameters())] + list(unexpected)
    if wrong:
        raise ValueError(f"backbone: {ev.ASSETS} does not fit the model: {', '.join(wrong)}")
    return model


def set_tasks(model, tasks) -> None:
    if not isinstance(fastpetl.methods.attached(model).config, fastpetl.BaselineConfig):
        fastpetl.task(model, tasks)


def train(model, batches, by_task, args, lr: float, name: str) -> tuple[list[float], list[float]]:
    """(loss, seconds) of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=args.steps, pct_start=0.1)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    losses, seconds = [], []
    model.train()
    for _ in tqdm(range(args.steps), desc=name):
        chosen = ev.proportional(by_task, rng, args.batch, mixed=True)
        start = time.perf_counter()
        set_tasks(model, [s.task for s in chosen])
        loss = model(**batches.batch(chosen)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


@torch.inference_mode()
def accuracy(model, batches, by_task, name: str) -> dict[str, float]:
    """Of each task, the share of answers generated right to the word."""
    model.eval()
    out = {}
    for task, samples in by_task.items():
        set_tasks(model, task)
        right = 0
        for start in tqdm(range(0, len(samples), 128), desc=f"{name}: {task}", leave=False):
            chosen = samples[start : start + 128]
            ids = model.generate(**batches.inputs(chosen), max_new_tokens=5, do_sample=False)
            found = batches.tokenizer.decode(ids)
            right += sum(a == s.answer for a, s in zip(found, chosen, strict=True))
        out[task] = right / len(samples)
    return out


def by_task(samples, limit=None) -> dict[str, list]:
    out = {task: [s for s in samples if s.task == task] for task in ev.TASKS}
    return {task: random.Random(0).sample(found, min(limit or len(found), len(found))) for task, found in out.items()}


def run(name: str, batches, test, train_set, test_set, args) -> dict:
    config, lr = METHODS[name]
    torch.manual_seed(args.seed)
    model = fastpetl.attach(backbone(), config, patch=not args.unpatched)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses, seconds = train(model, batches, train_set, args, lr, name)
    return {
        "method": name,
        "trainable": trainable,
        "total": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracy(model, test, test_set, name),
        "step_ms": 1e3 * statistics.median(seconds[5:] or seconds),
        "losses": losses,
    }


def table(rows: list[dict]) -> str:
    head = ["method", "trained", *ev.TASKS, "mean", "step"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        found = [row["accuracy"][task] for task in ev.TASKS]
        cells = [row["method"], f"{row['trainable'] / row['total']:.1%}", *(f"{a:.1%}" for a in found)]
        lines.append("| " + " | ".join([*cells, f"{statistics.mean(found):.1%}", f"{row['step_ms']:.0f} ms"]) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for row in rows:
        mean = 100 * statistics.mean(row["accuracy"].values())
        left.plot(100 * row["trainable"] / row["total"], mean, "o", label=row["method"])
        smooth = torch.tensor(row["losses"]).unfold(0, min(20, len(row["losses"])), 1).mean(1)
        right.plot(smooth, label=row["method"], lw=1)
    left.set(xscale="log", xlabel="trained parameters, % of all", ylabel="mean accuracy of the four tasks, %")
    right.set(yscale="log", xlabel="step", ylabel="loss (mean of 20 steps)")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("multitask"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--limit", type=int, default=400, help="test samples per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--unpatched", action="store_true", help="the same methods without fastpetl's kernels")
    args = parser.parse_args()
    train_set = by_task(ev.samples("train", lambda image: image % 2 == 1))
    test_set = by_task(ev.samples("test"), args.limit)
    tokenizer = ev.Tokenizer.load()
    images = {s.image for samples in train_set.values() for s in samples}
    batches = ev.Batches(ev.features("train", images), tokenizer)
    test = ev.Batches(ev.features("test", {s.image for found in test_set.values() for s in found}), tokenizer)
    rows = [run(name, batches, test, train_set, test_set, args) for name in args.only]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    plot(rows, args.out / "results.png")
    print(table(rows))
    print(f"written: {args.out / 'results.json'}, {args.out / 'results.png'}")


if __name__ == "__main__":
    main()
