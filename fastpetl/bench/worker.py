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
    name = f"{job.get('model', job['what'])} {job['kind']}"
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
    from . import cases, models, ops, skip, tasks, workloads

    common = {"rounds": job["rounds"], "only": job["only"], "patience": job["patience"]}
    if job["what"] == "ops":
        return ops.Plan(cases.TINY if job["tiny"] else cases.Size(), **common)
    if job["what"] == "skip":
        return skip.Plan(job["model"], job["tiny"], **common)
    if job["what"] == "tasks":
        return tasks.Plan(tiny=job["tiny"], **common)
    return models.Plan(workloads.WORKLOADS[job["model"]], job["tiny"], job["batch"], **common)


def _steps(job: dict) -> int:
    from . import adapterhub, models, ops, skip, tasks

    if job["kind"] == "memory":
        return 1
    if job["kind"] == "losses":
        return 2 * LOSS_STEPS
    plan = _plan(job)
    own = {"ops": ops.steps, "skip": skip.steps, "tasks": tasks.steps, "adapterhub": adapterhub.steps}.get(job["what"])
    return 1 + (models.steps(plan, job["dtype"]) if own is None else own(plan))


def _measure(job: dict, progress) -> dict:
    from . import adapterhub, machine, models, ops, skip, tasks, variant

    plan = _plan(job)
    if job["kind"] == "memory":
        progress(f"{job['dtype']} {job['variant']}")
        return {"memory": [models.memory(plan, job["dtype"], job["variant"])]}
    if job["kind"] == "losses":
        return {"losses": variant.losses(plan.work, plan.tiny, LOSS_STEPS, progress)}
    progress("machine")
    dtypes = DTYPES if job["dtype"] == "all" else ("bf16",) if job["dtype"] == "autocast" else (job["dtype"],)
    dtypes = () if job["tiny"] else dtypes
    facts = {**machine.facts(dtypes), "malloc": job["malloc"]}
    if job["what"] == "ops":
        found = ops.measure(plan, progress)
        found["ratios"] = ops.ratios(found["rows"])
    elif job["what"] == "skip":
        found = skip.measure(plan, progress)
    elif job["what"] == "tasks":
        found = tasks.measure(plan, progress)
    elif job["what"] == "adapterhub":
        found = adapterhub.measure(plan, job["malloc"].startswith("keeps"), progress)
        found["ratios"] = models.ratios(found["rows"], bars=not job["batch"])
    else:
        found = models.measure(plan, job["dtype"], progress)
        found["ratios"] = models.ratios(found["rows"], bars=not job["batch"])
    facts["pinned"] = machine.pinned()  # only now have all threads started
    facts["config"] = {"dtype": job["dtype"], **_config(job, plan)}
    return {"machine": [facts], **found}


def _config(job: dict, plan) -> dict:
    import dataclasses

    if job["what"] in ("ops", "skip", "tasks"):
        return dataclasses.asdict(plan)
    title = plan.work.title if not plan.batch else f"{plan.work.title}; here batch {plan.batch}"
    return {"model": plan.work.name, "workload": title, "tiny": plan.tiny, "rounds": plan.rounds}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
