"""The stages of the GPU suite (gpu_suite.py) that time: each a function of its limit in seconds that returns a JSON
value."""

import copy
import functools
import os
import statistics
import time

from gpu_stages import gpu, keep, run, serving

AUTOTUNED = ("site/vilt", "adapter/r96", "residual_norm")  # max-autotune compiles for minutes: only these


def size():
    from fastpetl.bench import cases

    return cases.Size(rows=16384, batch=64) if gpu() else cases.TINY


def facts(limit):
    import torch

    from fastpetl import info

    found = {"fastpetl": info.gather()["versions"], "gpu": gpu()}
    commit = run(["git", "rev-parse", "HEAD"], 10)
    found["commit"] = commit["tail"].strip() if commit["ok"] else os.environ.get("FASTPETL_COMMIT", "not known")
    if gpu():
        p = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found |= {"device": p.name, "sms": p.multi_processor_count, "smi": run(query, 20)["tail"].strip()}
        found["copy_tbs"] = copy_rate(1 << 31) / 1e12
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        found["bf16_tflops"] = 2 * 8192**3 / seconds(lambda: a @ b) / 1e12
    return found


def seconds(call, rep: int = 100) -> float:
    """Semantics: median seconds of a call, by device events on a GPU, where it is repeated for `rep` milliseconds."""
    if gpu():
        from triton.testing import do_bench

        return do_bench(call, warmup=25, rep=rep, return_mode="median") / 1e3
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_rate(nbytes: int) -> float:
    import torch

    a = torch.ones(nbytes // 4, device="cuda" if gpu() else "cpu")
    b = torch.empty_like(a)
    return 2 * nbytes / seconds(lambda: b.copy_(a))


def ops(limit):
    """Each case in bf16: eager, our backends, and (last: it compiles for long) max-autotune; share of the floor's
    bandwidth."""
    import torch

    from fastpetl.bench import cases
    from fastpetl.bench import ops as bench

    device, rows, end = ("cuda" if gpu() else "cpu"), [], time.time() + limit - 20
    copy = copy_rate(1 << (31 if gpu() else 22))
    named = {case.name: case for case in cases.CASES}
    tasks = [*((case, False) for case in cases.CASES), *((named[name], True) for name in AUTOTUNED)]
    for case, autotune in tasks:
        if time.time() > end - (25 if autotune and gpu() else 0):
            rows.append({"case": case.name, "variant": "max-autotune" if autotune else "", "status": "no time left"})
            continue
        built = case.build(size(), cases.Maker(torch.bfloat16, device, seed=3))
        if autotune:
            mode = {"mode": "max-autotune-no-cudagraphs"} if gpu() else {}
            calls = {"max-autotune": torch.compile(built.formula, dynamic=False, **mode)}
        else:
            ours = [n for n in serving(case, device, torch.bfloat16) if n not in ("reference", "torch")]
            calls = {"eager": built.formula} | {n: built.fused(n) for n in ours}
        for mode in bench.MODES:
            grads = None if mode == "forward" else bench.cotangents(built)
            floor = bench.floors(built, size(), mode)["floor_mib"] * 2**20
            for name, function in calls.items():
                row, call = (
                    {"case": case.name, "mode": mode, "variant": name},
                    functools.partial(bench.results, function, built.inputs, grads),
                )
                try:
                    rows.append({**row, "status": "ok", **_timed(call, floor / copy)})
                except RuntimeError as error:
                    rows.append({**row, "status": str(error)[:200]})
        keep(rows)
    return rows


def _timed(call, floor: float) -> dict:
    """Semantics: microseconds of a call from Python and, on a GPU, of its kernels alone, replayed from a graph: the
    share of the floor is taken of those. A call that waits for the device cannot be captured: its own time then."""
    called = seconds(call)
    alone = _kernels(call)
    replayed = called if alone is None else alone / 1e3
    return {"us": 1e6 * replayed, "called_us": 1e6 * called, "of_copy": floor / replayed, "captured": alone is not None}


def _replay(call) -> float:
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return seconds(graph.replay)


def _kernels(call) -> float | None:
    """Semantics: milliseconds of the kernels alone; None where the call cannot be captured: it waits for the device."""
    if not gpu():
        return None
    try:
        return 1e3 * _replay(call)
    except RuntimeError:
        return None


def model(limit):
    """Each model with adapters, in bf16: eager, patched; memory; the adapters' tax; for ViLT, what skipping a third of
    the blocks gives back; last, compiled."""
    from fastpetl.bench import workloads

    works = (workloads.VILT, workloads.VLBART, workloads.METER, workloads.VLT5) if gpu() else (workloads.VILT,)
    rows, bases, end = [], {}, time.time() + limit - 10
    tasks = [(w, n) for w in works for n in ("eager", "patched", "bare, patched", "skip a third, patched")]
    tasks = [(w, n) for w, n in tasks if w is workloads.VILT or not n.startswith("skip")]
    for work, name in [*tasks, *((w, "compile") for w in works)]:
        head = {"model": work.name, "variant": name, "status": "ok"}
        if time.time() > end - (30 if name == "compile" else 0):
            rows.append({**head, "status": "not run: out of time"})
            continue
        try:
            if work.name not in bases:
                bases[work.name] = work.build(not gpu())
            rows.append({**head, **_timed_model(work, bases[work.name], name)})
        except (RuntimeError, ValueError) as error:
            rows.append({**head, "status": str(error)[:200]})
        keep(rows)
    return rows


def scoring(limit):
    """Three candidate plans scored in one pass, against three passes, in bf16 at batch 8: a small batch of a search."""
    import torch

    from fastpetl.bench import skip, variant, workloads

    rows = []
    for work in (workloads.VILT, workloads.METER) if gpu() else (workloads.VILT,):
        base, device = work.build(not gpu()), "cuda" if gpu() else "cpu"
        batch = work.batch(base, not gpu(), torch.bfloat16, batch=8 if gpu() else None)
        base, batch = base.to(device, torch.bfloat16), {k: t.to(device) for k, t in batch.items()}
        calls, difference = skip.scoring(variant.Variant("patched", work, base, batch))
        took = {f"{name.replace(' ', '_')}_ms": 1e3 * seconds(call, MODEL_REP) for name, call in calls.items()}
        rows.append({"model": work.name, **took, "difference": difference})
        keep(rows)
    return rows


MODEL_REP = 600  # a whole model takes 10 to 120 ms, of which a tenth of a second has two
BATCH = {"vilt": 64, "meter": 16, "vlbart": 128, "vlt5": 128}  # fill the GPU


def _timed_model(work, base, name: str) -> dict:
    import torch

    import fastpetl
    from fastpetl.bench import variant

    device, chosen, saved = "cuda" if gpu() else "cpu", copy.deepcopy(base), 0.0
    batch = work.batch(chosen, not gpu(), torch.bfloat16, batch=BATCH[work.name] if gpu() else None)
    chosen, batch = chosen.to(device, torch.bfloat16), {k: t.to(device) for k, t in batch.items()}
    if name == "bare, patched":
        trained = {n for n, p in chosen.named_parameters() if p.requires_grad}
        fastpetl.detach(chosen)
        for n, p in chosen.named_parameters():
            p.requires_grad_(n in trained)
    v = variant.Variant(name.split(", ")[-1], work, chosen, batch)
    if name.startswith("skip"):
        found = fastpetl.blocks(chosen)
        mask = [i % 3 == 1 for i in range(len(found))]
        saved = sum(b.macs - b.shortcut_macs for b, m in zip(found, mask, strict=True) if m)
        saved /= sum(b.macs for b in found)
        fastpetl.skip(chosen, mask)
    if gpu():
        torch.cuda.reset_peak_memory_stats()
    row = {name: 1e3 * seconds(call, MODEL_REP) for name, call in (("inference_ms", v.infer), ("step_ms", v.step))}
    row["inference_kernels_ms"] = _kernels(v.infer)
    row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if gpu() else None
    return {**row, "skipped_share_of_macs": saved or None}
