"""What the micro-benchmarks share. Importing it readies the process, so it comes before torch."""

import os

from fastpetl.bench.machine import THREADS, environment, keep_pages

os.environ.update(environment())  # read by OpenMP when torch loads it
keep_pages()

import torch  # noqa: E402

from fastpetl.bench.ops import results, slack  # noqa: E402

torch.set_num_threads(THREADS)

ROWS, HIDDEN, BATCH, TOKENS, HEADS = 2248, 768, 8, 281, 12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def randn(*shape, dtype=torch.float32, std=1.0, mean=0.0, grad=False):
    return (torch.randn(shape) * std + mean).to(dtype).requires_grad_(grad)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def verify(got, eager, exact, name=""):
    """The two-times rule: each result at most twice as far from float64 as eager torch of the same dtype."""
    for i, (ours, theirs, true) in enumerate(zip(got, eager, exact, strict=True)):
        allowed = 2 * relative(theirs, true) + slack(name, theirs.dtype)
        assert relative(ours, true) <= allowed, f"result {i} is wrong: it is not timed"


def check_and_time(benchmark, name, function, reference, inputs, grad, flop):
    """Verifies `function` against `reference` in float64, then times it; GFLOP/s goes into the JSON."""
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    grads = None if grad is None else (grad,)
    exact = results(reference, doubles, None if grad is None else (grad.double(),))
    verify(results(function, inputs, grads), results(reference, inputs, grads), exact, name)
    timed(benchmark, lambda: results(function, inputs, grads), flop)


def timed(benchmark, call, flop, **extra):
    """Times `call`; GFLOP/s and `extra` go into the JSON."""
    benchmark.extra_info.update(gflop=flop / 1e9, **extra)
    benchmark.pedantic(call, rounds=15, warmup_rounds=2, iterations=1)
    if benchmark.stats is not None:  # --benchmark-disable
        benchmark.extra_info["gflops"] = flop / benchmark.stats.stats.median / 1e9
