"""All that a GPU has to say about fastpetl, in one command: python benchmarks/gpu_suite.py [--minutes 9]

Builds, runs the op tests on the GPU, checks every op's numbers (also on another stream, in a captured graph, and on a
device that is not the current one), lets compute-sanitizer look at small cases, reads the kernels' spills, then
measures: each op against eager and max-autotune, ViLT against eager and compiled, the adapters' tax and what skipping
gives back. Writes one JSON and one Markdown table into benchmarks/results/, to be committed.

Each stage is a process with a time limit; what one cannot do is a line that says why, and the next goes on. Without a
GPU every stage runs to its end on the CPU with sizes that mean nothing, Triton in its interpreter; the files then go to
a temporary folder and say so.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "facts": 60,
    "build": 200,
    "tests": 150,
    "checks": 120,
    "sanitizer": 90,
    "spills": 30,
    "ops": 150,
    "model": 120,
}
AUTOTUNED = ("adapter/r96", "site/vilt", "residual_norm")  # max-autotune compiles for minutes: only these


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def size():
    from fastpetl.bench import cases

    return cases.Size(rows=16384, batch=64) if gpu() else cases.TINY


def dtypes() -> dict:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run(command, limit: float, **env) -> dict:
    """Semantics: {"ok", "seconds", "tail"} of a command; a limit that is reached, or a missing program, is not ok."""
    start = time.time()
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=limit, capture_output=True, text=True, env={**os.environ, **env}, check=False
        )
        ok, text = done.returncode == 0, done.stdout + done.stderr
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        ok, text = False, str(error)
    return {"ok": ok, "seconds": round(time.time() - start, 1), "tail": text[-1500:]}


# --- stages: each returns a JSON value --------------------------------------------------------------------------------


def facts(limit):
    import torch

    from fastpetl import info

    found = {"fastpetl": info.gather()["versions"], "gpu": gpu()}
    found["commit"] = run(["git", "rev-parse", "HEAD"], 10)["tail"].strip()
    if gpu():
        p = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found |= {"device": p.name, "sms": p.multi_processor_count, "smi": run(query, 20)["tail"].strip()}
        found["copy_tbs"] = copy_rate(1 << 31) / 1e12
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        found["bf16_tflops"] = 2 * 8192**3 / seconds(lambda: a @ b) / 1e12
    return found


def build(limit):
    env = {"FASTPETL_REQUIRE_EXT": "1"}
    if gpu():
        import torch

        major, minor = torch.cuda.get_device_capability()
        env["FASTPETL_CUDA_ARCH_LIST"] = f"{major}{minor}" + ("a" if major >= 9 else "")
    else:
        env["FASTPETL_CUDA"] = "0"
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], limit, **env)


def tests(limit):
    what = ["tests/ops", "tests/kernels"] if gpu() else ["tests/ops/test_errors.py"]
    return run([sys.executable, "-m", "pytest", "-q", "-m", "not slow", *what], limit)


def checks(limit):
    """Every case x dtype x backend by the two-times rule, in each setting."""
    import torch

    from fastpetl.bench import cases, ops

    device, rows = ("cuda" if gpu() else "cpu"), []
    for case in cases.CASES:
        for short, dtype in dtypes().items():
            names = serving(case, device, dtype)
            built = case.build(cases.TINY, cases.Maker(dtype, device, seed=3))
            grads = ops.cotangents(built)
            for name in names:
                for setting, context in settings().items():
                    head = {"case": case.name, "dtype": short, "backend": name, "setting": setting}
                    with context():
                        try:
                            ops.verify(built, {"eager": built.formula, name: built.fused(name)}, grads, case.name)
                            rows.append({**head, "ok": True})
                        except (RuntimeError, ValueError) as error:
                            rows.append({**head, "ok": False, "why": str(error)[:300]})
                if gpu():
                    rows.append({"case": case.name, "dtype": short, "backend": name, **captured(built, name)})
    if gpu() and torch.cuda.device_count() == 1:
        rows.append({"setting": "not the current device", "ok": True, "why": "one GPU: cannot be tried"})
    return rows


def serving(case, device, dtype) -> list[str]:
    """Semantics: the backends that serve the case; a site's must also be the adapter's."""
    from fastpetl import backends

    ops = {case.op, "adapter"} if case.name.startswith("site/") else {case.op}
    return [n for n in backends.BACKENDS[case.op] if all(backends.verify(op, n, device, dtype)[0] for op in ops)]


def settings() -> dict:
    """Semantics: name -> a context in which the ops must give the same numbers."""
    if not gpu():
        return {"default": contextlib.nullcontext}
    import torch

    found = {"default": contextlib.nullcontext, "stream": lambda: torch.cuda.stream(torch.cuda.Stream())}
    if torch.cuda.device_count() > 1:
        found["not the current device"] = lambda: torch.cuda.device(1)
    return found


def captured(built, name) -> dict:
    """Semantics: the forward captured in a CUDA graph gives the same bits as outside."""
    import torch

    from fastpetl.bench import ops

    try:
        want = ops.results(built.fused(name), built.inputs)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                ops.results(built.fused(name), built.inputs)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            got = ops.results(built.fused(name), built.inputs)
        graph.replay()
        same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        return {"setting": "graph", "ok": same, "why": "" if same else "other bits than outside the graph"}
    except RuntimeError as error:
        return {"setting": "graph", "ok": False, "why": str(error)[:300]}


def sanitizer(limit):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not gpu() or not Path(tool).exists():
        return {"ok": None, "why": "no GPU" if not gpu() else f"{tool} is not installed"}
    own = [sys.executable, str(Path(__file__).resolve()), "--stage", "small"]
    return {
        t: run([tool, "--tool", t, "--error-exitcode", "9", *own], limit / 2 - 1) for t in ("memcheck", "racecheck")
    }


def small(limit):
    """What compute-sanitizer looks at: a forward and backward of each kind of kernel on each GPU backend."""
    from fastpetl.bench import cases, ops

    device = "cuda" if gpu() else "cpu"
    first = {case.op: case for case in reversed(cases.CASES)}  # one of each op
    for case in first.values():
        built = case.build(cases.TINY, cases.Maker(dtypes()["fp16"], device, seed=3))
        for name in serving(case, device, dtypes()["fp16"]):
            ops.results(built.fused(name), built.inputs, ops.cotangents(built))
    copied_rows(device)
    return {"ok": True}


def copied_rows(device):
    """Rows gathered and put back, which no case does."""
    import torch

    import fastpetl.ops

    x = torch.randn(9, 40, device=device, dtype=dtypes()["fp16"], requires_grad=True)
    index, count = torch.tensor([3, 0, 7], device=device), torch.tensor([2], device=device)
    y = fastpetl.ops.gather_rows(x, index, count)
    fastpetl.ops.scatter_rows(x, 2 * y, index, count).sum().backward()


def spills(limit):
    """Registers and spills of what Triton compiled for this GPU; ahead of time all are 0 (tests/kernels)."""
    if not gpu():
        return {"ok": None, "why": "no GPU: tests/kernels/test_aot.py reads them from ahead-of-time compiles"}
    small(limit)
    from fastpetl.kernels import adapter_kernels, phm_kernels, residual_norm_kernels, rows_kernels

    found, modules = [], (adapter_kernels, residual_norm_kernels, phm_kernels, rows_kernels)
    for name, kernel in ((f"{m.__name__}.{n}", k) for m in modules for n, k in vars(m).items()):
        for caches in getattr(kernel, "device_caches", {}).values():
            for compiled in getattr(caches[0], "values", list)():
                found.append({"kernel": name, "registers": compiled.n_regs, "spills": compiled.n_spills})
    return {"ok": bool(found) and not any(f["spills"] for f in found), "kernels": found}


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(call) -> float:
    """Semantics: median seconds of a call, by device events on a GPU."""
    if gpu():
        from triton.testing import do_bench

        return do_bench(call, warmup=25, rep=100, return_mode="median") / 1e3
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
    """Each case in bf16: eager, max-autotune, our backends; share of the floor's bandwidth."""
    import torch

    from fastpetl.bench import cases
    from fastpetl.bench import ops as bench

    device, rows, end = ("cuda" if gpu() else "cpu"), [], time.time() + limit - 20
    copy = copy_rate(1 << (31 if gpu() else 22))
    for case in cases.CASES:
        if time.time() > end:
            rows.append({"case": case.name, "status": "not run: out of time"})
            continue
        built = case.build(size(), cases.Maker(torch.bfloat16, device, seed=3))
        calls = {"eager": built.formula} | {n: built.fused(n) for n in bench.fused(case, "bf16", device)}
        if case.name in AUTOTUNED:
            mode = {"mode": "max-autotune"} if gpu() else {}
            calls["max-autotune"] = torch.compile(built.formula, dynamic=False, **mode)
        for mode in bench.MODES:
            grads = None if mode == "forward" else bench.cotangents(built)
            floor = bench.floors(built, size(), mode)["floor_mib"] * 2**20
            for name, function in calls.items():
                row = {"case": case.name, "mode": mode, "variant": name}
                try:
                    took = seconds(lambda f=function, g=grads, b=built: bench.results(f, b.inputs, g))
                    rows.append({**row, "status": "ok", "us": 1e6 * took, "of_copy": floor / took / copy})
                except RuntimeError as error:
                    rows.append({**row, "status": str(error)[:200]})
    return rows


def model(limit):
    """ViLT with DAS adapters: eager, compiled, patched; memory; the adapters' tax; what 4 of 12 skipped blocks give."""
    import copy

    import torch

    import fastpetl
    from fastpetl.bench import variant, workloads

    work, tiny, device = workloads.VILT, not gpu(), "cuda" if gpu() else "cpu"
    base = work.build(tiny).to(device, torch.bfloat16)
    batch = {k: t.to(device) for k, t in work.batch(base, tiny, torch.bfloat16).items()}
    rows, models = [], {"eager": "eager", "compile": "compile", "patched": "patched", "skip a third": "patched"}
    for name, kind in {**models, "bare, patched": "patched"}.items():
        chosen = copy.deepcopy(base)
        if name == "bare, patched":
            fastpetl.detach(chosen)
            for p in chosen.vilt.encoder.parameters():
                p.requires_grad_(False)
        v = variant.Variant(kind, work, chosen, batch)
        saved = 0.0
        if name == "skip a third":
            found = fastpetl.blocks(chosen)
            mask = [i % 3 == 1 for i in range(len(found))]
            saved = sum(b.macs - b.shortcut_macs for b, m in zip(found, mask, strict=True) if m)
            saved /= sum(b.macs for b in found)
            fastpetl.skip(chosen, mask)
        if gpu():
            torch.cuda.reset_peak_memory_stats()
        row = {"variant": name, "inference_ms": 1e3 * seconds(v.infer), "step_ms": 1e3 * seconds(v.step)}
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if gpu() else None
        rows.append({**row, "skipped_share_of_macs": saved or None})
        del v, chosen
    return rows


# --- the driver -------------------------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    f = result["facts"]
    lines = [f"# GPU suite: {f.get('device', 'no GPU; sizes and times here mean nothing')}", ""]
    lines += [f"{k}: {v}" for k, v in f.items() if not isinstance(v, dict)]
    lines += ["", "| stage | ok | seconds |", "|---|---|---|"]
    lines += [f"| {n} | {s['ok']} | {s['seconds']} |" for n, s in result["stages"].items()]
    wrong = [c for c in result.get("checks") or [] if not c["ok"]]
    lines += ["", f"checks: {len(result.get('checks') or [])}, failed: {len(wrong)}"]
    lines += [f"* {c}" for c in wrong[:20]]
    lines += ["", "| case | mode | variant | µs | of copy bandwidth |", "|---|---|---|---|---|"]
    for r in result.get("ops") or []:
        took = f"{r['us']:.1f} | {100 * r['of_copy']:.0f} %" if r["status"] == "ok" else f"– | {r['status']}"
        lines.append(f"| {r['case']} | {r.get('mode', '')} | {r.get('variant', '')} | {took} |")
    lines += [
        "",
        "| ViLT, bf16 | inference, ms | step, ms | peak MiB | share of MACs skipped |",
        "|---|---|---|---|---|",
    ]
    for r in result.get("model") or []:
        rest = f"{r['peak_mib'] or '–'} | {r['skipped_share_of_macs'] or '–'}"
        lines.append(f"| {r['variant']} | {r['inference_ms']:.2f} | {r['step_ms']:.2f} | {rest} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="all stages together")
    parser.add_argument("--only", default="", help="comma-separated stages")
    parser.add_argument("--results", type=Path, help="folder of the result files")
    parser.add_argument("--stage", choices=[*STAGES, "small"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.stage:
        correct_interpreter()
        value = globals()[args.stage](STAGES.get(args.stage, 60))
        if out := os.environ.get("FASTPETL_SUITE_OUT"):
            Path(out).write_text(json.dumps(value))
        return 0
    return drive(args)


def correct_interpreter():
    """Where Triton interprets, bf16 is right only with what the tests correct."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("interp_patch")


def drive(args) -> int:
    end = time.time() + 60 * args.minutes
    here = gpu()
    folder = args.results or (ROOT / "benchmarks/results" if here else Path(tempfile.mkdtemp(prefix="fastpetl-suite-")))
    folder.mkdir(parents=True, exist_ok=True)
    result = {"facts": {}, "stages": {}}
    file = folder / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.json"
    env = {"FASTPETL_SUITE_OUT": str(folder / "stage.json"), "TRITON_INTERPRET": "0" if here else "1"}
    for name, limit in STAGES.items():
        if args.only and name not in args.only.split(",") and name != "facts":
            continue
        limit = min(limit, end - time.time())
        print(f"{name} ...", end=" ", flush=True)
        if limit < 5:
            result["stages"][name] = {"ok": False, "seconds": 0, "tail": "not run: out of time"}
            print("not run: out of time")
            continue
        Path(env["FASTPETL_SUITE_OUT"]).unlink(missing_ok=True)
        done = run([sys.executable, __file__, "--stage", name], limit, **env)
        if Path(env["FASTPETL_SUITE_OUT"]).exists():
            result[name] = json.loads(Path(env["FASTPETL_SUITE_OUT"]).read_text())
            if isinstance(result[name], dict) and result[name].get("ok") is False:
                done["ok"] = False
        result["stages"][name] = done
        file.write_text(json.dumps(result, indent=1) + "\n")  # after each stage: a lease that ends keeps what there is
        print("ok" if done["ok"] else f"FAILED\n{done['tail'][-800:]}", f"({done['seconds']} s)", flush=True)
    Path(env["FASTPETL_SUITE_OUT"]).unlink(missing_ok=True)
    text = markdown(result)
    file.with_suffix(".md").write_text(text)
    print(f"\n{text}\nwritten: {file} and {file.with_suffix('.md').name}")
    return 0 if all(s["ok"] for s in result["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
