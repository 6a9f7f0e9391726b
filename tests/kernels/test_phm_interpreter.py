"""The Triton PHM weights in Triton's interpreter; every size against float64 stands in tests/ops/test_phm.py."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the triton package")

from fastpetl.kernels import launching, phm  # noqa: E402
from fastpetl.ops import _phm as torch_says  # noqa: E402
from ops.op_cases import assert_two_times  # noqa: E402

if launching.INTERPRETED:
    import interp_patch  # noqa: F401  (bf16 in the interpreter)

DEVICE = "cuda" if torch.cuda.is_available() and not launching.INTERPRETED else "cpu"
CALLS = [(2, 33, 7), (2, 65, 40), (2, 1, 5)]


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills what torch.empty returns with NaN: an element that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(calls, shared, dtype):
    rules = [torch.randn(n, n, n).to(DEVICE, dtype) for n, *_ in calls]
    return rules[:1] if shared else rules, [torch.randn(s).to(DEVICE, dtype) for s in calls]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shared", (True, pytest.param(False, marks=pytest.mark.slow)))  # ops/test_phm.py: False
def test_launchers_against_float64(shared, dtype):
    rules, weights = draw(CALLS, shared, dtype)
    wide = [t.double() for t in rules], [t.double() for t in weights]
    h = phm.phm_forward(rules, weights)
    assert_two_times(h, torch_says.reference_forward(rules, weights), torch_says.reference_forward(*wide), "H")
    grad = torch.randn_like(h)
    got = phm.phm_backward(grad, rules, weights, 3)
    says = torch_says.reference_backward(grad, rules, weights, 3)
    for g, t, w in zip(got, says, torch_says.reference_backward(grad.double(), *wide, 3), strict=True):
        assert_two_times(g, t, w, "gradients")
    for needs in (0, 1, 2):  # the same bits, whatever else is asked for
        for i, (g, again) in enumerate(zip(got, phm.phm_backward(grad, rules, weights, needs), strict=True)):
            assert torch.equal(g, again) if needs >> i & 1 else again.numel() == 0


def test_sums_longer_than_a_step(monkeypatch):
    monkeypatch.setattr(phm, "TILE", (16, 16, 4))
    monkeypatch.setattr(phm, "SUM_TILE", (2, 16))
    rules, weights = draw([(3, 40, 50), (3, 20, 17)], True, torch.float32)
    grad = torch.randn_like(phm.phm_forward(rules, weights))
    args = grad, rules, weights, 3
    for g, t in zip(phm.phm_backward(*args), torch_says.reference_backward(*args), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-4)


def test_tensors_that_move_are_found_again():
    """The table knows addresses: other tensors of the same shapes make other H; old tables go."""
    for _ in range(phm._MOST + 3):
        rules, weights = draw([(2, 3, 5)], False, torch.float32)
        torch.testing.assert_close(phm.phm_forward(rules, weights), torch_says.reference_forward(rules, weights))
    assert len(phm._TABLES) <= phm._MOST


def test_guards_around_the_tensors():
    whole = torch.full((2 * 3 * 5 + 64,), float("nan"), device=DEVICE)
    weight = whole[32:62].view(2, 3, 5).copy_(torch.randn(2, 3, 5))
    rule = torch.randn(2, 2, 2, device=DEVICE)
    assert phm.phm_forward([rule], [weight]).isfinite().all()
    assert whole[:32].isnan().all() and whole[62:].isnan().all()


def test_bad_arguments():
    rules, weights = draw([(2, 3, 5)], False, torch.float32)
    for message, args in {
        r"phm_forward: weights\[0\] has dtype torch.float64": (rules, [weights[0].double()]),
        r"rules has 2 entries, expected 1 or 1": (rules * 2, weights),
        r"weights\[0\] has shape \(3, 5\), expected \(n, in / n, out / n\)": (rules, [weights[0][0]]),
        r"rules\[0\] has shape \(3, 3, 3\), expected \(2, 2, 2\)": ([torch.ones(3, 3, 3, device=DEVICE)], weights),
        r"weights\[0\] has strides": (rules, [weights[0].transpose(1, 2)]),
    }.items():
        with pytest.raises(ValueError, match=message):
            phm.phm_forward(*args)
    with pytest.raises(ValueError, match=r"phm_backward: grad has shape \(7,\), expected \(60,\)"):
        phm.phm_backward(torch.ones(7, device=DEVICE), rules, weights, 3)
