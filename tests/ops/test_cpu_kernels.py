"""What csrc/cpu promises beyond the two-times rule: GELU's accuracy everywhere, and the same bits for any number of
threads.
"""

import pytest
import torch

from fastpetl import ops as functional
from ops.op_cases import needs_cpp

ops = torch.ops.fastpetl
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = needs_cpp


def test_gelu_and_its_gradient_over_the_whole_line(isa):
    """An identity as weight leaves GELU alone: its products are exact on every engine."""
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 32)).view(-1, 32)
    eye = torch.eye(32)
    y, stats = ops.cpu_linear_forward(x, [eye], [], 2, None, None, 0.0, None)
    dx = ops.cpu_linear_backward(torch.ones_like(x), x, stats, [eye], 2, None, None)
    exact = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    expected.sum().backward()
    scale = x.double().abs().clamp(min=1)
    assert ((y.double() - expected).abs() / scale).max() < 3e-7  # 2.2e-7 where there is no FMA
    assert ((dx.double() - exact.grad).abs() / scale).max() < 6e-7


def _everything(dtype):
    """Results of all kernels on sizes that are split among threads."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    rows, d, r = 600, 264, 40
    x, g, wd, wu = draw(rows, d), draw(rows, d), draw(r, d, scale=0.06), draw(d, r, scale=0.15)
    gamma, beta, bd, bu = draw(d), draw(d), draw(r), draw(d)
    y, z, stats = ops.cpu_adapter_forward(x, wd, bd, wu, bu, gamma, beta, g, None, True, 1e-5, 2, 0.7, True)
    grads = ops.cpu_adapter_backward(g, x, z, stats, wd, wu, gamma, beta, True, 2, 0.7, 127)
    w = draw(300, d, scale=0.06)
    h, lstats = ops.cpu_linear_forward(x, [w], [], 1, gamma, beta, 1e-5, None)
    dh = ops.cpu_linear_backward(h, x, lstats, [w], 1, gamma, None)
    qkv = draw(3, 130, 3 * 4 * 32)
    out, lse = ops.cpu_attention_forward(qkv, None, 4, 0.2, True)
    dqkv = ops.cpu_attention_backward(out, qkv, None, out, lse, 4, 0.2)
    dqkv = [dqkv, ops.cpu_attention_backward(out, qkv, None, None, lse, 4, 0.2)]
    coded = [*ops.cpu_activation_forward(x, 1, False)]
    coded.append(ops.cpu_activation_backward(g, coded[1], 1, 1.25))
    if dtype == torch.float32:
        wide = [*ops.cpu_activation_forward(x[:, :256].contiguous(), 2, False)]
        wide += ops.cpu_linear_forward_coded(x[:, :256].contiguous(), [w[:, :256].contiguous()], [])
        coded += [*wide, ops.cpu_linear_backward_coded(h, wide[1], [w[:, :256].contiguous()])]
    mask, seed = torch.arange(600) % 3 == 0, torch.tensor(11)
    norm = []
    for tail in (1, 2):
        s, n, rstats = ops.cpu_residual_norm_forward(x, g, gamma, None, mask, seed, tail, 3, 1e-5, 0.25, True)
        norm += [s, n, rstats, *ops.cpu_residual_norm_backward(g, n, s, rstats, gamma, mask, seed, tail, 0.25, 15)]
    rule, ws = draw(4, 4, 4), [draw(4, 48, 70), draw(4, 19, 200)]
    hs = ops.cpu_phm_forward([rule], ws)
    phm = [hs, *ops.cpu_phm_backward(hs, [rule], ws, 3)]
    return [y, z, stats, *grads, h, lstats, dh, out, lse, *dqkv, *coded, *norm, *phm]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads_and_in_every_run(isa, dtype):
    torch.set_num_threads(1)
    expected = _everything(dtype)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for i, (a, b) in enumerate(zip(_everything(dtype), expected, strict=True)):
            assert torch.equal(a, b), (threads, i)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_written(isa, dtype):
    """torch fills what it does not initialise with NaN; none may be left."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = _everything(dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    for i, result in enumerate(results):
        assert result.isfinite().all(), i


FAR = 2**31 + 3  # elements: an offset that no int holds, in storage of which only the touched pages exist


@pytest.fixture(scope="module")
def far():
    return torch.empty(2 * FAR + 2**20, dtype=torch.bfloat16)


def _apart(far, like, offset, whole):
    """`like`'s values in two halves FAR elements apart (whole: all of them behind FAR)."""
    stride = like.stride()[0] if whole else FAR
    view = far.as_strided(like.shape, (stride, *like.stride()[1:]), offset + (FAR if whole else 0))
    view.copy_(like.detach())
    return view.requires_grad_()


@pytest.mark.parametrize("whole", [True, False], ids=["behind", "across"])
def test_tensors_beyond_two_to_the_31_elements(far, whole):
    """Arguments and incoming gradients that lie far apart give the bits that small tensors give."""
    d, r = 40, 8
    x, g = torch.randn(2, 5, d).bfloat16(), torch.randn(2, 5, d).bfloat16()
    wd, wu, gamma = torch.randn(r, d).bfloat16(), torch.randn(d, r).bfloat16(), torch.randn(d).bfloat16()
    qkv, square = torch.randn(2, 5, 3 * d).bfloat16(), torch.randn(d, d).bfloat16()
    calls = {
        "adapter": lambda x, f: functional.adapter(
            x, wd, None, wu, None, norm_weight=gamma, residuals=(x, f), backend="cpp"
        ),
        "linear": lambda x, f: functional.linear(x, square, norm=(gamma, gamma, 1e-5), backend="cpp") + f,
        "residual_norm": lambda x, f: functional.residual_norm(x, f, weight=gamma, backend="cpp"),
        "attention": lambda x, f: functional.attention(x, 2, backend="cpp"),
    }
    for name, call in calls.items():
        first = qkv if name == "attention" else x
        results = []
        for place in (lambda t, at: t.clone().requires_grad_(), lambda t, at: _apart(far, t, at, whole)):
            a, f, cotangent = place(first, 0), place(x, 10_000), place(g, 20_000).detach()
            y = call(a, f)
            y = y[0] if isinstance(y, tuple) else y
            grads = torch.autograd.grad(y, [a, f], cotangent, allow_unused=name == "attention")
            results.append([y.detach(), *(t for t in grads if t is not None)])
        for i, (small, large) in enumerate(zip(*results, strict=True)):
            assert torch.equal(small, large), (name, i)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_row_stays_alone(isa, dtype):
    """At r = 48 the dot-product engine reads 64 of the bottleneck's row: what lies there must not be another row's."""
    x, wd, wu = (torch.randn(shape).to(dtype) for shape in ((5, 80), (48, 80), (80, 48)))
    x[4, 48:64] = float("inf")
    y, z, stats = ops.cpu_adapter_forward(x, wd, None, wu, None, None, None, None, None, True, 0.0, 1, 1.0, True)
    dx = ops.cpu_adapter_backward(x, x, z, stats, wd, wu, None, None, True, 1, 1.0, 1)[0]
    assert y[:4].isfinite().all() and dx[:4].isfinite().all()
    assert not y[4].isfinite().all()


@pytest.mark.parametrize("where", ["x", "w", "both"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_infinities_spread_as_in_torch(isa, where, value):
    """Through a product of several blocks and tiles, with their signs; no other row or column sees them."""
    x, w = torch.randn(43, 1500), torch.randn(70, 1500)
    if where != "w":
        x[3, 0], x[37, 1400] = value, value
    if where != "x":
        w[5, 700], w[66, 1400] = value, -value
    ours = ops.cpu_linear_forward(x, [w], [], 0, None, None, 0.0, None)[0]
    want = x.double() @ w.double().t()
    assert torch.equal(ours.isnan(), want.isnan())
    left = ~want.isnan()
    torch.testing.assert_close(ours[left].double(), want[left], rtol=1e-4, atol=1e-3)


def test_every_half_is_read_and_rounded_as_torch_does(isa):
    """All 65,536 of them, NaN, infinities and subnormals included, plus numbers that make the sum round."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(-1, 64)
    for f in (torch.zeros_like(x), x, torch.randn_like(x), torch.randn_like(x) * 1e-6, torch.full_like(x, 16.0)):
        ours = ops.cpu_residual_norm_forward(x, f, None, None, None, None, 0, 1, 0.0, 0.0, False)[0]
        want = (x.float() + f.float()).half()
        assert torch.equal(ours.isnan(), want.isnan())
        assert torch.equal(ours[~want.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))
