"""Compiles the Triton kernels for GPUs that are not there, through their launchers; reports what each kernel needs.

    python tests/kernels/aot_compile.py [--op adapter] [--full] [--archs 80,90,100] [--workers 2]

One JSON line per compiled kernel: architecture, element type, sizes, kernel, registers per thread, bytes of stack and
of local memory, bytes of shared memory, barriers it asks for, how often tensor-core instructions are; with --full also
how often the machine's others are that matter here.
A fake driver answers Triton's questions about the GPU; every launch becomes `warmup`, which compiles exactly what the
launch would run. Run as a process of its own: Triton decides at import whether it interprets or compiles.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from aot_code import resources  # noqa: E402

from fastpetl.kernels import adapter, adapter_config, launching, multi_adapter, phm, residual_norm, site  # noqa: E402
from fastpetl.kernels import rows as row_kernels  # noqa: E402

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


# --- what is called: job -> nothing, every kernel of one call is launched ---------------------------------------------


def meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")  # nothing is read


def call_adapter(direction, dtype, d, r, rows, norm=True, activation=1, autocast=""):
    """One forward or backward that asks for everything. autocast: "residual", the adapter reads the fp32 stream, or
    "sublayer", it reads f, which is of `dtype`, and the stream is a residual."""
    stream = torch.float32 if autocast else dtype
    x, w_down, w_up = (meta(*shape, dtype=dtype) for shape in ((rows, d), (r, d), (d, r)))
    x, residual = meta(rows, d, dtype=stream if autocast == "residual" else dtype), x
    gamma, beta = (meta(d, dtype=stream), meta(d, dtype=stream)) if norm else (None, None)
    if direction == "forward":
        b_down, b_up, options = meta(r, dtype=stream), meta(d, dtype=stream), dict(mixed=bool(autocast))
        residual = meta(rows, d, dtype=stream) if autocast == "sublayer" else residual
        rest = residual, None, True, 1e-5, activation, 0.5, True
        adapter.adapter_forward(x, w_down, b_down, w_up, b_up, gamma, beta, *rest, **options)
    else:
        z, stats, grad = meta(rows, r, dtype=dtype), meta(rows, 2, dtype=torch.float32), meta(rows, d, dtype=stream)
        options = dict(mixed=stream, low=True) if autocast else {}
        rest = True, activation, 0.5, 127
        adapter.adapter_backward(grad, x, z, stats, w_down, w_up, gamma, beta, *rest, **options)


def call_site(direction, dtype, d, r, rows, norm=True, activation=1, tail=1, emit_s=True, save=True, needs=511,
              autocast=""):  # fmt: skip
    """One forward or backward that asks for everything; d-wide residuals and gradients are there, unless not saved.
    autocast: as above."""
    stream = torch.float32 if autocast else dtype
    f, w_down, w_up = (meta(*shape, dtype=dtype) for shape in ((rows, d), (r, d), (d, r)))
    b_down, vector, s = (meta(*shape, dtype=stream) for shape in ((r,), (d,), (rows, d)))
    x, f = (f, s) if autocast == "sublayer" else (s, f)
    own = (vector, vector) if norm else (None, None)
    if direction == "site_forward":
        behind, options = (vector, vector if tail == 1 else None), dict(mixed=bool(autocast))
        site.site_forward(x, w_down, b_down, w_up, vector, *own, f, s if save else None, *behind, True, 1e-5,
                          activation, 0.5, tail, 1e-6, emit_s, save, **options)  # fmt: skip
    else:
        z, stats = meta(rows, r, dtype=dtype), meta(rows, 2, dtype=torch.float32)
        options = dict(mixed=stream, low=True) if autocast else {}
        site.site_backward(s if emit_s else None, s, s, stats, vector, x, z, stats, w_down, w_up, *own, True,
                           activation, 0.5, tail, needs, **options)  # fmt: skip


def call_residual_norm(direction, dtype, d, rows=1000, tail=1, dropout=0.1, mask=True, sublayer=True, autocast=False):
    """autocast: all but f is fp32."""
    stream, f = torch.float32 if autocast else dtype, meta(rows, d, dtype=dtype) if sublayer else None
    x, vector, stats = meta(rows, d, dtype=stream), meta(d, dtype=stream), meta(rows, 2, dtype=torch.float32)
    weight, bias = vector if tail else None, vector if tail == 1 else None
    skipped, seed = meta(8, dtype=torch.bool) if mask else None, meta(1, dtype=torch.int64)
    if direction == "forward":
        rest = skipped, seed, tail, 3 if tail else 1, 1e-5, dropout, True
        residual_norm.residual_norm_forward(x, f, weight, bias, *rest, mixed=autocast)
    else:
        needs, g_n = 15 if tail == 1 else 7 if tail else 3, x if tail else None
        rest, dtypes = (skipped, seed, tail, dropout, needs), (stream, dtype, stream, stream) if autocast else ()
        residual_norm.residual_norm_backward(x, g_n, x, stats, weight, *rest, mixed=dtypes)


def call_phm(direction, dtype, needs=3):
    rules, weights = [meta(2, 2, 2, dtype=dtype)], [meta(2, *s, dtype=dtype) for s in ((384, 48), (48, 384))]
    if direction == "forward":
        phm.phm_forward(rules, weights)
    else:
        phm.phm_backward(meta(sum(2 * w.numel() for w in weights), dtype=dtype), rules, weights, needs)


def call_rows(dtype, d, count=True):
    x, n = meta(64, d, dtype=dtype), 64
    index, how_many = meta(n, dtype=torch.int64), meta(1, dtype=torch.int64) if count else None
    row_kernels.gather(x, index, how_many)
    row_kernels.gather_backward(x, index, how_many, n)
    found = row_kernels.inverse(index, how_many, n)
    row_kernels.merge(x, x, found)
    row_kernels.merge(x, None, found)


def call_multi_adapter(direction, dtype, d, r, rows, norm=True, activation=3, tasks=4):
    """One forward or backward of several tasks that asks for everything; the up weights are shared."""
    x, w_down, b_down = meta(rows, d, dtype=dtype), meta(tasks, r, d, dtype=dtype), meta(tasks, r, dtype=dtype)
    w_up, b_up = meta(1, d, r, dtype=dtype), meta(1, d, dtype=dtype)
    gamma, beta = (meta(1, d, dtype=dtype), meta(tasks, d, dtype=dtype)) if norm else (None, None)
    order, bounds = meta(rows // 8, dtype=torch.int64), meta(tasks + 1, dtype=torch.int32)
    if direction == "forward":
        rest = order, bounds, x, None, True, 1e-5, activation, 0.5, True
        multi_adapter.multi_adapter_forward(x, w_down, b_down, w_up, b_up, gamma, beta, *rest)
    else:
        z, stats = meta(rows, r, dtype=dtype), meta(rows, 2, dtype=torch.float32)
        rest = order, bounds, True, activation, 0.5, 127, 0b0111000
        multi_adapter.multi_adapter_backward(x, x, z, stats, w_down, w_up, gamma, beta, *rest)


CALLS = {
    "adapter": call_adapter,
    "site": call_site,
    "multi_adapter": call_multi_adapter,
    "residual_norm": call_residual_norm,
    "phm": call_phm,
    "rows": call_rows,
}


def compile_job(job, disassemble: bool = False) -> list[dict]:
    """All kernels one call launches. job: op, arch, dtype, and what the op's call above takes."""
    job = dict(job)
    op, arch, name = (job.pop(k) for k in ("op", "arch", "dtype"))
    driver.set_active(FakeDriver(arch))
    report = []

    def warmup(kernel, grid, *args, **options):
        kernel.device_caches.clear()  # they know devices by number, and ours changes its architecture
        start = time.time()
        compiled = kernel.warmup(*args, grid=grid, **options)
        constants = {k: v for k, v in options.items() if isinstance(v, (int, bool))}
        report.append(
            dict(op=op, arch=arch, dtype=name, kernel=kernel.__name__, constants=constants, **job)
            | dict(seconds=round(time.time() - start, 2))
            | resources(compiled, disassemble)
        )

    launching.launch = warmup
    CALLS[op](dtype=DTYPES[name], **job)
    return report


# --- which calls ------------------------------------------------------------------------------------------------------


def table_rows(kind, direction, r):
    """A row count for every entry of the table."""
    limits = [tile[0] for tile in adapter_config._tiles_for(kind, direction, r)[3]]
    return [limit or 10**6 for limit in limits]


def adapter_jobs(archs):
    """What every run of the suite compiles, at ViLT's width: DAS's bottlenecks (96, 192; 288 is split), each element
    type, each architecture, few and many rows. sm_80 has the least shared memory, and gets the widest.
    """
    most, sizes = ("bf16", 96, 10**6), {80: [("bf16", 192, 10**6)]}
    sizes[90] = [most, ("fp16", 96, 1000), ("fp32", 96, 10**6), ("bf16", 288, 10**6)]
    for arch in archs:
        for dtype, r, rows in sizes.get(arch, [most]):
            for direction in ("forward", "backward"):
                yield dict(arch=arch, dtype=dtype, direction=direction, d=768, r=r, rows=rows)
    for direction in ("forward", "backward"):  # a split bottleneck's; the others are alike in a site
        yield dict(arch=90, dtype="bf16", direction=direction, d=768, r=288, rows=10**6, autocast="residual")


def all_adapter_jobs(archs):
    """Every entry of the table (fp16, which compiles like bf16: DAS's bottlenecks); odd widths; activations. Under
    autocast every entry with the stream in front, and what reads a sublayer's output."""
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
        for direction in ("forward", "backward"):
            job = dict(arch=arch, dtype="bf16", direction=direction, d=768, autocast="residual")
            for r in (12, 32, 48, 96, 192, 256, 288):
                for rows in table_rows("half", direction, r):
                    yield job | dict(r=r, rows=rows)
            sublayer = dict(autocast="sublayer", activation=3)
            for extra in (dict(norm=False), sublayer, sublayer | dict(norm=False), dict(d=760, r=100), dict(r=192)):
                yield job | dict(r=96, rows=10**6) | extra


LEAN = {"site_forward": dict(tail=2, emit_s=False, save=False), "site_backward": dict(tail=2, emit_s=False, needs=127)}


def site_jobs(archs):
    """As adapter_jobs, but 288, which is split: then nothing of the site's own compiles. With few rows and in fp32 what
    inference asks for, and its counterpart.
    """
    for direction, lean in LEAN.items():
        many = dict(direction=direction, dtype="bf16", d=768, r=96, rows=10**6)
        for arch in archs:
            yield many | dict(arch=arch) | (dict(r=192) if arch == 80 else {})
        yield many | dict(arch=90, dtype="fp16", rows=1000) | lean
        yield many | dict(arch=90, dtype="fp32") | lean
        yield many | dict(arch=90, autocast="residual")
        yield many | dict(arch=80, r=192, autocast="sublayer", activation=3, norm=False)


def all_site_jobs(archs):
    """As all_adapter_jobs; the leanest call at one size."""
    for arch in archs:
        for r in (96, 192):
            for direction, lean in LEAN.items():
                yield dict(arch=arch, dtype="bf16", direction=direction, d=768, r=r, rows=10**6) | lean
    for job in all_adapter_jobs(archs):
        if job["r"] <= 256:
            yield job | dict(direction="site_" + job["direction"])


def multi_adapter_jobs(archs):
    """VL-Adapter's bottlenecks and the widest there is, each element type, each architecture."""
    sizes = {80: [("bf16", 192)], 90: [("bf16", 256), ("fp32", 96)], 100: [("fp16", 96)]}
    for arch in archs:
        for dtype, r in sizes.get(arch, [("bf16", 96)]):
            for direction in ("forward", "backward"):
                yield dict(arch=arch, dtype=dtype, direction=direction, d=768, r=r, rows=16_000)


def all_multi_adapter_jobs(archs):
    """Every entry of the tables that is not split (fp16, which compiles like bf16: two bottlenecks); odd widths."""
    for arch in archs:
        for dtype in DTYPES:
            kind = "float" if dtype == "fp32" else "half"
            for direction in ("forward", "backward"):
                for r in (96, 192) if dtype == "fp16" else (8, 32, 48, 96, 192, *((256,) if kind == "half" else ())):
                    for rows in table_rows(kind, direction, r):
                        yield dict(arch=arch, dtype=dtype, direction=direction, d=768, r=r, rows=rows)
                odd = dict(d=760, r=100), dict(d=40, r=8)
                for extra in (dict(norm=False), *(dict(activation=a) for a in (1, 2, 4)), *odd):
                    yield dict(arch=arch, dtype=dtype, direction=direction, d=768, r=96, rows=16_000) | extra


def residual_norm_jobs(archs):
    """ViLT's width with everything asked for; fp32 holds the most, an odd width draws a word for each element."""
    for direction in ("forward", "backward"):
        for arch in archs:
            odd = dict(dtype="fp16", d=1130, tail=2) if arch == 80 else {}
            yield dict(arch=arch, dtype="bf16", direction=direction, d=768) | odd
        yield dict(arch=90, dtype="fp32", direction=direction, d=4096)
        yield dict(arch=80, dtype="bf16", direction=direction, d=1024, autocast=True)


def all_residual_norm_jobs(archs):
    """Every entry of both tables up to where rows spill, each tail, without dropout and mask, odd widths."""
    for arch in archs:
        for dtype in DTYPES:
            for direction in ("forward", "backward"):
                for d in (64, 200, 256, 760, 768, 1024, 1128, 1130, 2048, 4096, 8192):
                    yield dict(arch=arch, dtype=dtype, direction=direction, d=d)
                plain = dict(dropout=0.0, mask=False)
                for extra in (dict(tail=2), dict(tail=0), plain, plain | dict(sublayer=False), dict(autocast=True)):
                    yield dict(arch=arch, dtype=dtype, direction=direction, d=768) | extra


def phm_jobs(archs):
    for arch in archs:
        yield dict(arch=arch, dtype="bf16", direction="forward")
        yield dict(arch=arch, dtype="bf16", direction="backward")
    yield dict(arch=90, dtype="fp32", direction="backward")


def all_phm_jobs(archs):
    """Sizes are data: there is nothing more to compile but dtypes and gradients that are not asked for."""
    for arch in archs:
        for dtype in DTYPES:
            for job in (dict(direction="forward"), *(dict(direction="backward", needs=n) for n in (1, 2, 3))):
                yield dict(arch=arch, dtype=dtype, **job)


def rows_jobs(archs):
    for arch in archs:
        yield dict(arch=arch, dtype="bf16", d=768)


def all_rows_jobs(archs):
    for arch in archs:
        for dtype in DTYPES:
            for d in (3, 48, 768, 142_080):
                yield dict(arch=arch, dtype=dtype, d=d)
            yield dict(arch=arch, dtype=dtype, d=768, count=False)


JOBS = {
    "adapter": (adapter_jobs, all_adapter_jobs),
    "site": (site_jobs, all_site_jobs),
    "multi_adapter": (multi_adapter_jobs, all_multi_adapter_jobs),
    "residual_norm": (residual_norm_jobs, all_residual_norm_jobs),
    "phm": (phm_jobs, all_phm_jobs),
    "rows": (rows_jobs, all_rows_jobs),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", default="adapter", help=f"of {', '.join(JOBS)}; several with commas")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--archs", default="80,90,100")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    archs = [int(a) for a in args.archs.split(",")]
    jobs = [dict(op=op, **job) for op in args.op.split(",") for job in JOBS[op][args.full](archs)]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(args.workers) if args.workers > 1 else nullcontext() as pool:
            compile_one = functools.partial(compile_job, disassemble=args.full)
            for report in pool.imap_unordered(compile_one, jobs) if pool else map(compile_one, jobs):
                for line in report:
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
