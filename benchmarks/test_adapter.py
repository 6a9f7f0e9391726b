"""The fused adapter site at ViT-B size: x + f + A(x), forward and forward+backward, per backend."""

import pytest

from . import common
from .common import HIDDEN, ROWS

from fastpetl.bench.adapter import MODES, Site, formula, implementation  # isort: skip


def variants(dtype):
    from fastpetl import backends

    return ["eager", "compile", *(n for n in backends.candidates("adapter", "cpu", dtype) if n != "reference")]


CASES = [(short, name) for short, dtype in common.DTYPES.items() for name in variants(dtype)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("r", [48, 96, 192, 288])
@pytest.mark.parametrize("short, name", CASES)
def test_adapter(benchmark, short, name, r, mode):
    benchmark.group = f"adapter {short} r={r} {mode}"
    common.torch._dynamo.reset()
    site = Site(ROWS, HIDDEN, r, common.DTYPES[short])
    grad = site.grad if mode != "forward" else None
    flop = (1 if grad is None else 3) * 4 * ROWS * HIDDEN * r
    common.check_and_time(benchmark, name, implementation(name), formula, site.inputs, grad, flop)
