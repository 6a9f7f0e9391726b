"""Frozen linears at ViT-B size with what stands before them, forward (packed) and forward + dx, per backend."""

import pytest

from . import common
from .common import HIDDEN, ROWS, randn

SHAPES = {  # name -> (inputs, outputs side by side, prologue)
    "qkv": (HIDDEN, (HIDDEN,) * 3, "norm"),
    "proj": (HIDDEN, (HIDDEN,), None),
    "fc1": (HIDDEN, (4 * HIDDEN,), "norm"),
    "fc2": (4 * HIDDEN, (HIDDEN,), "gelu"),
}


def variants(dtype):
    from fastpetl import backends

    return ["eager", *backends.candidates("linear", "cpu", dtype)]


CASES = [(short, name) for short, dtype in common.DTYPES.items() for name in variants(dtype)]


@pytest.mark.parametrize("mode", ["forward", "forward+dx"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("short, name", CASES)
def test_linear(benchmark, short, name, shape, mode):
    from fastpetl import ops

    dtype, (k, outputs, prologue) = common.DTYPES[short], SHAPES[shape]
    benchmark.group = f"linear {short} {shape} {mode}"
    x = randn(ROWS, k, dtype=dtype, grad=mode != "forward")
    weights = tuple(randn(n, k, dtype=dtype, std=k**-0.5) for n in outputs)
    biases = tuple(randn(n, dtype=dtype, std=0.1) for n in outputs)
    gain, shift = randn(k, dtype=dtype, std=0.1, mean=1.0), randn(k, dtype=dtype, std=0.1)
    cache, n = ops.PackCache(), len(outputs)

    def call(function, **more):
        def run(x, gain, shift, *tensors):
            norm = (gain, shift, 1e-12) if prologue == "norm" else None
            activation = "gelu" if prologue == "gelu" else None
            return function(x, tensors[:n], tensors[n:], norm=norm, activation=activation, **more)

        return run

    reference = call(ops.linear_reference)
    function = reference if name == "eager" else call(ops.linear, backend=name, cache=cache)
    inputs = (x, gain, shift, *weights, *biases)
    grad = randn(ROWS, sum(outputs), dtype=dtype) if mode != "forward" else None
    flop = (1 if grad is None else 2) * 2 * ROWS * k * sum(outputs)
    common.check_and_time(benchmark, name, function, reference, inputs, grad, flop)
