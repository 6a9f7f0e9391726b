"""AdapterHub's side of `bench adapterhub`: a process whose transformers is the one that `adapters` needs. It has two
models, `adapters`' and the bare backbone, and does one thing with one of them when it is asked to.

Requests come on stdin and replies go to stdout, one JSON object a line; a reply with `error` is a failure in words.
While it waits it sleeps in a read.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from pathlib import Path

BACKBONE, ADAPTER, RESULTS = "backbone.pt", "adapter", "results.pt"
NAME = "mine"


class Side:
    """The models and what can be asked of them: each public method is a request, its arguments are the request's."""

    def start(self, model: str, tiny: bool, batch: int, folder: str, threads: int, keep_pages: bool) -> dict:
        """Semantics: makes both models with the weights in folder/backbone.pt and saves AdapterHub's adapters in
        folder/adapter, in its format. Returns the versions in use here.
        """
        if keep_pages:
            from .machine import keep_pages as keep

            keep()
        import adapters
        import torch
        import transformers

        from .variant import Variant
        from .workloads import WORKLOADS, norms_alone, spread

        torch.set_num_threads(threads)
        work, self._folder = WORKLOADS[model], Path(folder)
        weights = torch.load(self._folder / BACKBONE, weights_only=True)
        self._variants = {}
        for name in ("bare", "adapterhub"):
            backbone = work.build(tiny)
            backbone.load_state_dict(weights)
            sizes = {"batch": batch} if batch else {}
            given = work.batch(backbone, tiny, torch.float32, **sizes)
            if name == "bare":
                norms_alone(backbone)
            else:
                adapters.init(backbone)
                # Houlsby's places, and behind cross-attention as well: where fastpetl's AdapterConfig has adapters
                config = adapters.DoubleSeqBnConfig(reduction_factor=8, cross_adapter=True)
                backbone.add_adapter(NAME, config=config)
                backbone.train_adapter(NAME)
                torch.manual_seed(2)
                spread(backbone, sharpen=())
                backbone.save_adapter(str(self._folder / ADAPTER), NAME)
            self._variants[name] = Variant(name, work, backbone, given)
        gc.collect()
        gc.freeze()  # what is there by now stays; `collect` need not look at it
        gc.disable()  # as it is for the calls timed on the other side; `collect` is asked for between them
        versions = {module.__name__: module.__version__ for module in (adapters, transformers, torch)}
        return {"versions": versions}

    def run(self, name: str, mode: str) -> dict:
        """Semantics: one inference or one training step."""
        variant = self._variants[name]
        variant.infer() if mode == "inference" else variant.step()
        return {}

    def results(self, name: str, mode: str) -> dict:
        """Semantics: folder/results.pt gets the logits and, of training, the gradients by parameter."""
        import torch

        variant = self._variants[name]
        if mode == "inference":
            found = {"logits": variant.infer()}
        else:
            logits, flat = variant.gradients()
            trained = {name: p for name, p in variant.model.named_parameters() if p.requires_grad}
            parts = flat.split([p.numel() for p in trained.values()])
            pairs = zip(trained.items(), parts, strict=True)
            found = {"logits": logits, "gradients": {name: part.view_as(p) for (name, p), part in pairs}}
        torch.save(found, self._folder / RESULTS)
        return {}

    def collect(self) -> dict:
        """Semantics: Python's garbage, between samples."""
        gc.collect()
        return {}

    def facts(self) -> dict:
        """Semantics: where its threads may run; by then all have started."""
        from .machine import pinned

        return {"pinned": pinned()}


def main() -> int:
    if hasattr(os, "sched_setaffinity"):
        # The process that started this one runs OpenMP: its main thread, whose CPUs we inherit, is bound to one.
        with contextlib.suppress(ValueError):
            cpus = [int(cpu) for cpu in os.environ.get("GOMP_CPU_AFFINITY", "").split()]
            os.sched_setaffinity(0, cpus) if cpus else None
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    side = Side()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(side, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001  (whatever it is, the other side ends the benchmark with it)
            first = str(error).strip().splitlines() or [""]
            reply = {"error": f"{type(error).__name__}: {first[0]}"}
        print(json.dumps(reply), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
