"""Compiles the Triton adapter for GPUs that are not there, through its own launchers; reports what each kernel needs.

    python tests/kernels/aot_compile.py [--full] [--archs 80,90,100] [--workers 2]

One JSON line per compiled kernel: architecture, element type, bottleneck, rows, kernel, registers per thread, bytes of
stack and of local memory, bytes of shared memory, and how often the tensor-core and local-memory instructions occur.
A fake driver answers Triton's questions about the GPU; every launch becomes `warmup`, which compiles exactly what the
launch would run. Run as a process of its own: Triton decides at import whether it interprets or compiles.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastpetl.kernels import adapter, adapter_config  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "FFMA", "LDL", "STL", "LDGSTS")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class FakeDriver:
    """As much of a CUDA driver as JITFunction.warmup asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_name):
        return type_name


def resources(compiled) -> dict:
    """Registers, stack, local and shared memory, instruction counts: read from the machine code (no driver to ask)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", f.name], capture_output=True, text=True)
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", f.name], capture_output=True, text=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    if not sass.stdout or len(found) != 3:
        raise RuntimeError(f"no resource usage: {usage.stderr} {sass.stderr}")
    counts = {name: len(re.findall(rf"\b{name}\b", sass.stdout)) for name in INSTRUCTIONS}
    return dict(
        registers=int(found["REG"]),
        stack=int(found["STACK"]),
        local=int(found["LOCAL"]),
        shared=compiled.metadata.shared,
        instructions={k: v for k, v in counts.items() if v},
    )


def call_launchers(direction, dtype, d, r, rows, norm=True, activation=1, config=None):
    """One forward or backward that asks for everything; meta tensors, for nothing is read."""

    def tensor(*shape, kind=dtype):
        return torch.empty(*shape, dtype=kind, device="meta")

    x, w_down, w_up = tensor(rows, d), tensor(r, d), tensor(d, r)
    gamma, beta = (tensor(d), tensor(d)) if norm else (None, None)
    if direction == "forward":
        b_down, b_up = tensor(r), tensor(d)
        args = x, w_down, b_down, w_up, b_up, gamma, beta, x, None, True, 1e-5, activation, 0.5, True
        adapter.adapter_forward(*args, config=config)
    else:
        z, stats = tensor(rows, r), tensor(rows, 2, kind=torch.float32)
        args = x, x, z, stats, w_down, w_up, gamma, beta, True, activation, 0.5, 127
        adapter.adapter_backward(*args, config=config)


def compile_job(job) -> list[dict]:
    """All kernels one call launches. job: arch, dtype, direction, d, r, rows; optionally norm, activation, config."""
    job = dict(job)
    config = job.pop("config", None)
    arch, name, direction, d, r, rows = (job.pop(k) for k in ("arch", "dtype", "direction", "d", "r", "rows"))
    driver.set_active(FakeDriver(arch))
    kind = "float" if name == "fp32" else "half"
    config = config or adapter_config.select(kind, direction, d, r, rows)
    report = []

    def warmup(kernel, grid, *args, **options):
        kernel.device_caches.clear()  # they know devices by number, and ours changes its architecture
        start = time.time()
        compiled = kernel.warmup(*args, grid=grid, **options)
        report.append(
            dict(arch=arch, dtype=name, kernel=kernel.__name__, d=d, r=r, rows=rows, config=config._asdict(), **job)
            | dict(seconds=round(time.time() - start, 2))
            | resources(compiled)
        )

    adapter._launch = warmup
    call_launchers(direction, DTYPES[name], d, r, rows, config=config, **job)
    return report


def table_rows(kind, direction, r):
    """A row count for every entry of the table."""
    limits = [tile[0] for tile in adapter_config._tiles_for(kind, direction, r)[3]]
    return [limit or 10**6 for limit in limits]


def default_jobs(archs):
    """DAS's bottlenecks at ViLT's width (96, 192; 288 is split), fp32, fp16: what every run of the suite compiles."""
    for arch in archs:
        for dtype, r, rows in (("bf16", 96, 10**6), ("bf16", 192, 10**6), ("fp32", 96, 10**6), ("bf16", 96, 1000)):
            for direction in ("forward", "backward"):
                yield dict(arch=arch, dtype=dtype, direction=direction, d=768, r=r, rows=rows)
    for direction in ("forward", "backward"):
        for dtype, r in (("fp16", 192), ("bf16", 288)):
            yield dict(arch=90, dtype=dtype, direction=direction, d=768, r=r, rows=10**6)


def full_jobs(archs):
    """Every entry of the table (fp16, which compiles like bf16: DAS's bottlenecks); odd widths; activations."""
    for arch in archs:
        for dtype in DTYPES:
            kind = "float" if dtype == "fp32" else "half"
            for direction in ("forward", "backward"):
                for r in (96, 192) if dtype == "fp16" else (12, 32, 48, 96, 192, 256, 288, 384):
                    for rows in table_rows(kind, direction, r):
                        yield dict(arch=arch, dtype=dtype, direction=direction, d=768, r=r, rows=rows)
                odd = dict(d=760, r=100), dict(d=40, r=8)
                for extra in (dict(norm=False), *(dict(activation=a) for a in (2, 3, 4)), *odd):
                    yield dict(arch=arch, dtype=dtype, direction=direction, d=768, r=96, rows=10**6) | extra


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--archs", default="80,90,100")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    archs = [int(a) for a in args.archs.split(",")]
    jobs = list((full_jobs if args.full else default_jobs)(archs))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            for report in pool.imap_unordered(compile_job, jobs):
                for line in report:
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
