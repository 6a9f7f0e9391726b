"""``python -m fastpetl demo``: four training runs on easy-VQA, one table, results.json and two plots."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import data, report
from .model import SKIPPED_BLOCKS, TITLES, VARIANTS, Settings

QUICK = {"batch": 8, "steps": 6, "train_limit": 64, "test_limit": 64, "timing_pairs": 3}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m fastpetl demo",
        description="Train a small ViLT on easy-VQA four times (full fine-tuning; DAS adapters; patched; patched and"
        " skipping 4 of 12 blocks) and compare accuracy, time and memory. Exit status 1: a check of these failed.",
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("fastpetl-demo"),
        help="folder for results.json and the plots (default: %(default)s)",
    )
    made.add_argument(
        "--seed", type=int, default=0, help="of the new weights and the questions' order (default: %(default)s)"
    )
    made.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: %(default)s)"
    )
    made.add_argument(
        "--steps", type=int, default=Settings.steps, help="training steps of each run (default: %(default)s)"
    )
    made.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK['steps']} steps, whatever --steps is, on {QUICK['train_limit']} questions; accuracies are not "
        "checked",
    )
    return made


def _settings(args: argparse.Namespace) -> Settings:
    for name in ("steps", "threads"):
        if getattr(args, name) < 1:
            parser().error(f"--{name} is {getattr(args, name)}, expected 1 or more")
    quick = QUICK if args.quick else {}
    return Settings(**{"seed": args.seed, "threads": args.threads, "steps": args.steps, **quick})


def _child(module: str, *arguments: object) -> None:
    """Run a module of the demo in its own process, its progress bars going to this terminal."""
    root = str(Path(__file__).resolve().parents[2])  # the fastpetl that runs here, wherever it was imported from
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"fastpetl.demo.{module}", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise RuntimeError(f"demo: {' '.join(command[1:4])} failed with exit code {done.returncode}, see above")


def _environment(settings: Settings) -> dict:
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": settings.threads,
        **{package: version(package) for package in ("torch", "transformers", "easy-vqa")},
    }


def measure(settings: Settings) -> tuple[dict[str, dict], dict]:
    """The four runs and the comparison: ({variant: result of train.run}, result of compare.run)."""
    runs = {}
    with tempfile.TemporaryDirectory(prefix="fastpetl-demo-") as folder:
        work = Path(folder)
        settings_file, weights, result = work / "settings.json", work / "adapters.safetensors", work / "result.json"
        settings_file.write_text(json.dumps(dataclasses.asdict(settings)))
        for number, variant in enumerate(VARIANTS, 1):
            print(f"[{number}/{len(VARIANTS) + 1}] {TITLES[variant]}", flush=True)
            _child("train", variant, settings_file, result, *([weights] if variant == "adapters" else []))
            runs[variant] = json.loads(result.read_text())
        print(f"[{len(VARIANTS) + 1}/{len(VARIANTS) + 1}] patched against unpatched", flush=True)
        _child("compare", settings_file, weights, result)
        return runs, json.loads(result.read_text())


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 if every check passed, else 1."""
    args = parser().parse_args(argv)
    data.offline()
    start, settings = time.monotonic(), _settings(args)
    args.out.mkdir(parents=True, exist_ok=True)
    runs, comparison = measure(settings)
    found = report.checks(runs, comparison, accuracy=not args.quick)
    passed = all(check["passed"] for check in found)
    results = {
        "settings": {**dataclasses.asdict(settings), "skipped_blocks": SKIPPED_BLOCKS, "quick": args.quick},
        "environment": _environment(settings),
        "runs": list(runs.values()),
        "comparison": comparison,
        "checks": found,
        "passed": passed,
        "total_seconds": time.monotonic() - start,
    }
    del results["settings"]["assets"]  # a path of this machine
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report.plot_losses(runs, args.out / "losses.png")
    report.plot_costs(runs, comparison, args.out / "costs.png")
    print(f"\n{report.table(runs, comparison)}\n\n{report.check_lines(found)}\n")
    print(f"results.json, losses.png and costs.png are in {args.out} ({results['total_seconds']:.0f} s)")
    return 0 if passed else 1
