"""adapter_residual_norm: the papers' sites against their formulas, every backend against float64, skipped samples."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpetl import ops
from fastpetl.spec import AdapterSpec
from ops.op_cases import _cpu_isas, assert_two_times, using

BACKENDS = ["reference", *_cpu_isas(), "triton", "cuda"]
VILT = AdapterSpec(64, 24, tail="layernorm", tail_eps=1e-6, emit="both")
METER = AdapterSpec(64, 24, tail="layernorm", tail_eps=1e-12, emit="norm")
METER_FFN = replace(METER, placement="after")
VLBART = AdapterSpec(64, 24, "gelu_tanh", norm=False, norm_bias=False, input="sublayer", tail="layernorm", emit="norm")
VLT5 = replace(VLBART, tail="rmsnorm", tail_eps=1e-6, emit="both")
ADAPTFORMER = replace(VILT, input="normalised", scale=0.1)
AFTER_OWN = replace(METER, input="normalised", placement="after", norm=False, norm_bias=False)
SITES = {
    "vilt": VILT,
    "meter": METER,
    "meter_ffn": METER_FFN,
    "vlbart": VLBART,
    "vlt5": VLT5,
    "adaptformer": ADAPTFORMER,
    "after_own": AFTER_OWN,
}


def draw(*size, dtype=torch.float32, scale=1.0, offset=0.0):
    return (offset + scale * torch.randn(*size)).to(dtype).requires_grad_()


def weights(d, r, norm=True, dtype=torch.float32):
    own = (draw(d, scale=0.2, offset=1.0, dtype=dtype), draw(d, scale=0.2, dtype=dtype)) if norm else (None, None)
    return (draw(r, d, scale=d**-0.5, dtype=dtype), draw(r, scale=0.1, dtype=dtype),
            draw(d, r, scale=r**-0.5, dtype=dtype), draw(d, scale=0.1, dtype=dtype), *own)  # fmt: skip


def site(spec, shape=(3, 5), dtype=torch.float32, shortcut=0):
    """(positional tensors, keyword tensors, shortcut) of one site."""
    d, r = spec.hidden, spec.bottleneck
    x, f = draw(*shape, d, dtype=dtype, offset=0.3), draw(*shape, d, dtype=dtype)
    *mine, gamma, beta = weights(d, r, spec.norm, dtype)
    named = {"norm_weight": gamma, "norm_bias": beta}
    if spec.tail:
        named["tail_weight"] = draw(d, dtype=dtype, scale=0.2, offset=1.0)
    if spec.tail == "layernorm":
        named["tail_bias"] = draw(d, dtype=dtype, scale=0.2)
    if spec.input == "normalised" and spec.placement == "inside":
        named["normed"] = draw(*shape, d, dtype=dtype)
    return (x, f, *mine), named, weights(d, shortcut, dtype=dtype) if shortcut else None


def results(function, tensors, named, shortcut, **options):
    out = function(*tensors, **named, shortcut=shortcut, **options)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [t for t in (*tensors, *named.values(), *(shortcut or ())) if t is not None]
    torch.manual_seed(5)
    grads = [torch.randn(o.shape).to(o.dtype) for o in out]
    found = torch.autograd.grad(out, wanted, grads, allow_unused=True)
    return [o.detach() for o in out] + [
        torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)
    ]


def doubled(tensors, named, shortcut):
    def wide(t):
        return None if t is None else t.detach().double().requires_grad_()

    return tuple(map(wide, tensors)), {k: wide(t) for k, t in named.items()}, shortcut and tuple(map(wide, shortcut))


def compare(backend, made, spec, dtype=torch.float32, **options):
    want = results(ops.adapter_residual_norm_reference, *doubled(*made), spec=spec, **options)
    theirs = results(ops.adapter_residual_norm_reference, *made, spec=spec, **options)
    with using("adapter", backend, dtype) as name:
        ours = results(ops.adapter_residual_norm, *made, spec=spec, backend=name, **options)
    for i, (o, t, w) in enumerate(zip(ours, theirs, want, strict=True)):
        assert_two_times(o, t, w, f"result {i}")


# --- the papers' formulas, written down once more ---------------------------------------------------------------------


def bottleneck(u, w_down, b_down, w_up, b_up, gamma=None, beta=None, act=F.relu):
    h = u if gamma is None else F.layer_norm(u, u.shape[-1:], gamma, beta, 1e-5)
    return act(h @ w_down.T + b_down) @ w_up.T + b_up


def test_vilt_site():
    """das.md 1.3: x + f + A(x) with A's own LayerNorm (1e-5), then the next sublayer's norm (1e-6)."""
    (x, f, *w), n, _ = site(VILT)
    y = x + f + bottleneck(x, *w, n["norm_weight"], n["norm_bias"])
    got = ops.adapter_residual_norm(x, f, *w, spec=VILT, **n)
    torch.testing.assert_close(got[0], y)
    torch.testing.assert_close(got[1], F.layer_norm(y, (64,), n["tail_weight"], n["tail_bias"], 1e-6))


def test_meter_sites():
    """das.md 1.4: a = LN(dense + h + A(h)) for attention; o = LN3(W2 gelu(W1 c) + c) + A(c) for the FFN."""
    (h, dense, *w), n, _ = site(METER)
    a = bottleneck(h, *w, n["norm_weight"], n["norm_bias"])
    tail = (64,), n["tail_weight"], n["tail_bias"], 1e-12
    got = ops.adapter_residual_norm(h, dense, *w, spec=METER, **n)
    torch.testing.assert_close(got, F.layer_norm(dense + h + a, *tail))
    got = ops.adapter_residual_norm(h, dense, *w, spec=METER_FFN, **n)
    torch.testing.assert_close(got, F.layer_norm(dense + h, *tail) + a)


def test_vlbart_and_clip_vil_site():
    """vl_adapter.md 2: LN(h + dropout(a + A(a))), gelu_new, no norm of the adapter's own."""
    (h, a, *w), n, _ = site(VLBART)
    a2 = a + bottleneck(a, *w, act=lambda z: F.gelu(z, approximate="tanh"))
    got = ops.adapter_residual_norm(h, a, *w, spec=VLBART, **n)
    torch.testing.assert_close(got, F.layer_norm(h + a2, (64,), n["tail_weight"], n["tail_bias"], 1e-5))


def test_vlt5_site():
    """vl_adapter.md 2: h + dropout(a + A(a)), then T5's RMSNorm: no mean, no bias."""
    (h, a, *w), n, _ = site(VLT5)
    y = h + a + bottleneck(a, *w, act=lambda z: F.gelu(z, approximate="tanh"))
    s, normed = ops.adapter_residual_norm(h, a, *w, spec=VLT5, **n)
    torch.testing.assert_close(s, y)
    torch.testing.assert_close(normed, y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * n["tail_weight"])


# --- backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SITES)
def test_sites_match_float64(backend, dtype, name):
    compare(backend, site(SITES[name], dtype=dtype), SITES[name], dtype)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("d, r", [(760, 8), (768, 96), (1024, 100), (1128, 192), (768, 288)])
def test_odd_sizes(backend, d, r):
    spec = replace(VILT, hidden=d, bottleneck=r)
    compare(backend, site(spec, (199,)), spec)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("shortcut", [0, 40])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_skipped_samples_and_dropout(backend, name, shortcut, dropout):
    spec = replace(SITES[name], dropout=dropout)
    made = site(spec, (4, 3), shortcut=shortcut)
    options = {"mask": torch.tensor([True, False, False, True]), "seed": torch.tensor([77]) if dropout else None}
    compare(backend, made, spec, **options)


@pytest.mark.parametrize("mask", [[False] * 3, [True] * 3, [True, False, True]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_sample_does_not_depend_on_its_neighbours(backend, mask):
    tensors, named, shortcut = site(VILT, (3, 7), shortcut=40)
    tensors[1].data[torch.tensor(mask)] = float("nan")  # skipped samples' f is not read
    with using("adapter", backend) as name:
        options = {"spec": VILT, **named, "shortcut": shortcut, "backend": name}

        def run(x, f, m):
            return ops.adapter_residual_norm(x, f, *tensors[2:], mask=m, **options)

        s, n = run(tensors[0], tensors[1], torch.tensor(mask))
        for i, skip in enumerate(mask):
            alone = run(tensors[0][i : i + 1], tensors[1][i : i + 1], torch.tensor([skip]))
            torch.testing.assert_close(s[i], alone[0][0], rtol=0, atol=1e-6)
            torch.testing.assert_close(n[i], alone[1][0], rtol=0, atol=1e-5)
    assert s.isfinite().all() and n.isfinite().all()


def test_compiled_with_any_mask():
    torch._dynamo.reset()
    tensors, named, shortcut = site(VILT, (4, 3), shortcut=40)

    @torch.compile(fullgraph=True)
    def block(x, f, mask):
        s, n = ops.adapter_residual_norm(x, f, *tensors[2:], spec=VILT, **named, shortcut=shortcut, mask=mask)
        return (s * n).sum()

    wanted = [*tensors, named["tail_weight"], *shortcut]
    for i, values in enumerate(([1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1])):
        mask = torch.tensor(values).bool()
        ours = torch.autograd.grad(block(*tensors[:2], mask), wanted)
        s, n = ops.adapter_residual_norm_reference(*tensors, spec=VILT, **named, shortcut=shortcut, mask=mask)
        for o, w in zip(ours, torch.autograd.grad((s * n).sum(), wanted), strict=True):
            torch.testing.assert_close(o, w, rtol=2e-4, atol=2e-4)
        if i == 0:
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("way", ["eager", "compiled", "reference"])
def test_nothing_crosses_between_kept_and_skipped_samples(way):
    """A NaN in a sample's x stays out of the weights that the sample does not use, whichever way the mask is served."""
    torch._dynamo.reset()
    tensors, named, shortcut = site(VILT, (3, 5), shortcut=40)
    function = {"reference": ops.adapter_residual_norm_reference}.get(way, ops.adapter_residual_norm)
    function = torch.compile(function, fullgraph=True) if way == "compiled" else function
    for bad, clean in ((0, shortcut[0]), (1, tensors[2])):
        x = tensors[0].detach().clone()
        x[bad] = float("nan")
        mask = torch.tensor([False, True, False])
        s, n = function(x, *tensors[1:], spec=VILT, **named, shortcut=shortcut, mask=mask)
        good = 1 - bad
        (dw,) = torch.autograd.grad(s[good].sum() + n[good].sum(), clean)
        assert dw.isfinite().all() and s[good].isfinite().all()


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_mixes_dtypes(name, masked):
    """A float32 stream beside the bfloat16 output of an autocast sublayer: as autocast torch would, s in float32."""
    spec = SITES[name]
    tensors, named, shortcut = site(spec, (3, 5), shortcut=40)
    x, f, *w = tensors
    mask = torch.tensor([False, True, False]) if masked else None
    want = ops.adapter_residual_norm_reference(x, f, *w, spec=spec, **named, shortcut=shortcut, mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.adapter_residual_norm(x, f.bfloat16(), *w, spec=spec, **named, shortcut=shortcut, mask=mask)
    for g, t in zip(
        got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True
    ):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, t, rtol=0.05, atol=0.08)


def test_gradcheck_of_the_reference():
    spec = AdapterSpec(5, 2, "gelu", tail="layernorm", emit="both", dropout=0.2)
    tensors, named, shortcut = doubled(*site(spec, (3, 2), shortcut=3))
    options = {"mask": torch.tensor([False, True, False]), "seed": torch.tensor([4])}
    names = list(named)

    def function(*t):
        return ops.adapter_residual_norm_reference(
            *t[:6],
            spec=spec,
            **dict(zip(names, t[6 : 6 + len(names)], strict=True)),
            shortcut=t[6 + len(names) :],
            **options,
        )

    assert torch.autograd.gradcheck(function, (*tensors, *named.values(), *shortcut))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    d=st.integers(1, 70),
    r=st.integers(1, 40),
    name=st.sampled_from(sorted(SITES)),
    activation=st.sampled_from(["identity", "relu", "gelu", "gelu_tanh", "silu"]),
    skip=st.lists(st.booleans(), min_size=4, max_size=4),
    shortcut=st.integers(0, 20),
    dropout=st.sampled_from([0.0, 0.5]),
)
def test_any_site(shape, d, r, name, activation, skip, shortcut, dropout):
    spec = replace(SITES[name], hidden=d, bottleneck=r, activation=activation, dropout=dropout, eps=0.1, tail_eps=0.1)
    mask = torch.tensor(skip[: shape[0]]) if any(skip) else None
    options = {"mask": mask, "seed": torch.tensor([1]) if dropout else None}
    made = site(spec, shape, shortcut=shortcut)
    want = results(ops.adapter_residual_norm_reference, *doubled(*made), spec=spec, **options)
    ours = results(ops.adapter_residual_norm, *made, spec=spec, **options)
    for o, w in zip(ours, want, strict=True):  # not the two-times rule: of one element it is a matter of luck
        torch.testing.assert_close(o.double(), w, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "error, change",
    [
        ("spec is a dict, expected an AdapterSpec", {"spec": {}}),
        ("x has 64 channels, expected hidden=32 as in spec", {"spec": replace(VILT, hidden=32)}),
        ("w_down has shape (24, 64), expected bottleneck=8 as in spec", {"spec": replace(VILT, bottleneck=8)}),
        ("b_up is given, expected the contrary as spec says", {"spec": replace(VILT, up_bias=False)}),
        ("norm_weight is None, expected the contrary as spec says", {"norm_weight": None}),
        (
            "f is None with input='sublayer'",
            {"spec": replace(VLBART, norm=True, norm_bias=True, emit="both"), "f": None},
        ),
        ("f has shape (5, 64), expected (3, 5, 64) to match x", {"f": torch.zeros(5, 64)}),
        ("normed is None with input='normalised'", {"spec": replace(VILT, input="normalised")}),
        ("normed is given with input='residual'", {"normed": torch.zeros(3, 5, 64)}),
        ("tail_weight and tail_bias do not fit tail='rmsnorm'", {"spec": replace(VILT, tail="rmsnorm")}),
        ("shortcut is list, expected a tuple (w_down, b_down", {"shortcut": []}),
        ("mask is float32 (3,) on cpu, expected bool (batch=3,)", {"mask": torch.zeros(3)}),
        ("seed is a NoneType, expected an int64 tensor", {"spec": replace(VILT, dropout=0.1)}),
    ],
)
def test_errors(error, change):
    (x, f, *w), named, _ = site(VILT)
    options = {"spec": VILT, "f": f, **named} | change
    with pytest.raises((ValueError, TypeError)) as caught:
        ops.adapter_residual_norm(x, options.pop("f"), *w, **options)
    assert str(caught.value).startswith("adapter_residual_norm: ") and error in str(caught.value)


@pytest.mark.parametrize(
    "error, change",
    [
        ("input is 'both', expected one of residual, sublayer, normalised", {"input": "both"}),
        ("placement is 'outside', expected one of inside, after", {"placement": "outside"}),
        ("tail is 'norm', expected one of None, layernorm, rmsnorm", {"tail": "norm"}),
        ("emit is 'both' with tail=None, expected 'sum'", {"tail": None}),
        ("dropout is -0.1, expected a number in [0, 1)", {"dropout": -0.1}),
        ("tail_eps is 'x', expected a number", {"tail_eps": "x"}),
        ("tail_eps is -1, expected a number of at least 0", {"tail_eps": -1}),
        (
            "placement is 'after' with tail='layernorm' and input='sublayer'",
            {"placement": "after", "input": "sublayer"},
        ),
    ],
)
def test_spec_errors(error, change):
    with pytest.raises(ValueError) as caught:
        replace(VILT, **change)
    assert str(caught.value).startswith("AdapterSpec: ") and error in str(caught.value)
