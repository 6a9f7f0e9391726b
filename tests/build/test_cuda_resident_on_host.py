"""The forward with resident rows (csrc/cuda/resident_forward.cu), run on the CPU by cuda_host.h, against float64."""

import pytest
import torch

import cuda_kernels as ck
from cuda_formulas import NO_NORM, NO_RES, check, check_forward, check_stats, operands, reference

pytestmark = pytest.mark.skipif(bool(ck.WHY_NOT), reason=ck.WHY_NOT)
HALVES = [torch.bfloat16, torch.float16]
# rows, hidden, bottleneck, operands left out, tail: every number of bottleneck groups, whole and part blocks
SHAPES = [
    (130, 128, 24, (), 1),
    (37, 64, 8, ("b_down", "b_up", "norm_bias", "res2", "tail_bias"), 2),
    (70, 192, 96, (*NO_NORM, *NO_RES), 0),
    (20, 320, 192, NO_NORM, 1),
    (5, 64, 128, (), 0),
    (33, 256, 48, ("res1", "tail_bias"), 2),
]


@pytest.mark.parametrize("warps", [-4, -8])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows, d, r, drop, tail", SHAPES)
def test_matches_torch(kernels, dtype, rows, d, r, drop, tail, warps):
    check_forward(kernels, rows, d, r, dtype, drop, tail, warps)


@pytest.mark.parametrize("activation", range(5))
def test_activations_and_nothing_saved(kernels, activation):
    t = operands(18, 64, 40, torch.float16, ("res2",))
    options = dict(activation=activation, add_x=False)
    got = ck.site_forward(kernels, t, save=False, warps_m=-4, **options)
    check(got["s"], reference(t, **options)["s"], reference(t, **options, dtype=torch.float16)["s"])


def test_only_the_norm_is_emitted(kernels):
    t = operands(19, 128, 24, torch.bfloat16)
    both = ck.site_forward(kernels, t, tail=1, warps_m=-4)
    alone = ck.site_forward(kernels, t, tail=1, warps_m=-4, emit=2, save=False)
    assert alone.keys() == {"n"} and torch.equal(alone["n"], both["n"])


@pytest.mark.parametrize("offset, column", [(300.0, 0.0), (0.0, 2000.0)])
def test_neither_a_large_mean_nor_a_large_column_eats_the_variance(kernels, offset, column):
    """The column lies in the part of the row whose mean the sums are moved by."""
    t = operands(17, 256, 16, torch.float16, NO_RES, offset=offset)
    t["x"][:, 3] += column
    got = ck.site_forward(kernels, t, tail=1, warps_m=-4)
    check_stats(got["stats"], t["x"], 1e-5)
    check_stats(got["tail_stats"], got["s"], 1e-6)
    exact, torchs = reference(t, tail=1), reference(t, tail=1, dtype=torch.float16)
    check(got["z"], exact["z"], torchs["z"])
    check(got["n"], exact["n"], torchs["n"])


@pytest.mark.parametrize("tail", [1, 2])
def test_infinite_and_nan_stay_in_their_rows(kernels, tail):
    t = operands(20, 64, 16, torch.bfloat16, ("tail_bias",))
    clean = ck.site_forward(kernels, t, tail=tail, warps_m=-4)
    t["x"][3, 5], t["x"][18, 60] = float("inf"), float("nan")
    t["res1"][7, 2] = float("nan")  # of the sum alone: all of n, but one column of s
    got = ck.site_forward(kernels, t, tail=tail, warps_m=-4)
    bad = torch.tensor([i in (3, 7, 18) for i in range(20)])
    assert got["s"][3].isnan().all() and got["s"][18].isnan().all() and got["s"][7].isnan().sum() == 1
    assert got["n"][bad].isnan().all()
    assert torch.equal(got["s"][~bad], clean["s"][~bad]) and torch.equal(got["n"][~bad], clean["n"][~bad])


def test_thread_order_does_not_matter(kernels, monkeypatch):
    t = operands(18, 128, 96, torch.bfloat16)
    forward = ck.site_forward(kernels, t, tail=1, warps_m=-4)
    monkeypatch.setenv("CUDA_HOST_REVERSE", "1")
    for name, again in ck.site_forward(kernels, t, tail=1, warps_m=-4).items():
        assert torch.equal(forward[name], again), name


@pytest.mark.parametrize("d, r, dtype", [(96, 24, torch.bfloat16), (64, 12, torch.bfloat16), (64, 200, torch.float16)])
def test_what_it_does_not_serve_is_the_other_kernels(kernels, d, r, dtype):
    """A width that is no multiple of 64, a bottleneck that is none of 8 or above 192."""
    t = operands(5, d, r, dtype)
    asked, other = (ck.site_forward(kernels, t, tail=1, warps_m=w) for w in (-4, 1))
    assert all(torch.equal(asked[name], other[name]) for name in other)
