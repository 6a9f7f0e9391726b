"""fastpetl.ops.attention: every backend against float64."""

import pytest
import torch
import torch.nn.functional as F

from fastpetl import backends, ops
from fastpetl.ops import _attention
from ops.op_cases import ATTENTION_BACKENDS, assert_two_times, using

# batch, tokens, heads, head size, mask
SHAPES = [
    (2, 199, 12, 64, True),
    (1, 1, 4, 8, False),
    (3, 29, 4, 8, True),
    (2, 33, 2, 40, False),
    (1, 70, 1, 128, True),
]


def arguments(b, t, h, d, mask, dtype=torch.float32):
    qkv = torch.randn(b, t, 3 * h * d).to(dtype).requires_grad_()
    if not mask:
        return qkv, None
    drop = torch.rand(b, t) < 0.3
    drop[:, 0] = False
    return qkv, torch.zeros(b, t).masked_fill(drop, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("label", ATTENTION_BACKENDS)
def test_against_float64(label, case, dtype):
    case = (case[0], min(case[1], 40), *case[2:]) if label == "cpp-portable" else case
    qkv, mask = arguments(*case, dtype)
    heads = case[2]
    cotangent = torch.randn(*case[:2], heads * case[3]).to(dtype)
    with using("attention", label, dtype) as name:
        y = ops.attention(qkv, heads, key_mask=mask, backend=name)
        (dqkv,) = torch.autograd.grad(y, qkv, cotangent)
        with torch.no_grad():
            inference = ops.attention(qkv, heads, key_mask=mask, backend=name)
    a, w = qkv.detach().requires_grad_(), qkv.detach().double().requires_grad_()
    theirs = ops.attention_reference(a, heads, key_mask=mask)
    want = ops.attention_reference(w, heads, key_mask=mask)
    assert_two_times(y, theirs, want, "out")
    assert_two_times(inference, theirs, want, "out without gradient")
    theirs, want = torch.autograd.grad(theirs, a, cotangent)[0], torch.autograd.grad(want, w, cotangent.double())[0]
    assert_two_times(dqkv, theirs, want, "dqkv")


def test_reference_is_torch_attention():
    qkv, mask = arguments(2, 9, 4, 8, True)
    q, k, v = qkv.view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
    for scale in (None, 0.3):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=scale)
        got = ops.attention_reference(qkv, 4, key_mask=mask, scale=scale)
        torch.testing.assert_close(got, want.transpose(1, 2).flatten(2))
        torch.testing.assert_close(ops.attention(qkv, 4, key_mask=mask, scale=scale), got)


def test_reference_gradcheck_and_launchers():
    qkv, mask = arguments(2, 5, 2, 3, True)
    qkv, mask = qkv.detach().double().requires_grad_(), torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def function(qkv, mask):
        return ops.attention_reference(qkv, 2, key_mask=mask)

    assert torch.autograd.gradcheck(function, (qkv, mask))
    assert torch.autograd.gradgradcheck(function, (qkv, mask), fast_mode=True)
    out, lse = _attention.reference_forward(qkv.detach(), mask.detach(), 2, 3**-0.5, True)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(out, function(qkv, mask).detach())
    got = _attention.reference_backward(cotangent, qkv.detach(), mask.detach(), out, lse, 2, 3**-0.5)
    torch.testing.assert_close(got, torch.autograd.grad(function(qkv, mask), qkv, cotangent)[0])


@pytest.mark.parametrize("label", ATTENTION_BACKENDS)
def test_expanded_gradient_strided_input_and_nothing_to_do(label):
    qkv = torch.randn(9, 2, 96).transpose(0, 1).requires_grad_()
    mask = torch.zeros(1, 9).expand(2, 9)
    with using("attention", label) as name:
        y = ops.attention(qkv, 4, key_mask=mask, backend=name)
        want = ops.attention_reference(qkv, 4)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), qkv)[0] for t in (y, want)), rtol=1e-4, atol=1e-5)
        for shape in ((0, 9, 96), (2, 0, 96)):
            empty = torch.zeros(shape, requires_grad=True)
            y = ops.attention(empty, 4, backend=name)
            assert y.shape == (*shape[:2], 32) and torch.autograd.grad(y.sum(), empty)[0].shape == shape


@pytest.mark.parametrize("label", ATTENTION_BACKENDS)
def test_deterministic(label):
    qkv, mask = arguments(2, 70, 4, 64, True)
    with using("attention", label) as name:
        runs = []
        for _ in range(2):
            y = ops.attention(qkv, 4, key_mask=mask, backend=name)
            runs.append((y, *torch.autograd.grad(y.square().sum(), qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", ATTENTION_BACKENDS)
def test_all_keys_masked_is_the_mean(label, dtype):
    """A sample whose keys are all at the lowest fp32 number (Hugging Face's mask) averages its values, in bf16 too; its
    gradient is that of the mean, not, as from a log-sum-exp, that of the sum.
    """
    if label == "torch" and dtype is torch.float16:
        pytest.skip("torch casts the mask to float16, where that number is minus infinity")
    qkv, _ = arguments(2, 9, 2, 8, False, dtype)
    mask = torch.zeros(2, 9)
    mask[1] = torch.finfo(torch.float32).min
    with using("attention", label, dtype) as name:
        y = ops.attention(qkv, 2, key_mask=mask, backend=name)
        (g,) = torch.autograd.grad(y.float().square().sum(), qkv)
    assert torch.isfinite(y).all() and torch.isfinite(g).all()
    torch.testing.assert_close(y[1], qkv[1, :, 32:].mean(0).expand(9, 16), rtol=2e-2, atol=2e-2)
    exact = qkv.detach().double().requires_grad_()
    z = ops.attention_reference(exact, 2, key_mask=mask.double())
    (want,) = torch.autograd.grad(z.square().sum(), exact)
    torch.testing.assert_close(g.double(), want, rtol=5e-2, atol=5e-2 if dtype is not torch.float32 else 1e-5)


def test_autocast():
    qkv, mask = arguments(2, 33, 4, 64, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.attention(qkv, 4, key_mask=mask)
    assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.float().sum(), qkv)[0].dtype == torch.float32


def test_wide_heads_fall_back_and_say_why():
    qkv = torch.randn(1, 5, 3 * 160)
    choice = backends.resolve("attention", "auto", qkv, 160)
    assert choice.name == "reference" and "at most 128 channels, these have 160" in choice.reason
    torch.testing.assert_close(ops.attention(qkv, 1), ops.attention_reference(qkv, 1))
    with pytest.raises(RuntimeError, match="attention: backend is 'cpp', .* at most 128 channels"):
        ops.attention(qkv, 1, backend="cpp")


def test_double_backward_is_refused():
    qkv, _ = arguments(1, 5, 2, 8, False)
    with using("attention", "cpp") as name:
        (g,) = torch.autograd.grad(ops.attention(qkv, 2, backend=name).sum(), qkv, create_graph=True)
        with pytest.raises(RuntimeError, match="attention: .* cannot be differentiated twice"):
            g.sum().backward()


def test_auto_measures_forward_and_training_apart(monkeypatch):
    backends.forget()
    qkv, mask = arguments(2, 33, 4, 8, True)
    want = ops.attention_reference(qkv, 4, key_mask=mask)
    for _ in range(2):
        torch.testing.assert_close(ops.attention(qkv, 4, key_mask=mask), want)
        with torch.no_grad():
            torch.testing.assert_close(ops.attention(qkv, 4, key_mask=mask), want)
    assert sorted(key[0] for key in backends.tuned()) == ["attention", "attention+backward"]
    for found in backends.tuned().values():
        assert found.name in found.milliseconds and "reference" in found.milliseconds and not found.rejected
    monkeypatch.setenv("FASTPETL_TUNE", "0")
    backends.forget()
    torch.testing.assert_close(ops.attention(qkv, 4, key_mask=mask), want)
    assert not backends.tuned()


def test_mask_that_wants_a_gradient():
    qkv, _ = arguments(2, 9, 4, 8, False)
    mask = torch.randn(2, 9, requires_grad=True)
    y = ops.attention(qkv, 4, key_mask=mask)
    (g,) = torch.autograd.grad(y.square().sum(), mask)
    assert g.abs().sum() > 0
    with pytest.raises(ValueError, match="attention: key_mask requires grad, expected a constant: backend 'torch'"):
        ops.attention(qkv, 4, key_mask=mask, backend="torch")
