"""`bench adapterhub`: AdapterHub's `adapters` against ours on the same T5 and BART, with the same weights.

`adapters` needs an older transformers than we do, so its side runs in a second process (`adapterhub_side`) that does
one call when asked to; the calls of both take turns as if they were in one process, and who waits sleeps. To show what
the two transformers differ by, each side also has the bare backbone, of which training moves the norms alone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import variant as vm
from .adapterhub_side import ADAPTER, BACKBONE, RESULTS
from .models import Plan, _tuned
from .plan import HUB_VARIANTS, hub_modes
from .timing import Refused, interleave
from .workloads import norms_alone

FOLDER = "FASTPETL_ADAPTERHUB"  # environment variable: where its packages are
MAKE = "python -m pip install --no-deps --target .adapterhub -r benchmarks/adapterhub-requirements.txt"


class Helper:
    """The process of AdapterHub's side. A context manager: it ends with the block."""

    def __init__(self, packages: Path):
        root = Path(__file__).resolve().parents[2]
        paths = [str(packages.resolve()), str(root), os.environ.get("PYTHONPATH", "")]
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastpetl.bench.adapterhub_side"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()  # its loop ends
        self._process.stdout.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ask(self, do: str, **arguments) -> dict:
        """Semantics: the reply to one request. Raises Refused with what it failed with, or printed before it ended."""
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["nothing"])[-1]
            raise Refused(f"bench adapterhub: AdapterHub's process ended with status {status}; it printed: {last}")
        reply = json.loads(line)
        if "error" in reply:
            raise Refused(f"bench adapterhub: AdapterHub's process failed to {do}: {reply['error']}")
        return reply


class Remote:
    """A Variant that is over there: the same calls, asked for."""

    def __init__(self, name: str, helper: Helper, folder: Path, in_our_order):
        self.name, self._helper, self._folder, self._in_our_order = name, helper, folder, in_our_order

    def _results(self, mode: str) -> dict:
        self._helper.ask("results", name=self.name, mode=mode)
        return torch.load(self._folder / RESULTS, weights_only=True)

    def infer(self) -> torch.Tensor:
        return self._results("inference")["logits"]

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._results("train")
        return found["logits"], self._in_our_order(found["gradients"])

    def run(self, mode: str) -> None:
        self._helper.ask("run", name=self.name, mode=mode)


def packages() -> Path:
    """Semantics: the folder with AdapterHub's packages. Raises Refused, with the command that makes it, without one."""
    folder = Path(os.environ.get(FOLDER, ".adapterhub"))
    if not (folder / "adapters").is_dir():
        raise Refused(f"bench adapterhub: {folder} has no `adapters`; {MAKE} makes it ({FOLDER} names another folder)")
    return folder


def steps(plan: Plan) -> int:
    """Semantics: how often `measure` reports progress."""
    return 1 + len(hub_modes(plan.only, plan.work.name)) * (1 + len(HUB_VARIANTS) * (1 + plan.rounds))


def measure(plan: Plan, keep_pages: bool, progress=lambda what: None) -> dict:
    """Semantics: rows, checks, and what the other side runs with. Raises Refused, before timing, if the two sides do
    not compute the same, as adapters and as bare backbones, with the same weights.
    """
    rows, checks = [], []
    with tempfile.TemporaryDirectory(prefix="fastpetl-hub-") as folder, Helper(packages()) as helper:
        folder = Path(folder)
        base = plan.work.build(plan.tiny)
        torch.save(base.state_dict(), folder / BACKBONE)
        progress("models")
        theirs = helper.ask(
            "start",
            model=plan.work.name,
            tiny=plan.tiny,
            batch=plan.batch,
            folder=str(folder),
            threads=torch.get_num_threads(),
            keep_pages=keep_pages,
        )
        theirs["round_trip_ms"] = _round_trip(helper)
        variants = _variants(plan, base, helper, folder)
        for mode in hub_modes(plan.only, plan.work.name):
            progress(f"{mode}: compare")
            found = []
            for names in (("eager", "patched", "adapterhub"), ("bare", "bare_there")):
                found += vm.verify({name: variants[name] for name in names}, "fp32", mode, variants[names[0]])
            checks += [{"model": plan.work.name, **check} for check in found]
            rows += _times(plan, variants, mode, helper, progress)
        theirs |= helper.ask("facts")
    return {"rows": rows, "checks": checks, "tuned": _tuned(), "adapterhub": theirs}


def _variants(plan: Plan, base, helper: Helper, folder: Path) -> dict:
    from fastpetl import import_adapterhub

    batch = plan.work.batch(base, plan.tiny, torch.float32, **plan.sizes())
    attached = import_adapterhub(copy.deepcopy(base), folder / ADAPTER, patch=False)

    def adapters_in_our_order(gradients: dict) -> torch.Tensor:
        """What reads their adapters puts their gradients in the places of our parameters."""
        there = folder / "gradients"
        there.mkdir(exist_ok=True)
        shutil.copy(folder / ADAPTER / "adapter_config.json", there)
        torch.save(gradients, there / "pytorch_adapter.bin")
        return _flat(import_adapterhub(copy.deepcopy(base), there, patch=False))

    bare = norms_alone(copy.deepcopy(base))
    trained = [name for name, p in bare.named_parameters() if p.requires_grad]
    return {
        "eager": vm.Variant("eager", plan.work, attached, batch),
        "patched": vm.Variant("patched", plan.work, copy.deepcopy(attached), batch),
        "adapterhub": Remote("adapterhub", helper, folder, adapters_in_our_order),
        "bare": vm.Variant("bare", plan.work, bare, batch),
        "bare_there": Remote(
            "bare", helper, folder, lambda gradients: torch.cat([gradients[n].reshape(-1) for n in trained])
        ),
    }


def _flat(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def _times(plan: Plan, variants: dict, mode: str, helper: Helper, progress) -> list[dict]:
    def call(variant):
        if isinstance(variant, Remote):
            return lambda: variant.run(mode)
        return variant.infer if mode == "inference" else variant.step

    def sampled(what: str) -> None:
        helper.ask("collect")
        progress(f"{mode}: {what}")

    calls = {name: call(variant) for name, variant in variants.items()}
    timed = interleave(calls, rounds=plan.rounds, patience=plan.patience, progress=sampled, helper=helper.pid)
    head = {"model": plan.work.name, "dtype": "fp32", "mode": mode}
    return [{**head, "variant": name, "status": "ok", **timing.row()} for name, timing in timed.items()]


def _round_trip(helper: Helper) -> float:
    """Milliseconds that asking costs, which their samples contain."""
    helper.ask("facts")
    found = []
    for _ in range(5):
        start = time.perf_counter()
        helper.ask("facts")
        found.append(1e3 * (time.perf_counter() - start))
    return min(found)
