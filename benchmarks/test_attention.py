"""Attention on a fused q|k|v at ViT-B size (batch 8, 281 tokens, 12 heads of 64), per backend."""

import pytest

from . import common
from .common import BATCH, HEADS, HIDDEN, TOKENS, randn


def variants(dtype):
    from fastpetl import backends

    return ["reference", *(n for n in backends.candidates("attention", "cpu", dtype, 64) if n != "reference")]


CASES = [(short, name) for short, dtype in common.DTYPES.items() for name in variants(dtype)]


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("short, name", CASES)
def test_attention(benchmark, short, name, mode):
    from fastpetl import ops

    dtype = common.DTYPES[short]
    benchmark.group = f"attention {short} {mode}"
    qkv = randn(BATCH, TOKENS, 3 * HIDDEN, dtype=dtype, grad=mode != "forward")
    mask = common.torch.zeros(BATCH, TOKENS)
    mask[:, -9:] = -1e4
    grad = randn(BATCH, TOKENS, HIDDEN, dtype=dtype) if mode != "forward" else None
    flop = (1 if grad is None else 3.5) * 4 * BATCH * HIDDEN * TOKENS**2  # the backward computes P again

    def reference(qkv):
        return ops.attention_reference(qkv, HEADS, key_mask=mask.to(qkv.dtype))

    def function(qkv):
        return ops.attention(qkv, HEADS, key_mask=mask, backend=name)

    common.check_and_time(benchmark, name, function, reference, (qkv,), grad, flop)
