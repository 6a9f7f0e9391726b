"""The Triton launchers with tensors of several dtypes, as under autocast on a GPU: what each result's dtype is, that
nothing outside the rows is touched, what is refused. Their numbers through the ops: tests/ops/test_mixed.py.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the Triton kernels need the triton package")

from fastpetl.kernels.adapter_config import Config  # noqa: E402

from fastpetl.kernels import adapter, launching, residual_norm, site  # noqa: E402
from guards import guarded, untouched  # noqa: E402
from ops.op_cases import assert_two_times  # noqa: E402

if launching.INTERPRETED:
    import interp_patch  # noqa: F401  (bf16 in the interpreter)

DEVICE = "cuda" if torch.cuda.is_available() and not launching.INTERPRETED else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS, D, R = 21, 40, 12
CONFIG = True, 1e-5, 3, 0.7  # x added, eps, gelu_tanh, scale


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills what torch.empty returns with NaN: an element that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, dtype=FP32, scale=1.0):
    return (scale * torch.randn(*shape)).to(DEVICE, dtype)


def make(x=FP32, res=BF16, weights=BF16, vectors=FP32, r=R):
    """The launchers' tensors in their order, and the tail's weight and bias."""
    matrices = draw(r, D, dtype=weights, scale=D**-0.5), draw(D, r, dtype=weights, scale=r**-0.5)
    b_down, *others = draw(r, dtype=vectors), *(draw(D, dtype=vectors) for _ in range(5))
    b_up, *norms = others
    mine = matrices[0], b_down, matrices[1], b_up, *norms[:2]
    return draw(ROWS, D, dtype=x), *mine, draw(ROWS, D, dtype=res), None, *norms[2:]


@pytest.mark.parametrize("r", [R, 300])
@pytest.mark.parametrize(
    "x, res, weights, vectors, s, n",
    [
        (FP32, BF16, BF16, FP32, FP32, FP32),
        (BF16, FP32, BF16, FP32, FP32, FP32),  # what reads a sublayer's output
        (BF16, BF16, BF16, FP32, BF16, FP32),  # a stream of bf16: autocast has its norm in float32 all the same
        (FP16, BF16, FP16, FP16, FP32, FP32),
        (BF16, BF16, BF16, BF16, BF16, BF16),
    ],
    ids=str,
)
def test_dtypes_of_a_site(x, res, weights, vectors, s, n, r):
    t = make(x, res, weights, vectors, r)
    wide = [None if v is None else v.double() for v in t]
    u = F.layer_norm(wide[0], (D,), *wide[5:7])
    h = F.linear(F.gelu(F.linear(u, *wide[1:3]), approximate="tanh"), *wide[3:5])
    exact = 0.7 * h + wide[0] + wide[7]
    for emit_s, save in ((True, True), (False, True), (False, False)):
        out = site.site_forward(*t, *CONFIG, 1, 1e-5, emit_s, save, mixed=True)
        assert out[1].dtype == n
        torch.testing.assert_close(out[1].double(), F.layer_norm(exact, (D,), *wide[9:]), rtol=0.05, atol=0.05)
        if emit_s or save:
            assert out[0].dtype == s and out[2].dtype == weights
            torch.testing.assert_close(out[0].double(), exact, rtol=0.03, atol=0.03)
            kept = out
    g_s, g_n = draw(ROWS, D, dtype=s), draw(ROWS, D, dtype=n)
    saved = kept[0], kept[4], t[9], t[0], kept[2], kept[3], t[1], t[3], t[5], t[6]
    rest = CONFIG[0], *CONFIG[2:], 1
    g, *grads, low = site.site_backward(g_s, g_n, *saved, *rest, 511, mixed=FP32, low=True)
    assert g.dtype == s and low.dtype == weights and torch.equal(low, g.to(weights))
    expected = [x, FP32, FP32, FP32, FP32, *(vectors,) * 4]
    assert [t.dtype for t in grads] == expected and all(t.isfinite().all() for t in grads)
    *part, low = site.site_backward(g_s, g_n, *saved, *rest, 2, mixed=FP32, low=True)  # dx is not made on the way
    torch.testing.assert_close(part[2], grads[1], rtol=2e-2, atol=2e-2)
    assert torch.equal(low, g.to(weights))


def test_the_products_read_what_autocast_rounds():
    """The normed row and the gradient go into the products rounded, once: the numbers are those of bf16 operands."""
    t = make()
    x, w_down, _, w_up, _, gamma, beta, res = t[:8]
    y, z, stats = adapter.adapter_forward(*t[:9], *CONFIG, True, mixed=True)
    n = F.layer_norm(x, (D,), gamma, beta).to(BF16)
    assert_two_times(z, F.linear(n, w_down, t[2].to(BF16)), F.linear(n.double(), w_down.double(), t[2].double()), "z")
    grad = draw(ROWS, D)
    args = x, z, stats, w_down, w_up, gamma, beta, True, 0, 1.0
    got = adapter.adapter_backward(grad, *args, 2 | 8, mixed=FP32)
    dz = F.linear(grad.to(BF16), w_up.t()).double()
    exact = dz.t() @ n.double(), grad.to(BF16).double().t() @ z.double()
    for mine, want in zip((got[1], got[3]), exact, strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=0.01, atol=0.01 * float(want.abs().max()))
    low = adapter.adapter_backward(grad, *args, 0, mixed=FP32, low=True)[7]
    assert torch.equal(low, grad.to(BF16))


def test_a_norm_is_folded_only_where_x_is_multiplied_as_it_is():
    config = Config(False, 64, 32, 32, 16, 0, 4, 2, True)
    t = make()
    t = (t[0] * 0.5 + 60, *t[1:9])  # rounded to bf16, it would have two bits left
    folds = [config._replace(fold=fold) for fold in (True, False)]
    folded, plain = (adapter.adapter_forward(*t, *CONFIG, True, mixed=True, config=one) for one in folds)
    assert all(map(torch.equal, folded, plain))
    t = make(x=BF16, res=FP32)[:9]
    wide = [None if v is None else v.double() for v in t]
    exact = F.linear(F.layer_norm(wide[0], (D,), *wide[5:7]), *wide[1:3])
    theirs = F.linear(F.layer_norm(t[0].float(), (D,), *t[5:7]).to(BF16), t[1], t[2].to(BF16))
    z = adapter.adapter_forward(*t, *CONFIG, True, mixed=True, config=config)[1]
    assert_two_times(z, theirs, exact, "z")


def test_nothing_outside_the_rows_is_touched(monkeypatch):
    """Guards around all that is written, where 7 must stay."""

    guards = guarded(monkeypatch)
    for r in (R, 300):
        t = make(r=r)
        s, n, z, stats, tail_stats = site.site_forward(*t, *CONFIG, 1, 1e-5, True, True, mixed=True)
        saved = s, tail_stats, t[9], t[0], z, stats, t[1], t[3], t[5], t[6]
        site.site_backward(n, n, *saved, True, 3, 0.7, 1, 511, mixed=FP32, low=True)
    assert len(guards) > 30 and untouched(guards)


@pytest.mark.parametrize("x, f, n", [(FP32, BF16, FP32), (BF16, FP32, FP32), (BF16, BF16, FP32), (FP16, BF16, FP32)])
def test_dtypes_of_a_norm(x, f, n):
    x, f, weight, bias = draw(ROWS, D, dtype=x), draw(ROWS, D, dtype=f), draw(D), draw(D)
    s_dtype = x.dtype if x.dtype is f.dtype else FP32
    for emit in (2, 3):
        s, got, stats = residual_norm.residual_norm_forward(
            x, f, weight, bias, None, None, 1, emit, 1e-5, 0.0, True, mixed=True
        )
        assert s.dtype == s_dtype and got.dtype == n and torch.equal(s, x + f)
        torch.testing.assert_close(got, F.layer_norm(s.float(), (D,), weight, bias), rtol=1e-5, atol=1e-5)
    args = None, None, 1, 1e-5
    unkept = residual_norm.residual_norm_forward(x, f, weight, bias, *args[:2], 1, 2, 1e-5, 0.0, False, mixed=True)
    assert torch.equal(unkept[1], got)  # of the sum as it would have been rounded
    g_n, dtypes = draw(ROWS, D, dtype=n), (x.dtype, f.dtype, FP32, FP16)
    back = residual_norm.residual_norm_backward(None, g_n, s, stats, weight, None, None, 1, 0.0, 15, mixed=dtypes)
    assert tuple(g.dtype for g in back) == dtypes
    torch.testing.assert_close(back[0].float(), back[1].float(), rtol=1e-2, atol=1e-3)


def test_what_is_refused():
    t = make()
    wrong = list(t)
    wrong[3] = t[3].float()
    with pytest.raises(ValueError, match=r"adapter_forward: w_up has dtype torch.float32, expected torch.bfloat16"):
        adapter.adapter_forward(*wrong[:9], *CONFIG, True, mixed=True)
    wrong = list(t)
    wrong[7] = t[7].double()
    with pytest.raises(ValueError, match=r"site_forward: res1 has dtype torch.float64"):
        site.site_forward(*wrong, *CONFIG, 1, 1e-5, True, True, mixed=True)
    with pytest.raises(ValueError, match=r"site_forward: w_down has dtype torch.bfloat16, expected torch.float32"):
        site.site_forward(*t, *CONFIG, 1, 1e-5, True, True)
    with pytest.raises(ValueError, match=r"residual_norm_forward: f has dtype torch.bfloat16, expected torch.float32"):
        residual_norm.residual_norm_forward(t[0], t[7], t[9], t[10], None, None, 1, 3, 1e-5, 0.0, True)
