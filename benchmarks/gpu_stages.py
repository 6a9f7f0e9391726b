"""The stages of the GPU suite (gpu_suite.py) that build and prove: each a function of its limit in seconds that returns
a JSON value."""

import concurrent.futures
import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE = Path(__file__).with_name("gpu_suite.py")


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def keep(value) -> None:
    """Semantics: writes what a stage has found so far: a limit that cuts it off leaves that."""
    if out := os.environ.get("FASTPETL_SUITE_OUT"):
        Path(out).write_text(json.dumps(value))


def dtypes() -> dict:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run(command, limit: float, keep: int = 6000, **env) -> dict:
    """Semantics: {"ok", "seconds", "tail"} of a command; a limit that is reached, or a missing program, is not ok. At
    the limit the command ends with all it has started; what it had printed is there."""
    start, ok = time.time(), False
    with tempfile.TemporaryFile("w+") as out:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **env},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            ok = process.wait(max(limit, 1)) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            out.write(f"\nout of time after {limit:.0f} s\n")
        except FileNotFoundError as error:
            out.write(str(error))
        out.seek(0)
        return {"ok": ok, "seconds": round(time.time() - start, 1), "tail": out.read()[-keep:]}


# --- stages: each returns a JSON value --------------------------------------------------------------------------------


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
    """The op tests that have a backend for the GPU, on its tensors, and the kernels' own but for their grids."""
    if not gpu():
        return run([sys.executable, "-m", "pytest", "-q", "tests/ops/test_errors.py"], limit)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:benchmark", "-m", "not slow and not grid"]
    command += ["-k", "triton or cuda or interpreter"]
    command += ["tests/ops", "tests/kernels", "--ignore=tests/kernels/test_aot.py"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, (os.cpu_count() or 2) - 4))]
    found = run(command, limit - 5, keep=10**8, FASTPETL_TEST_DEVICE="cuda", FASTPETL_TEST_WHY="1")
    found["tail"] = reasons(found["tail"])
    print(found["tail"])
    return found


def reasons(text: str) -> str:
    """Semantics: what pytest -v printed, shortened: how many passed and failed, why each failed (tests/conftest.py
    prints that at once, so that it is there when the run is cut off), the last lines."""
    lines = text.splitlines()
    passed, why = sum(" PASSED" in line for line in lines), [line for line in lines if line.startswith("WHY ")]
    return "\n".join([f"passed {passed}, failed {len(why)}", *why[:60], *lines[-15:]])


def checks(limit):
    """Every case x dtype x backend by the two-times rule: small in each setting, and at a layer's width."""
    from fastpetl.bench import cases

    tasks = [(i, short) for i in range(len(cases.CASES)) for short in dtypes()]
    if not gpu():
        return [row for task in tasks for row in check(*task)]
    import torch

    # Most of the time is Triton compiling: several processes.
    with concurrent.futures.ProcessPoolExecutor(6, multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in pool.map(check, *zip(*tasks, strict=True)) for row in found]
    if torch.cuda.device_count() == 1:
        rows.append({"setting": "not the current device", "ok": True, "why": "one GPU: cannot be tried"})
    return rows


def check(case_index: int, short: str) -> list[dict]:
    sys.path.insert(0, str(ROOT))
    from fastpetl.bench import cases

    case, rows, device = cases.CASES[case_index], [], "cuda" if gpu() else "cpu"
    for name in serving(case, device, dtypes()[short]):
        head = {"case": case.name, "dtype": short, "backend": name}
        try:
            built = case.build(cases.TINY, cases.Maker(dtypes()[short], device, seed=3))
            rows += [{**head, "setting": s, **agrees(case, built, name, c)} for s, c in settings().items()]
            if gpu():
                if name not in ("reference", "composed"):  # plain torch's indexing may wait for the device
                    rows.append({**head, **captured(built, name)})
                wide = case.build(cases.Size(rows=1100), cases.Maker(dtypes()[short], device, seed=4))
                rows.append({**head, "setting": "wide", **agrees(case, wide, name, contextlib.nullcontext)})
        except Exception as error:  # a line in the table, and the next case goes on
            rows.append({**head, "setting": "build", "ok": False, "why": f"{type(error).__name__}: {error}"[:300]})
    return rows


def agrees(case, built, name, context) -> dict:
    from fastpetl.bench import ops

    with context():
        try:
            functions = {"eager": built.formula, name: built.fused(name)}
            ops.verify(built, functions, ops.cotangents(built), case.name)
            return {"ok": True}
        except (RuntimeError, ValueError) as error:
            return {"ok": False, "why": str(error)[:300]}


def serving(case, device, dtype) -> list[str]:
    """Semantics: the backends that serve the case."""
    from fastpetl import backends

    op = "multi_adapter" if case.name.startswith("multi_adapter") and device == "cuda" else case.op
    return [n for n in backends.BACKENDS[op] if backends.verify(op, n, device, dtype)[0]]


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
    own = [sys.executable, str(SUITE), "--stage", "small"]
    command, tools = [tool, "--error-exitcode", "9", "--tool"], ("memcheck", "racecheck")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = dict(zip(tools, pool.map(lambda t: run([*command, t, *own], limit - 3), tools), strict=True))
    return {"ok": all(f["ok"] for f in found.values()), **found}


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

    from fastpetl import backends, ops

    x = torch.randn(9, 40, device=device, dtype=dtypes()["fp16"], requires_grad=True)
    index, count = torch.tensor([3, 0, 7], device=device), torch.tensor([2], device=device)
    for name in (n for n in backends.BACKENDS["rows"] if backends.verify("rows", n, device, x.dtype)[0]):
        y = ops.gather_rows(x, index, count, backend=name)
        ops.scatter_rows(x, 2 * y, index, count, backend=name).sum().backward()


def spills(limit):
    """Registers and spills of what Triton compiled for this GPU; ahead of time all are 0 (tests/kernels)."""
    if not gpu():
        return {"ok": None, "why": "no GPU: tests/kernels/test_aot.py reads them from ahead-of-time compiles"}
    from fastpetl.bench import cases, ops

    first = {case.op: case for case in reversed(cases.CASES)}
    for rows in (1000, 16384):
        for case in [c for c in cases.CASES if c.name.startswith(("adapter", "site")) or first[c.op] is c]:
            built = case.build(cases.Size(rows=rows), cases.Maker(dtypes()["bf16"], "cuda", seed=3))
            if "triton" in serving(case, "cuda", dtypes()["bf16"]):
                ops.results(built.fused("triton"), built.inputs, ops.cotangents(built))
    copied_rows("cuda")
    import fastpetl.kernels

    found = []
    for file in sorted(Path(fastpetl.kernels.__path__[0]).glob("*_kernels.py")):
        module = importlib.import_module(f"fastpetl.kernels.{file.stem}")
        for name, kernel in vars(module).items():
            for caches in getattr(kernel, "device_caches", {}).values():
                for compiled in getattr(caches[0], "values", list)():
                    what = {"kernel": f"{file.stem}.{name}", "shared": compiled.metadata.shared}
                    found.append({**what, "registers": compiled.n_regs, "spills": compiled.n_spills})
    return {"ok": bool(found) and not any(f["spills"] for f in found), "kernels": found}
