"""The command line of the benchmarks. Each measurement runs in a process of its own, made ready before torch loads.

One process per dtype holds all variants of that dtype, taken in turns. Not one for everything: on a CPU with AMX the
fp32 one keeps oneDNN off AMX (so that routed eager computes in fp32), and bf16 needs it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from . import plan
from .machine import cpu_flags, environment

SCHEMA = 1
ROUNDS = {
    "vilt": (9, 3),
    "models": (9, 3),
    "methods": (9, 3),
    "ops": (15, 5),
    "skip": (9, 3),
    "tasks": (9, 3),
    "adapterhub": (9, 3),
}  # samples per variant: usually, and with --quick


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    batched = (*plan.MODELS, "adapterhub")
    if args.batch is not None and args.what not in batched:
        print(f"bench: --batch is for {' and '.join(batched)}, not for {args.what}", file=sys.stderr)
        return 2
    if args.batch is not None and args.batch < 1:
        print(f"bench: --batch is {args.batch}, expected a positive number", file=sys.stderr)
        return 2
    only = tuple(part for part in args.only.split(",") if part)
    jobs = [{"kind": "time", "dtype": "fp32" if args.what == "tasks" else "all"}]
    if args.what == "skip":
        jobs = plan.skip_jobs(only)
    elif args.what in plan.MODELS:
        jobs = plan.model_jobs(plan.MODELS[args.what], only, args.losses)
    elif args.what == "adapterhub":
        models = [model for model in plan.HUB_MODELS if plan.hub_modes(only, model)]
        jobs = [{"kind": "time", "model": model, "dtype": "fp32"} for model in models]
    if not jobs:
        example = "meter/train/static" if args.what == "skip" else "fp32/train/patched"
        print(f"bench: --only {args.only} matches nothing, expected a part of e.g. {example}", file=sys.stderr)
        return 2
    common = {
        "what": args.what,
        "batch": args.batch or 0,
        "tiny": args.tiny,
        "only": only,
        "rounds": ROUNDS[args.what][args.quick],
        "patience": 0.0 if args.tiny else 15.0 if args.quick else 120.0,
        "malloc": "default" if args.default_malloc else "keeps its pages (mallopt)",
    }
    parts, refused = [], []
    for job in jobs:  # what one model refuses is no reason to throw another's hour away
        part = _run({**common, **job})
        if "refused" in part and part not in refused:
            print(part["refused"], file=sys.stderr)
        (refused if "refused" in part else parts).append(part)
    if not parts:
        return 1
    result = _merge(common, parts)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    _show(result)
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastpetl bench",
        description="Patched against unpatched: variants verified, then timed in turns in one process on 2 pinned "
        "threads; ratios are of medians. Samples taken while other processes ran are thrown away and redone.",
    )
    parser.add_argument(
        "what",
        choices=sorted(ROUNDS),
        help="vilt: ViLT with DAS adapters; models: METER, VL-BART and VL-T5 with adapters; methods: "
        "VL-BART with adapters, Compacter, Hyperformer and LoRA; ops: the kernel "
        "family, op by op; skip: MACs skipped against time saved, of ViLT and METER; tasks: decoding with each method, "
        "tasks mixed; adapterhub: AdapterHub's adapters and ours on the same T5 and BART",
    )
    parser.add_argument(
        "--quick", action="store_true", help="3 samples of each variant in place of 9, of ops 5 in place of 15"
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything measured to FILE")
    parser.add_argument(
        "--only",
        default="",
        metavar="PART[,PART]",
        help="run only what has a PART in its path, default: all; vilt fp32/train/patched, autocast/train or "
        "bf16/memory/eager, models vlbart/fp32, ops fp32/adapter/r96/forward/cpp, skip meter/train/static or "
        "vilt/scoring, tasks decode/lora or train/mixed",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="vilt, models, methods, adapterhub: samples a batch, default: ViLT 8, METER 2, others 16; goals, "
        "which are for these, are then left out",
    )
    parser.add_argument("--losses", action="store_true", help="vilt: compare 50 training losses as well (minutes)")
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help="leave glibc's malloc as it is; otherwise it is told to keep its pages, as mapping them anew differs "
        "between variants by chance",
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests: sizes that mean nothing
    return parser


def _run(job: dict) -> dict:
    """One measurement in a process of its own; its result, or {"refused": why}."""
    cap = job["dtype"] == "fp32" and "amx_tile" in cpu_flags()
    with tempfile.TemporaryDirectory(prefix="fastpetl-bench-") as folder:
        ask, answer = Path(folder, "job.json"), Path(folder, "result.json")
        ask.write_text(json.dumps(job))
        command = [sys.executable, "-m", "fastpetl.bench.worker", str(ask), str(answer)]
        code = subprocess.run(command, env=environment(cap_onednn=cap)).returncode
        if not answer.exists():
            return {"refused": f"bench: the process for {job['kind']} {job['dtype']} ended with status {code}"}
        return json.loads(answer.read_text())


def _merge(common: dict, parts: list[dict]) -> dict:
    """All parts in one schema: lists are appended in the order of the jobs."""
    result = {"schema": SCHEMA, "bench": common["what"], "settings": common, "machine": []}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, list):
                result.setdefault(key, []).extend(value)
            else:
                result[key] = value
    for key in ("rows", "ratios", "checks", "tuned", "memory"):
        result.setdefault(key, [])
    return result


def _show(result: dict) -> None:
    from . import report

    seen = []
    for facts in result["machine"]:
        text = report.machine(facts)
        if text not in seen:
            seen.append(text)
    show = {"ops": report.ops, "skip": report.skip, "tasks": report.skip}.get(result["bench"], report.models)
    print("\n\n".join([*seen, show(result)]))
