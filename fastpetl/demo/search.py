"""``python -m fastpetl search``: DAS's search on easy-VQA: which 4 of 12 blocks of the demo's ViLT can be skipped."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from pathlib import Path

import torch

from . import data, train
from .model import Settings, build

BLOCKS = 12  # of the demo's model
SKIP = 4
VALIDATION = 512  # questions of the training split that nothing trains on
VALIDATION_BATCH = 64


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m fastpetl search",
        description="Search which blocks of the demo's ViLT can be skipped on easy-VQA, while its adapters train.",
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("fastpetl-search"),
        help="folder for plan.json and plan.png (default: %(default)s)",
    )
    made.add_argument("--steps", type=int, default=240, help="training steps (default: %(default)s)")
    many = made.add_mutually_exclusive_group()
    many.add_argument(
        "--skip", type=int, metavar="K", help=f"how many of the {BLOCKS} blocks to skip (default: {SKIP})"
    )
    many.add_argument(
        "--budget-macs",
        type=float,
        metavar="N",
        help="in place of --skip: multiply-accumulates of a sample to save at least, e.g. 20e6; the search fills it by "
        "gate per multiply-accumulate",
    )
    made.add_argument(
        "--turn",
        type=int,
        default=5,
        metavar="N",
        help="training steps from one scoring of sets on validation questions to the next (default: %(default)s)",
    )
    made.add_argument(
        "--candidates",
        type=int,
        default=3,
        metavar="N",
        help="different sets of blocks scored each time, at least 2 (default: %(default)s)",
    )
    made.add_argument(
        "--per-sample", action="store_true", help="in training each sample skips a set drawn for it alone"
    )
    made.add_argument(
        "--seed", type=int, default=0, help="of new weights, sets and the questions' order (default: %(default)s)"
    )
    made.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    made.add_argument(
        "--compare",
        type=int,
        default=0,
        metavar="N",
        help="then train anew with nothing skipped, with the plan, with N random plans of as many blocks; test each "
        "and write results.json (default: 0, none of it)",
    )
    made.add_argument("--quick", action="store_true", help="at most 8 steps, on 64 questions")
    return made


def _data(settings: Settings):
    """(training set, validation set): the last questions of the training split are held out."""
    whole = data.load("train", "downstream", limit=settings.train_limit, assets=Path(settings.assets))
    held_out = min(VALIDATION, len(whole) // 4)
    return whole.part(0, len(whole) - held_out), whole.part(len(whole) - held_out, len(whole))


def _amount(args) -> dict:
    """How much is to be skipped, as `fastpetl.das.search` takes it."""
    return {"n_skip": args.skip} if args.budget_macs is None else {"budget_macs": args.budget_macs}


def find(args: argparse.Namespace, settings: Settings, training, validation):
    """The search; its plan."""
    from fastpetl.das import Scorer, search

    model = build("patched", settings)
    optimizer = train.optimizer_for(model, settings.adapter_lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    order = train.order(len(training), settings)
    torch.manual_seed(settings.seed)  # ViLT orders the image patches by the global generator
    model.train()

    def step(i: int) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * train.lr_factor(i, settings.steps)
        train.train_step(model, optimizer, training, order[i])

    def batches(round: int):
        start = round * VALIDATION_BATCH % len(validation)
        indices = torch.arange(start, start + VALIDATION_BATCH) % len(validation)
        return validation.batch(indices), validation.answers[indices]

    def loss(outputs, answers):
        return torch.nn.functional.cross_entropy(outputs.logits, answers)

    return search(
        model,
        step,
        Scorer(batches, loss),
        steps=settings.steps,
        **_amount(args),
        turn=args.turn,
        candidates=args.candidates,
        per_sample=args.per_sample,
        seed=settings.seed,
    )


def _train_with(plan, settings: Settings, training, test, name: str) -> float:
    """Test accuracy of adapters trained anew, from the shipped backbone, with `plan` skipped."""
    import fastpetl

    model = build("patched", settings)
    fastpetl.skip(model, plan)
    train.train(model, training, settings, settings.adapter_lr, f"train {name}")
    return train.evaluate(model, test, desc=f"test {name}")


def compare(plan, n: int, settings: Settings, training) -> dict:
    """{name: (blocks, accuracy)} with nothing skipped, the plan, and `n` random plans of as many blocks."""
    from fastpetl import SkipPlan

    test = data.load("test", "downstream", limit=settings.test_limit, assets=Path(settings.assets))
    generator = torch.Generator().manual_seed(settings.seed)
    random = [
        SkipPlan(tuple(torch.randperm(BLOCKS, generator=generator)[: len(plan.blocks)].tolist())) for _ in range(n)
    ]
    plans = {"nothing skipped": None, "searched": plan} | {f"random {i + 1}": p for i, p in enumerate(random)}
    return {
        name: {
            "blocks": [] if p is None else list(p.blocks),
            "accuracy": _train_with(p, settings, training, test, name),
        }
        for name, p in plans.items()
    }


def _check_budget(args, settings: Settings) -> None:
    """A budget that cannot be had, or not in so many ways, is a usage error, before anything is trained."""
    from fastpetl.das import Search

    model = build("patched", settings)
    try:
        Search(model, lambda r: 0.0, candidates=args.candidates, **_amount(args))
    except ValueError as error:
        message = str(error).removeprefix("search: ").replace("budget_macs is", "--budget-macs is")
        parser().error(message.replace("candidates is", "--candidates is"))


def main(argv: list[str] | None = None) -> int:
    """Search, write plan.json and plan.png, and with --compare results.json."""
    args = parser().parse_args(argv)
    if args.skip is None:  # not argparse's default: it takes --skip 4 for "not given" and would let --budget-macs pass
        args.skip = SKIP
    for name, least, most in (
        ("skip", 1, BLOCKS),
        ("turn", 1, None),
        ("candidates", 2, None),
        ("steps", 1, None),
        ("threads", 1, None),
        ("compare", 0, None),
    ):
        value = getattr(args, name)
        if value < least or most is not None and value > most:
            expected = f"{least} or more" if most is None else f"{least} to {most}"
            parser().error(f"--{name} is {value}, expected {expected}")
    if args.budget_macs is None and math.comb(BLOCKS, args.skip) < args.candidates:
        parser().error(
            f"--candidates is {args.candidates}, but there are only {math.comb(BLOCKS, args.skip)} sets of {args.skip}"
        )
    data.offline()
    quick = {"batch": 8, "train_limit": 64, "test_limit": 32} if args.quick else {}
    steps = min(args.steps, 8) if args.quick else args.steps
    settings = Settings(seed=args.seed, threads=args.threads, steps=steps, **quick)
    if args.budget_macs is not None:
        _check_budget(args, settings)
    torch.set_num_threads(settings.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    training, validation = _data(settings)
    plan = find(args, settings, training, validation)
    plan.save(args.out / "plan.json")
    plan.plot(args.out / "plan.png")
    gates = "  ".join(f"{i}:{gate:+.4f}" for i, gate in enumerate(plan.gates))
    print(f"skip {', '.join(map(str, plan.blocks))}: {plan.macs_saved / 1e6:.1f} M MACs of a sample saved")
    print(f"gates after {len(plan.rounds)} rounds: {gates}")
    if args.compare:
        found = compare(plan, args.compare, settings, training)
        for name, run in found.items():
            print(f"{name:<16} {100 * run['accuracy']:6.2f} %  {run['blocks']}")
        random = [run["accuracy"] for name, run in found.items() if name.startswith("random")]
        print(f"mean of {len(random)} random plans: {100 * statistics.mean(random):.2f} %")
        content = {"settings": {**dataclasses.asdict(settings), "assets": "shipped"}, "runs": found}
        (args.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"plan.json and plan.png are in {args.out}")
    return 0
