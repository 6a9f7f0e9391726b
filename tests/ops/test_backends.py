"""Which backend serves, why not another, and the site's specification."""

import os
import subprocess
import sys

import pytest
import torch

from fastpetl import _measuring, backends, ops
from fastpetl.spec import ACTIVATIONS, AdapterSpec, activation_code
from ops.op_cases import adapter_arguments, call_adapter

X = torch.zeros(2, 40)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("FASTPETL_BACKEND", raising=False)


def test_availability_has_a_reason_for_every_row():
    rows = backends.availability()
    assert {(op, name) for op, name, _, _ in rows} == {
        (op, name) for op, names in backends.BACKENDS.items() for name in names
    }
    for op, name, ok, reason in rows:
        assert isinstance(ok, bool) and reason, (op, name)
        if name in ("reference", "torch"):
            assert ok


def test_explicit_request_that_cannot_serve_raises_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    a = adapter_arguments(3, 40, 8)
    message = "adapter: backend is 'triton', which cannot serve this call: the tensors are on the CPU, where Triton"
    with pytest.raises(RuntimeError, match=message):
        call_adapter(ops.adapter, a, backend="triton")
    double = {k: t.double() for k, t in a.items()}
    with pytest.raises(
        RuntimeError, match="the C\\+\\+ kernels take float32, bfloat16 and float16, the tensors are float64"
    ):
        call_adapter(ops.adapter, double, backend="cpp")
    with pytest.raises(
        RuntimeError, match="linear: .* linear has no triton backend \\(it has cpp, onednn, torch, reference\\)"
    ):
        ops.linear(X, torch.zeros(8, 40), backend="triton")
    with pytest.raises(ValueError, match="adapter: backend is 'fast', expected auto, cpp, triton, cuda, reference"):
        call_adapter(ops.adapter, a, backend="fast")
    with pytest.raises(RuntimeError, match="'cuda', .*: the CUDA kernels run on CUDA, the tensors are on cpu"):
        call_adapter(ops.adapter, a, backend="cuda")


def test_auto_falls_back_and_remembers_why():
    choice = backends.resolve("adapter", "auto", X.double())
    assert choice.name == "reference"
    assert "cpp: the C++ kernels take float32, bfloat16 and float16, the tensors are float64" in choice.reason
    assert backends.resolve("adapter", "auto", X.double()).name == "reference"
    a = adapter_arguments(3, 40, 8, torch.float64)
    torch.testing.assert_close(call_adapter(ops.adapter, a), call_adapter(ops.adapter_reference, a))
    assert backends.resolve_for("linear", "auto", "mps", torch.float32).name == "torch"
    assert backends.resolve_for("attention", "auto", "cuda", torch.float32).name == "torch"


def test_environment_overrides_auto_only(monkeypatch):
    served = []
    reference = ops.adapter.__globals__["_formula"]
    monkeypatch.setitem(ops.adapter.__globals__, "_formula", lambda *a: served.append(1) or reference(*a))
    a = adapter_arguments(3, 40, 8)
    monkeypatch.setenv("FASTPETL_BACKEND", "reference")
    call_adapter(ops.adapter, a)
    assert served == [1]
    assert backends.resolve("linear", "auto", X).name == "reference"
    assert "FASTPETL_BACKEND is 'reference'" in backends.resolve("attention", "auto", X).reason
    assert backends.serving("linear", "auto", "cpu", torch.float32) == ("reference",)
    assert backends.resolve("linear", "torch", X).name == "torch"
    monkeypatch.setenv("FASTPETL_BACKEND", "onednn")  # only linear has it
    assert backends.serving("linear", "auto", "cpu", torch.float32) == ("onednn",)
    choice = backends.resolve("adapter", "auto", X)
    assert choice.name in ("cpp", "reference") and "which adapter does not have" in choice.reason
    monkeypatch.setenv("FASTPETL_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="adapter: FASTPETL_BACKEND is 'triton', which cannot serve"):
        backends.resolve("adapter", "auto", X)
    monkeypatch.setenv("FASTPETL_BACKEND", "fast")
    with pytest.raises(ValueError, match="adapter: FASTPETL_BACKEND is 'fast', expected auto, cpp"):
        backends.resolve("adapter", "auto", X)


def test_for_op():
    assert backends.for_op("linear", "triton") == "auto" and backends.for_op("adapter", "triton") == "triton"
    with pytest.raises(ValueError, match="backend is 'fast'"):
        backends.for_op("linear", "fast")


def test_works_without_the_compiled_part():
    """A checkout without a compiler: auto serves, an explicit cpp says what is missing."""
    program = """
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "fastpetl._C" else find(name, *a)
from fastpetl import _measuring, backends, ops
x, w = torch.randn(3, 8), torch.randn(4, 8)
assert backends.resolve("adapter", "auto", x).name == "reference"
assert ops.adapter(x, w, None, w.t(), None, residuals=(x,)).shape == x.shape
assert ops.linear(x, w).shape == (3, 4)
assert ops.attention(torch.randn(1, 2, 24), 2).shape == (1, 2, 8)
try:
    ops.adapter(x, w, None, w.t(), None, backend="cpp")
except RuntimeError as error:
    assert "fastpetl._C is not built" in str(error), error
else:
    raise SystemExit("cpp was not refused")
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTPETL_")}
    result = subprocess.run([sys.executable, "-c", program], cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_spec():
    spec = AdapterSpec(768, 96)
    assert (spec.code, spec.parameters, spec.macs(10)) == (ACTIVATIONS["relu"], 149_856, 2 * 10 * 768 * 96)
    assert AdapterSpec(768, 288).parameters == 444_960  # DAS-METER's shortcut adapter
    assert AdapterSpec(768, 96, norm=False, norm_bias=False, down_bias=False, up_bias=False).parameters == 2 * 768 * 96
    assert spec == AdapterSpec(768, 96) and hash(spec) == hash(AdapterSpec(768, 96))
    with pytest.raises(AttributeError):
        spec.hidden = 4
    assert [activation_code(name) for name in ACTIVATIONS] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("activation", "tanh", "activation is 'tanh', expected one of identity, relu, gelu, gelu_tanh, silu"),
        ("hidden", 0, "hidden is 0, expected an integer of at least 1"),
        ("bottleneck", 2.5, "bottleneck is 2.5, expected an integer"),
        ("scale", "1", "scale is '1', expected a number"),
        ("eps", -1e-5, "eps is -1e-05, expected a number of at least 0"),
        ("residuals", 3, "residuals is 3, expected 0, 1 or 2"),
        ("norm", False, "norm_bias is True without norm"),
    ],
)
def test_spec_errors(field, value, message):
    with pytest.raises(ValueError, match="AdapterSpec: " + message):
        AdapterSpec(**{"hidden": 768, "bottleneck": 96, field: value})


@pytest.mark.parametrize(
    "milliseconds, winner",
    [
        ({"cpp": 1.0, "onednn": 1.5, "torch": 2.0}, "cpp"),
        ({"cpp": 1.02, "onednn": 1.0, "torch": 2.0}, "cpp"),  # ours unless another is 3 % faster
        ({"cpp": 1.05, "onednn": 1.0, "torch": 2.0}, "onednn"),
        ({"cpp": 1.02, "onednn": 1.0, "torch": 1.04}, "torch"),  # torch's unless another is 3 % and 20 us faster
        ({"cpp": 1.02, "onednn": 1.0, "torch": 1.06}, "cpp"),
        ({"cpp": 0.1, "torch": 0.12}, "torch"),
        ({"cpp": 1.0, "composed": 0.99}, "cpp"),
        ({"cpp": 1.0, "composed": 0.9}, "composed"),
        ({"onednn": 1.0, "torch": 1.2}, "onednn"),
    ],
)
def test_who_wins_a_measurement(milliseconds, winner, monkeypatch):
    monkeypatch.setattr(_measuring, "_cold", lambda runs, times: milliseconds)
    runs = {name: lambda: torch.ones(3) for name in milliseconds}
    assert _measuring._measure(runs, next(iter(runs)), 0.0).name == winner
