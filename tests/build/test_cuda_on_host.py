"""The site kernels of csrc/cuda, compiled as C++ and run on the CPU by cuda_host.h, against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F

import cuda_kernels as ck
from cuda_formulas import EPS, NO_NORM, NO_RES, check, check_forward, operands, reference

pytestmark = pytest.mark.skipif(bool(ck.WHY_NOT), reason=ck.WHY_NOT)


# rows, hidden, bottleneck, operands left out, tail: sizes that divide nothing, two chunks of everything, one of all
SHAPES = [
    (17, 96, 24, (), 1),
    (3, 70, 13, ("b_down", "b_up", "norm_bias", "res2", "tail_bias"), 2),
    (2, 40, 300, (*NO_NORM, *NO_RES), 0),  # two bottleneck tiles
    (66, 136, 208, ("tail_bias",), 1),
    (1, 300, 1, NO_NORM, 0),
]


@pytest.mark.parametrize("warps_m", [1, 4])
@pytest.mark.parametrize("dtype", ck.DTYPES, ids=str)
@pytest.mark.parametrize("rows, d, r, drop, tail", SHAPES)
def test_forward_matches_torch(kernels, dtype, rows, d, r, drop, tail, warps_m):
    check_forward(kernels, rows, d, r, dtype, drop, tail, warps_m)


@pytest.mark.parametrize("activation", range(5))
def test_activations_and_nothing_saved(kernels, activation):
    t = operands(2, 32, 16, torch.float32, NO_RES)
    options = dict(activation=activation, add_x=False)
    got = ck.site_forward(kernels, t, save=False, **options)
    check(got["s"], reference(t, **options)["s"], reference(t, **options, dtype=torch.float32)["s"])


@pytest.mark.parametrize("warps_m", [1, 4])
def test_only_the_norm_is_emitted(kernels, warps_m):
    """The sum then passes through the norm's own memory."""
    t = operands(5, 72, 24, torch.float16)
    both = ck.site_forward(kernels, t, tail=1, warps_m=warps_m)
    alone = ck.site_forward(kernels, t, tail=1, warps_m=warps_m, emit=2, save=False)
    assert alone.keys() == {"n"} and torch.equal(alone["n"], both["n"])


def test_fp32_sums_are_short(kernels):
    """One row, whose products torch sums as a tree on a GPU; 760 terms one after the other have an error of 3e-7."""
    t = operands(1, 760, 100, torch.float32, (*NO_NORM, *NO_RES, "b_down"))
    z = ck.site_forward(kernels, t)["z"]
    grad = {k: t[k] for k in ("x", "w_down", "w_up")} | {"z": z, "g_s": torch.randn(1, 760)}
    dz = ck.site_backward(kernels, grad, activation=0)["dz"]
    t |= {"g_s": grad["g_s"]}
    for got, (left, right) in ((z, ("x", "w_down")), (dz, ("g_s", "w_up"))):
        exact = t[left].double() @ (t[right].double().t() if right == "w_down" else t[right].double())
        assert (got - exact).norm() <= 2 * torch.finfo(torch.float32).eps * exact.norm()


def test_a_large_mean_does_not_eat_the_variance(kernels):
    t = operands(4, 64, 16, torch.float32, NO_RES, offset=3e3)
    got = ck.site_forward(kernels, t, tail=1, eps=1e-5)
    exact, torchs = reference(t, tail=1), reference(t, tail=1, dtype=torch.float32)
    check(got["n"], exact["n"], torchs["n"])
    check(got["z"], exact["z"], torchs["z"])


def test_unaligned_operands_are_read_element_by_element(kernels):
    t = operands(4, 64, 16, torch.bfloat16)
    shifted = {}
    for name, v in t.items():
        buffer = torch.empty(v.numel() + 1, dtype=v.dtype)
        shifted[name] = buffer[1:].view(v.shape).copy_(v)
    for a, b in zip(ck.site_forward(kernels, t, tail=1).values(),
                    ck.site_forward(kernels, shifted, tail=1).values(), strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_infinite_and_nan_stay_in_their_rows(kernels):
    t = operands(20, 64, 16, torch.bfloat16)
    clean = ck.site_forward(kernels, t, tail=1)
    t["x"][3, 5], t["x"][18, 60] = float("inf"), float("nan")
    got = ck.site_forward(kernels, t, tail=1)
    bad = torch.tensor([i in (3, 18) for i in range(20)])
    assert got["s"][bad].isnan().all() and torch.equal(got["s"][~bad], clean["s"][~bad])
    assert torch.equal(got["n"][~bad], clean["n"][~bad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_order_does_not_matter(kernels, monkeypatch, dtype):
    """A missing barrier shows as a difference between the two orders, or as the NaN that shared memory starts with."""
    t = operands(18, 136, 208, dtype)
    forward = ck.site_forward(kernels, t, tail=1)
    monkeypatch.setenv("CUDA_HOST_REVERSE", "1")
    for name, again in ck.site_forward(kernels, t, tail=1).items():
        assert torch.equal(forward[name], again), name


def test_refuses_what_does_not_fit(kernels):
    """fp32 rows of the bottleneck beyond shared memory; narrower ones take 16 rows to a block where 64 do not fit."""
    t = operands(1, 8, 4000, torch.float32)
    with pytest.raises(AssertionError, match="CUDA error 9"):  # cudaErrorInvalidConfiguration
        ck.site_forward(kernels, t)
    t = operands(1, 8, 1200, torch.float32)
    with pytest.raises(AssertionError, match="CUDA error 9"):
        ck.site_forward(kernels, t, warps_m=4)
    assert not ck.site_forward(kernels, t)["s"].isnan().any()


# --- backward ---------------------------------------------------------------------------------------------------------


def saved(t, **options):
    """What a perfect forward keeps for the backward, in t's dtype."""
    exact = reference(t, **options)
    kept = {"s": exact["s"], "z": exact["z"], "n": exact.get("n")}
    kept = {name: None if v is None else v.to(t["x"].dtype) for name, v in kept.items()}
    for name, v, eps, rms in (("stats", t["x"], options["eps"], False),
                              ("tail_stats", kept["s"], options["tail_eps"], options["tail"] == 2)):  # fmt: skip
        v = v.double()
        mean = v.mean(1, keepdim=True) * (not rms)
        kept[name] = torch.cat([mean, ((v - mean).square().mean(1, keepdim=True) + eps).rsqrt()], 1).float()
    return kept


def gradients(t, g_s, g_n, dtype, **options):
    """torch's gradients of x, res1 (all of s's), tail_weight, tail_bias, w_down, w_up."""
    leaves = {name: v.to(dtype).requires_grad_() for name, v in t.items()}
    out = reference(leaves, **options, dtype=dtype)
    outs = [(out["s"], g_s)] * (g_s is not None) + [(out.get("n"), g_n)] * (g_n is not None)
    torch.autograd.backward([o for o, _ in outs], [g.to(dtype) for _, g in outs])
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("warps_m", [1, 4])
@pytest.mark.parametrize("dtype", ck.DTYPES, ids=str)
@pytest.mark.parametrize("rows, d, r, drop, tail", SHAPES)
def test_backward_matches_torch(kernels, dtype, rows, d, r, drop, tail, warps_m):
    t = operands(rows, d, r, dtype, [name for name in drop if name != "res1"])
    options = dict(activation=2, scale=0.7, tail=tail, add_x=rows != 3, **EPS)
    g_n = torch.randn(rows, d).to(dtype) if tail else None
    g_s = None if rows == 17 else torch.randn(rows, d).to(dtype)  # with a tail the sum may have no gradient of its own
    kept = saved(t, **options)
    given = {k: t[k] for k in ("x", "w_down", "w_up", "norm_weight", "tail_weight") if k in t}
    given |= {"g_s": g_s, "z": kept["z"], "stats": kept["stats"]}
    if tail:
        given |= {"g_n": g_n, "s": kept["s"], "tail_stats": kept["tail_stats"]}
    got = ck.site_backward(kernels, given, activation=2, scale=0.7, tail=tail, add_x=options["add_x"], warps_m=warps_m)
    exact = gradients(t, g_s, g_n, torch.float64, **options)
    torchs = gradients(t, g_s, g_n, dtype, **options)
    check(got["dx"], exact["x"], torchs["x"])
    if tail:
        check(got["g"], exact["res1"], torchs["res1"])
        weight, bias = got["tail_partial"].sum(0)
        check(weight.to(dtype), exact["tail_weight"], torchs["tail_weight"])
        if "tail_bias" in t:
            check(bias.to(dtype), exact["tail_bias"], torchs["tail_bias"])
    g = got.get("g", g_s).double()
    check((0.7 * g.T @ got["h"].double()).to(dtype), exact["w_up"], torchs["w_up"])
    u = F.layer_norm(t["x"].double(), (d,), *(t.get(k, torch.zeros(d)).double() for k in NO_NORM), 1e-3)
    u = u if "norm_weight" in t else t["x"].double()
    check((got["dz"].double().T @ u).to(dtype), exact["w_down"], torchs["w_down"])


@pytest.mark.parametrize("activation", range(5))
def test_backward_activations_and_only_what_is_wanted(kernels, activation):
    t = operands(2, 32, 16, torch.float32, NO_RES)
    options = dict(activation=activation, add_x=False, tail=0, **EPS)
    kept, g = saved(t, **options), torch.randn(2, 32)
    given = {k: t[k] for k in ("x", "w_down", "w_up", "norm_weight")} | {
        "g_s": g,
        "z": kept["z"],
        "stats": kept["stats"],
    }
    got = ck.site_backward(kernels, given, activation=activation, add_x=False, want=1)
    exact, torchs = (gradients(t, g, None, dtype, **options) for dtype in (torch.float64, torch.float32))
    check(got["dx"], exact["x"], torchs["x"])
    alone = ck.site_backward(kernels, given, activation=activation, add_x=False, want=0)
    assert alone.keys() == {"dz"} and torch.equal(alone["dz"], got["dz"])


def test_backward_thread_order_does_not_matter(kernels, monkeypatch):
    t = operands(18, 136, 208, torch.bfloat16)
    kept = saved(t, activation=1, tail=1, **EPS)
    given = {k: t[k] for k in ("x", "w_down", "w_up", "norm_weight", "tail_weight")}
    given |= {k: kept[k] for k in ("s", "z", "stats", "tail_stats")}
    given |= {"g_n": torch.randn(18, 136).bfloat16(), "g_s": torch.randn(18, 136).bfloat16()}
    forward = ck.site_backward(kernels, given, tail=1)
    monkeypatch.setenv("CUDA_HOST_REVERSE", "1")
    for name, again in ck.site_backward(kernels, given, tail=1).items():
        assert torch.equal(forward[name], again), name
