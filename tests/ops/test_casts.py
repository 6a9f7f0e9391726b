"""What autocast makes of parameters is kept while they stay, and of what they are made in whose dtype."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from fastpetl import ops
from fastpetl.ops import _casts
from fastpetl.ops._casts import cast

BF16 = torch.bfloat16


def frozen(*shape):
    return torch.nn.Parameter(torch.randn(shape), requires_grad=False)


def test_a_frozen_parameter_is_cast_once():
    p = frozen(8, 6)
    low = cast(p, BF16)
    assert low.dtype == BF16 and not low.requires_grad and cast(p, BF16) is low
    torch.testing.assert_close(low, p.detach().to(BF16), rtol=0, atol=0)
    half = cast(p, torch.float16)
    assert half.dtype == torch.float16 and cast(p, BF16) is low and cast(p, torch.float16) is half


@pytest.mark.parametrize(
    "change",
    [
        lambda m: torch.optim.SGD(m.requires_grad_().parameters(), 1.0).step(lambda: m.weight.sum().backward() or 0.0),
        lambda m: m.load_state_dict({"weight": torch.ones(4, 6)}),
        lambda m: m.load_state_dict({"weight": torch.ones(4, 6)}, assign=True),
        lambda m: setattr(m.weight, "data", torch.ones(4, 6)),
        lambda m: m.weight.data.mul_(3),
        lambda m: m.to(torch.float64).to(torch.float32).weight.data.mul_(2),
    ],
)
def test_never_stale(change):
    module = torch.nn.Linear(6, 4, bias=False).requires_grad_(False)
    before = cast(module.weight, BF16)
    change(module)
    module.requires_grad_(False)
    now = cast(module.weight, BF16)
    assert now is not before
    torch.testing.assert_close(now, module.weight.to(BF16), rtol=0, atol=0)


def test_what_trains_is_cast_anew_with_its_gradient():
    p = torch.nn.Parameter(torch.randn(3))
    low = cast(p, BF16)
    assert low.requires_grad and cast(p, BF16) is not low
    low.float().sum().backward()
    torch.testing.assert_close(p.grad, torch.ones(3))
    with torch.no_grad():
        assert cast(p, BF16) is cast(p, BF16)
        p.add_(1)
        torch.testing.assert_close(cast(p, BF16), p.to(BF16), rtol=0, atol=0)


def test_what_is_left_alone():
    assert cast(None, BF16) is None
    for t in (torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=BF16)):
        assert cast(t, BF16) is t
    x = torch.ones(2)
    assert cast(x, BF16) is not cast(x, BF16)  # an activation


def test_nothing_outlives_its_parameter():
    p = frozen(5)
    kept, seen = weakref.ref(cast(p, BF16)), len(_casts._KEPT)
    twin = copy.deepcopy(p)
    del p
    gc.collect()
    assert kept() is None and len(_casts._KEPT) == seen - 1 and twin not in _casts._KEPT
    low = weakref.ref(cast(twin, BF16))
    _casts.forget([twin, twin])
    gc.collect()
    assert low() is None


def test_kept_weights_are_made_in_their_own_dtype():
    """A product inside `make` would be of autocast's dtype, and stay so when autocast has ended."""
    cache, p = ops.WeightCache(), frozen(4, 4)
    with torch.autocast("cpu", BF16):
        made = cache.get("all", [p], lambda: p @ p)
    assert made.dtype == torch.float32
    assert cache.get("all", [p], lambda: p @ p) is made
    assert cast(made, BF16) is cast(made, BF16)


def apart(y, truth):
    return (y.double() - truth).norm()


@pytest.mark.parametrize("stream", [torch.float32, BF16])
def test_norms_see_x_before_it_is_cast(stream):
    """With a mean of 60 deviations bf16 has two bits of x left; autocast's own norm sees them all."""
    torch.manual_seed(0)
    x = (torch.randn(50, 64) + 60).to(stream)
    g, b, w, u = torch.rand(64) + 0.5, torch.randn(64), torch.randn(32, 64) / 8, torch.randn(64, 32) / 8
    wide = [t.double() for t in (g, b, w, u)]
    n = F.layer_norm(x.double(), (64,), *wide[:2])
    linear = n @ wide[2].t()
    with torch.autocast("cpu", BF16):
        torchs = F.linear(F.layer_norm(x, (64,), g, b), w)
        ours = ops.linear(x, (w,), norm=(g, b, 1e-5))
        assert ours.dtype == BF16
        assert apart(ours, linear) <= 1.5 * apart(torchs, linear) + 1e-3 * linear.norm()
        for bias, shift in ((b, 0), (None, wide[1])):
            y = ops.adapter(x, w, None, u, None, norm_weight=g, norm_bias=bias, residuals=(x,))
            assert y.dtype == stream
            torchs = F.linear(F.linear(F.layer_norm(x, (64,), g, bias), w).relu(), u) + x
            exact = ((n - shift) @ wide[2].t()).relu() @ wide[3].t() + x.double()
            assert apart(y, exact) <= 1.5 * apart(torchs, exact) + 1e-4 * linear.norm()
        with pytest.raises(ValueError, match=r"linear: norm weight has shape \(63,\), expected \(64,\) to match x"):
            ops.linear(x, (w,), norm=(g[:63], None, 1e-5))
        with pytest.raises(ValueError, match=r"adapter: norm_weight has shape \(63,\)"):
            ops.adapter(x, w, None, u, None, norm_weight=g[:63], norm_bias=b[:63])
