"""The Triton site (adapter, residuals, norm behind them) against float64, in Triton's interpreter (on a GPU machine:
the compiled kernels).

Few, large tiles: a program costs the interpreter 30 to 60 ms, whatever its size. On a GPU they would not fit.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="the Triton kernels need the triton package")

from fastpetl.kernels.adapter_config import Config  # noqa: E402

from fastpetl.kernels import adapter, adapter_config, launching, residual_norm, site  # noqa: E402
from guards import guarded, untouched  # noqa: E402
from ops.op_cases import adapter_arguments, assert_two_times  # noqa: E402

if launching.INTERPRETED:
    import interp_patch  # noqa: F401  (bf16 in the interpreter)

DEVICE = "cuda" if torch.cuda.is_available() and not launching.INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (lambda z: z, F.relu, F.gelu, lambda z: F.gelu(z, approximate="tanh"), F.silu)
PARAMETERS = ("w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias", "tail_weight", "tail_bias")
GRADIENTS = ("x", *PARAMETERS)  # in the order of the bits of needs
ROWS = ("x", *PARAMETERS[:6], "res1", "res2", "tail_weight", "tail_bias")  # in the order of the launchers' arguments
LAYERNORM, RMSNORM = 1, 2
ALL = 511


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills what torch.empty returns with NaN: an element that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The small kernels, whose tiles suit a GPU, with tiles that suit the interpreter."""
    if launching.INTERPRETED:
        monkeypatch.setattr(adapter_config, "FOLD_TILE", (32, 256))
        monkeypatch.setattr(adapter_config, "WEIGHT_GRADS_TILE", (256, 128))
        monkeypatch.setattr(residual_norm, "SUM_TILE", (32, 256))


def make(rows, d, r, dtype, tail=LAYERNORM, residuals=1, **options):
    t = adapter_arguments(rows, d, r, dtype, residuals=residuals, **options)
    t["tail_weight"] = (1 + 0.2 * torch.randn(d)).to(dtype)
    t["tail_bias"] = (0.2 * torch.randn(d)).to(dtype) if tail == LAYERNORM else None
    return {k: None if v is None else v.detach().to(DEVICE) for k, v in t.items()}


def formula(t, add_x, eps, activation, scale, tail, tail_eps):
    """(s, n), everything in the dtype of t."""
    x = u = t["x"]
    shape = x.shape[-1:]
    if t["norm_weight"] is not None:
        u = F.layer_norm(x, shape, t["norm_weight"], t["norm_bias"], eps)
    s = F.linear(ACTIVATIONS[activation](F.linear(u, t["w_down"], t["b_down"])), t["w_up"], t["b_up"]) * scale
    for other in (x if add_x else None, t["res1"], t["res2"]):
        s = s if other is None else s + other
    if tail == LAYERNORM:
        return s, F.layer_norm(s, shape, t["tail_weight"], t["tail_bias"], tail_eps)
    return s, F.rms_norm(s, shape, t["tail_weight"], tail_eps)


def autograd(t, g_s, g_n, settings, dtype):
    """s, n and the gradients by name, of s as well, all arithmetic in dtype."""
    leaves = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in t.items()}
    s, n = formula(leaves, *settings)
    used = {k: v for k, v in leaves.items() if v is not None} | {"s": s}
    outputs, grads = ([n], [g_n]) if g_s is None else ([s, n], [g_s, g_n])
    found = torch.autograd.grad(outputs, list(used.values()), [g.to(dtype) for g in grads], materialize_grads=True,
                                allow_unused=True)  # fmt: skip
    return (s.detach(), n.detach()), dict(zip(used, found, strict=True))


def close(name, ours, torch_says, exact):
    """The 2x rule over all elements and, so that one wrong element cannot hide, for the largest error."""
    if not exact.numel():
        assert ours.shape == exact.shape, name
        return
    assert_two_times(ours, torch_says, exact, name)
    mine, theirs = ((v.double() - exact).abs().max() for v in (ours, torch_says))
    eps = torch.finfo(ours.dtype).eps
    eps *= 4 if ours.dtype == torch.float32 else 0.25
    assert mine <= 2 * theirs + eps * exact.abs().max().clamp_min(1e-3), f"{name}: {mine:.3e}, torch {theirs:.3e}"


def forward(t, settings, emit_s=True, save=True, config=None):
    add_x, eps, activation, scale, tail, tail_eps = settings
    rest = add_x, eps, activation, scale, tail, tail_eps, emit_s, save
    return site.site_forward(*[t[k] for k in ROWS], *rest, config=config)


def backward(t, g_s, g_n, saved, settings, needs=ALL, config=None):
    s, _, z, stats, tail_stats = saved
    add_x, _, activation, scale, tail, _ = settings
    own = [t[k] for k in ("w_down", "w_up", "norm_weight", "norm_bias")]
    rest = add_x, activation, scale, tail, needs
    return site.site_backward(g_s, g_n, s, tail_stats, t["tail_weight"], t["x"], z, stats, *own, *rest, config=config)


def cotangents(t, use_s=True):
    g_s, g_n = (torch.randn(t["x"].shape).to(t["x"]) for _ in range(2))
    return g_s if use_s else None, g_n


def check(t, add_x=True, activation=3, scale=0.7, tail=LAYERNORM, use_s=True, tail_eps=1e-6, config=None):
    """Forward and backward by the 2x rule; returns what both gave, and with what."""
    settings = add_x, 1e-5, activation, scale, tail, tail_eps
    grads = cotangents(t, use_s)
    exact, exact_grads = autograd(t, *grads, settings, torch.float64)
    says, torch_grads = autograd(t, *grads, settings, t["x"].dtype)
    saved = forward(t, settings, config=config)
    for name, *three in zip("sn", saved, says, exact, strict=False):
        close(name, *three)
    needs = sum(1 << i for i, k in enumerate(GRADIENTS) if t[k] is not None)
    g, *got = backward(t, *grads, saved, settings, needs, config)
    close("gradient of s", g, torch_grads["s"], exact_grads["s"])
    for name, mine in zip(GRADIENTS, got, strict=True):
        if t[name] is None:
            assert mine.numel() == 0, name
        else:
            close("gradient of " + name, mine, torch_grads[name], exact_grads[name])
    return saved, (g, *got), grads, settings


def tile(d, r, split=False, fold=True, r1=None, r2=0, block_m=256, block=256):
    block_m, block = (block_m, block) if launching.INTERPRETED else (min(block_m, 64), 32)
    block = min(block, adapter_config.power_of_two(d))
    return Config(split, block_m, block, block, r1 or adapter_config.power_of_two(r), r2, 8, 2, fold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows,d,r,r1,r2,tail",
    [
        (199, 760, 96, 64, 32, LAYERNORM),
        (199, 760, 96, 128, 0, RMSNORM),
        (199, 1128, 100, 128, 0, LAYERNORM),
        (70, 768, 192, 128, 64, RMSNORM),
        (1, 768, 16, 16, 0, LAYERNORM),
    ],
)
def test_one_launch(rows, d, r, r1, r2, dtype, tail):
    fold = dtype != torch.float32
    check(
        make(rows, d, r, dtype, tail),
        activation=3 if fold else 1,
        tail=tail,
        config=tile(d, r, fold=fold, r1=r1, r2=r2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,bottlenecks", [(1, (8, 192)), (20, (96, 300))])
def test_configs_of_the_table(rows, bottlenecks, dtype):
    """What a caller gets who names no config, up to a bottleneck that is split."""
    for r in bottlenecks:
        check(make(rows, 96, r, dtype))


@pytest.mark.parametrize("tail", (LAYERNORM, RMSNORM))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_at_the_bottleneck(dtype, tail):
    """A bottleneck too wide for one launch: the adapter's and the norm's kernels one after the other."""
    config = tile(200, 192, split=True, fold=dtype != torch.float32, r1=64, block_m=64)
    check(make(70, 200, 192, dtype, tail, residuals=2), activation=4, tail=tail, config=config)


# Each activation with both norm and biases, one with every optional part: the kernels decide each by itself.
PARTS = [
    case if case[1:] == (True, True) or case[0] == 3 else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(range(5), (True, False), (True, False))
]


@pytest.mark.grid
@pytest.mark.parametrize("activation,norm,bias", PARTS)
def test_activations_and_optional_parts(activation, norm, bias):
    """Both forms of the own norm, none; no biases; 0 to 2 residuals; with and without x; s used or only its norm."""
    for dtype, tail in itertools.product((torch.float32, torch.bfloat16), (LAYERNORM, RMSNORM)):
        t = make(40, 72, 20, dtype, tail, (activation + norm + tail) % 3, norm=norm, bias=bias)
        add_x, use_s = bool((activation + bias) % 2), bool((activation + tail) % 2)
        if activation == 1 and bias and dtype == torch.bfloat16:
            # relu's gradient jumps at 0, and which z rounding throws to the other side is chance: keep z away from 0
            t["b_down"] = (16.0 * (torch.arange(20, device=DEVICE) % 2) - 8).to(dtype)
        elif activation == 1 and dtype == torch.bfloat16:
            continue
        fold = (activation + tail) % 2 == (dtype == torch.float32)
        check(t, add_x, activation, -1.3, tail, use_s, config=tile(72, 20, fold=fold))


@pytest.mark.parametrize("split", (False, True))
@pytest.mark.parametrize("tail", (LAYERNORM, RMSNORM))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_asked_for_is_not_kept(dtype, tail, split):
    """s normalised in place has the bits it has with s apart; what nobody asked for has no elements."""
    t = make(37, 72, 20, dtype, tail)
    settings, config = (True, 1e-5, 4, 1.0, tail, 1e-6), tile(72, 20, split, block_m=16)
    kept = forward(t, settings, config=config)
    for emit_s, save in itertools.product((False, True), repeat=2):
        s, n, z, stats, tail_stats = forward(t, settings, emit_s, save, config)
        assert torch.equal(n, kept[1])
        assert torch.equal(s, kept[0]) if emit_s or save else s.numel() == 0
        for mine, theirs in zip((z, stats, tail_stats), kept[2:], strict=True):
            assert torch.equal(mine, theirs) if save else mine.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_the_adapters(dtype):
    """s, z and the statistics have the bits of the adapter's kernel, and the tail's statistics are those of s."""
    t = make(37, 72, 20, dtype, residuals=2)
    config = tile(72, 20, block_m=16)
    s, _, z, stats, tail_stats = forward(t, (True, 1e-5, 2, 0.7, LAYERNORM, 1e-3), config=config)
    theirs = adapter.adapter_forward(*[t[k] for k in ROWS[:9]], True, 1e-5, 2, 0.7, True, config=config)
    assert all(map(torch.equal, (s, z, stats), theirs))
    wide = s.double()
    expected = torch.stack([wide.mean(1), (wide.var(1, unbiased=False) + 1e-3).rsqrt()], 1)
    torch.testing.assert_close(tail_stats.double(), expected, rtol=1e-5, atol=1e-6)
    *_, tail_stats = forward(t, (True, 1e-5, 2, 0.7, RMSNORM, 1e-3), config=config)
    assert not tail_stats[:, 0].any()
    torch.testing.assert_close(tail_stats[:, 1].double(), (wide.square().mean(1) + 1e-3).rsqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", (LAYERNORM, RMSNORM))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero(dtype, tail):
    """Rows whose mean is many times their spread: the statistics must not cancel."""
    t = make(40, 256, 32, dtype, tail)
    t["x"] = (t["x"] * 0.2 + 12).to(dtype)
    check(t, tail=tail, config=tile(256, 32, fold=dtype != torch.float32, block=64))


@pytest.mark.grid
@pytest.mark.parametrize("split", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_only_needed_gradients(dtype, split):
    """Any subset of gradients has the bits it has among all of them, the gradient of s always; the others are empty.
    On a GPU each subset is a kernel of its own, whose multiplications and additions are contracted in its own way."""
    t = make(20, 40, 12, dtype)
    config = tile(40, 12, split, dtype != torch.float32, block_m=16)
    saved, full, grads, settings = check(t, config=config)
    for needs in [1 << i for i in range(9)] + [0, 2 | 4 | 8 | 16, 1 | 32 | 256, 8 | 64 | 128, 16 | 128, 128 | 256, 127]:
        g, *got = backward(t, *grads, saved, settings, needs, config)
        apart = not needs & 127 & ~16  # no product of the adapter's is needed: the norm's own kernel, other sums
        apart = apart or not launching.INTERPRETED
        same = torch.testing.assert_close if apart else lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0)
        same(g, full[0])
        for i, (mine, theirs) in enumerate(zip(got, full[1:], strict=True)):
            if not needs >> i & 1:
                assert mine.numel() == 0, GRADIENTS[i]
            elif i == 4 and not needs & 8:  # a plain sum over the rows then, not a column of g^T h
                torch.testing.assert_close(mine, theirs)
            else:
                same(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype):
    """An empty batch: empty rows, zero parameter gradients."""
    (s, n, z, stats, tail_stats), got, *_ = check(make(0, 48, 12, dtype))
    assert s.shape == n.shape == got[0].shape == got[1].shape == (0, 48) and z.shape == (0, 12)
    assert stats.shape == tail_stats.shape == (0, 2)
    assert all(g.numel() and not g.any() for g in got[2:])


def test_columns_beyond_the_last_do_not_overflow():
    """A row of fp16 whose mean is many times its spread, in a tile wider than it: what the gradient's formula gives
    beyond the last column is too large for fp16, and must not reach the product with w_up."""
    t = make(3, 40, 12, torch.float16, residuals=0)
    t["x"].fill_(60.0)[:, 7] = 60.03125
    g_s, g_n = torch.zeros_like(t["x"]), torch.full_like(t["x"], 0.1)
    g_n[:, 7] = 2.0
    settings = True, 1e-5, 3, 0.0, LAYERNORM, 1e-6
    for g in backward(t, g_s, g_n, forward(t, settings), settings):
        assert g.isfinite().all()


def test_nothing_outside_the_rows_is_touched(monkeypatch):
    """Guard rows around all that is read, NaN, and around all that is written, where 7 must stay."""
    t = make(21, 40, 12, torch.bfloat16)
    for name in ("x", "res1", "w_down", "w_up"):
        rows, width = t[name].shape
        buffer = torch.full((rows + 64, width), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        buffer[32 : 32 + rows] = t[name]
        t[name] = buffer[32 : 32 + rows]

    config = tile(40, 12, block_m=16)
    guards = guarded(monkeypatch)
    saved, _, _, settings = check(t, config=config)
    before = len(guards)
    _, n, *_ = forward(t, settings, False, False, config)
    assert torch.equal(n, saved[1])
    wide = [len(after) for _, after in guards[before:] if after.storage_offset() >= 1024 + n.numel()]
    assert before >= 20 and len(wide) == 1, "memory for s, which nobody wants"
    assert untouched(guards)


def test_nan_stays_in_its_row():
    t = make(20, 40, 12, torch.float32)
    settings = True, 1e-5, 1, 1.0, LAYERNORM, 1e-6
    clean = formula(t, *settings)
    t["x"][7, 3] = float("nan")
    s, n, *_ = forward(t, settings)
    rest = [i for i in range(20) if i != 7]
    for mine, theirs in zip((s, n), clean, strict=True):
        assert mine[7].isnan().all()
        torch.testing.assert_close(mine[rest], theirs[rest], rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    t = make(20, 40, 12, torch.float32)
    settings = True, 1e-5, 1, 1.0, LAYERNORM, 1e-6
    one = torch.ones((), device=DEVICE)
    for message, changes in {
        r"site_forward: w_up has shape \(40, 11\), expected \(40, 12\)": dict(w_up=t["w_up"][:, :11].contiguous()),
        r"site_forward: res1 has strides \(0, 0\), expected a contiguous": dict(res1=one.expand(20, 40)),
        r"site_forward: tail_weight is None, expected a tensor of shape \(40,\)": dict(tail_weight=None),
        r"site_forward: tail_bias has dtype torch.float64, expected torch.float32": dict(
            tail_bias=t["tail_bias"].double()
        ),
        r"site_forward: x has shape \(2, 10, 40\), expected two dimensions": dict(x=t["x"].view(2, 10, 40)),
    }.items():
        with pytest.raises(ValueError, match=message):
            forward({**t, **changes}, settings)
    with pytest.raises(ValueError, match=r"site_forward: tail is 0, expected 1 \(LayerNorm\) or 2 \(RMSNorm\)"):
        forward(t, (*settings[:4], 0, 1e-6))
    s, n, z, stats, tail_stats = forward(t, settings)
    for message, grads, saved in (
        (r"site_backward: tail_stats has shape \(0,\)", (s, n), (s, n, z, stats, tail_stats[:0, 0])),
        (r"site_backward: stats has shape \(20,\)", (s, n), (s, n, z, stats[:, 0], tail_stats)),
        (r"site_backward: s has shape \(0,\)", (s, n), (s[:0, 0], n, z, stats, tail_stats)),
        (r"site_backward: g_s has strides \(0, 0\)", (one.expand(20, 40), n), (s, n, z, stats, tail_stats)),
    ):
        with pytest.raises(ValueError, match=message):
            backward(t, *grads, saved, settings)


def test_verify_says_why_not():
    x = torch.ones(2, 8, device=DEVICE)
    assert site.verify(x, 8, 4) == (True, "")
    for arguments, word in (((x.double(), 8, 4), "float64"), ((x, 8, 0), "bottleneck"), ((x, 1 << 18, 4), "131072")):
        ok, why = site.verify(*arguments)
        assert not ok and word in why
