"""`bench tasks`: what a method's made weights cost while decoding, and what mixing tasks in a batch costs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from .plan import MODES, wants
from .timing import Refused, interleave
from .variant import DTYPES, Variant
from .workloads import WORKLOADS

# method -> (against, the most time it may take of that)
DECODING = {"compacter": ("adapter", 1.05), "hyperformer": ("adapter", 1.05), "lora": ("bare", 1.02)}
MIXED = 1.05  # four tasks in a batch against one
# "gradients": a step without its optimizer, which has four times as many parameters to update for four tasks.
MIXED_MODES = (*MODES, "gradients")
TOKENS = 10
TASKS = ("vqa", "gqa", "nlvr", "caption")


@dataclass(frozen=True)
class Plan:
    """What to run: `only` are substrings of decode/method, inference/mixed, train/mixed and gradients/mixed; empty for
    everything.
    """

    tiny: bool = False
    rounds: int = 9
    only: tuple[str, ...] = ()
    patience: float = 120.0

    def methods(self) -> list[str]:
        """Semantics: what decodes, whatever these are measured against included."""
        wanted = [name for name in DECODING if wants(self.only, "decode", name)]
        return list(dict.fromkeys([*(DECODING[name][0] for name in wanted), *wanted]))

    def mixed(self) -> list[str]:
        return [mode for mode in MIXED_MODES if wants(self.only, mode, "mixed")]


def steps(plan: Plan) -> int:
    """Semantics: how often `measure` reports progress."""
    return (len(plan.methods()) + 2 * len(plan.mixed())) * (1 + plan.rounds)


def measure(plan: Plan, progress=lambda what: None) -> dict:
    """Semantics: rows and ratios of patched VL-BART in fp32, everything taken in turns."""
    rows, found = [], []
    if plan.methods():
        timed = _timed(plan, "decode", {name: decoder(name, plan.tiny) for name in plan.methods()}, progress)
        rows += [_row("decode", name, timing) for name, timing in timed.items()]
        ms = {name: timing.row()["ms"] for name, timing in timed.items()}
        for name, (against, bar) in DECODING.items():
            if name in ms:
                what = f"{TOKENS} tokens, time over {against}'s"
                found.append(_found(plan, "decode", name, what, ms[name] / ms[against], bar))
    if plan.mixed():
        calls = mixed(plan.tiny)
    for mode in plan.mixed():
        timed = _timed(plan, mode, calls[mode], progress)
        rows += [_row(mode, name, timing) for name, timing in timed.items()]
        ratio = timed["four tasks"].row()["ms"] / timed["one task"].row()["ms"]
        found.append(_found(plan, mode, "four tasks", "adapters per task, time over one task's", ratio, MIXED))
    return {"rows": rows, "ratios": found, "checks": []}


def decoder(method: str, tiny: bool):
    """Semantics: the patched model of a method (or the "bare" backbone) generating TOKENS tokens greedily, as a
    function; Refused if the unpatched one gives others.
    """
    import fastpetl

    work = WORKLOADS["vlbart" if method in ("bare", "adapter") else f"vlbart_{method}"]
    model = work.build(tiny)
    if method == "bare":
        fastpetl.detach(model)
    batch = {k: v for k, v in work.batch(model, tiny, DTYPES["fp32"]).items() if k != "labels"}
    model.generation_config.forced_eos_token_id = None

    @torch.inference_mode()
    def decode(model):
        return model.eval().generate(**batch, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    want = decode(model)
    fastpetl.patch(model)
    if not torch.equal(decode(model), want):
        raise Refused(f"bench tasks: patched {method} generates other tokens than unpatched; nothing was timed")
    return lambda: decode(model)


def mixed(tiny: bool) -> dict:
    """Semantics: mode -> {setting: function}: adapters per task, one task for the whole batch or four in turn."""
    import fastpetl

    work = WORKLOADS["vlbart"]
    model = fastpetl.detach(work.build(tiny))
    size = {"bottleneck": 8 if tiny else 96}
    fastpetl.attach(model, fastpetl.AdapterConfig(tasks=TASKS, sharing="multiple", **size), patch=False)
    batch = work.batch(model, tiny, DTYPES["fp32"], **({"batch": 4} if tiny else {}))
    subject = Variant("patched", work, copy.deepcopy(model), batch)
    count = batch["input_ids"].shape[0]
    settings = {"one task": ["vqa"] * count, "four tasks": [TASKS[i % 4] for i in range(count)]}

    def call(run, tasks):
        def go():
            with fastpetl.task(subject.model, tasks):
                return run()

        return go

    runs = dict(zip(MIXED_MODES, (subject.infer, subject.step, lambda: _gradients(subject)), strict=True))
    return {mode: {name: call(run, tasks) for name, tasks in settings.items()} for mode, run in runs.items()}


def _gradients(subject) -> None:
    subject.model.train().zero_grad(set_to_none=True)
    subject.forward(subject.batch).loss.backward()


def _timed(plan, mode, calls, progress):
    return interleave(
        calls, rounds=plan.rounds, patience=plan.patience, progress=lambda what: progress(f"{mode}: {what}")
    )


def _row(mode, name, timing) -> dict:
    return {"model": "vlbart", "dtype": "fp32", "mode": mode, "variant": name, "status": "ok", **timing.row()}


def _found(plan, mode, setting, what, value, bar) -> dict:
    bar = None if plan.tiny else bar
    met = bar is None or value <= bar
    return {"model": "vlbart", "mode": mode, "setting": setting, "what": what, "value": value, "bar": bar, "met": met}
