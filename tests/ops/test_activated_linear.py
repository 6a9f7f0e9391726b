"""`ops.activated_linear` against float64, against the linear and the activation it stands for, and what it refuses."""

import pytest
import torch

from fastpetl import _C as C
from fastpetl import backends, ops

SIZES = [(1, 5, 32), (3, 48, 96), (199, 760, 320), (433, 64, 1056), (37, 1100, 2080), (16, 33, 64)]
ODD = [(9, 32, 50), (4, 16, 1)]  # not whole groups of the code: the linear and the activation


def make(rows, k, m, dtype=torch.float32, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=g, dtype=torch.float64, device="cpu") * scale).to(dtype)

    x, w, b = draw(rows, k), draw(m, k, scale=k**-0.5), draw(m)
    return [x, w, b if bias else None]


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def run(function, tensors, activation="gelu", grad=True, **options):
    x, *rest = tensors
    x = x.detach().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = function(x, *rest, activation=activation, **options)
        if not grad:
            return (y,)
        (dx,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return y.detach(), dx


def truth(tensors, activation="gelu", grad=True):
    wide = [None if t is None else t.double() for t in tensors]
    return run(ops.activated_linear_reference, wide, activation, grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "auto"])
@pytest.mark.parametrize("sizes", SIZES + ODD)
def test_two_times_rule(sizes, backend, bias, activation, grad):
    tensors = make(*sizes, bias=bias)
    want = truth(tensors, activation, grad)
    plain = run(ops.activated_linear_reference, tensors, activation, grad)
    got = run(ops.activated_linear, tensors, activation, grad, backend=backend)
    for ours, theirs, exact in zip(got, plain, want, strict=True):
        assert error(ours, exact) <= 2 * error(theirs, exact) + 1.3e-6  # 20 bits of a GELU's derivative


@pytest.fixture(params=C.cpu_isas())
def isa(request):
    before = C.cpu_isa()
    C.set_cpu_isa(request.param)
    yield request.param
    C.set_cpu_isa(before)


def test_every_instruction_set(isa):
    limit = 1e-4 if isa == "amx" else 3e-6
    for sizes in ((50, 96, 160), (450, 40, 288)):
        tensors = make(*sizes)
        for activation, grad in (("gelu", True), ("gelu", False), ("relu", True), ("relu", False)):
            got = run(ops.activated_linear, tensors, activation, grad, backend="cpp")
            for ours, exact in zip(got, truth(tensors, activation, grad), strict=True):
                assert error(ours, exact) <= limit


@pytest.mark.parametrize("rows", [1, 8, 100, 400, 401, 900])
def test_a_rows_bits_do_not_depend_on_the_others(rows):
    """By columns up to 400 rows, by rows above."""
    tensors = make(900, 72, 224)
    whole = run(ops.activated_linear, tensors, backend="cpp")
    x, *rest = tensors
    g = torch.linspace(-1, 1, 900 * 224).view(900, 224)
    part = x[:rows].clone().requires_grad_()
    y = ops.activated_linear(part, *rest, backend="cpp")
    assert torch.equal(y, whole[0][:rows])
    assert torch.equal(torch.autograd.grad(y, part, g[:rows])[0], whole[1][:rows])
    with torch.no_grad():  # with a pack or without
        for cache in (None, ops.PackCache()):
            assert torch.equal(ops.activated_linear(x[:rows], *rest, backend="cpp", cache=cache), whole[0][:rows])


def test_threads_do_not_change_bits():
    before = torch.get_num_threads()
    try:
        for rows in (90, 700):
            found = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                found.append(run(ops.activated_linear, make(rows, 72, 352), backend="cpp"))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_it_is_the_first_half_of_a_feed_forward():
    x, w, b = make(70, 48, 96)
    _, second, bias = make(1, 96, 24, seed=1)
    both = ops.feed_forward(x, w, b, second, bias, backend="cpp")
    h = ops.activated_linear(x, w, b, backend="cpp")
    assert torch.equal(both, ops.linear(h, second, bias, backend="cpp"))


def measured():
    return [key for key in backends.tuned() if "activated_linear" in str(key[0])]


def test_auto_measures_and_is_either():
    tensors = make(60, 64, 96)
    backends.forget()
    try:
        got = run(ops.activated_linear, tensors)
        assert len(measured()) == 1
        assert set(backends.tuned()[measured()[0]].milliseconds) == {"cpp", "composed"}
        run(ops.activated_linear, tensors, "relu")  # nothing to choose
        assert len(measured()) == 1
        run(ops.activated_linear, tensors, "relu", grad=False)
        assert len(measured()) == 2
    finally:
        backends.forget()
    for ours, exact in zip(got, truth(tensors), strict=True):
        assert error(ours, exact) <= 3e-6


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_packs_are_kept_and_follow_the_weights(activation):
    tensors, cache = make(20, 48, 64), ops.PackCache()
    options = {"activation": activation, "backend": "cpp"}
    with torch.no_grad():
        first = ops.activated_linear(*tensors, cache=cache, **options)
        assert len(cache) == 1 and torch.equal(first, ops.activated_linear(*tensors, **options))
        tensors[1].mul_(1.5)
        second = ops.activated_linear(*tensors, cache=cache, **options)
        assert torch.equal(second, ops.activated_linear(*tensors, **options)) and not torch.equal(first, second)
    fresh = ops.PackCache()
    ops.activated_linear(*tensors, cache=fresh, **options)  # gradients enabled: a training pass
    assert len(fresh) == 0


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("which", [1, 2])
def test_what_is_trained_has_its_gradient(which, activation):
    """A weight that is not frozen, which `linear` serves, or a bias."""
    tensors = make(12, 32, 64)
    tensors[0].requires_grad_()
    tensors[which].requires_grad_()
    found = []
    for function in (ops.activated_linear, ops.activated_linear_reference):
        y = function(*tensors, activation=activation)
        found.append(torch.autograd.grad(y.square().sum(), (tensors[0], tensors[which])))
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs.double()) <= 1e-5


@pytest.mark.parametrize("with_x", [False, True])
def test_a_trained_bias_is_served_by_the_kernel(with_x):
    x, w, b = make(199, 96, 320)
    grads = []
    for function, dtype, options in (
        (ops.activated_linear, torch.float32, {"backend": "cpp"}),
        (ops.activated_linear_reference, torch.float32, {}),
        (ops.activated_linear_reference, torch.float64, {}),
    ):
        leaves = [t.detach().to(dtype).requires_grad_(t is b or (with_x and t is x)) for t in (x, w, b)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = function(*leaves, **options)
        if options:
            assert sum(t.nbytes for t in kept if t.data_ptr() != leaves[1].data_ptr()) == 199 * 320 * 5 // 2
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        grads.append(torch.autograd.grad(y, [t for t in leaves if t.requires_grad], cotangent))
    for ours, theirs, exact in zip(*grads, strict=True):
        assert error(ours, exact) <= 2 * error(theirs, exact) + 1.3e-6


@pytest.mark.parametrize("activation, bytes_", [("gelu", 64 * 256 * 5 // 2), ("relu", 64 * 256 // 8)])
def test_kept_for_the_backward(activation, bytes_):
    x, w, b = make(64, 64, 256)
    x.requires_grad_()
    frozen, kept = {w.data_ptr(), b.data_ptr()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.activated_linear(x, w, b, activation=activation, backend="cpp")
    assert sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in frozen) == bytes_


def test_not_twice():
    tensors = make(8, 32, 64)
    x = tensors[0].requires_grad_()
    (g,) = torch.autograd.grad(ops.activated_linear(*tensors, backend="cpp").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="activated_linear: the fused backends cannot be differentiated twice"):
        g.sum().backward()


def test_infinities_and_nan():
    tensors = make(6, 32, 64)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = tensors[0].clone()
        x[2, 3] = value
        for activation in ("gelu", "relu"):
            got = ops.activated_linear(x, *tensors[1:], activation=activation, backend="cpp")
            want = ops.activated_linear_reference(x, *tensors[1:], activation=activation)
            assert torch.equal(got.isfinite(), want.isfinite()) and not want[2].isfinite().all()
            assert torch.equal(got[3:].isnan(), want[3:].isnan())


def test_the_result_is_the_callers():
    """It may be written to in place, in training and without gradients, and x stays as it was."""
    for grad in (False, True):
        for activation in ("gelu", "relu"):
            for sizes in ((2, 32, 64), (2, 32, 50)):
                x, w, b = make(*sizes)
                leaf = x.clone().view(1, *x.shape).requires_grad_(grad)
                with torch.set_grad_enabled(grad):
                    y = ops.activated_linear(leaf, w, b, activation=activation)
                    y.add_(1)
                assert torch.equal(leaf.detach()[0], x)


def test_shapes_dtypes_and_nothing():
    x, w, b = make(24, 32, 64)
    flat = ops.activated_linear(x, w, b, backend="cpp")
    got = ops.activated_linear(x.view(2, 3, 4, 32), w, b, backend="cpp")
    assert got.shape == (2, 3, 4, 64) and torch.equal(got.view(24, 64), flat)
    assert torch.equal(ops.activated_linear(x[0], w, b, backend="cpp"), flat[0])
    strided = torch.randn(24, 64)[:, ::2]
    for grad in (False, True):
        pair = [run(ops.activated_linear, [t, w, b], grad=grad, backend="cpp") for t in (strided, strided.clone())]
        assert all(torch.equal(*two) for two in zip(*pair, strict=True))
    columns = w.t().contiguous().t()
    assert torch.equal(ops.activated_linear(x, columns, b, backend="cpp"), flat)
    for activation in ("gelu", "relu"):
        y, dx = run(ops.activated_linear, [x[:0], w, b], activation)
        assert y.shape == (0, 64) and dx.shape == (0, 32)
        half = [t.bfloat16() for t in (x, w, b)]
        assert ops.activated_linear(*half, activation=activation).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tune", ["0", "1"])
def test_autocast_is_torchs(activation, grad, tune, monkeypatch):
    """Unmeasured, too, where the C++ kernel would come first."""
    monkeypatch.setenv("FASTPETL_TUNE", tune)
    tensors = make(24, 32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(ops.activated_linear, tensors, activation, grad)
        want = run(ops.activated_linear_reference, tensors, activation, grad)
    assert [t.dtype for t in got] == [t.dtype for t in want] and got[0].dtype == torch.bfloat16
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours, theirs.double()) <= 1e-2


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_compiled(activation, grad):
    tensors = make(24, 32, 64)
    function = lambda x, w, b, activation: ops.activated_linear(x, w, b, activation=activation)  # noqa: E731
    got = run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, activation, grad)
    for ours, exact in zip(got, truth(tensors, activation, grad), strict=True):
        assert error(ours, exact) <= 3e-6


BAD = [
    (dict(activation="silu"), ValueError, "activated_linear: activation is 'silu', expected one of gelu, relu"),
    (dict(cache=3), TypeError, "activated_linear: cache is a int, expected a fastpetl.ops.PackCache"),
    (dict(w="w"), TypeError, "activated_linear: w is a str, expected a torch.Tensor"),
    (
        dict(w=torch.zeros(64, 31)),
        ValueError,
        r"activated_linear: w has shape \(64, 31\), expected \(out_features, in_features=32\) to match x",
    ),
    (dict(w=torch.zeros(64)), ValueError, r"activated_linear: w has shape \(64,\), expected"),
    (dict(w=torch.zeros(64, 32).double()), ValueError, "activated_linear: w has dtype float64, expected float32 to"),
    (dict(b=torch.zeros(63)), ValueError, r"activated_linear: b has shape \(63,\), expected \(64,\) to match w"),
    (dict(b=2), TypeError, "activated_linear: b is a int, expected a torch.Tensor"),
    (dict(x=3), TypeError, "activated_linear: x is a int, expected a torch.Tensor"),
    (dict(x=torch.zeros(2, 32).long()), ValueError, "activated_linear: x has dtype int64, expected a floating-point"),
    (dict(x=torch.tensor(1.0)), ValueError, r"activated_linear: x has shape \(\), expected at least one dimension"),
    (dict(backend="cuda!"), ValueError, "backend"),
    (dict(backend="triton"), RuntimeError, "backend is 'triton', which cannot serve this call"),
]


@pytest.mark.parametrize("change, kind, message", BAD)
def test_errors(change, kind, message):
    x, w, b = make(5, 32, 64)
    with pytest.raises(kind, match=message):
        ops.activated_linear(**(dict(x=x, w=w, b=b) | change))


def test_an_explicit_backend_serves_or_says_why_not():
    x, w, b = make(5, 32, 64)
    want = truth([x, w, b])
    for backend in ("cpp", "onednn", "torch", "reference"):
        if backend != "reference" and backend not in backends.serving("linear", "auto", "cpu", x.dtype):
            continue
        for ours, exact in zip(run(ops.activated_linear, [x, w, b], backend=backend), want, strict=True):
            assert error(ours, exact) <= 3e-6
    with pytest.raises(RuntimeError, match="linear: backend is 'cpp', which cannot serve this call"):
        ops.activated_linear(x, w.requires_grad_(), b, backend="cpp")
