"""The CUDA kernels of csrc/cuda, compiled as C++ and run on the CPU by cuda_host.h, against plain torch in float64."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cuda_toolkit import include_dir

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.skipif(include_dir() is None, reason="no CUDA toolkit: its headers define __half and __nv_bfloat16"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX})"),
]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = [
    lambda z: z,
    F.relu,
    F.gelu,
    lambda z: F.gelu(z, approximate="tanh"),
    F.silu,
]
OPERANDS = ["x", "w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias", "res1", "res2"]


class Args(ctypes.Structure):
    """fp_cuda_adapter_args of csrc/cuda/fastpetl_cuda.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in [*OPERANDS, "y", "z", "stats"]],
        ("rows", ctypes.c_int64),
        *[(name, ctypes.c_int) for name in ("d", "r", "activation", "add_x")],
        *[(name, ctypes.c_float) for name in ("eps", "scale")],
    ]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    target = tmp_path_factory.mktemp("cuda_host") / "adapter.so"
    command = [CXX, "-std=c++17", "-O1", "-shared", "-fPIC", "-include", Path(__file__).with_name("cuda_host.h")]
    command += ["-isystem", include_dir(), f"-I{ROOT / 'csrc'}", "-o", target]
    command += ["-x", "c++", ROOT / "csrc/cuda/adapter_forward.cu"]
    subprocess.run([*map(str, command)], check=True)
    return ctypes.CDLL(str(target)).fastpetl_cuda_adapter_forward


def operands(rows, d, r, dtype, drop=()):
    """Random operands with a canary row of NaN after each, so that reading past the end poisons the result."""
    shapes = {"x": (rows, d), "w_down": (r, d), "b_down": (r,), "w_up": (d, r), "b_up": (d,), "norm_weight": (d,)}
    shapes |= {"norm_bias": (d,), "res1": (rows, d), "res2": (rows, d)}
    made = {}
    for name, shape in shapes.items():
        if name in drop:
            continue
        size = {"w_down": d**-0.5, "w_up": r**-0.5}.get(name, 1.0)
        buffer = torch.full((shape[0] + 1, *shape[1:]), float("nan")).to(dtype)
        made[name] = buffer[:-1].copy_(torch.randn(shape) * size)
    return made


def run(kernel, t, dtype, activation=1, add_x=True, eps=1e-5, scale=1.0, save=True):
    (rows, d), r = t["x"].shape, t["w_down"].shape[0]
    y = torch.full((rows + 1, d), 7.0, dtype=dtype)
    z = torch.full((rows + 1, r), 7.0, dtype=dtype)
    stats = torch.full((rows + 1, 2), 7.0)
    results = {"y": y, "z": z, "stats": stats} if save else {"y": y}
    pointers = {name: tensor.data_ptr() for name, tensor in {**t, **results}.items()}
    args = Args(rows=rows, d=d, r=r, activation=activation, add_x=add_x, eps=eps, scale=scale, **pointers)
    assert kernel(ctypes.byref(args), DTYPES[dtype], None) == 0
    assert all((out[-1] == 7.0).all() for out in (y, z, stats)), "wrote past the last row"
    return y[:-1], z[:-1], stats[:-1]


def reference(t, activation=1, add_x=True, eps=1e-5, scale=1.0, dtype=torch.float64):
    t = {name: tensor.to(dtype) for name, tensor in t.items()}
    x = n = t["x"]
    if "norm_weight" in t:
        n = F.layer_norm(x, x.shape[-1:], t["norm_weight"], t.get("norm_bias"), eps)
    z = F.linear(n, t["w_down"], t.get("b_down"))
    y = scale * F.linear(ACTIVATIONS[activation](z), t["w_up"], t.get("b_up")) + (x if add_x else 0)
    return y + t.get("res1", 0) + t.get("res2", 0), z


def check(ours, exact, torchs):
    """The project's rule: at most twice the error of torch at that dtype."""
    assert not ours.isnan().any()
    floor = 4 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, d, r, drop",
    [
        (3, 96, 24, ()),  # one row to a block
        (131, 64, 8, ()),  # four rows to a block, the last block with three
        (2, 70, 13, ("b_down", "b_up", "norm_weight", "norm_bias", "res2")),  # sizes that divide nothing
        (2, 40, 300, ("norm_bias", "res1", "res2")),  # bottleneck wider than the block
        (1, 300, 1, ("norm_weight", "norm_bias")),
    ],
)
def test_matches_torch(kernel, dtype, rows, d, r, drop):
    t = operands(rows, d, r, dtype, drop)
    options = dict(activation=2, add_x=True, eps=1e-3, scale=0.7)
    y, z, stats = run(kernel, t, dtype, **options)
    exact, z_exact = reference(t, **options)
    torchs, z_torchs = reference(t, **options, dtype=dtype)
    check(y, exact, torchs)
    check(z, z_exact, z_torchs)
    if "norm_weight" in t:
        x = t["x"].double()
        expected = torch.stack([x.mean(1), (x.var(1, unbiased=False) + 1e-3).rsqrt()], 1)
        torch.testing.assert_close(stats.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", range(5))
def test_activations_and_no_residual(kernel, activation):
    t = operands(2, 32, 16, torch.float32, ("res1", "res2"))
    y, _, stats = run(kernel, t, torch.float32, activation=activation, add_x=False, save=False)
    exact, _ = reference(t, activation=activation, add_x=False)
    check(y, exact, reference(t, activation=activation, add_x=False, dtype=torch.float32)[0])
    assert (stats == 7.0).all(), "wrote statistics that nobody asked for"


def test_thread_order_does_not_matter(kernel, monkeypatch):
    """A missing barrier shows as a difference between the two orders, or as the NaN that shared memory starts with."""
    t = operands(3, 96, 24, torch.float32)
    forward = run(kernel, t, torch.float32)
    monkeypatch.setenv("CUDA_HOST_REVERSE", "1")
    for a, b in zip(forward, run(kernel, t, torch.float32), strict=True):
        assert torch.equal(a, b)


def test_refuses_what_does_not_fit(kernel):
    t = operands(1, 12000, 400, torch.float32)
    args = Args(rows=1, d=12000, r=400, **{name: tensor.data_ptr() for name, tensor in t.items()})
    assert kernel(ctypes.byref(args), 0, None) == 1  # cudaErrorInvalidValue
