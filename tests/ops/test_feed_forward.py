"""`ops.feed_forward` against float64, against the two linears it stands for, and what it refuses."""

import pytest
import torch

from fastpetl import backends, ops
from ops.op_cases import needs_cpp

SIZES = [(1, 5, 32, 7), (3, 48, 96, 48), (199, 760, 320, 100), (433, 64, 1056, 80), (37, 1100, 2080, 24)]
pytestmark = needs_cpp


def make(rows, k, m, n, dtype=torch.float32, biases=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    x, w1, w2 = draw(rows, k), draw(m, k, scale=k**-0.5), draw(n, m, scale=m**-0.5)
    b1, b2 = (draw(m), draw(n)) if biases else (None, None)
    return [x, w1, b1, w2, b2], (1 + 0.1 * draw(k), 0.1 * draw(k), 1e-5)


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def run(function, tensors, norm, activation, grad, **options):
    x, *rest = tensors
    x = x.detach().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = function(x, *rest, norm=norm, activation=activation, **options)
        if not grad:
            return (y,)
        (dx,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return y.detach(), dx


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_two_times_rule(sizes, biases, with_norm, activation, grad):
    tensors, norm = make(*sizes, biases=biases)
    norm = norm if with_norm else None
    wide = [None if t is None else t.double() for t in tensors]
    wide_norm = None if norm is None else (norm[0].double(), norm[1].double(), norm[2])
    want = run(ops.feed_forward_reference, wide, wide_norm, activation, grad)
    plain = run(ops.feed_forward_reference, tensors, norm, activation, grad)
    got = run(ops.feed_forward, tensors, norm, activation, grad, backend="cpp")
    for ours, theirs, exact in zip(got, plain, want, strict=True):
        assert error(ours, exact) <= 2 * error(theirs, exact) + 1.3e-6  # 20 bits of a GELU's derivative


def test_every_instruction_set(isa):
    for sizes in ((50, 96, 160, 60), (450, 40, 288, 50)):
        tensors, norm = make(*sizes)
        wide, wide_norm = [t.double() for t in tensors], (norm[0].double(), norm[1].double(), norm[2])
        want = run(ops.feed_forward_reference, wide, wide_norm, "gelu", True)
        got = run(ops.feed_forward, tensors, norm, "gelu", True, backend="cpp")
        relu = run(ops.feed_forward, tensors, norm, "relu", False, backend="cpp")
        limit = 1e-4 if isa == "amx" else 3e-6
        for ours, exact in zip(got, want, strict=True):
            assert error(ours, exact) <= limit
        assert error(relu[0], run(ops.feed_forward_reference, tensors, norm, "relu", False)[0].double()) <= limit


@pytest.mark.parametrize("rows", [1, 8, 100, 400, 401, 900])
def test_a_rows_bits_do_not_depend_on_the_others(rows):
    """By columns up to 400 rows, by rows above."""
    tensors, norm = make(900, 72, 224, 100)
    whole = run(ops.feed_forward, tensors, norm, "gelu", True, backend="cpp")
    x, *rest = tensors
    g = torch.linspace(-1, 1, 900 * 100).view(900, 100)
    part = x[:rows].clone().requires_grad_()
    y = ops.feed_forward(part, *rest, norm=norm, backend="cpp")
    assert torch.equal(y, whole[0][:rows])
    assert torch.equal(torch.autograd.grad(y, part, g[:rows])[0], whole[1][:rows])


def test_threads_do_not_change_bits():
    before = torch.get_num_threads()
    try:
        for rows in (90, 700):
            found = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                tensors, norm = make(rows, 72, 352, 200)
                found.append(run(ops.feed_forward, tensors, norm, "gelu", True, backend="cpp"))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_auto_measures_and_is_either():
    tensors, norm = make(60, 64, 96, 64)
    backends.forget()
    try:
        got = run(ops.feed_forward, tensors, norm, "gelu", True)
        keys = [key for key in backends.tuned() if "feed_forward" in str(key[0])]
        assert len(keys) == 1 and set(backends.tuned()[keys[0]].milliseconds) == {"cpp", "composed"}
        run(ops.feed_forward, tensors, norm, "relu", True)  # nothing to choose
        assert len([key for key in backends.tuned() if "feed_forward" in str(key[0])]) == 1
    finally:
        backends.forget()
    want = run(ops.feed_forward, tensors, norm, "gelu", True, backend="reference")
    assert all(error(a, b.double()) <= 3e-6 for a, b in zip(got, want, strict=True))


def test_packs_are_kept_and_follow_the_weights():
    tensors, norm = make(20, 48, 64, 40)
    caches = (ops.PackCache(), ops.PackCache())
    with torch.no_grad():
        first = ops.feed_forward(*tensors, norm=norm, backend="cpp", caches=caches)
        assert [len(cache) for cache in caches] == [1, 1]
        assert torch.equal(first, ops.feed_forward(*tensors, norm=norm, backend="cpp"))
        tensors[1].mul_(1.5), tensors[3].mul_(0.5)
        second = ops.feed_forward(*tensors, norm=norm, backend="cpp", caches=caches)
        assert torch.equal(second, ops.feed_forward(*tensors, norm=norm, backend="cpp")) and not torch.equal(
            first, second
        )
    fresh = (ops.PackCache(), ops.PackCache())
    ops.feed_forward(*tensors, norm=norm, backend="cpp", caches=fresh)  # gradients enabled: a training pass
    assert [len(cache) for cache in fresh] == [0, 0]


@pytest.mark.parametrize("which", range(1, 7))
def test_what_is_trained_has_its_gradient(which):
    """A weight, bias or norm that is not frozen."""
    tensors, norm = make(12, 32, 64, 16)
    everything = [*tensors, *norm[:2]]
    everything[which] = everything[which].requires_grad_()
    x, w1, b1, w2, b2, weight, bias = everything
    y = ops.feed_forward(x, w1, b1, w2, b2, norm=(weight, bias, 1e-5))
    want = ops.feed_forward_reference(x, w1, b1, w2, b2, norm=(weight, bias, 1e-5))
    found = [torch.autograd.grad(out.square().sum(), everything[which])[0] for out in (y, want)]
    assert error(found[0], found[1].double()) <= 1e-5


NAMES = ("x", "w1", "b1", "w2", "b2", "weight", "bias")


@pytest.mark.parametrize("trained", ["x b1", "x b2", "x b1 b2", "b1", "b2", "x weight", "x b1 b2 bias", "b1 bias"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_trained_biases_and_norms_are_served_by_the_kernel(trained, activation):
    """BitFit's, and those that LoRA trains with it."""
    tensors, norm = make(199, 96, 320, 100)
    everything, wanted = [*tensors, *norm[:2]], [NAMES.index(name) for name in trained.split()]

    def gradients(function, dtype, **options):
        leaves = [t.detach().to(dtype).requires_grad_(i in wanted) for i, t in enumerate(everything)]
        x, w1, b1, w2, b2, weight, bias = leaves
        y = function(x, w1, b1, w2, b2, norm=(weight, bias, 1e-5), activation=activation, **options)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        return torch.autograd.grad(y, [leaves[i] for i in wanted], cotangent)

    want = gradients(ops.feed_forward_reference, torch.float64)
    plain = gradients(ops.feed_forward_reference, torch.float32)
    for ours, theirs, exact in zip(gradients(ops.feed_forward, torch.float32, backend="cpp"), plain, want, strict=True):
        assert ours.shape == exact.shape and error(ours, exact) <= 2 * error(theirs, exact) + 1.3e-6


@pytest.mark.parametrize("trained", [(), (2,), (4,), (2, 4)])
def test_kept_for_the_backward(trained):
    tensors, norm = make(64, 64, 256, 64)
    x = tensors[0].requires_grad_()
    for i in trained:
        tensors[i].requires_grad_()
    frozen = {t.data_ptr() for t in (*tensors, *norm[:2])}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.feed_forward(*tensors, norm=norm, backend="cpp")
    bytes_ = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in frozen)
    assert bytes_ == 64 * 256 * 5 // 2 + 64 * 2 * 4
    x.grad = None


def test_not_twice():
    tensors, _ = make(8, 32, 64, 16)
    x = tensors[0].requires_grad_()
    (g,) = torch.autograd.grad(ops.feed_forward(*tensors, backend="cpp").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="feed_forward: the fused backends cannot be differentiated twice"):
        g.sum().backward()


def test_infinities_and_nan():
    tensors, _ = make(6, 32, 64, 48)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = tensors[0].clone()
        x[2, 3] = value
        for activation in ("gelu", "relu"):
            got = ops.feed_forward(x, *tensors[1:], activation=activation, backend="cpp")
            want = ops.feed_forward_reference(x, *tensors[1:], activation=activation)
            assert torch.equal(got.isfinite(), want.isfinite())
            assert torch.equal(got[3:].isnan(), want[3:].isnan())


def test_shapes_dtypes_and_nothing():
    tensors, norm = make(24, 32, 64, 16)
    x, *rest = tensors
    wide = x.view(2, 3, 4, 32)
    got = ops.feed_forward(wide, *rest, norm=norm, backend="cpp")
    assert got.shape == (2, 3, 4, 16) and torch.equal(
        got.view(24, 16), ops.feed_forward(x, *rest, norm=norm, backend="cpp")
    )
    strided = torch.randn(24, 64)[:, ::2]
    assert torch.equal(
        ops.feed_forward(strided, *rest, backend="cpp"), ops.feed_forward(strided.clone(), *rest, backend="cpp")
    )
    assert ops.feed_forward(x[:0], *rest).shape == (0, 16)
    odd, _ = make(9, 32, 50, 16)  # not whole groups of the code: the two linears
    assert error(ops.feed_forward(*odd), ops.feed_forward_reference(*odd).double()) <= 3e-6
    half = [t.bfloat16() for t in tensors]
    assert ops.feed_forward(*half).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.feed_forward(*tensors).dtype == torch.bfloat16
    compiled = torch.compile(lambda x: ops.feed_forward(x, *rest, norm=norm), fullgraph=True, backend="aot_eager")
    assert error(compiled(x), got.view(24, 16).double()) <= 3e-6


BAD = [
    (dict(activation="silu"), ValueError, "feed_forward: activation is 'silu', expected one of gelu, relu"),
    (dict(caches=(None, 3)), TypeError, r"feed_forward: caches is \(NoneType, int\), expected two, each None or a"),
    (dict(caches=3), TypeError, "feed_forward: caches is a int, expected a pair"),
    (dict(w2=torch.zeros(16, 65)), ValueError, r"linear: weights\[0\] has shape \(16, 65\), expected"),
    (dict(w1="w"), TypeError, r"linear: weights is a str"),
    (dict(b1=torch.zeros(63)), ValueError, r"linear: biases\[0\]"),
    (dict(norm=(torch.ones(32), None)), TypeError, "linear: norm is not a triple"),
    (dict(x=3), TypeError, "linear: x is a int"),
    (dict(backend="cuda!"), ValueError, "backend"),
]  # fmt: skip


@pytest.mark.parametrize("change, kind, message", BAD)
def test_errors(change, kind, message):
    (x, w1, b1, w2, b2), _ = make(5, 32, 64, 16)
    arguments = dict(x=x, w1=w1, b1=b1, w2=w2, b2=b2) | change
    with pytest.raises(kind, match=message):
        ops.feed_forward(**arguments)
