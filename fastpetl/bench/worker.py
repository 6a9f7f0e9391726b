"""One measurement in its own process: python -m fastpetl.bench.worker job.json result.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .plan import DTYPES

LOSS_STEPS = 50


def main(argv: list[str]) -> int:
    ask, answer = map(Path, argv)
    job = json.loads(ask.read_text())
    job["only"] = tuple(job["only"])
    from .machine import THREADS, keep_pages
    from .timing import Refused

    # Memory is measured with the allocator users have.
    if job["kind"] != "memory" and job["malloc"] != "default" and not keep_pages():
        job["malloc"] = "default (this is not glibc)"
    import torch
    from tqdm import tqdm

    torch.set_num_threads(THREADS)
    name = f"{job['what']} {job['kind']}"
    with tqdm(total=_steps(job), desc=name, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:

        def progress(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        try:
            result = _measure(job, progress)
        except Refused as error:
            result = {"refused": str(error)}
        bar.total = bar.n  # what was not available needed fewer steps
    answer.write_text(json.dumps(result))
    return 1 if "refused" in result else 0


def _plan(job: dict):
    from . import cases, ops, vilt
    from .vilt_model import TINY, Sizes

    if job["what"] == "vilt":
        sizes = {"sizes": TINY if job["tiny"] else Sizes()}
        return vilt.Plan(**sizes, rounds=job["rounds"], only=job["only"], patience=job["patience"])
    size = cases.TINY if job["tiny"] else cases.Size()
    return ops.Plan(size, rounds=job["rounds"], only=job["only"], patience=job["patience"])


def _steps(job: dict) -> int:
    from . import ops, vilt

    if job["kind"] == "memory":
        return 1
    if job["kind"] == "losses":
        return 2 * LOSS_STEPS
    plan = _plan(job)
    return 1 + (vilt.steps(plan, job["dtype"]) if job["what"] == "vilt" else ops.steps(plan))


def _measure(job: dict, progress) -> dict:
    from . import machine, ops, vilt, vilt_model

    plan = _plan(job)
    if job["kind"] == "memory":
        progress(f"{job['dtype']} {job['variant']}")
        return {"memory": [vilt.memory(plan, job["dtype"], job["variant"])]}
    if job["kind"] == "losses":
        return {"losses": vilt_model.losses(plan.sizes, LOSS_STEPS, progress)}
    progress("machine")
    dtypes = () if job["tiny"] else DTYPES if job["dtype"] == "all" else (job["dtype"],)
    facts = {**machine.facts(dtypes), "malloc": job["malloc"]}
    if job["what"] == "vilt":
        found = vilt.measure(plan, job["dtype"], progress)
        found["ratios"] = vilt.ratios(found["rows"])
    else:
        found = ops.measure(plan, progress)
        found["ratios"] = ops.ratios(found["rows"])
    facts["pinned"] = machine.pinned()  # only now have all threads started
    facts["config"] = {"dtype": job["dtype"], **_config(plan)}
    return {"machine": [facts], **found}


def _config(plan) -> dict:
    import dataclasses

    return dataclasses.asdict(plan)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
