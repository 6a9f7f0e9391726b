"""The raw C++ ops cpu_site_forward and cpu_site_backward: an adapter and the norm behind it in one pass each way."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from ops.op_cases import assert_two_times, needs_cpp

ops = torch.ops.fastpetl
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUT = ("s", "n", "z", "stats", "tail_stats")
GRADS = ("x", "w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias", "tail_weight", "tail_bias")
LAYERNORM, RMSNORM, EPS, TAIL_EPS = 1, 2, 1e-5, 1e-6
ACT = [lambda z: z, F.relu, F.gelu, lambda z: F.gelu(z, approximate="tanh"), F.silu]
pytestmark = needs_cpp


@dataclass
class Form:
    """What the sites differ in; `residuals` besides x."""

    norm: bool
    add_x: bool
    residuals: int
    tail: int = LAYERNORM
    act: int = 1
    scale: float = 1.0
    bias: bool = True


FORMS = {
    "vilt": Form(True, True, 1),
    "meter": Form(True, True, 1, act=2),
    "vlbart": Form(False, True, 1, act=3),
    "vlt5": Form(False, True, 1, RMSNORM, act=3),
    "adaptformer": Form(True, False, 2, act=1, scale=0.1),
    "bare": Form(True, False, 0, RMSNORM, act=4, bias=False),
    "linear": Form(False, False, 1, act=0, scale=-2.0, bias=False),
}
SIZES = [(199, 768, 96), (1, 760, 8), (199, 1128, 100), (33, 1024, 48), (17, 760, 100), (199, 1024, 8), (5, 24, 3)]


def arguments(form, rows, d, r, dtype, seed=3):
    """The tensors of one site by name, absent ones None."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, offset=0.0, want=True):
        t = offset + scale * torch.randn(*shape, generator=generator)
        return t.to(dtype) if want else None

    return {
        "x": draw(rows, d, scale=1.5, offset=0.3),
        "w_down": draw(r, d, scale=d**-0.5),
        "b_down": draw(r, scale=0.1, want=form.bias),
        "w_up": draw(d, r, scale=r**-0.5),
        "b_up": draw(d, scale=0.1, want=form.bias),
        "norm_weight": draw(d, scale=0.2, offset=1.0, want=form.norm),
        "norm_bias": draw(d, scale=0.2, want=form.norm and form.bias),
        "res1": draw(rows, d, offset=-0.5, want=form.residuals > 0),
        "res2": draw(rows, d, want=form.residuals > 1),
        "tail_weight": draw(d, scale=0.2, offset=1.0),
        "tail_bias": draw(d, scale=0.2, want=form.tail == LAYERNORM and form.bias),
    }


def cotangents(form, rows, d, dtype, both):
    generator = torch.Generator().manual_seed(9)
    g_n, g_s = (torch.randn(rows, d, generator=generator).to(dtype) for _ in range(2))
    return g_s if both else None, g_n


def forward(form, a, emit_s=True, save=True):
    out = ops.cpu_site_forward(*a.values(), form.add_x, EPS, form.act, form.scale, form.tail, TAIL_EPS, emit_s, save)
    return dict(zip(OUT, out, strict=True))


def backward(form, a, out, g_s, g_n, needs=511):
    saved = (out["s"], out["tail_stats"], a["tail_weight"], a["x"], out["z"], out["stats"])
    weights = (a["w_down"], a["w_up"], a["norm_weight"], a["norm_bias"])
    config = (form.add_x, form.act, form.scale, form.tail, needs)
    return dict(zip(("g", *GRADS), ops.cpu_site_backward(g_s, g_n, *saved, *weights, *config), strict=True))


def formula(form, a, g_s, g_n, dtype):
    """The site written down in torch at `dtype`: s, n and, by autograd, the gradients; g is that of s."""
    a = {k: None if t is None else t.to(dtype).requires_grad_() for k, t in a.items()}
    d = a["x"].shape[-1]
    h = F.layer_norm(a["x"], (d,), a["norm_weight"], a["norm_bias"], EPS) if form.norm else a["x"]
    h = ACT[form.act](F.linear(h, a["w_down"], a["b_down"]))
    s = F.linear(h, a["w_up"], a["b_up"]) * form.scale
    for t in (a["x"] if form.add_x else None, a["res1"], a["res2"]):
        s = s if t is None else s + t
    s.retain_grad()
    if form.tail == LAYERNORM:
        n = F.layer_norm(s, (d,), a["tail_weight"], a["tail_bias"], TAIL_EPS)
    else:
        n = F.rms_norm(s, (d,), a["tail_weight"], TAIL_EPS)
    roots, grads = ((n,), (g_n.to(dtype),)) if g_s is None else ((n, s), (g_n.to(dtype), g_s.to(dtype)))
    torch.autograd.backward(roots, grads)
    found = {"s": s.detach(), "n": n.detach(), "g": s.grad}
    return found | {"d" + k: a[k].grad for k in GRADS if a[k] is not None}


def check(form, rows, d, r, dtype, both):
    a, (g_s, g_n) = arguments(form, rows, d, r, dtype), cotangents(form, rows, d, dtype, both)
    out = forward(form, a)
    grads = backward(form, a, out, g_s, g_n)
    want, theirs = (formula(form, a, g_s, g_n, t) for t in (torch.float64, dtype))
    ours = {"s": out["s"], "n": out["n"], "g": grads["g"]} | {"d" + k: grads[k] for k in GRADS}
    for name in want:
        assert_two_times(ours[name], theirs[name], want[name], f"{name} at {rows, d, r}")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_matches_float64(isa, dtype, name):
    """Each case takes two of the sizes in turn; together the forms take all of them."""
    at = list(FORMS).index(name) + list(DTYPES).index(dtype)
    for i in (at, at + 3):
        check(FORMS[name], *SIZES[i % len(SIZES)], DTYPES[dtype], both=i % 2 == 0)


@pytest.mark.parametrize("dtype, rows", [("fp32", 1300), ("bf16", 2500)])
def test_more_rows_than_one_slice(isa, dtype, rows):
    """The backward goes through rows in slices: their sums and products must add up."""
    check(FORMS["vilt"], rows, 1024, 8, DTYPES[dtype], both=True)
    check(FORMS["vlt5"], rows, 1024, 8, DTYPES[dtype], both=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(isa, dtype):
    form = FORMS["vilt"]
    a = arguments(form, 0, 760, 8, DTYPES[dtype])
    out = forward(form, a)
    assert [tuple(t.shape) for t in out.values()] == [(0, 760), (0, 760), (0, 8), (0, 2), (0, 2)]
    grads = backward(form, a, out, None, a["x"])
    assert grads.pop("g").shape == (0, 760)
    for name, g in grads.items():
        assert g.shape == a[name].shape and not g.any(), name


NEEDS = [0, 384, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1 | 128, 4 | 16, 2 | 8 | 256, 1 | 32 | 64, 511]


@pytest.mark.parametrize("name", ["vilt", "vlt5", "linear"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_is_needed(isa, dtype, name):
    """The bits do not depend on what else is asked for; g is always there."""
    form, (rows, d, r) = FORMS[name], (70, 264, 40)
    a, (g_s, g_n) = arguments(form, rows, d, r, DTYPES[dtype]), cotangents(form, rows, d, DTYPES[dtype], True)
    out = forward(form, a)
    everything = backward(form, a, out, g_s, g_n)
    for needs in NEEDS:
        got = backward(form, a, out, g_s, g_n, needs)
        assert torch.equal(got["g"], everything["g"])
        for i, k in enumerate(GRADS):
            if needs >> i & 1 and not (k.startswith("norm") and not form.norm):
                assert torch.equal(got[k], everything[k]), (needs, k)
            else:
                assert got[k].numel() == 0, (needs, k)


def test_only_what_is_wanted_forward(isa):
    form = FORMS["vilt"]
    a = arguments(form, 37, 264, 40, torch.bfloat16)
    full = forward(form, a)
    for emit_s, save in ((True, False), (False, True), (False, False)):
        got = forward(form, a, emit_s, save)
        for k, t in got.items():
            there = k == "n" or (k == "s" and (emit_s or save)) or (k != "s" and save)
            assert torch.equal(t, full[k]) if there else t.numel() == 0, k


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved(isa, dtype):
    """Statistics of x and of s as rounded; z is the pre-activation."""
    form, dtype = FORMS["vilt"], DTYPES[dtype]
    a = arguments(form, 50, 264, 40, dtype)
    out = forward(form, a)
    for stats, t, eps in ((out["stats"], a["x"], EPS), (out["tail_stats"], out["s"], TAIL_EPS)):
        var, mean = torch.var_mean(t.double(), -1, correction=0)
        torch.testing.assert_close(stats.double(), torch.stack([mean, (var + eps).rsqrt()], -1), rtol=1e-5, atol=1e-6)
    rms = forward(FORMS["vlt5"], arguments(FORMS["vlt5"], 50, 264, 40, dtype))
    want = (rms["s"].double().square().mean(-1) + TAIL_EPS).rsqrt()
    torch.testing.assert_close(rms["tail_stats"][:, 1].double(), want, rtol=1e-5, atol=0)
    assert not rms["tail_stats"][:, 0].any() and rms["stats"].numel() == 0
    h = F.layer_norm(a["x"].double(), (264,), a["norm_weight"].double(), a["norm_bias"].double(), EPS)
    z = F.linear(h, a["w_down"].double(), a["b_down"].double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out["z"].double(), z, rtol=8 * eps, atol=32 * eps)


def everything(form, rows, d, r, dtype):
    a, (g_s, g_n) = arguments(form, rows, d, r, dtype), cotangents(form, rows, d, dtype, True)
    out = forward(form, a)
    return {**out, **{"d" + k: t for k, t in backward(form, a, out, g_s, g_n).items()}}


@pytest.mark.parametrize("name, rows, d, r", [("vilt", 600, 264, 40), ("vlt5", 1300, 1024, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads_and_in_every_run(isa, dtype, name, rows, d, r):
    torch.set_num_threads(1)
    expected = everything(FORMS[name], rows, d, r, DTYPES[dtype])
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for k, t in everything(FORMS[name], rows, d, r, DTYPES[dtype]).items():
            assert torch.equal(t, expected[k]), (threads, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_written(isa, dtype):
    """torch fills what it does not initialise with NaN; none may be left."""
    torch.use_deterministic_algorithms(True)
    try:
        results = [everything(FORMS[name], 199, 760, 20, DTYPES[dtype]) for name in ("vilt", "vlt5")]
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results:
        for k, t in result.items():
            assert t.isfinite().all(), k


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "res1", "g_n", "g_s"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_not_finite_spoils_its_row_and_the_sums_alone(isa, dtype, where, bad):
    form, dtype = FORMS["vilt"], DTYPES[dtype]
    a, (g_s, g_n) = arguments(form, 35, 264, 40, dtype), cotangents(form, 35, 264, dtype, True)
    clean = everything(form, 35, 264, 40, dtype)
    (a | {"g_n": g_n, "g_s": g_s})[where][20, 100] = bad
    out = forward(form, a)
    got = out | {"d" + k: t for k, t in backward(form, a, out, g_s, g_n).items()}
    others = torch.arange(35) != 20
    for k in ("s", "n", "z", "dg", "dx"):
        assert torch.equal(got[k][others], clean[k][others]), k
    spoiled = {
        "x": "s n z dg dx dw_down",
        "res1": "s n dg dx dtail_weight",
        "g_n": "dg dx dtail_bias",
        "g_s": "dg dx db_up",
    }
    for k in spoiled[where].split():
        row = got[k] if k.startswith(("dw", "db", "dt")) else got[k][20]
        assert not row.isfinite().all(), k


@pytest.mark.parametrize(
    "error, change",
    [
        ("tail is 0, expected 1", {"tail": 0}),
        ("tail_weight has 3 elements, expected 264", {"tail_weight": torch.ones(3)}),
        ("res1 has another dtype than x", {"res1": torch.ones(4, 264, dtype=torch.float16)}),
        ("x must be float32, bfloat16 or float16", {"x": torch.ones(4, 264, dtype=torch.float64)}),
    ],
)
def test_errors(error, change):
    a = arguments(FORMS["vilt"], 4, 264, 40, torch.float32)
    a |= {k: t for k, t in change.items() if k in a}
    with pytest.raises(RuntimeError, match=error):
        ops.cpu_site_forward(*a.values(), True, EPS, 1, 1.0, change.get("tail", 1), TAIL_EPS, True, True)
