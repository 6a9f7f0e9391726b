"""multi_adapter on the Triton backend: parity, choice of backend, autocast, residuals, compiled code, no host waits."""

import importlib

import pytest
import torch
from torch.library import opcheck

from fastpetl import backends, ops
from fastpetl.ops import _multi_adapter_triton
from no_host_sync import NoHostSynchronisation
from ops.op_cases import DEVICE, assert_two_times

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@pytest.fixture(autouse=True)
def served():
    ok, reason = backends.verify("multi_adapter", "triton", DEVICE, torch.float32)
    if not ok:
        pytest.skip(reason)


def stacks(tasks, d, r, shared="", dtype=torch.float32):
    """w_down, b_down, w_up, b_up, norm_weight (one for all tasks), norm_bias."""

    def leaf(*shape, scale=1.0, offset=0.0):
        return (offset + scale * torch.randn(shape)).to(dtype).requires_grad_()

    down, up = (1 if shared == "down" else tasks), (1 if shared == "up" else tasks)
    return [leaf(down, r, d, scale=d**-0.5), leaf(down, r, scale=0.1), leaf(up, d, r, scale=r**-0.5),
            leaf(up, d, scale=0.1), leaf(d, scale=0.2, offset=1.0), leaf(tasks, d, scale=0.2)]  # fmt: skip


def call(function, x, weights, ids, residuals=None, **options):
    w, (gamma, beta) = weights[:4], weights[4:]
    residuals = (x,) if residuals is None else residuals
    return function(x, *w, ids, norm_weight=gamma, norm_bias=beta, residuals=residuals, **options)


def gradients(function, x, weights, ids, cotangent, *residuals, **options):
    y = call(function, x, weights, ids, (x, *residuals), **options)
    return [y.detach(), *torch.autograd.grad(y, [x, *weights, *residuals], cotangent.to(y.dtype))]


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


@DTYPES
@pytest.mark.parametrize("shared", ["", "down", "up"])
@pytest.mark.parametrize("per_row", [False, True])
def test_matches_float64(dtype, shared, per_row):
    x, f, weights = draw(5, 7, 76, dtype=dtype), draw(5, 7, 76, dtype=dtype), stacks(4, 76, 24, shared, dtype)
    ids = torch.randint(0, 3, (5, 7) if per_row else (5,))  # task 3 has no rows
    cotangent = torch.randn(5, 7, 76).to(dtype)
    double = [t.detach().double().requires_grad_() for t in (x, *weights, f)]
    want = gradients(
        ops.multi_adapter_reference, double[0], double[1:-1], ids, cotangent.double(), double[-1], scale=0.5
    )
    theirs = gradients(ops.multi_adapter_reference, x, weights, ids, cotangent, f, scale=0.5)
    ours = gradients(ops.multi_adapter, x, weights, ids, cotangent, f, scale=0.5, backend="triton")
    for i, (o, t, w) in enumerate(zip(ours, theirs, want, strict=True)):
        assert_two_times(o, t, w, f"result {i}")
    assert not ours[-2][3].any()  # zeros, not None


def test_expanded_and_strided_inputs():
    x, weights, ids = draw(7, 5, 48), stacks(3, 48, 8), torch.randint(0, 3, (7, 5))
    weights[0] = weights[0][:1].detach().requires_grad_().expand(3, -1, -1)
    x = x.transpose(0, 1)
    cotangent = torch.ones(()).expand(5, 7, 48)
    ours = gradients(ops.multi_adapter, x, weights, ids.t(), cotangent, backend="triton")
    want = gradients(ops.multi_adapter_reference, x, weights, ids.t(), cotangent)
    for o, w in zip(ours, want, strict=True):
        torch.testing.assert_close(o, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 5, 48), (3, 0, 48)], ids=str)
def test_no_rows(shape):
    x, weights = draw(*shape), stacks(3, 48, 8)
    got = gradients(ops.multi_adapter, x, weights, torch.zeros(shape[0]).long(), torch.ones(shape), backend="triton")
    assert got[0].shape == shape
    for w, g in zip([x, *weights], got[1:], strict=True):
        assert g.shape == w.shape and not g.any()


def test_autocast_keeps_a_wide_residual():
    x, f, weights, ids = draw(4, 5, 48), draw(4, 5, 48), stacks(3, 48, 8), torch.randint(0, 3, (4,))
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = gradients(ops.multi_adapter, x, weights, ids, torch.randn(4, 5, 48), f, backend="triton")
    want = call(ops.multi_adapter_reference, x, weights, ids, (x, f))
    assert ours[0].dtype == torch.float32 and all(g.dtype == torch.float32 for g in ours[1:])
    torch.testing.assert_close(ours[0], want, rtol=0.05, atol=0.05)


def test_compiles_whole_whatever_the_ids():
    torch._dynamo.reset()
    weights = stacks(3, 32, 8, "up")

    def block(x, ids):
        return call(ops.multi_adapter, x * 1, weights, ids, backend="triton") * 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 6, 9):
        x, ids = draw(n, 6, 32), torch.randint(0, 3, (n,))
        y, want = compiled(x, ids), block(x, ids)
        assert torch.equal(y, want)
        cotangent = torch.randn_like(y)
        grads = (torch.autograd.grad(out, [x, *weights], cotangent) for out in (y, want))
        for ours, theirs in zip(*grads, strict=True):
            assert torch.equal(ours, theirs)
        if n == 4:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_opcheck():
    weights = stacks(3, 24, 8, "up")
    weights[4] = weights[4].detach()[None].requires_grad_()
    ids = torch.randint(0, 3, (5,))
    tail = ids, 3, True, 1e-5, 3, 0.7, True
    opcheck(torch.ops.fastpetl.multi_adapter.default, (draw(10, 24), *weights, draw(10, 24), None, *tail))


def test_the_device_is_never_waited_for(monkeypatch):
    """On a GPU the range of the ids is asserted there; here the host's own check is left out to see the rest."""
    module = importlib.import_module("fastpetl.ops.multi_adapter")  # ops.multi_adapter is the function
    monkeypatch.setattr(module, "_check_range", lambda *a: None)
    monkeypatch.setattr(_multi_adapter_triton._kernels().launching, "launch", lambda *a, **k: None)
    x, weights, ids, cotangent = draw(4, 5, 48), stacks(3, 48, 8, "down"), torch.tensor([0, 2, 1, 0]), draw(4, 5, 48)
    with NoHostSynchronisation() as mode:
        gradients(ops.multi_adapter, x, weights, ids, cotangent, backend="triton")
    assert any(name.startswith("sort") for name in mode.seen)


def test_which_backend():
    wide = stacks(2, 48, 300)
    x, ids = draw(4, 48), torch.tensor([0, 1, 1, 0])
    with pytest.raises(RuntimeError, match="multi_adapter: backend is 'triton', which cannot serve .* at most"):
        call(ops.multi_adapter, x, wide, ids, backend="triton")
    assert _multi_adapter_triton.choose("cpp", x, 8, 2) == "composed"
    assert _multi_adapter_triton.choose("reference", x, 8, 2) == "reference"
    assert _multi_adapter_triton.choose("triton", x, 8, 2) == "triton"
    assert _multi_adapter_triton.choose("auto", x, 8, 2) == ("triton" if DEVICE == "cuda" else "composed")
    assert _multi_adapter_triton.choose("auto", x, 300, 2) == "composed"
    torch.testing.assert_close(
        call(ops.multi_adapter, x, wide, ids),
        call(ops.multi_adapter_reference, x, wide, ids),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_environment_decides(monkeypatch):
    x = draw(4, 48)
    for name, want in (("triton", "triton"), ("reference", "reference"), ("composed", "composed")):
        monkeypatch.setenv("FASTPETL_BACKEND", name)
        assert _multi_adapter_triton.choose("auto", x, 8, 2) == want


def test_errors():
    x, weights, ids = draw(4, 48), stacks(3, 48, 8), torch.tensor([0, 1, 2, 0])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="multi_adapter: task_ids goes from 0 to 3, expected 0 to 2"):
            call(ops.multi_adapter, x, weights, torch.tensor([0, 1, 3, 0]), backend="triton")
    with pytest.raises(ValueError, match="residuals has 3 tensors beside x"):
        call(ops.multi_adapter, x, weights, ids, (x, *(draw(4, 48) for _ in range(3))), backend="triton")
    with pytest.raises(ValueError, match=r"residuals\[0\] has dtype bfloat16, expected float32"):
        call(ops.multi_adapter, x, weights, ids, (draw(4, 48, dtype=torch.bfloat16),), backend="triton")
    with pytest.raises(ValueError, match="w_up has dtype float64, expected float32"):
        call(ops.multi_adapter, x, [*weights[:2], weights[2].double(), *weights[3:]], ids, backend="triton")
    y = call(ops.multi_adapter, x, weights, ids, backend="triton")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="multi_adapter: the fused backends cannot be differentiated twice"):
        dx.sum().backward()
