"""Whole models under torch.autocast, served as on a GPU: a site of an adapter with what is added and its norm is one
launch, in front of which nothing is normed, cast or added up.
"""

import collections
import copy

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the triton package")

import fastpetl  # noqa: E402
import meter_tiny  # noqa: E402
import vilt_tiny  # noqa: E402
import vl_tiny  # noqa: E402
from fastpetl.kernels import launching  # noqa: E402
from fastpetl.nn.vilt import FusedDASViltLayer  # noqa: E402
from methods.test_autocast import assert_as_near  # noqa: E402
from vilt_tiny import one_thread  # noqa: E402, F401

MODELS = {
    "vilt": (vilt_tiny.tiny_das, vilt_tiny.inputs),
    "meter": (meter_tiny.tiny, meter_tiny.inputs),
    "vlbart": (lambda: vl_tiny.tiny_adapters("vlbart"), vl_tiny.inputs),
    "vlbart pre-norm": (lambda: vl_tiny.tiny_adapters("vlbart", norm_before=True), vl_tiny.inputs),
    "vlt5": (lambda: vl_tiny.tiny_adapters("vlt5"), vl_tiny.inputs),
}


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel was launched."""
    seen, launch = collections.Counter(), launching.launch

    def counted(kernel, *args, **options):
        seen[kernel.fn.__name__] += 1
        return launch(kernel, *args, **options)

    monkeypatch.setattr(launching, "launch", counted)
    monkeypatch.setattr(FusedDASViltLayer, "_norm_in_site", lambda *_: True)  # as where torch's linear serves
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_one_launch(launches, name):
    build, data = MODELS[name][0], MODELS[name][1]()
    plain = build().eval()
    patched = fastpetl.patch(copy.deepcopy(plain), backend="triton")

    def forward(dtype):
        launches.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            patched(**data)
        return {k: n for k, n in launches.items() if k != "fold_weights"}

    without = forward(None)
    assert set(without) & {"site_forward", "forward_fused"}, "no adapter was served"
    for dtype in (torch.bfloat16, torch.float16):
        assert forward(dtype) == without
    launches.clear()
    assert_as_near(patched, plain, data)
    back = {"site_forward": "site_backward", "forward_fused": "backward_fused"}
    assert all(launches[back[k]] <= launches[k] for k in back)
    assert launches["weight_grads"] == launches["site_backward"] + launches["backward_fused"] > 0
