"""The Triton adapter against float64, in Triton's interpreter (on a GPU machine: the compiled kernels).

Few, large tiles: a program costs the interpreter 30 to 60 ms, whatever its size. On a GPU they would not fit.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="the Triton kernels need the triton package")

from fastpetl.kernels.adapter_config import Config  # noqa: E402

from fastpetl.kernels import adapter, adapter_config  # noqa: E402

if adapter.INTERPRETED:
    import interp_patch  # noqa: F401  (bf16 in the interpreter)

DEVICE = "cuda" if torch.cuda.is_available() and not adapter.INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (
    lambda z: z,
    F.relu,
    F.gelu,
    lambda z: F.gelu(z, approximate="tanh"),
    F.silu,
)
NAMES = ("x", "w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias")
ALL = 127


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills what torch.empty returns with NaN: an element that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_programs(monkeypatch):
    """The two small kernels, whose tiles suit a GPU, with tiles that suit the interpreter."""
    if adapter.INTERPRETED:
        monkeypatch.setattr(adapter_config, "FOLD_TILE", (32, 256))
        monkeypatch.setattr(adapter_config, "WEIGHT_GRADS_TILE", (256, 128))


def formula(t, res1, res2, add_x, eps, activation, scale):
    x = t["x"]
    n = x
    if t["norm_weight"] is not None:
        n = F.layer_norm(x, x.shape[-1:], t["norm_weight"], t["norm_bias"], eps)
    h = ACTIVATIONS[activation](F.linear(n, t["w_down"], t["b_down"]))
    y = F.linear(h, t["w_up"], t["b_up"]) * scale
    for other in (x if add_x else None, res1, res2):
        y = y if other is None else y + other
    return y


def make(rows, d, r, dtype, norm=True, bias=True, mean=0.3):
    def draw(*shape, sigma=1.0, offset=0.0):
        return (offset + sigma * torch.randn(*shape)).to(DEVICE, dtype)

    return dict(
        x=draw(rows, d, sigma=1.5, offset=mean),
        w_down=draw(r, d, sigma=d**-0.5),
        b_down=draw(r, sigma=0.1) if bias else None,
        w_up=draw(d, r, sigma=r**-0.5),
        b_up=draw(d, sigma=0.1) if bias else None,
        norm_weight=draw(d, sigma=0.2, offset=1.0) if norm else None,
        norm_bias=draw(d, sigma=0.1) if norm and bias else None,
    )


def autograd(t, grad, res1, res2, *settings, dtype):
    """y and the gradients of the formula with everything, arithmetic included, in dtype."""
    leaves = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in t.items()}
    res1, res2 = (None if v is None else v.to(dtype) for v in (res1, res2))
    y = formula(leaves, res1, res2, *settings)
    used = {k: v for k, v in leaves.items() if v is not None}
    grads = torch.autograd.grad(y, list(used.values()), grad.to(dtype), materialize_grads=True, allow_unused=True)
    return y.detach(), dict(zip(used, grads, strict=True))


def close(name, ours, exact, torch_says, eps):
    """The 2x rule in the largest and in the mean error, plus eps of the largest value."""
    assert ours.shape == exact.shape and ours.dtype == torch_says.dtype, name
    assert ours.isfinite().all(), f"{name}: not written everywhere, or overflowed"
    if not exact.numel():
        return
    size = exact.abs().max().clamp_min(1e-3)
    for kind in (torch.mean, torch.amax):
        mine, theirs = (kind((v.double() - exact).abs()) for v in (ours, torch_says))
        assert mine <= 2 * theirs + eps * size, f"{name}: error {mine:.3e}, torch at {ours.dtype} {theirs:.3e}"


def check(t, residuals=1, add_x=True, activation=3, scale=0.7, ln_eps=1e-5, config=None, backward_config=None):
    rows, d = t["x"].shape
    dtype = t["x"].dtype
    draws = [torch.randn(rows, d).to(DEVICE, dtype) for _ in range(3)]
    grad, res1, res2 = draws[0], draws[1] if residuals > 0 else None, draws[2] if residuals > 1 else None
    settings = add_x, ln_eps, activation, scale
    exact_y, exact = autograd(t, grad, res1, res2, *settings, dtype=torch.float64)
    torch_y, torch_says = autograd(t, grad, res1, res2, *settings, dtype=dtype)
    eps = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    weights = [t[k] for k in NAMES[1:]]
    rest = res1, res2, add_x, ln_eps, activation, scale, True
    y, z, stats = adapter.adapter_forward(t["x"], *weights, *rest, config=config)
    close("y", y, exact_y, torch_y, eps)
    args = t["w_down"], t["w_up"], t["norm_weight"], t["norm_bias"], add_x, activation, scale
    got = adapter.adapter_backward(grad, t["x"], z, stats, *args, ALL, config=backward_config or config)
    for name, g in zip(NAMES, got, strict=True):
        if t[name] is None and "norm" in name:
            assert g.numel() == 0, name
        elif t[name] is not None:
            close("d" + name, g, exact[name], torch_says[name], eps)
    return y, z, stats, grad, got, settings


def tile(d, r, split=False, fold=True, r1=None, r2=0, block_m=64, block=256):
    block = min(block if adapter.INTERPRETED else 32, adapter_config.power_of_two(d))
    return Config(split, block_m, block, block, r1 or adapter_config.power_of_two(r), r2, 8, 2, fold)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "rows,d,r,r1,r2",
    [(70, 768, 96, 64, 32), (70, 768, 192, 128, 64), (70, 760, 100, 128, 0), (5, 40, 12, 16, 0), (1, 768, 8, 16, 0)],
)
def test_one_launch(rows, d, r, r1, r2, dtype):
    half = dtype != torch.float32
    check(make(rows, d, r, dtype), activation=3 if half else 1, config=tile(d, r, r1=r1, r2=r2, fold=half))


@pytest.mark.usefixtures("few_programs")
def test_one_launch_fp16():
    check(make(70, 760, 96, torch.float16), config=tile(760, 96))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm,r", [(True, 192), (False, 100)])
def test_split_at_the_bottleneck(norm, r, dtype):
    """A bottleneck that fits no tile: two launches each way, several column tiles, the last one partly empty."""
    config = tile(200, r, split=True, r1=64, fold=dtype != torch.float32)
    check(make(70, 200, r, dtype, norm=norm), residuals=2, activation=4, config=config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,bottlenecks", [(1, (8, 192)), (20, (96, 300))])
def test_configs_of_the_table(rows, bottlenecks, dtype):
    """What a caller gets who names no config, up to a bottleneck that is split."""
    for r in bottlenecks:
        check(make(rows, 96, r, dtype))


# Each activation with both norm and biases, one with every optional part: the kernels decide each by itself.
PARTS = [
    case if case[1:] == (True, True) or case[0] == 3 else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(range(5), (True, False), (True, False))
]


@pytest.mark.grid
@pytest.mark.parametrize("activation,norm,bias", PARTS)
def test_activations_and_optional_parts(activation, norm, bias):
    """Both LayerNorm forms, no norm, no biases, 0 to 2 residuals, with and without x, in each activation."""
    residuals, add_x = (activation + norm) % 3, bool((activation + bias) % 2)
    for dtype in (torch.float32, torch.bfloat16):
        t = make(40, 72, 20, dtype, norm, bias)
        if activation == 1 and dtype == torch.bfloat16:
            # relu's gradient jumps at 0, and which z rounding throws to the other side is chance: keep z away from 0
            t["b_down"] = (16.0 * (torch.arange(20, device=DEVICE) % 2) - 8).to(dtype)
        for fold in (True, False) if norm else (True,):
            check(t, residuals, add_x, activation, scale=-1.3, config=tile(72, 20, fold=fold))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero(dtype):
    """Rows whose mean is many times their spread: statistics and gradients must not cancel."""
    check(make(40, 256, 32, dtype, mean=12.0))


def test_norm_gain_without_bias():
    t = make(40, 72, 20, torch.bfloat16)
    t["norm_bias"] = None
    for dtype in (torch.bfloat16, torch.float32):
        check({k: None if v is None else v.to(dtype) for k, v in t.items()}, residuals=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype):
    """An empty batch: empty rows, zero parameter gradients."""
    y, z, stats, _, got, _ = check(make(0, 48, 12, dtype))
    assert y.shape == (0, 48) and z.shape == (0, 12) and stats.shape == (0, 2)
    assert all((g == 0).all() for g in got)


@pytest.mark.grid
@pytest.mark.parametrize("split", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_only_needed_gradients(split, dtype):
    """Any subset of gradients has the bits it has among all of them; the others come back empty."""
    t = make(20, 40, 12, dtype)
    config = tile(40, 12, split=split, r1=16, fold=dtype != torch.float32)
    _, z, stats, grad, full, (add_x, _, activation, scale) = check(t, config=config)
    args = t["w_down"], t["w_up"], t["norm_weight"], t["norm_bias"], add_x, activation, scale
    for needs in [1 << i for i in range(7)] + [0, 2 | 4 | 8 | 16, 1 | 32, 32 | 64, 8 | 64]:
        got = adapter.adapter_backward(grad, t["x"], z, stats, *args, needs, config=config)
        for i, (g, f) in enumerate(zip(got, full, strict=True)):
            if not needs >> i & 1:
                assert g.numel() == 0, NAMES[i]
            elif i == 4 and not needs & 8:  # a plain sum over the rows then, not a column of grad^T h
                torch.testing.assert_close(g, f)
            else:
                assert torch.equal(g, f), NAMES[i]


def test_not_saving_keeps_nothing():
    t = make(20, 40, 12, torch.float32)
    weights = [t[k] for k in NAMES[1:]]
    for config in (tile(40, 12), tile(40, 12, split=True)):
        kept = adapter.adapter_forward(t["x"], *weights, None, None, True, 1e-5, 1, 1.0, True, config=config)
        y, z, stats = adapter.adapter_forward(t["x"], *weights, None, None, True, 1e-5, 1, 1.0, False, config=config)
        assert torch.equal(y, kept[0]) and z.numel() == stats.numel() == 0


def test_statistics_and_pre_activation():
    t = make(20, 40, 12, torch.float32)
    y, z, stats, *_ = check(t)
    x = t["x"].double()
    mean, var = x.mean(1), x.var(1, unbiased=False)
    torch.testing.assert_close(stats.double(), torch.stack([mean, (var + 1e-5).rsqrt()], 1), rtol=1e-5, atol=1e-6)
    n = F.layer_norm(x, (40,), t["norm_weight"].double(), t["norm_bias"].double(), 1e-5)
    expected = F.linear(n, t["w_down"].double(), t["b_down"].double())
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)


def test_nothing_outside_the_rows_is_touched():
    """Guard rows around every matrix: NaN before reading would spread, a changed canary is a write out of bounds."""
    t = make(21, 40, 12, torch.bfloat16)
    buffers = {}
    for name in ("x", "w_down", "w_up"):
        rows, width = t[name].shape
        buffers[name] = torch.full((rows + 64, width), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        buffers[name][32 : 32 + rows] = t[name]
        t[name] = buffers[name][32 : 32 + rows]
    check(t, config=tile(40, 12, fold=True))
    for name, b in buffers.items():
        assert b[:32].isnan().all() and b[32 + len(t[name]) :].isnan().all(), name


def test_nan_stays_in_its_row():
    t = make(20, 40, 12, torch.float32)
    clean = formula(t, None, None, True, 1e-5, 1, 1.0)
    t["x"][7, 3] = float("nan")
    y, *_ = adapter.adapter_forward(t["x"], *[t[k] for k in NAMES[1:]], None, None, True, 1e-5, 1, 1.0, False)
    assert y[7].isnan().all()
    rest = [i for i in range(20) if i != 7]
    torch.testing.assert_close(y[rest], clean[rest], rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    t = make(20, 40, 12, torch.float32)

    def forward(**changes):
        u = {**t, **changes}
        adapter.adapter_forward(*[u[k] for k in NAMES], u.get("res1"), None, True, 1e-5, 1, 1.0, True)

    one = torch.ones((), device=DEVICE)
    for message, changes in {
        r"adapter_forward: w_up has shape \(40, 11\), expected \(40, 12\)": dict(w_up=t["w_up"][:, :11].contiguous()),
        r"adapter_forward: w_up has strides \(1, 40\), expected a contig": dict(w_up=one.expand(12, 40).clone().t()),
        r"adapter_forward: res1 has strides \(0, 0\), expected a contiguous": dict(res1=one.expand(20, 40)),
        r"adapter_forward: b_down has dtype torch.float64, expected torch.float32": dict(b_down=t["b_down"].double()),
        r"adapter_forward: x has dtype torch.float64": dict(x=t["x"].double()),
        r"adapter_forward: x has shape \(2, 10, 40\), expected two dimensions": dict(x=t["x"].view(2, 10, 40)),
        r"adapter_forward: norm_weight has shape \(12,\), expected \(40,\)": dict(norm_weight=t["norm_weight"][:12]),
    }.items():
        with pytest.raises(ValueError, match=message):
            forward(**changes)
    z = torch.ones(20, 12, device=DEVICE)
    args = z[:, 0].contiguous(), t["w_down"], t["w_up"], t["norm_weight"], None, True, 1, 1.0, 1
    with pytest.raises(ValueError, match=r"adapter_backward: stats has shape \(20,\)"):
        adapter.adapter_backward(t["x"], t["x"], z, *args)
    with pytest.raises(ValueError, match=r"adapter_backward: grad has strides \(0, 0\), expected a contiguous"):
        adapter.adapter_backward(one.expand(20, 40), t["x"], z, *args)


def test_verify_says_why_not():
    x = torch.ones(2, 8, device=DEVICE)
    assert adapter.verify(x, 8, 4) == (True, "")
    ok, why = adapter.verify(x.double(), 8, 4)
    assert not ok and "float64" in why
    ok, why = adapter.verify(x, 8, 0)
    assert not ok and "bottleneck" in why
    ok, why = adapter.verify(torch.ones(2, 8, device="meta"), 8, 4)
    assert not ok and "meta" in why


def test_every_bottleneck_has_tiles_that_hold_it():
    for (kind, direction), r in itertools.product(adapter_config.TABLE, range(1, 400)):
        for rows in (1, 3000, 3001, 8000, 10**7):
            c = adapter_config.select(kind, direction, 768, r, rows)
            assert c.split or c.r1 + c.r2 >= r, (kind, direction, r)
            assert all(n == 0 or (n >= 16 and n & (n - 1) == 0) for n in (c.r1, c.r2, c.block_m, c.block_k, c.block_n))
