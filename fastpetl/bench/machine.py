"""What a measurement stands on: pinned threads, an allocator that keeps its pages, the load of other processes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import time
from pathlib import Path

THREADS = 2
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # <malloc.h>


def cpu_flags() -> frozenset[str]:
    """Semantics: the flags of the first CPU in /proc/cpuinfo; empty where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def environment(*, cap_onednn: bool = False) -> dict[str, str]:
    """Semantics: the environment of a measuring process, to be set before it imports torch.

    Two OpenMP threads on two fixed CPUs; torch.compile in the process itself, so that no idle workers are about.
    cap_onednn: oneDNN may not use AMX (see `variant.route`).
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(THREADS))
    settings = {
        "OMP_NUM_THREADS": str(THREADS),
        "MKL_NUM_THREADS": str(THREADS),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if len(cpus) >= THREADS:
        settings["GOMP_CPU_AFFINITY"] = " ".join(map(str, cpus[:THREADS]))
    if cap_onednn:
        settings["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
    return {**os.environ, **settings}


def keep_pages() -> bool:
    """Semantics: glibc's malloc neither maps nor returns memory from here on; was it told so?

    By default each large temporary is mapped, faulted in page by page and unmapped, which costs as much as small
    kernels do and differs between variants by chance.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_TOP_PAD, 64 << 20))


class Load:
    """CPU time that others took between two moments: everything /proc/stat counts as busy, less our own and that of
    the process `helper`, which works for us.
    """

    def __init__(self, helper: int | None = None):
        self.known = Path("/proc/stat").exists()
        self._helper = helper
        self._ticks = os.sysconf("SC_CLK_TCK") if self.known else 1
        self.start()

    def _busy(self) -> float:
        if not self.known:
            return 0.0
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / self._ticks - time.process_time()
        return busy if self._helper is None else busy - self._used(self._helper)

    def _used(self, process: int) -> float:
        with contextlib.suppress(OSError):  # it has ended
            after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            return (int(after_name[11]) + int(after_name[12])) / self._ticks
        return 0.0

    def start(self) -> None:
        self._at, self._wall = self._busy(), time.perf_counter()

    def foreign(self) -> float:
        """Semantics: CPUs that others kept busy since `start`, 0 if that is not known."""
        if not self.known:
            return 0.0
        return max(0.0, self._busy() - self._at) / (time.perf_counter() - self._wall)

    def wait_idle(self, seconds: float) -> None:
        """Semantics: returns once others are quiet for a quarter second, or after `seconds`."""
        end = time.perf_counter() + seconds
        while self.known and time.perf_counter() < end:
            self.start()
            time.sleep(0.25)
            if self.foreign() < 0.15:
                return


def pinned() -> str:
    """Semantics: which CPUs this process's OpenMP threads may run on, in words."""
    tasks = []
    for status in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):
            lines = status.read_text().splitlines()
            tasks += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Cpus_allowed_list")]
    single = sorted({int(cpus) for cpus in tasks if cpus.isdigit()})
    return f"threads pinned to CPUs {', '.join(map(str, single))}" if len(single) >= THREADS else "threads not pinned"


def _rate(run, seconds: float = 0.25) -> float:
    """Calls per second, the best of short bursts."""
    best, end = float("inf"), time.perf_counter() + seconds
    run()
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return 1 / best


def fma_peak() -> float | None:
    """Semantics: GFLOP/s of independent FMA chains in the widest vectors in use, on all threads: what no kernel made of
    FMAs can exceed here; None without fastpetl._C.
    """
    import torch

    from fastpetl._build import extension

    module, _ = extension()
    if module is None:
        return None
    iterations, threads = 200_000, torch.get_num_threads()
    return _rate(lambda: module.fma(iterations, threads)) * module.fma(iterations, threads) / 1e9


def rates(names) -> dict[str, dict[str, float]]:
    """Semantics: dtype -> what was run -> GFLOP/s, best burst. These are rates reached by real GEMMs, not FMA peaks."""
    import torch

    from fastpetl import backends, ops

    found = {}
    for short in names:
        dtype, rates = {"fp32": torch.float32, "bf16": torch.bfloat16}[short], {}
        for n in (1024, 2048):
            a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
            rates[f"torch.mm {n}"] = _rate(lambda a=a, b=b: a @ b) * 2 * n**3 / 1e9
        x, w, cache = torch.randn(2248, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype), ops.PackCache()
        with torch.no_grad():
            for name in backends.candidates("linear", "cpu", dtype):
                if name == "torch":
                    continue

                def linear(name=name, x=x, w=w, cache=cache):
                    ops.linear(x, (w,), backend=name, cache=cache)

                rates[f"ops.linear 2248x768x3072 {name}"] = _rate(linear) * 2 * 2248 * 768 * 3072 / 1e9
        found[short] = {name: round(rate, 1) for name, rate in rates.items()}
    return found


def copy_bandwidth() -> float:
    """Semantics: GB/s of torch's copy of 256 MiB, counting what is read and what is written."""
    import torch

    a, b = torch.ones(1 << 26), torch.empty(1 << 26)
    return _rate(lambda: b.copy_(a)) * 2 * a.numel() * 4 / 1e9


def facts(dtypes) -> dict:
    """Semantics: the machine and the settings of this process, as JSON values, and the GEMM rates of `dtypes`."""
    import torch

    from fastpetl import info

    found, model = info.gather(), ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
    torch.set_num_threads(THREADS)
    gflops = rates(dtypes)
    gc.collect()
    return {
        "cpu": model,
        "flags": sorted(cpu_flags().intersection(wanted)),
        "isa": found["cpu"]["isa"],
        "threads": torch.get_num_threads(),
        "pinned": pinned(),
        "onednn_max_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "fastpetl": found["fastpetl"],
        "versions": found["versions"],
        "gflops": gflops,
    }
