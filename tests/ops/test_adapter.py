"""fastpetl.ops.adapter: every backend against float64, and the contract of its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpetl import backends, ops
from fastpetl.ops import _adapter
from fastpetl.spec import ACTIVATIONS
from ops.op_cases import (
    ADAPTER_BACKENDS,
    NAMES,
    adapter_arguments,
    assert_two_times,
    call_adapter,
    gradients,
    like,
    using,
)

# rows, d, r, activation, arguments: odd sizes, every activation, norm and biases there or not, all residual counts
SHAPES = [
    (199, 768, 96, "relu", {}),
    (1, 760, 100, "gelu", dict(residuals=0)),
    (199, 40, 8, "silu", dict(norm=False)),
    (33, 768, 288, "gelu_tanh", dict(bias=False, residuals=1)),
    (70, 40, 48, "identity", dict(norm_bias=False, bias=False)),
    (65, 760, 48, "relu", dict(norm=False, bias=False, residuals=0)),
    (1100, 56, 24, "gelu", {}),  # weight gradients are summed in slices of rows
]


def check_against_float64(label, rows, d, r, activation, arguments, dtype, add_x=True, scale=0.7, eps=1e-5):
    rows = min(rows, 33) if label == "cpp-portable" else rows  # slow by nature
    options = dict(activation=activation, scale=scale, eps=eps)
    a = adapter_arguments(rows, d, r, dtype, **arguments)
    cotangent = torch.randn(rows, d).to(dtype)
    with using("adapter", label, dtype) as name:
        ours = call_adapter(ops.adapter, a, add_x, backend=name, **options)
        got = gradients(ours, a, cotangent)
    b, w = like(a, dtype), like(a, torch.float64)
    theirs = call_adapter(ops.adapter_reference, b, add_x, **options)
    want = call_adapter(ops.adapter_reference, w, add_x, **options)
    assert_two_times(ours, theirs, want, "y")
    theirs, want = gradients(theirs, b, cotangent), gradients(want, w, cotangent)
    assert got.keys() == want.keys() == {k for k, t in a.items() if t is not None}
    for k in want:
        assert_two_times(got[k], theirs[k], want[k], f"gradient of {k}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: "-".join(map(str, c[:4])))
@pytest.mark.parametrize("label", [b for b in ADAPTER_BACKENDS if b not in ("triton", "reference")])
def test_backend_against_float64(label, case, dtype):
    check_against_float64(label, *case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [SHAPES[2], (70, 40, 48, "gelu", {})], ids=lambda c: "-".join(map(str, c[:4])))
def test_triton_against_float64(case, dtype):
    check_against_float64("triton", *case, dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    d=st.integers(1, 90),
    r=st.integers(1, 60),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    norm=st.booleans(),
    bias=st.booleans(),
    residuals=st.integers(0, 2),
    add_x=st.booleans(),
)
def test_any_shape(rows, d, r, activation, norm, bias, residuals, add_x):
    arguments = dict(norm=norm and d > 2, bias=bias, residuals=residuals)  # a norm over 1 or 2 channels has no gradient
    torch.manual_seed(rows * d + r)
    check_against_float64("cpp", rows, d, r, activation, arguments, torch.float32, add_x, eps=1e-3)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_reference_gradcheck(activation):
    a = adapter_arguments(3, 5, 2, torch.float64)
    names = list(a)

    def function(*t):
        return call_adapter(ops.adapter_reference, dict(zip(names, t, strict=True)), activation=activation)

    assert torch.autograd.gradcheck(function, tuple(a.values()))
    assert torch.autograd.gradgradcheck(function, tuple(a.values()), fast_mode=True)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("arguments", [{}, dict(norm=False, bias=False, residuals=0)], ids=["all", "bare"])
def test_reference_launcher_is_the_reference(activation, arguments):
    """The formula that serves the registered op without compiled kernels has the gradients autograd finds."""
    a = adapter_arguments(6, 10, 4, torch.float64, **arguments)
    code, cotangent = ACTIVATIONS[activation], torch.randn(6, 10, dtype=torch.float64)
    want = call_adapter(ops.adapter_reference, a, activation=activation, scale=0.7)
    tensors = {k: None if t is None else t.detach() for k, t in a.items()}
    y, z, stats = _adapter.reference_forward(*tensors.values(), True, 1e-5, code, 0.7, True)
    torch.testing.assert_close(y, want.detach())
    t = tensors
    saved = (t["x"], z, stats, t["w_down"], t["w_up"], t["norm_weight"], t["norm_bias"])
    needs = sum(1 << i for i, k in enumerate(NAMES[:7]) if a[k] is not None)
    got = _adapter.reference_backward(cotangent, *saved, True, code, 0.7, needs)
    want = gradients(want, a, cotangent)
    for k, g in zip(NAMES[:7], got, strict=True):
        torch.testing.assert_close(g, want.get(k, g.new_empty(0)))


EAGER = ["cpp", "triton", "cuda"]


@pytest.mark.parametrize("label", EAGER)
def test_gradients_only_where_wanted(label, monkeypatch):
    """Each subset of gradients equals the full set bit for bit, and the kernel is told to compute nothing else."""
    a = adapter_arguments(9, 40, 8)
    cotangent = torch.randn(9, 40)
    asked = []
    run = _adapter.eager_backward
    monkeypatch.setitem(ops.adapter.__globals__, "eager_backward", lambda *args: asked.append(args[-1]) or run(*args))
    with using("adapter", label) as name:
        full = gradients(call_adapter(ops.adapter, a, backend=name), a, cotangent)
        assert asked.pop() == 127
        subsets = [("x",), ("w_down",), ("w_up", "b_up"), ("norm_weight", "norm_bias"), ("b_down", "res2"), ("res1",)]
        for wanted in subsets if label == "cpp" else subsets[1:2]:
            part = {k: t.detach().requires_grad_(k in wanted) for k, t in a.items()}
            got = gradients(call_adapter(ops.adapter, part, backend=name), part, cotangent)
            mask = sum(1 << i for i, k in enumerate(NAMES[:7]) if k in wanted)
            assert (asked.pop() if mask else 0) == mask and not asked
            assert got.keys() == set(wanted)
            for k in wanted:
                assert torch.equal(got[k], full[k]), k


@pytest.mark.parametrize("label", EAGER)
def test_expanded_gradient_and_strided_arguments(label):
    """`y.sum().backward()` hands over a gradient of stride 0; transposed and sliced arguments are read as they are."""
    a = adapter_arguments(7, 40, 8)
    strided = {
        **a,
        "x": torch.randn(40, 7).t().requires_grad_(),
        "w_down": torch.randn(40, 8).t().requires_grad_(),
        "res1": torch.randn(7, 80)[:, ::2].requires_grad_(),
        "b_up": torch.randn(1).expand(40).requires_grad_(),
    }
    with using("adapter", label) as name:
        y = call_adapter(ops.adapter, strided, backend=name)
        got = torch.autograd.grad(y.sum(), list(strided.values()))
    want = call_adapter(ops.adapter_reference, strided)
    torch.testing.assert_close(y, want)
    for k, g, w in zip(NAMES, got, torch.autograd.grad(want.sum(), list(strided.values())), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("label", EAGER)
def test_no_rows(label):
    """No rows: an empty result and zeros, not None, for every parameter (DDP waits for them)."""
    a = adapter_arguments(0, 40, 8)
    with using("adapter", label) as name:
        y = call_adapter(ops.adapter, a, backend=name)
        assert y.shape == (0, 40)
        for k, g in gradients(y, a, torch.zeros(0, 40)).items():
            assert g.shape == a[k].shape and not g.any(), k
        with torch.no_grad():
            assert call_adapter(ops.adapter, a, backend=name).shape == (0, 40)


def test_leading_dimensions():
    a = adapter_arguments(6, 40, 8, residuals=1)
    flat = call_adapter(ops.adapter, a, backend="auto")
    for shape in ((40,), (6, 40), (2, 3, 40), (1, 2, 1, 3, 40)):
        t = dict(a)
        if shape == (40,):
            t["x"], t["res1"] = a["x"][0], a["res1"][0]
        else:
            t["x"], t["res1"] = a["x"].view(shape), a["res1"].view(shape)
        y = call_adapter(ops.adapter, t)
        assert y.shape == shape
        torch.testing.assert_close(y.reshape(-1, 40), flat[: y.numel() // 40])
        assert torch.autograd.grad(y.sum(), t["x"])[0].shape == shape
        with torch.no_grad():
            assert call_adapter(ops.adapter, t).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", [b for b in ADAPTER_BACKENDS if b.startswith("cpp")])
def test_deterministic(label, dtype):
    a = adapter_arguments(300, 768, 96, dtype)
    cotangent = torch.randn(300, 768)
    with using("adapter", label, dtype) as name:
        runs = [gradients(call_adapter(ops.adapter, a, backend=name), a, cotangent) for _ in range(2)]
    for k in runs[0]:
        assert torch.equal(runs[0][k], runs[1][k]), k


def test_x_among_the_residuals_is_recognised_by_identity():
    a = adapter_arguments(5, 40, 8, residuals=2)
    x = a["x"]
    parameters = (a["w_down"], a["b_down"], a["w_up"], a["b_up"])
    base = ops.adapter(x, *parameters)
    twice = ops.adapter(x, *parameters, residuals=(a["res1"], x, x))
    torch.testing.assert_close(twice, base + a["res1"] + 2 * x)
    torch.testing.assert_close(
        torch.autograd.grad(twice.sum(), x, retain_graph=True)[0], torch.autograd.grad(base.sum(), x)[0] + 2
    )


def test_result_may_be_modified_in_place_and_input_is_not():
    a = adapter_arguments(6, 40, 8)
    t = {**a, "x": a["x"].detach().view(2, 3, 40).requires_grad_(), "res1": None, "res2": None}
    before = t["x"].detach().clone()
    y = call_adapter(ops.adapter, t)
    y += 1
    y.sum().backward()
    assert torch.equal(t["x"], before)


def test_double_backward_and_changed_inputs_are_refused():
    a = adapter_arguments(5, 40, 8, residuals=0)
    with using("adapter", "cpp") as name:
        (g,) = torch.autograd.grad(call_adapter(ops.adapter, a, backend=name).sum(), a["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="adapter: .* cannot be differentiated twice"):
            g.sum().backward()
        y = call_adapter(ops.adapter, a, backend=name)
        with torch.no_grad():
            a["w_up"].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    (g,) = torch.autograd.grad(call_adapter(ops.adapter, a, backend="reference").sum(), a["x"], create_graph=True)
    g.sum().backward()


def test_torch_func_is_served_by_plain_torch_or_refused():
    a = {k: None if t is None else t.detach() for k, t in adapter_arguments(5, 40, 8, residuals=0).items()}

    def loss(x, backend):
        return call_adapter(ops.adapter, {**a, "x": x}, backend=backend).square().sum()

    x = a["x"].clone().requires_grad_()
    torch.testing.assert_close(
        torch.func.grad(lambda x: loss(x, "auto"))(a["x"]), torch.autograd.grad(loss(x, "auto"), x)[0]
    )
    per_row = torch.vmap(lambda x: call_adapter(ops.adapter, {**a, "x": x}))(a["x"])
    torch.testing.assert_close(per_row, call_adapter(ops.adapter, a))
    if backends.verify("adapter", "cpp", "cpu", torch.float32)[0]:
        with pytest.raises(RuntimeError, match="torch.func transforms .* use backend='reference'"):
            torch.func.grad(lambda x: loss(x, "cpp"))(a["x"])


@pytest.mark.parametrize("label", ["reference", "cpp"])
def test_autocast(label):
    """Computes in bf16, keeps a float32 residual stream in float32, and returns each gradient in its tensor's dtype."""
    a = adapter_arguments(64, 768, 96)
    cotangent = torch.randn(64, 768)
    with using("adapter", label) as name:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call_adapter(ops.adapter, a, backend=name)
            alone = call_adapter(ops.adapter, {**a, "res1": None, "res2": None}, add_x=False, backend=name)
        assert y.dtype == torch.float32 and alone.dtype == torch.bfloat16
        got = gradients(y, a, cotangent)
    b, w = like(a, torch.float32), like(a, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = call_adapter(ops.adapter_reference, b)
    want = call_adapter(ops.adapter_reference, w)
    assert_two_times(y, theirs, want, "y")
    theirs, want = gradients(theirs, b, cotangent), gradients(want, w, cotangent)
    for k in want:
        assert got[k].dtype == a[k].dtype
        assert_two_times(got[k], theirs[k], want[k], k)


def test_checkpoint_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    a = adapter_arguments(20, 40, 8)
    cotangent = torch.randn(20, 40)
    want = gradients(call_adapter(ops.adapter, a), a, cotangent)
    for reentrant in (False, True):
        y = checkpoint(lambda x: call_adapter(ops.adapter, {**a, "x": x}), a["x"], use_reentrant=reentrant)
        a["x"].grad = None
        for t in a.values():
            t.grad = None
        y.backward(cotangent)
        for k, g in want.items():
            torch.testing.assert_close(a[k].grad, g, rtol=0, atol=0, msg=lambda m, k=k: f"{k}: {m}")


def test_cuda_says_that_a_bottleneck_does_not_fit():
    with (
        using("adapter", "cuda"),
        pytest.raises(RuntimeError, match="bottleneck of 4000, which is too wide"),
    ):
        call_adapter(ops.adapter, adapter_arguments(3, 8, 4000), backend="cuda")
