"""`bench vilt`: inference and training step, eager against compiled, routed and patched."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass

import torch

from . import variant as vm
from .plan import MODES, model_variants
from .timing import interleave
from .workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Plan:
    """What to run of one workload: `only` are substrings of model/dtype/mode/variant, empty for everything."""

    work: Workload
    tiny: bool = False
    batch: int = 0  # samples a batch; 0: the workload's
    rounds: int = 9
    only: tuple[str, ...] = ()
    patience: float = 120.0  # seconds spent on waiting for a quiet machine, per group of variants

    def sizes(self) -> dict:
        return {"batch": self.batch} if self.batch else {}

    def variants(self, dtype: str, mode: str) -> list[str]:
        return model_variants(self.only, self.work.name, dtype, mode)


def steps(plan: Plan, dtype: str) -> int:
    """Semantics: how often `measure` reports progress."""
    count = 0
    for mode in MODES:
        names = plan.variants(dtype, mode)
        count += len(names) * (1 + plan.rounds) + bool(names) + ("compile" in names and not count)
    return count


def measure(plan: Plan, dtype: str, progress=lambda what: None) -> dict:
    """Semantics: rows, checks and the backends chosen, for one dtype; everything in this process, taken in turns.

    Raises Refused, before timing, if a variant computes something else than eager.
    """
    rows, checks = [], []
    wanted = {mode: plan.variants(dtype, mode) for mode in MODES}
    unavailable = {"routed": vm.route_reason()} if any("routed" in names for names in wanted.values()) else {}
    unavailable = {name: reason for name, reason in unavailable.items() if reason}
    base = plan.work.build(plan.tiny).to(vm.PRECISIONS[dtype])
    batch = plan.work.batch(base, plan.tiny, vm.PRECISIONS[dtype], **plan.sizes())
    variants = {}
    for mode in MODES:
        for name in wanted[mode]:
            if name in unavailable:
                rows.append(
                    {
                        "model": plan.work.name,
                        "dtype": dtype,
                        "mode": mode,
                        "variant": name,
                        "status": unavailable[name],
                    }
                )
                progress(f"{name}: not available")
                continue
            if name not in variants:
                variants[name] = vm.Variant(name, plan.work, copy.deepcopy(base), batch, dtype == "autocast")
                if name == "compile":
                    unavailable.update(_compile(plan, variants[name], dtype, mode, rows, progress))
        present = {name: variants[name] for name in wanted[mode] if name not in unavailable}
        if not present:
            continue
        truth = present["eager"] if dtype == "fp32" else _single(plan.work, base, batch)
        progress(f"{dtype} {mode}: compare")
        found = vm.verify(present, dtype, mode, truth)
        checks += [{"model": plan.work.name, **c} for c in found]
        for check in (c for c in found if not c["met"] and present.pop(c["variant"], None)):
            row = {"model": plan.work.name, "dtype": dtype, "mode": mode, "variant": check["variant"]}
            rows.append({**row, "status": vm.difference(check)})
        del truth
        gc.collect()
        calls = {name: (v.infer if mode == "inference" else v.step) for name, v in present.items()}
        timed = interleave(
            calls,
            rounds=plan.rounds,
            patience=plan.patience,
            progress=lambda what, mode=mode: progress(f"{dtype} {mode}: {what}"),
        )
        for name, timing in timed.items():
            rows.append(
                {"model": plan.work.name, "dtype": dtype, "mode": mode, "variant": name, "status": "ok", **timing.row()}
            )
    return {"rows": rows, "checks": checks, "tuned": _tuned()}


def _compile(plan, variant, dtype: str, mode: str, rows: list, progress) -> dict:
    """Compiles by running once; a compiler that fails is a row that says so, not the end of the benchmark."""
    progress(f"{dtype} {mode}: torch.compile compiles")
    try:
        variant.infer() if mode == "inference" else variant.gradients()
    except Exception as error:  # noqa: BLE001  (inductor raises whatever the C++ compiler made it raise)
        line = str(error).strip().splitlines() or [""]
        reason = f"torch.compile failed: {type(error).__name__}: {line[0][:120]}"
        rows.append({"model": plan.work.name, "dtype": dtype, "mode": mode, "variant": "compile", "status": reason})
        return {"compile": reason}
    return {}


def _single(work, base, batch):
    """The same weights and inputs in fp32."""
    batch = {name: t.float() if t.is_floating_point() else t for name, t in batch.items()}
    return vm.Variant("eager", work, copy.deepcopy(base).float(), batch)


def _tuned() -> list[dict]:
    from fastpetl import backends

    return [
        {"key": [str(part) for part in key], "chosen": t.name, "ms": t.milliseconds, "rejected": t.rejected}
        for key, t in backends.tuned().items()
    ]


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(plan: Plan, dtype: str, name: str) -> dict:
    """Semantics: memory of `name`'s training step in a process of its own, with the allocator as it comes.

    saved_mib: what the forward keeps for the backward, each storage once, parameters and inputs not counted.
    step_peak_mib: highest resident memory of two steps after the first. process_peak_mib: of the whole process, first
    step (in which the patched model measures its backends) and imports included.
    """
    variant = vm.make(name, plan.work, plan.tiny, dtype, **plan.sizes())
    first = variant.step()
    whole = high_water_mib()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again from what is resident now
        reset = True
    except OSError:
        reset = False
    for _ in range(2):
        variant.step()
    peak = high_water_mib()
    saved = saved_bytes(variant)  # last: what it frees stays with the allocator
    return {
        "model": plan.work.name,
        "dtype": dtype,
        "variant": name,
        "saved_mib": saved / 2**20,
        "step_peak_mib": peak if reset else None,
        "process_peak_mib": None if peak is None else max(whole, peak),
        "loss": first.item(),
    }


def saved_bytes(variant) -> int:
    """Semantics: bytes of the distinct storages autograd keeps for one training forward, less parameters and inputs."""
    model = variant.model.train()
    known = [*model.parameters(), *model.buffers(), *variant.batch.values()]
    ours = {t.untyped_storage().data_ptr() for t in known}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = variant.forward(variant.batch).loss  # keeps the graph, so that no address is used twice
    total = sum(kept.values())
    del loss
    return total


def high_water_mib() -> float | None:
    """Semantics: VmHWM, the highest resident memory since the mark was last reset; None where there is no /proc."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return None


# --- ratios -----------------------------------------------------------------------------------------------------------


def ratios(rows: list[dict], bars: bool = True) -> list[dict]:
    """Semantics: patched against every other variant of its model, dtype and mode: ratio of medians, the bar, met or
    not. bars: False at other sizes than the bars are for.
    """
    ms = {(r["model"], r["dtype"], r["mode"], r["variant"]): r["ms"] for r in rows if r["status"] == "ok"}
    found = []
    for (model, dtype, mode, name), base in ms.items():
        patched = ms.get((model, dtype, mode, "patched"))
        if name == "patched" or patched is None:
            continue
        bar = WORKLOADS[model].bars.get((dtype, mode, name)) if bars else None
        ratio = base / patched
        met = None if bar is None else ratio >= bar
        head = {"model": model, "dtype": dtype, "mode": mode}
        found.append({**head, "against": name, "ratio": ratio, "bar": bar, "met": met})
    return found
