"""fastpetl.ops.linear: every backend against float64, what it keeps for backward, and the pack cache."""

import copy
import pickle

import pytest
import torch

from fastpetl import _measuring, backends, ops
from fastpetl.ops import PackCache, _linear
from ops.op_cases import LINEAR_BACKENDS, assert_two_times, needs_cpp, using

# rows, K, N_i, prologue, biases
SHAPES = [
    (199, 768, (768, 768, 768), "norm", True),
    (1, 760, (100,), "gelu", True),
    (33, 40, (8, 48), None, False),
    (65, 288, (96,), None, True),
    (70, 48, (40, 7, 1), "norm", False),
    (64, 3072, (40,), "gelu", False),
    (33, 45, (49,), None, True),
    (501, 1061, (31, 20), None, False),
]


def arguments(rows, k, ns, prologue, biases, dtype=torch.float32, grad=()):
    def draw(*shape, scale=1.0, offset=0.0):
        return (offset + scale * torch.randn(*shape)).to(dtype)

    x = draw(rows, k, scale=1.5, offset=0.3).requires_grad_()
    weights = tuple(draw(n, k, scale=k**-0.5) for n in ns)
    options = {}
    if prologue == "norm":
        options["norm"] = (draw(k, scale=0.2, offset=1.0), draw(k, scale=0.2), 1e-6)
    elif prologue:
        options["activation"] = prologue
    return x, weights, tuple(draw(n, scale=0.1) for n in ns) if biases else None, options


def double(x, weights, biases, options):
    norm = options.get("norm")
    wide = dict(options, norm=(norm[0].double(), norm[1].double(), norm[2])) if norm else options
    biases = biases and tuple(b.double() for b in biases)
    return x.detach().double().requires_grad_(), tuple(w.double() for w in weights), biases, wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("label", LINEAR_BACKENDS)
def test_against_float64(label, case, dtype):
    case = (min(case[0], 33), *case[1:]) if label == "cpp-portable" else case
    x, weights, biases, options = arguments(*case, dtype)
    cotangent = torch.randn(case[0], sum(case[2])).to(dtype)
    with using("linear", label, dtype) as name:
        y = ops.linear(x, weights, biases, backend=name, **options)
        (dx,) = torch.autograd.grad(y, x, cotangent)
        with torch.no_grad():
            cache = PackCache()
            for _ in range(2):  # the second call reads the pack
                packed = ops.linear(x, weights, biases, backend=name, cache=cache, **options)
    xt = x.detach().requires_grad_()
    theirs = ops.linear_reference(xt, weights, biases, **options)
    wide = double(x, weights, biases, options)
    want = ops.linear_reference(wide[0], wide[1], wide[2], **wide[3])
    assert_two_times(y, theirs, want, "y")
    assert_two_times(packed, theirs, want, "y from packed weights")
    theirs, want = (
        torch.autograd.grad(theirs, xt, cotangent)[0],
        torch.autograd.grad(want, wide[0], cotangent.double())[0],
    )
    assert_two_times(dx, theirs, want, "dx")


@pytest.mark.parametrize("prologue", [None, "norm", "gelu"])
def test_reference_gradcheck(prologue):
    x, weights, biases, options = double(*arguments(3, 5, (2, 4), prologue, True))
    leaves = [t.requires_grad_() for t in (x, *weights, *biases, *options.get("norm", ())[:2])]

    def function(x, w1, w2, b1, b2, *norm):
        given = dict(options, norm=(*norm, 1e-6)) if norm else options
        return ops.linear_reference(x, (w1, w2), (b1, b2), **given)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("label", LINEAR_BACKENDS)
def test_expanded_gradient_strided_arguments_and_no_rows(label):
    x = torch.randn(40, 7).t().requires_grad_()
    weights = (torch.randn(40, 8).t(), torch.randn(8, 80)[:, ::2])
    with using("linear", label) as name:
        for options in ({}, dict(activation="gelu"), dict(norm=(torch.rand(80)[::2], None, 1e-5))):
            y = ops.linear(x, weights, backend=name, **options)
            want = ops.linear_reference(x, weights, **options)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, want)), rtol=1e-4, atol=1e-4)
            empty = torch.zeros(2, 0, 40, requires_grad=True)
            y = ops.linear(empty, weights, backend=name, **options)
            assert y.shape == (2, 0, 16) and torch.autograd.grad(y.sum(), empty)[0].shape == empty.shape


def test_leading_dimensions_and_single_weight():
    x, (w,), (b,), _ = arguments(6, 40, (8,), None, True)
    want = torch.nn.functional.linear(x, w, b)
    for shape in ((6, 40), (2, 3, 40), (1, 6, 1, 40)):
        y = ops.linear(x.view(shape), w, b)
        torch.testing.assert_close(y, want.view(*shape[:-1], 8))
        y += 1  # the result is nobody's view
        assert torch.autograd.grad(y.sum(), x, retain_graph=True)[0].shape == x.shape
    torch.testing.assert_close(ops.linear(x[0], w, b), want[0])


@pytest.mark.parametrize("which", ["weight", "bias", "norm"])
def test_parameters_that_want_gradients_get_them(which):
    x, weights, biases, options = arguments(9, 40, (8, 12), "norm", True)
    wanted = dict(weight=weights[1], bias=biases[0], norm=options["norm"][0])[which].requires_grad_()
    y, want = ops.linear(x, weights, biases, **options), ops.linear_reference(x, weights, biases, **options)
    torch.testing.assert_close(y, want)
    cotangent = torch.randn_like(y)
    for g, w in zip(*(torch.autograd.grad(t, (x, wanted), cotangent) for t in (y, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_explicit_backend_refuses_trainable_weights():
    x, weights, _, _ = arguments(9, 40, (8,), None, False)
    weights[0].requires_grad_()
    with pytest.raises(RuntimeError, match="linear: backend is 'onednn', which cannot serve .* a weight requires grad"):
        ops.linear(x, weights, backend="onednn")
    with torch.no_grad():
        ops.linear(x, weights, backend="onednn")


def test_frozen_linear_keeps_no_input_for_backward():
    """Saved for backward: nothing of x's size without a prologue, x alone (not p(x)) with a norm. GELU: test_kept.py"""
    for prologue, allowed in ((None, 0), ("norm", 1)):
        x, weights, biases, options = arguments(64, 256, (512,), prologue, True)
        saved = []

        def keep(t, saved=saved):
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = ops.linear(x, weights, biases, **options)
        ours = {t.data_ptr() for t in saved} & {x.data_ptr()}
        assert len(ours) == allowed
        others = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weights[0].data_ptr())]
        assert sum(t.numel() for t in others) <= 2 * 64 + 512
        y.sum().backward()


def test_autocast():
    x, weights, biases, options = arguments(64, 256, (96, 32), "norm", True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear(x, weights, biases, **options)
        theirs = ops.linear_reference(x, weights, biases, **options)
    assert y.dtype == theirs.dtype == torch.bfloat16
    wide = double(x, weights, biases, options)
    assert_two_times(y, theirs, ops.linear_reference(wide[0], wide[1], wide[2], **wide[3]), "y")
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == torch.float32


def test_double_backward_is_refused():
    x, weights, _, _ = arguments(9, 40, (8, 8), None, False)
    (g,) = torch.autograd.grad(ops.linear(x, weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear: .* cannot be differentiated twice"):
        g.sum().backward()


def test_auto_measures_once_per_shape_class(monkeypatch):
    backends.forget()
    x, weights, biases, options = arguments(65, 40, (8,), None, True)
    measured = []
    measure = _measuring._measure
    monkeypatch.setattr(_measuring, "_measure", lambda *a: measured.append(list(a[0])) or measure(*a))
    for rows in (65, 128, 100):
        ops.linear(x.new_zeros(rows, 40).uniform_(), weights, biases)
    assert len(measured) == 1
    ops.linear(x[:64].detach(), weights, biases)
    assert len(measured) == 2
    ops.linear(x, weights, biases).sum().backward()  # its forward is known by now
    assert len(measured) == 3
    assert {key[0] for key in backends.tuned()} == {"forward", "backward"}
    for found in backends.tuned().values():
        assert found.name in found.milliseconds and "torch" in found.milliseconds
    monkeypatch.setenv("FASTPETL_TUNE", "0")
    backends.forget()
    y = ops.linear(x, weights, biases)
    assert len(measured) == 3 and not backends.tuned()
    first = backends.candidates("linear", "cpu", torch.float32)[0]
    assert torch.equal(y, ops.linear(x, weights, biases, backend=first))


def test_low_precision_candidates_are_rejected(monkeypatch):
    """A backend that answers an fp32 call with bf16 arithmetic is never chosen, however fast; nor one that raises."""
    backends.forget()
    x, weights, biases, _ = arguments(64, 256, (96,), None, True)

    def bf16(x, weights, biases, *_):
        return torch.nn.functional.linear(*(t.bfloat16() for t in (x, weights[0], biases[0]))).float(), x.new_empty(0)

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(_linear._FORWARD, "onednn", bf16)
    monkeypatch.setitem(_linear._FORWARD, "cpp", broken)
    monkeypatch.setattr(backends, "candidates", lambda *a: ("cpp", "onednn", "torch"))
    y = ops.linear(x.detach(), weights, biases)
    assert torch.equal(y, torch.nn.functional.linear(x, weights[0], biases[0]))
    (found,) = backends.tuned().values()
    assert found.name == "torch" and "differs from torch by" in found.rejected["onednn"]
    assert found.rejected["cpp"] == "failed: no such kernel"
    backends.forget()
    ops.linear(torch.full((64, 256), float("nan")), weights, biases, backend="torch")
    monkeypatch.setitem(_linear._FORWARD, "cpp", _linear._FORWARD["torch"])
    assert ops.linear(torch.full((64, 256), float("nan")), weights, biases).isnan().all() and not backends.tuned()


def test_pack_cache_follows_the_weights():
    w = torch.randn(48, 40)
    made = []
    cache = PackCache()

    def get():
        return cache.get("kind", [w], lambda: made.append(1) or w.clone())

    assert torch.equal(get(), w) and torch.equal(get(), w) and len(made) == 1
    with torch.no_grad():
        w[0, 0] += 1  # an optimizer step, load_state_dict: the version counter
    assert torch.equal(get(), w) and len(made) == 2
    w.data.mul_(2)  # an EMA swap: no version counter, but the values
    assert torch.equal(get(), w) and len(made) == 3
    w = w.clone()
    assert torch.equal(get(), w) and len(made) == 4
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(other, PackCache) and len(other) == 0
    assert len(cache) == 1 and cache.nbytes == w.numel() * 4
    cache.clear()
    assert len(cache) == 0
    with torch.inference_mode():
        w = torch.randn(8, 8)
        get(), get()
    assert len(made) == 6 and len(cache) == 0


@pytest.mark.parametrize("n", [16, 64, 128, 300])
def test_a_new_tensor_never_takes_an_old_ones_pack(n):
    """As LoRA's merged weights: made anew, perhaps where the old one stood, one value changed that is not looked at."""
    w, cache = torch.randn(n, n), PackCache()
    for _ in range(4):
        cache.get("kind", [w], w.clone)
        changed = w.clone()
        changed[0, 1] += 1
        del w
        w = changed.clone()
        assert torch.equal(cache.get("kind", [w], w.clone), w)


@pytest.mark.parametrize("label", LINEAR_BACKENDS)
def test_training_keeps_no_pack(label):
    x, weights, biases, _ = arguments(64, 256, (96, 32), None, True)
    cache = PackCache()
    with using("linear", label) as name:
        ops.linear(x, weights, biases, backend=name, cache=cache).sum().backward()
        ops.linear(x.detach(), weights, biases, backend=name, cache=cache)
        assert len(cache) == 0
        with torch.no_grad():
            y = ops.linear(x, weights, biases, backend=name, cache=cache)
            weights[0].mul_(2)
            torch.testing.assert_close(
                ops.linear(x, weights, biases, backend=name, cache=cache)[:, :96],
                2 * (y[:, :96] - biases[0]) + biases[0],
            )


@pytest.mark.parametrize("label", LINEAR_BACKENDS)
def test_deterministic(label):
    x, weights, biases, options = arguments(300, 768, (96, 48), "norm", True)
    cotangent = torch.randn(300, 144)
    with using("linear", label) as name:
        runs = []
        for _ in range(2):
            y = ops.linear(x, weights, biases, backend=name, **options)
            runs.append((y, *torch.autograd.grad(y, x, cotangent)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_overwrite_writes_to_x_only_where_nothing_is_recorded():
    x, w, b = torch.randn(3, 16), torch.randn(8, 16), torch.randn(8)
    want, kept = ops.linear(x, w, b, activation="gelu", backend="torch"), x.clone()
    given = {"activation": "gelu", "backend": "torch", "overwrite": True}
    assert torch.equal(ops.linear(x, w, b, **given), want) and torch.equal(x, kept)  # grad mode is on
    with torch.no_grad():
        assert torch.equal(ops.linear(x, w, b, **given), want)
    assert torch.equal(x, torch.nn.functional.gelu(kept))


def test_off_the_cpu_torchs_own_linear_serves_and_errors_keep_their_words():
    """The meta device stands in for a GPU: no kernel of ours serves there either."""
    x = torch.zeros(2, 5, 8, device="meta", requires_grad=True)
    w, b, gamma = (torch.zeros(*s, device="meta") for s in ((6, 8), (6,), (8,)))
    for options in ({}, {"activation": "gelu"}, {"norm": (gamma, None, 1e-5)}):
        y = ops.linear(x, (w,), (b,), **options)
        assert y.shape == (2, 5, 6) and y.requires_grad, options
        assert ops.linear(x, (w, w), (b, b), **options).shape == (2, 5, 12)
    with pytest.raises(ValueError, match=r"linear: weights\[0\] has shape \(6, 7\), expected \(out_features, in_feat"):
        ops.linear(x, (torch.zeros(6, 7, device="meta"),))
    with pytest.raises(ValueError, match="linear: norm and activation are both given"):
        ops.linear(x, (w,), norm=(gamma, None, 1e-5), activation="gelu")
    with pytest.raises(ValueError, match=r"linear: biases\[0\] has shape \(5,\), expected \(6,\) to match"):
        ops.linear(x, (w,), (torch.zeros(5, device="meta"),))


@needs_cpp
@pytest.mark.parametrize("prologue", [None, "gelu"])
def test_outputs_too_large_for_the_caches(prologue):
    """They are written past them in whole vectors; the last panel of 64 columns has vectors that are not the row's."""
    rows, wide, narrow = 50_000, 64, 8  # 12.8 MB
    x, weights, biases, _ = arguments(rows, narrow, (wide,), None, True)
    with torch.no_grad():
        torch.testing.assert_close(
            ops.linear(x, weights, biases, backend="cpp"), ops.linear_reference(x, weights, biases)
        )
    x, weights, _, options = arguments(rows, wide, (narrow,), prologue, False)
    cotangent = torch.randn(rows, narrow)
    (got,) = torch.autograd.grad(ops.linear(x, weights, backend="cpp", **options), x, cotangent)
    (want,) = torch.autograd.grad(ops.linear_reference(x, weights, **options), x, cotangent)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
