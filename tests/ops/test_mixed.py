"""Adapters, sites and norms under torch.autocast by the Triton kernels: a float32 stream beside bf16 and fp16, as near
to float64 as autocast's own formulas are, in as many launches as without autocast.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the Triton kernels need the triton package")

from fastpetl import ops  # noqa: E402
from fastpetl.kernels import launching  # noqa: E402
from fastpetl.ops import _mixed  # noqa: E402
from fastpetl.ops._adapter import ACT  # noqa: E402
from fastpetl.ops._dropout import dropout_factor  # noqa: E402
from fastpetl.spec import AdapterSpec  # noqa: E402
from ops.op_cases import DEVICE, assert_two_times, using  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16
NAMES = ("w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias")
VILT = AdapterSpec(72, 20, tail="layernorm", tail_eps=1e-6, emit="both")
METER = replace(VILT, tail_eps=1e-12, emit="norm")
VLBART = AdapterSpec(72, 20, "gelu_tanh", norm=False, norm_bias=False, input="sublayer", tail="layernorm", emit="norm")
SITES = {
    "vilt": VILT,
    "meter": METER,
    "vlbart": VLBART,
    "vlbart pre-norm": replace(VLBART, norm=True, norm_bias=True),
    "vlt5": replace(VLBART, tail="rmsnorm", tail_eps=1e-6, emit="both"),
    "adaptformer": replace(VILT, input="normalised", scale=0.1, activation="gelu_tanh"),
    "wide": replace(METER, hidden=40, bottleneck=300, activation="gelu_tanh"),  # split at the bottleneck
    "odd": replace(VILT, hidden=77, bottleneck=9, activation="silu"),
}


def draw(*size, scale=1.0, offset=0.0, dtype=torch.float32):
    return (offset + scale * torch.randn(*size)).to(dtype).requires_grad_()


def tensors(spec, low, shape=(2, 7), x=torch.float32):
    """Leaves by name. f, which a linear made, is of autocast's dtype; parameters are float32."""
    d, r = spec.hidden, spec.bottleneck
    made = dict(x=draw(*shape, d, offset=0.3, dtype=x), f=draw(*shape, d, dtype=low))
    made |= dict(w_down=draw(r, d, scale=d**-0.5), b_down=draw(r, scale=0.1))
    made |= dict(w_up=draw(d, r, scale=r**-0.5), b_up=draw(d, scale=0.1))
    if (
        spec.activation == "relu"
    ):  # which z rounding throws to the other side of the kink is chance: keep z away from it
        made["b_down"] = (16.0 * (torch.arange(r) % 2) - 8).requires_grad_()
    if spec.norm:
        made |= dict(norm_weight=draw(d, scale=0.2, offset=1.0), norm_bias=draw(d, scale=0.2))
    if spec.input == "normalised":
        made["normed"] = draw(*shape, d)
    if spec.tail:
        made["tail_weight"] = draw(d, scale=0.2, offset=1.0)
    if spec.tail == "layernorm":
        made["tail_bias"] = draw(d, scale=0.2)
    return made


def without_tail(t):
    return {k: v for k, v in t.items() if "tail" not in k}


def adapted(t, spec, u):
    """A(u) as eager code has it; norms in float32, as on CUDA."""
    if spec.norm:
        wide = torch.promote_types(u.dtype, torch.float32)
        u = F.layer_norm(u.to(wide), u.shape[-1:], t["norm_weight"], t["norm_bias"], spec.eps)
    h = ACT[spec.code](F.linear(u, t["w_down"], t["b_down"]))
    return F.linear(h, t["w_up"], t["b_up"]) * spec.scale


def tail(t, spec, s):
    if spec.tail == "layernorm":
        return F.layer_norm(s, s.shape[-1:], t["tail_weight"], t["tail_bias"], spec.tail_eps)
    return F.rms_norm(s, s.shape[-1:], t["tail_weight"], spec.tail_eps)


def eager_site(t, spec):
    if spec.input == "sublayer":
        s = t["x"] + (t["f"] + adapted(t, spec, t["f"]))
    else:
        s = t["x"] + t["f"] + adapted(t, spec, t["x"] if spec.input == "residual" else t["normed"])
    n = tail(t, spec, s)
    return (s, n) if spec.emit == "both" else (n,)


def fused_site(t, spec, backend="triton"):
    named = {k: t.get(k) for k in ("norm_weight", "norm_bias", "tail_weight", "tail_bias", "normed")}
    out = ops.adapter_residual_norm(t["x"], t["f"], *(t[k] for k in NAMES[:4]), spec=spec, **named, backend=backend)
    return out if isinstance(out, tuple) else (out,)


def eager_adapter(t, spec):
    u = t["f"] if spec.input == "sublayer" else t["x"]
    return (adapted(t, spec, u) + t["f"] + t["x"],)


def fused_adapter(t, spec, backend="triton", residuals=("x", "f")):
    u = t["f"] if spec.input == "sublayer" else t["x"]
    norm = {k: t.get(k) for k in NAMES[4:]}
    options = dict(activation=spec.activation, scale=spec.scale, eps=spec.eps, backend=backend)
    weights = (t[k] for k in NAMES[:4])
    return (ops.adapter(u, *weights, **norm, residuals=tuple(t[k] for k in residuals), **options),)


def run(function, t, spec, low, cotangents, **options):
    """Outputs, and the gradients by name of what wants one."""
    with torch.autocast(DEVICE, low, enabled=low is not None):
        out = function(t, spec, **options)
    wanted = {k: v for k, v in t.items() if v.requires_grad}
    cotangents = [c.to(o.dtype) for c, o in zip(cotangents, out, strict=False)]
    grads = torch.autograd.grad(out, list(wanted.values()), cotangents)
    return [o.detach() for o in out], dict(zip(wanted, grads, strict=True))


def agree(fused, eager, t, spec, low, **options):
    """|ours - fp64| <= 2 |eager autocast - fp64| + eps, outputs and gradients, each in the dtype eager has it in."""
    cotangents = [torch.randn(t["x"].shape) for _ in range(2)]
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in t.items()}
    with using("adapter", "triton"):
        ours = run(fused, t, spec, low, cotangents, **options)
    theirs, want = run(eager, t, spec, low, cotangents), run(eager, exact, spec, None, cotangents)
    for o, e, w in zip(ours[0], theirs[0], want[0], strict=True):
        assert_two_times(o, e, w, "output")
    assert ours[1].keys() == theirs[1].keys()
    for name, g in ours[1].items():
        assert_two_times(g, theirs[1][name], want[1][name], f"gradient of {name}")


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched; torch's norms are not to be called."""
    seen, launch = [], launching.launch
    monkeypatch.setattr(launching, "launch", lambda k, *a, **o: seen.append(k.fn.__name__) or launch(k, *a, **o))
    return seen


@pytest.mark.parametrize("low", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", SITES)
def test_sites(name, low):
    agree(fused_site, eager_site, tensors(SITES[name], low), SITES[name], low)


@pytest.mark.parametrize("low", [BF16, FP16], ids=str)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("input", ["residual", "sublayer"])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_adapters(activation, input, norm, low):
    spec = AdapterSpec(44, 12, activation, scale=0.7, norm=norm, norm_bias=norm, input=input)
    agree(fused_adapter, eager_adapter, tensors(spec, low, (3, 5)), spec, low)


@pytest.mark.parametrize("low", [BF16, FP16], ids=str)
def test_a_wide_bottleneck_and_a_single_row(low):
    for shape, d, r in (((1, 1), 40, 300), ((1,), 77, 9)):
        spec = AdapterSpec(d, r, "gelu_tanh")
        agree(fused_adapter, eager_adapter, tensors(spec, low, shape), spec, low)


def test_rows_far_from_zero():
    """The norm sees x uncast: with a mean of 60 deviations bf16 would leave two bits of it."""
    spec = VILT
    t = tensors(spec, BF16)
    t["x"] = (t["x"].detach() * 0.5 + 60).requires_grad_()
    agree(fused_site, eager_site, t, spec, BF16)
    agree(fused_adapter, eager_adapter, without_tail(t), spec, BF16)


FROZEN = {
    "all weights": set(NAMES),
    "the products'": set(NAMES[:4]),
    "what is before": {"x", "f"},
    "the stream": {"x"},
    "all but one bias": {"x", "f", *NAMES} - {"b_up"},
    "all but the norm": {"x", "f", *NAMES[:4]},
}


@pytest.mark.parametrize("what", FROZEN)
@pytest.mark.parametrize("name", ["vilt", "vlbart", "wide"])
def test_frozen(name, what):
    """Gradients only where wanted."""
    t = tensors(SITES[name], BF16)
    for key in FROZEN[what] & t.keys():
        t[key].requires_grad_(False)
    agree(fused_site, eager_site, t, SITES[name], BF16)
    t = without_tail(t)
    if any(v.requires_grad for v in t.values()):
        agree(fused_adapter, eager_adapter, t, SITES[name], BF16)


@pytest.mark.parametrize("name", ["vilt", "vlbart"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_outputs_is_used(name, which):
    spec = replace(SITES[name], emit="both")

    def only(function):
        return lambda t, spec: function(t, spec)[which : which + 1]

    t = tensors(spec, BF16)
    if which == 0:  # autograd then knows nothing of the tail
        t |= {k: v.detach() for k, v in t.items() if "tail" in k}
    agree(only(fused_site), only(eager_site), t, spec, BF16)


def test_all_of_autocasts_dtype():
    """A bf16 stream with float32 parameters: the sums stay bf16, as eager has them."""
    spec = AdapterSpec(44, 12, "gelu_tanh")
    agree(fused_adapter, eager_adapter, tensors(spec, BF16, x=BF16), spec, BF16)


@pytest.mark.parametrize("low", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["vilt", "meter", "vlbart", "vlt5", "wide"])
def test_as_many_launches_as_without_autocast(launches, monkeypatch, name, low):
    spec = SITES[name]
    t = tensors(spec, low)
    cotangents = [torch.randn(t["x"].shape) for _ in range(2)]
    uniform = {k: v.detach().to(low).requires_grad_() for k, v in t.items()}
    run(fused_site, uniform, spec, None, cotangents)
    without = launches[:]
    launches.clear()
    for norm in ("layer_norm", "rms_norm"):
        monkeypatch.setattr(F, norm, None)  # not torch's
    run(fused_site, t, spec, low, cotangents)
    assert sorted(set(launches) - {"fold_weights"}) == sorted(set(without) - {"fold_weights"})
    assert len(launches) <= len(without)
    launches.clear()
    with torch.no_grad(), torch.autocast(DEVICE, low):
        fused_site(t, spec)
    assert len(launches) == (3 if name == "wide" else 1)


class Casts(TorchDispatchMode):
    """Counts what changes a dtype."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["vilt", "vlbart"])
def test_only_the_trained_matrices_are_cast(name):
    """No row is, there and back."""
    t, spec = tensors(SITES[name], BF16), SITES[name]
    with Casts() as casts, torch.autocast(DEVICE, BF16):
        out = fused_site(t, spec)
    assert casts.count == 2
    with Casts() as casts:
        torch.autograd.grad(out, list(t.values()), [torch.ones_like(o) for o in out])
    # CPU: `products` casts what it multiplies
    assert casts.count <= (4 if DEVICE == "cpu" else 0)


def eager_norm(t, spec, dropout=0.0, seed=None, mask=None):
    x, f = t["x"], t["f"]
    wide = torch.promote_types(x.dtype, f.dtype)
    rows = x.reshape(-1, x.shape[-1]).shape
    factor = dropout_factor(seed, *rows, dropout, x)
    f = f if factor is None else (f * factor.view(f.shape).to(f.dtype))
    if mask is not None:
        f = torch.where(mask.view(-1, *(1,) * (x.dim() - 1)), 0, f)
    s = (x + f).to(wide)
    if spec.tail is None:
        return (s,)
    n = tail(t, spec, s)
    return (s, n) if spec.emit == "both" else (n,)


def fused_norm(t, spec, **options):
    options |= dict(tail=spec.tail, eps=spec.tail_eps, emit=spec.emit, backend="triton")
    out = ops.residual_norm(t["x"], t["f"], t.get("tail_weight"), t.get("tail_bias"), **options)
    return out if isinstance(out, tuple) else (out,)


def norm_tensors(spec, low, x):
    t = tensors(spec, low, (4, 5), x)
    return {k: v for k, v in t.items() if k in ("x", "f", "tail_weight", "tail_bias")}


@pytest.mark.parametrize("low", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["layernorm both", "layernorm norm", "rmsnorm norm", "none sum"])
def test_residual_norm(name, low, launches):
    kind, emit = name.split()
    spec = AdapterSpec(44, 12, tail=None if kind == "none" else kind, emit=emit, tail_eps=1e-6)
    t = norm_tensors(spec, low, torch.float32)
    agree(fused_norm, eager_norm, t, spec, low)
    assert launches.count("forward") == launches.count("backward") == 1
    mask, seed = torch.tensor([False, True, False, False]), torch.tensor([7])
    options = dict(dropout=0.3, seed=seed, mask=mask)
    agree(lambda *a: fused_norm(*a, **options), lambda *a: eager_norm(*a, **options), t, spec, low)
    t["x"], t["f"] = (t[k].detach().requires_grad_() for k in "fx")  # the stream low, the sublayer's output not
    agree(fused_norm, eager_norm, t, spec, low)


def test_samples_that_skip():
    """Kept samples are one launch; a shortcut is an adapter of the stream."""
    spec, mask = METER, torch.tensor([False, True, False])
    t = tensors(spec, BF16, (3, 5))
    shortcut = {k: v for k, v in tensors(replace(spec, bottleneck=8), BF16).items() if k in NAMES}
    named = {k: t[k] for k in ("norm_weight", "norm_bias", "tail_weight", "tail_bias")}
    options = dict(spec=spec, shortcut=tuple(shortcut[k] for k in NAMES), mask=mask, **named)
    made = t["x"], t["f"], *(t[k] for k in NAMES[:4])
    with torch.autocast(DEVICE, BF16):
        n = ops.adapter_residual_norm(*made, **options, backend="triton")
        kept = eager_site(t, spec)[0]
        skipped = tail(t, spec, t["x"] + adapted(shortcut, spec, t["x"]))
    want = torch.where(mask[:, None, None], skipped, kept)
    assert n.dtype == torch.float32
    torch.testing.assert_close(n, want, rtol=2e-2, atol=2e-2)


def test_an_empty_batch():
    t = tensors(VILT, BF16, (0, 7))
    (s, n), grads = run(fused_site, t, VILT, BF16, [torch.empty(0, 7, 72)] * 2)
    assert s.shape == n.shape == (0, 7, 72) and s.dtype == n.dtype == torch.float32
    assert all(g.dtype == t[k].dtype and g.shape == t[k].shape and not g.any() for k, g in grads.items())
    t = norm_tensors(VILT, BF16, torch.float32)
    t["x"], t["f"] = (v.detach()[:0].requires_grad_() for v in (t["x"], t["f"]))
    (s, n), grads = run(fused_norm, t, VILT, BF16, [torch.empty(0, 5, 72)] * 2)
    assert grads["f"].dtype == BF16 and grads["x"].dtype == grads["tail_weight"].dtype == torch.float32


def test_strided_tensors():
    t = tensors(VILT, BF16, (4, 6))
    t["x"], t["f"] = (t[k].detach()[:, ::2].requires_grad_() for k in "xf")
    t["w_down"] = t["w_down"].detach().t().contiguous().t().requires_grad_()
    agree(fused_site, eager_site, t, VILT, BF16)
    agree(fused_adapter, eager_adapter, without_tail(t), VILT, BF16)


def test_a_backward_under_autocast():
    """The sums over the rows are float32 then, too."""
    t = tensors(VILT, BF16)
    cotangents = [torch.randn(t["x"].shape) for _ in range(2)]
    want = run(fused_site, t, VILT, BF16, cotangents)[1]
    with torch.autocast(DEVICE, BF16):
        got = torch.autograd.grad(fused_site(t, VILT), list(t.values()), cotangents)
    for name, g in zip(t, got, strict=True):
        torch.testing.assert_close(g, want[name], rtol=0, atol=0)


def test_frozen_weights_are_cast_once(monkeypatch):
    t = {k: torch.nn.Parameter(v.detach(), k in ("x", "f")) for k, v in tensors(VILT, BF16).items()}
    seen, cast = [], torch.Tensor.to
    with torch.autocast(DEVICE, BF16):
        fused_site(t, VILT)
        monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: seen.append(a) or cast(t, *a, **k))
        fused_site(t, VILT)
    assert not [a for a in seen if a[:1] == (BF16,)]


def test_what_the_kernels_do_not_take(monkeypatch):
    """Other backends, other dtypes, wrong arguments: as without these kernels."""
    t = tensors(VILT, BF16)
    with torch.autocast(DEVICE, BF16):
        assert _mixed.serves("site", t["x"], "triton") == BF16
        for x, backend in ((t["x"], "cpp"), (t["x"], "reference"), (t["x"].double(), "triton")):
            assert _mixed.serves("site", x, backend) is None
        if DEVICE == "cpu":
            assert _mixed.serves("site", t["x"], "auto") is None
        monkeypatch.setenv("FASTPETL_BACKEND", "triton")
        assert _mixed.serves("site", t["x"], "auto") == BF16
        with pytest.raises(ValueError, match=r"w_up has shape \(72, 19\)"):
            fused_site(t | {"w_up": t["w_up"][:, :19]}, VILT)
        with pytest.raises(ValueError, match="f has shape"):
            fused_norm(t | {"f": t["f"][:1]}, VILT)
        with pytest.raises(ValueError, match="w_down has dtype float64"):
            fused_adapter(t | {"w_down": t["w_down"].double()}, VILT)
        with pytest.raises(ValueError, match="residuals has 3 tensors"):
            fused_adapter(t, VILT, residuals=("f", "f", "f"))
    assert _mixed.serves("site", t["x"], "triton") is None  # autocast is over
