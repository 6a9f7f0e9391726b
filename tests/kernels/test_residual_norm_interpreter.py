"""The Triton residual_norm against float64, in Triton's interpreter (on a GPU machine: the compiled kernels).

The reference of the launchers is plain torch at float64; the same at the kernels' dtype is what the 2x rule allows.
Public calls, strided tensors and expanded gradients are in tests/ops/test_residual_norm.py.
"""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Triton kernels need the triton package")
import triton.language as tl  # noqa: E402
from fastpetl.kernels.residual_norm_kernels import keep_factor  # noqa: E402

from fastpetl.kernels import launching, residual_norm  # noqa: E402
from fastpetl.ops import _residual_norm as torch_says  # noqa: E402
from guards import guarded, untouched  # noqa: E402
from ops.op_cases import assert_two_times  # noqa: E402

if launching.INTERPRETED:
    import interp_patch  # noqa: F401  (bf16 in the interpreter)

DEVICE = "cuda" if torch.cuda.is_available() and not launching.INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERNORM, RMSNORM = 1, 2
SUM, NORM, BOTH = 1, 2, 3
ALL = 15
SEED = 2**40 - 12345


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills what torch.empty returns with NaN: an element that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_programs(monkeypatch):
    """Tiles that suit the interpreter: it pays per program, not per element. On a GPU they take minutes to compile."""
    if launching.INTERPRETED:
        tiles = ((1 << 17, 1 << 16, 4),)
        monkeypatch.setattr(residual_norm, "FORWARD", tiles)
        monkeypatch.setattr(residual_norm, "BACKWARD", tiles)


def make(rows, d, dtype, tail, sublayer=True, batch=0, dropout=0.0, mean=0.3):
    def draw(*shape, sigma=1.0, offset=0.0):
        return (offset + sigma * torch.randn(*shape)).to(DEVICE, dtype)

    return dict(
        x=draw(rows, d, offset=mean),
        f=draw(rows, d, sigma=2.0) if sublayer else None,
        weight=draw(d, sigma=0.2, offset=1.0) if tail else None,
        bias=draw(d, sigma=0.2) if tail == LAYERNORM else None,
        mask=(torch.arange(batch, device=DEVICE) % 2 == 1) if batch else None,
        seed=torch.tensor([SEED], device=DEVICE) if dropout else None,
    )


def at(t, dtype):
    return {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in t.items()}


def both_ways(forward, backward, t, grads, tail, emit, dropout, needs):
    s, n, stats = forward(*t.values(), tail, emit, 1e-5, dropout, True)
    kept = t["x"] if t["f"] is None else s
    found = backward(*grads, kept, stats, t["weight"], t["mask"], t["seed"], tail, dropout, needs)
    return (s, n, stats), found


def check(t, tail, emit=BOTH, dropout=0.0, needs=ALL):
    """Launchers against plain torch, forward and backward, by the 2x rule; returns what the launchers gave."""
    x = t["x"]
    grads = [torch.randn(x.shape).to(DEVICE, x.dtype) if emit & bit else None for bit in (SUM, NORM)]
    needs &= ALL if tail == LAYERNORM else 7 if tail else 3
    options = tail, emit, dropout, needs
    plain = torch_says.reference_forward, torch_says.reference_backward
    kernels = residual_norm.residual_norm_forward, residual_norm.residual_norm_backward
    wide = [None if g is None else g.double() for g in grads]
    want, exact = both_ways(*plain, at(t, torch.float64), wide, *options)
    theirs, says = both_ways(*plain, t, grads, *options)
    ours, got = both_ways(*kernels, t, grads, *options)
    names = ("s", "n", "stats", "dx", "df", "dweight", "dbias")
    for name, o, s, w in zip(names, (*ours, *got), (*theirs, *says), (*want, *exact), strict=True):
        assert o.shape == w.shape, name
        assert_two_times(o, s, w, name)
    return ours, got, grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", (LAYERNORM, RMSNORM))
@pytest.mark.parametrize("rows, d", [(1, 760), (3, 768), (3, 1024), (2, 1128)])
def test_tiles_of_the_table(rows, d, tail, dtype):
    check(make(rows, d, dtype, tail), tail)


@pytest.mark.parametrize("d", (4096, 9000))
def test_wide_rows(d):
    check(make(1, d, torch.bfloat16, LAYERNORM), LAYERNORM)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, d",
    [(199, 760), (198, 1128), (1, 1)]  # 760: not a power of two; 1128: batches, two tiles of columns
    + [pytest.param(*size, marks=pytest.mark.slow) for size in ((199, 768), (199, 1024))],
)
def test_many_rows(rows, d, dtype):
    """The last tile partly empty; d a power of two and not, whole quads of dropout and not; skipped samples."""
    batch, dropout = 2 if rows % 2 == 0 else 0, 0.1
    check(make(rows, d, dtype, LAYERNORM, batch=batch, dropout=dropout), LAYERNORM, dropout=dropout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination_of_options(dtype):
    """Tail, what is emitted, no sublayer, dropout and skipped samples; rows of 7, 40 and 64."""
    sizes = itertools.cycle((7, 40, 64))
    for tail, emit, sublayer, dropout, batch in itertools.product(
        (0, LAYERNORM, RMSNORM), (SUM, NORM, BOTH), (True, False), (0.0, 0.4), (0, 5)
    ):
        if (emit != SUM and not tail) or (not sublayer and (emit != NORM or dropout or batch)):
            continue
        check(make(20, next(sizes), dtype, tail, sublayer, batch, dropout), tail, emit, dropout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero(dtype):
    """Rows whose mean is many times their spread: the variance must not cancel."""
    check(make(20, 256, dtype, LAYERNORM, mean=12.0), LAYERNORM)


@pytest.mark.parametrize("programs", (1, 3, 512))
def test_sums_of_the_weights_gradients_over_several_tiles(programs, monkeypatch):
    """A program that takes several tiles, more parts than one step of the last sum takes; the same bits each time."""
    monkeypatch.setattr(residual_norm, "PROGRAMS", programs)
    monkeypatch.setattr(residual_norm, "SUM_TILE", (2, 32))
    monkeypatch.setattr(residual_norm, "BACKWARD", ((1 << 17, 128, 4),))
    t = make(19, 40, torch.float32, LAYERNORM)
    (s, _, stats), got, grads = check(t, LAYERNORM)
    args = *grads, s, stats, t["weight"], None, None, LAYERNORM, 0.0
    for needs in (ALL, 4, 8, 12, 1, 2, 9, 0):
        again = residual_norm.residual_norm_backward(*args, needs)
        for i, (a, g) in enumerate(zip(again, got, strict=True)):
            assert torch.equal(a, g) if needs >> i & 1 else a.numel() == 0


def test_no_gradient_through_the_norm():
    """Only the sum was used: dx is its gradient, the norm's parameters get zeros."""
    t = make(6, 40, torch.float32, LAYERNORM, batch=3)
    s, _, stats = residual_norm.residual_norm_forward(*t.values(), LAYERNORM, BOTH, 1e-5, 0.0, True)
    g = torch.randn_like(s)
    dx, df, dweight, dbias = residual_norm.residual_norm_backward(
        g, None, s, stats, t["weight"], t["mask"], None, LAYERNORM, 0.0, ALL
    )
    assert torch.equal(dx, g) and not dweight.any() and not dbias.any() and dweight.shape == dbias.shape == (40,)
    skipped = t["mask"].repeat_interleave(2)
    assert torch.equal(df[~skipped], g[~skipped]) and not df[skipped].any()


@pytest.mark.parametrize("save", (True, False))
def test_what_is_not_asked_for_is_not_written(save):
    t = make(5, 24, torch.float32, RMSNORM)
    for sublayer, emit in itertools.product((True, False), (NORM, BOTH)):
        given = {**t, "f": t["f"] if sublayer else None}
        s, n, stats = residual_norm.residual_norm_forward(*given.values(), RMSNORM, emit, 1e-5, 0.0, save)
        assert s.numel() == (s.new_empty(5, 24).numel() if sublayer and (emit == BOTH or save) else 0)
        assert n.shape == (5, 24) and stats.shape == ((5, 2) if save else (0,))


def test_no_rows():
    t = make(0, 24, torch.float32, LAYERNORM)
    s, n, stats = residual_norm.residual_norm_forward(*t.values(), LAYERNORM, BOTH, 1e-5, 0.0, True)
    assert s.shape == n.shape == (0, 24) and stats.shape == (0, 2)
    grads = residual_norm.residual_norm_backward(s, n, s, stats, t["weight"], None, None, LAYERNORM, 0.0, ALL)
    assert grads[0].shape == grads[1].shape == (0, 24) and not grads[2].any() and grads[3].shape == (24,)


def test_nothing_outside_the_rows_is_touched():
    """Guard rows around every matrix: NaN before reading would spread, a changed canary is a write out of bounds."""
    t = make(21, 40, torch.bfloat16, LAYERNORM)
    buffers = {}
    for name in ("x", "f"):
        buffers[name] = torch.full((21 + 64, 40), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        buffers[name][32:53] = t[name]
        t[name] = buffers[name][32:53]
    check(t, LAYERNORM)
    for name, b in buffers.items():
        assert b[:32].isnan().all() and b[53:].isnan().all(), name


def test_outputs_end_where_their_rows_end(monkeypatch):
    """The kernels' own outputs between guard rows: torch.empty gives the middle of a larger tensor."""

    t = make(21, 40, torch.float32, LAYERNORM)
    with monkeypatch.context() as patch:
        guards = guarded(patch)
        s, n, stats = residual_norm.residual_norm_forward(*t.values(), LAYERNORM, BOTH, 1e-5, 0.0, True)
        residual_norm.residual_norm_backward(s, n, s, stats, t["weight"], None, None, LAYERNORM, 0.0, ALL)
    assert len(guards) >= 6 and untouched(guards)


def test_infinities_and_nan_stay_in_their_rows():
    t = make(6, 48, torch.float32, LAYERNORM)
    t["x"][1, 3], t["x"][2, 5] = float("inf"), float("nan")
    s, n, _ = residual_norm.residual_norm_forward(*t.values(), LAYERNORM, BOTH, 1e-5, 0.0, True)
    want = torch.nn.functional.layer_norm(t["x"] + t["f"], (48,), t["weight"], t["bias"])
    assert torch.equal(s.isfinite(), t["x"].isfinite()) and torch.equal(n.isnan(), want.isnan())


def test_skipped_rows_are_not_read():
    t = make(8, 40, torch.float32, RMSNORM, batch=4, dropout=0.3)
    skipped = t["mask"].repeat_interleave(2)
    t["f"][skipped] = float("nan")
    s, _, _ = residual_norm.residual_norm_forward(*t.values(), RMSNORM, BOTH, 1e-5, 0.3, True)
    assert torch.equal(s[skipped], t["x"][skipped]) and s.isfinite().all()


@triton.jit
def draw(seed_ptr, out_ptr, row0, threshold, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    rm, cols = tl.arange(0, BM), tl.arange(0, BD)
    keep = keep_factor(seed_ptr, tl.full((), 1, tl.int64) * row0, rm, threshold, 1.0, D, BM, BD)
    tl.store(out_ptr + rm[:, None] * BD + cols[None, :], keep)


def philox_word(element, seed):
    """Philox-4x32-10 in Python's integers (Salmon et al., SC 2011)."""
    quad, low = element >> 2, 0xFFFFFFFF
    c, k = [quad & low, quad >> 32, 0, 0], [seed & low, seed >> 32 & low]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & low, a >> 32 ^ c[3] ^ k[1], a & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c[element & 3]


@pytest.mark.parametrize("d", (8, 7))
@pytest.mark.parametrize("first", (0, 2**31 // 7, 2**36))
def test_the_mask_of_elements_beyond_32_bits(first, d):
    """Elements are counted in 64 bits, and p above a half has the top bit of the threshold set."""
    for p in (0.25, 0.75):
        _, threshold, _ = residual_norm._scalars(1, None, p)
        seed, out = torch.tensor([-SEED], device=DEVICE), torch.empty(2, 8, device=DEVICE)
        launching.launch(draw, (1,), seed, out, first, threshold, D=d, BM=2, BD=8)
        for row, col in itertools.product(range(2), range(d)):
            word = philox_word((first + row) * d + col, -SEED)
            assert out[row, col] == (word >= int(p * 2**32)), (row, col)


def test_bad_arguments():
    t = make(6, 40, torch.float32, LAYERNORM)

    def forward(**changes):
        u = {**t, **changes}
        residual_norm.residual_norm_forward(
            *u.values(), LAYERNORM, BOTH, 1e-5, 0.5 if u["seed"] is not None else 0.0, 1
        )

    one = torch.ones((), device=DEVICE)
    for message, changes in {
        r"residual_norm_forward: f has shape \(5, 40\), expected \(6, 40\) to match x": dict(f=t["f"][:5]),
        r"f has strides \(0, 0\), expected a contiguous tensor": dict(f=one.expand(6, 40)),
        r"weight has dtype torch.float64, expected torch.float32": dict(weight=t["weight"].double()),
        r"x has dtype torch.float64, expected float32, bfloat16 or float16": dict(x=t["x"].double()),
        r"bias has shape \(7,\), expected \(40,\)": dict(bias=t["bias"][:7]),
        r"mask has dtype torch.uint8, expected torch.bool": dict(mask=torch.zeros(3, device=DEVICE).byte()),
        r"mask has 4 samples, expected a divisor of the 6 rows": dict(mask=torch.zeros(4, device=DEVICE).bool()),
        r"seed has shape \(2,\), expected \(1,\)": dict(seed=torch.zeros(2, device=DEVICE).long()),
        r"x has 131073 columns, expected 1 to 131072": dict(x=torch.ones(1, 131073, device=DEVICE)),
    }.items():
        with pytest.raises(ValueError, match=message):
            forward(**changes)
    s, n, stats = residual_norm.residual_norm_forward(*t.values(), LAYERNORM, BOTH, 1e-5, 0.0, True)
    with pytest.raises(ValueError, match=r"residual_norm_backward: stats has shape \(6,\), expected \(6, 2\)"):
        residual_norm.residual_norm_backward(s, n, s, stats[:, 0], t["weight"], None, None, LAYERNORM, 0.0, ALL)
