"""fastpetl.ops.cross_attention: keys and values never made, against making them."""

import pytest
import torch

from fastpetl import ops
from ops.op_cases import assert_two_times
from ops.test_kept import kept

B, T, S, H, D, HIDDEN = 3, 4, 40, 4, 16, 64
MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.rand(B, 1, 1, S) > 0.4,
    "of a query": lambda: (torch.rand(B, 1, T, S) > 0.4) & (torch.arange(T) != 1)[:, None],  # query 1 has no key
    "additive": lambda: torch.randn(1, H, T, S),
}


def arguments(bias=True):
    q, source = torch.randn(B, T, H * D), torch.randn(B, S, HIDDEN)
    weights = [torch.randn(H * D, HIDDEN) * HIDDEN**-0.5 for _ in range(2)]
    return [q, source, *weights, torch.randn(H * D) if bias else None]


def results(function, arguments, seed=3, **options):
    """(out, dq, dsource, dw_v and, with a bias, db_v)."""
    leaves = [t if t is None else t.clone() for t in arguments]
    wanted = [t.requires_grad_() for i, t in enumerate(leaves) if i != 2 and t is not None]
    torch.manual_seed(seed)
    out = function(*leaves, heads=H, **options)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).sin()
    return out.detach(), *torch.autograd.grad(out, wanted, cotangent)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_against_float64(mask, bias):
    given, mask = arguments(bias), MASKS[mask]()
    wide = [t if t is None else t.double() for t in given]
    for scale in (None, 0.7):
        truth = results(ops.cross_attention_reference, wide, mask=_double(mask), scale=scale)
        theirs = results(ops.cross_attention_reference, given, mask=mask, scale=scale)
        ours = results(ops.cross_attention, given, mask=mask, scale=scale)
        for name, *three in zip(
            ("out", "dq", "dsource", "dw_v", "db_v")[: len(ours)], ours, theirs, truth, strict=True
        ):
            assert_two_times(*three, name)
        with torch.no_grad():
            assert torch.equal(ops.cross_attention(*given, heads=H, mask=mask, scale=scale), ours[0])


def _double(mask):
    return mask if mask is None or mask.dtype == torch.bool else mask.double()


@pytest.mark.parametrize("bias", [True, False])
def test_dropout_draws_as_sdpa_does(bias):
    given = arguments(bias)
    options = {"mask": MASKS["bool"](), "dropout": 0.3}
    for got, want in zip(
        results(ops.cross_attention, given, **options),
        results(ops.cross_attention_reference, given, **options),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_keeps_no_keys_and_values():
    given = arguments()
    leaves = [t.requires_grad_(i < 2) for i, t in enumerate(given)]
    _, size = kept(lambda: ops.cross_attention(*leaves, heads=H), *leaves)
    assert size == 4 * B * T * H * S  # the probabilities


def test_only_asked_for_gradients():
    given = arguments()
    for i in (0, 1, 3, 4):
        call = [t.clone().requires_grad_() if i == j else t for j, t in enumerate(given)]
        got = torch.autograd.grad(ops.cross_attention(*call, heads=H).square().sum(), call[i])[0]
        want = torch.autograd.grad(ops.cross_attention_reference(*call, heads=H).square().sum(), call[i])[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["w_k", "mask"])
def test_what_is_trained_gets_its_gradient_from_the_reference(which):
    q, source, w_k, w_v, b_v = arguments()
    named = {"w_k": w_k, "w_v": w_v, "b_v": b_v, "mask": torch.randn(1, H, T, S)}
    named[which].requires_grad_()
    y = ops.cross_attention(q, source, **named, heads=H)
    want = ops.cross_attention_reference(q, source, **named, heads=H)
    assert torch.equal(*(torch.autograd.grad(t.sum(), named[which])[0] for t in (y, want)))


def test_a_bias_of_the_keys_changes_nothing():
    *given, b_v = arguments()
    b_k, mask = torch.randn(H * D).requires_grad_(), MASKS["of a query"]()
    y = ops.cross_attention(*given, b_v, heads=H, b_k=b_k, mask=mask)
    assert torch.equal(y, ops.cross_attention(*given, b_v, heads=H, mask=mask))
    torch.testing.assert_close(y, ops.cross_attention_reference(*given, b_v, heads=H, b_k=b_k, mask=mask))
    assert torch.equal(torch.autograd.grad(y.square().sum(), b_k)[0], torch.zeros(H * D))


def test_reference_gradcheck():
    leaves = [t.double().requires_grad_() for t in (torch.randn(2, 2, 4), torch.randn(2, 3, 5))]
    leaves += [torch.randn(4, 5, dtype=torch.double, requires_grad=True) for _ in range(2)]
    leaves.append(torch.randn(4, dtype=torch.double, requires_grad=True))
    assert torch.autograd.gradcheck(lambda *t: ops.cross_attention_reference(*t, heads=2), leaves)


def test_not_differentiable_twice():
    given = [t.requires_grad_(i < 2) for i, t in enumerate(arguments())]
    (g,) = torch.autograd.grad(ops.cross_attention(*given, heads=H).sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cross_attention: .* cannot be differentiated twice"):
        g.sum().backward()


def test_when_it_saves():
    assert ops.cross_attention_saves(5, 56, 768, 12)  # an answer over text and image
    assert not ops.cross_attention_saves(40, 577, 768, 12)  # METER's text over its image
    assert not ops.cross_attention_saves(20, 56, 768, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads is 0, expected an integer of at least 1"),
        ({"heads": 7}, r"q has shape \(3, 4, 64\), expected \(batch, queries, 7 heads \* head size\)"),
        ({"source": torch.zeros(2, S, HIDDEN)}, r"source has shape .*, expected \(batch=3, keys, hidden\) to match q"),
        ({"w_v": torch.zeros(3, HIDDEN)}, r"w_v has shape \(3, 64\), expected \(64, 64\) to match q and source"),
        ({"b_v": torch.zeros(3)}, r"b_v has shape \(3,\), expected \(64,\) to match q"),
        ({"mask": torch.zeros(B, S)}, r"mask has shape \(3, 40\), expected one broadcast to \(3, 4, 4, 40\) \(B, H"),
        (
            {"mask": torch.zeros(2, 1, T, S)},
            r"mask has shape \(2, 1, 4, 40\), expected one broadcast to \(3, 4, 4, 40\)",
        ),
        (
            {"mask": torch.zeros(B, 1, T, S).long()},
            r"mask has dtype int64, expected bool \(True keeps a key\) or float32",
        ),
        ({"mask": torch.zeros(B, 1, T, S, device="meta")}, "mask is on meta, expected cpu to match q"),
        ({"dropout": 2.0}, "dropout is 2.0, expected a probability"),
        ({"dropout": -0.1}, "dropout is -0.1, expected a probability"),
    ],
)
def test_errors(change, message):
    given = dict(zip(("q", "source", "w_k", "w_v", "b_v"), arguments(), strict=True)) | {"heads": H} | change
    with pytest.raises(ValueError, match=f"cross_attention: {message}"):
        ops.cross_attention(**given)
    with pytest.raises(TypeError, match="cross_attention: mask is a list, expected a torch.Tensor or None"):
        ops.cross_attention(*arguments(), heads=H, mask=[1])
