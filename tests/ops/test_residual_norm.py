"""residual_norm: every backend against float64, its dropout mask, skipped samples, and what it refuses."""

import pytest
import torch

from fastpetl import backends, ops
from fastpetl.ops._dropout import dropout_keep
from ops.op_cases import _cpu_isas, assert_two_times, needs_cpp, using

BACKENDS = ["reference", "torch", *_cpu_isas(), "triton"]
NAMES = ("x", "f", "weight", "bias")


def arguments(shape, dtype, tail):
    d = shape[-1]

    def draw(*size, scale=1.0, offset=0.0):
        return (offset + scale * torch.randn(*size)).to(dtype).requires_grad_()

    made = {"x": draw(*shape, offset=0.3), "f": draw(*shape, scale=2.0), "weight": None, "bias": None}
    if tail:
        made["weight"] = draw(d, scale=0.2, offset=1.0)
    if tail == "layernorm":
        made["bias"] = draw(d, scale=0.2)
    return made


def run(function, tensors, grads, **options):
    out = function(*(tensors[n] for n in NAMES), **options)
    out = out if isinstance(out, tuple) else (out,)
    wanted = {n: t for n, t in tensors.items() if t is not None}
    found = torch.autograd.grad(out, list(wanted.values()), grads[: len(out)], allow_unused=True)
    return [o.detach() for o in out], dict(zip(wanted, found, strict=True))


def compare(backend, shape, dtype, tail, emit, **options):
    tensors = arguments(shape, dtype, tail)
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    options |= {"tail": tail, "emit": emit, "eps": 1e-6}
    wide = {n: None if t is None else t.detach().double().requires_grad_() for n, t in tensors.items()}
    want = run(ops.residual_norm_reference, wide, [g.double() for g in grads], **options)
    theirs = run(ops.residual_norm_reference, tensors, grads, **options)
    with using("residual_norm", backend, dtype) as name:
        ours = run(ops.residual_norm, tensors, grads, backend=name, **options)
    for o, t, w in zip(ours[0], theirs[0], want[0], strict=True):
        assert_two_times(o, t, w, "output")
    for n in ours[1]:
        if want[1][n] is not None:
            assert_two_times(ours[1][n], theirs[1][n], want[1][n], f"gradient of {n}")


# Triton's interpreter pays by the row; many rows are in tests/kernels/test_residual_norm_interpreter.py.
SHAPES = [
    (b, s) for b in BACKENDS for s in ((1, 760), (199, 768), (2, 3, 1128), (5, 7)) if (b, s[0]) != ("triton", 199)
]


@pytest.mark.parametrize("backend, shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tail, emit", [("layernorm", "both"), ("rmsnorm", "norm"), ("rmsnorm", "both"), (None, "sum")])
def test_matches_float64(backend, dtype, tail, emit, shape):
    compare(backend, shape, dtype, tail, emit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", ["layernorm", "rmsnorm", None])
def test_dropout_and_skipped_samples(backend, tail):
    mask = torch.tensor([False, True, False, True])
    options = {"dropout": 0.25, "seed": torch.tensor([2**40 + 12345]), "mask": mask}
    compare(backend, (4, 5, 67), torch.float32, tail, "both" if tail else "sum", **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_rows_are_not_read_and_exact(backend):
    x, f = torch.randn(3, 4, 33), torch.randn(3, 4, 33)
    f[1] = float("nan")
    with using("residual_norm", backend) as name:
        s = ops.residual_norm(x, f, tail=None, emit="sum", mask=torch.tensor([False, True, False]), backend=name)
    assert torch.equal(s[1], x[1]) and torch.equal(s[0], x[0] + f[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dropout_mask_is_the_reference_s(backend):
    rows, d, p, seed = 9, 37, 0.3, torch.tensor([-5])
    x, f = torch.zeros(rows, d), torch.ones(rows, d, requires_grad=True)
    with using("residual_norm", backend) as name:
        s = ops.residual_norm(x, f, tail=None, emit="sum", dropout=p, seed=seed, backend=name)
        (df,) = torch.autograd.grad(s.sum(), f)
    keep = dropout_keep(seed, rows, d, p)
    assert torch.equal(s != 0, keep) and torch.equal(df, s.detach())
    torch.testing.assert_close(s[keep], torch.full((int(keep.sum()),), 1 / (1 - p)))


def test_philox_is_the_published_generator():
    """Philox-4x32-10 of counter and key zero (Random123's known answers), and the mask's statistics."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for i, word in enumerate(words):  # p just below and just above the word
        for offset, kept in ((0, True), (1, False)):
            keep = dropout_keep(torch.tensor([0]), 1, 4, (word + offset) / 2**32)
            assert keep[0, i] == kept
    assert abs(dropout_keep(torch.tensor([7]), 200, 500, 0.1).float().mean() - 0.9) < 0.005
    assert not torch.equal(dropout_keep(torch.tensor([7]), 4, 50, 0.5), dropout_keep(torch.tensor([8]), 4, 50, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend):
    x = torch.randn(6, 40).t().requires_grad_()
    f = torch.randn(1, 6).expand(40, 6)
    w = torch.rand(6)
    with using("residual_norm", backend) as name:
        s, n = ops.residual_norm(x, f, w, tail="rmsnorm", backend=name)
        (ours,) = torch.autograd.grad((s.sum(), n.sum()), x)  # sums give expanded gradients
    s2, n2 = ops.residual_norm_reference(x, f, w, tail="rmsnorm")
    (want,) = torch.autograd.grad((s2.sum(), n2.sum()), x)
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(n, n2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_without_gradient(backend, unused):
    x, f, w = (torch.randn(4, 8, requires_grad=True) for _ in range(3))
    w = w[0].detach().requires_grad_()
    with using("residual_norm", backend) as name:
        out = ops.residual_norm(x, f, w, tail="rmsnorm", backend=name)[1 - unused]
        ours = torch.autograd.grad(out.square().sum(), (x, f, w), allow_unused=True)
    out = ops.residual_norm_reference(x, f, w, tail="rmsnorm")[1 - unused]
    want = torch.autograd.grad(out.square().sum(), (x, f, w), allow_unused=True)
    for o, t in zip(ours, want, strict=True):
        torch.testing.assert_close(torch.zeros_like(w) if o is None else o, torch.zeros_like(w) if t is None else t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_rows(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    w = torch.ones(16, requires_grad=True)
    with using("residual_norm", backend) as name:
        s, n = ops.residual_norm(x, torch.randn(shape), w, tail="rmsnorm", backend=name)
        dx, dw = torch.autograd.grad((s.sum() + n.sum()), (x, w))
    assert s.shape == n.shape == dx.shape == shape and not dw.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", ["layernorm", "rmsnorm"])
def test_the_norm_reads_the_rounded_sum(backend, tail):
    """What a reader of s would compute, to the bit: the saved statistics are of the s that is saved."""
    made = arguments((64, 300), torch.bfloat16, tail)
    options = {"tail": tail}
    with using("residual_norm", backend, torch.bfloat16) as name:
        s, n = ops.residual_norm(made["x"], made["f"], made["weight"], made["bias"], backend=name, **options)
        again = ops.residual_norm(s, None, made["weight"], made["bias"], emit="norm", backend=name, **options)
    assert torch.equal(n, again)


def test_infinities_and_nan_stay_in_their_rows():
    x = torch.randn(6, 48)
    x[1, 3], x[2, 5] = float("inf"), float("nan")
    w = torch.ones(48)
    s, n = ops.residual_norm(x, torch.zeros_like(x), w, w)
    want = torch.nn.functional.layer_norm(x, (48,), w, w)
    assert torch.equal(s.isfinite(), x.isfinite()) and torch.equal(n.isnan(), want.isnan())


@needs_cpp
def test_same_bits_for_any_number_of_threads():
    tensors = arguments((301, 768), torch.float32, "layernorm")
    grads = [torch.randn(301, 768) for _ in range(2)]
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(run(ops.residual_norm, tensors, grads, dropout=0.1, seed=torch.tensor([3])))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][0], other[0], strict=True))
        assert all(torch.equal(a, other[1][n]) for n, a in found[0][1].items())


def test_gradcheck_of_the_reference():
    tensors = [
        t if t is None else t.detach().double().requires_grad_()
        for t in arguments((3, 5), torch.float32, "layernorm").values()
    ]
    options = {"dropout": 0.3, "seed": torch.tensor([1]), "mask": torch.tensor([False, True, False])}
    assert torch.autograd.gradcheck(lambda *t: ops.residual_norm(*t, backend="reference", **options), tensors)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_opcheck(backend):
    x, f, w = (
        torch.randn(4, 16, requires_grad=True),
        torch.randn(4, 16, requires_grad=True),
        torch.rand(16, requires_grad=True),
    )
    mask, seed, op = torch.tensor([True, False]), torch.tensor([5]), torch.ops.fastpetl.residual_norm.default
    with using("residual_norm", backends.resolve("residual_norm", backend, x).name) as name:
        torch.library.opcheck(op, (x, f, w, None, mask, seed, 2, 3, 1e-5, 0.2, True, name))
        torch.library.opcheck(op, (x, None, w, None, None, None, 2, 2, 1e-5, 0.0, True, name))


def test_compiled_without_recompiling():
    torch._dynamo.reset()
    w = torch.rand(32, requires_grad=True)

    @torch.compile(fullgraph=True, dynamic=True)
    def block(x, f, mask, seed):
        s, n = ops.residual_norm(x, f, w, tail="rmsnorm", dropout=0.1, seed=seed, mask=mask)
        return (s * n).sum()

    counter = torch._dynamo.utils.counters
    for i, batch in enumerate((2, 3, 5)):
        x, f = torch.randn(batch, 4 + i, 32, requires_grad=True), torch.randn(batch, 4 + i, 32)
        mask, seed = torch.rand(batch) > 0.5, torch.tensor([i])
        ours = torch.autograd.grad(block(x, f, mask, seed), (x, w))
        s, n = ops.residual_norm_reference(x, f, w, tail="rmsnorm", dropout=0.1, seed=seed, mask=mask)
        for o, t in zip(ours, torch.autograd.grad((s * n).sum(), (x, w)), strict=True):
            torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-5)
        if i == 0:
            compiled = counter["stats"]["unique_graphs"]
    assert counter["stats"]["unique_graphs"] == compiled


def test_overwrite_writes_to_f_only_where_nothing_is_recorded():
    x, f, w = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    want = ops.residual_norm(x, f, w, tail="rmsnorm", emit="norm", backend="torch")
    kept = f.clone()
    given = {"tail": "rmsnorm", "emit": "norm", "backend": "torch", "overwrite": True}
    assert torch.equal(ops.residual_norm(x, f, w, **given), want) and torch.equal(f, kept)  # grad mode is on
    with torch.no_grad():
        assert torch.equal(ops.residual_norm(x, f, w, **given), want)
    assert torch.equal(f, x + kept)


def test_not_differentiable_twice():
    x = torch.randn(3, 8, requires_grad=True)
    name = backends.resolve("residual_norm", "auto", x).name
    if name in ("reference", "torch"):
        pytest.skip("plain torch differentiates any number of times")
    n = ops.residual_norm(x, x.detach(), torch.ones(8), tail="rmsnorm", emit="norm", backend=name)
    (dx,) = torch.autograd.grad(n.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_norm: .* cannot be differentiated twice"):
        dx.sum().backward()


X = torch.randn(2, 3, 8)
W = torch.ones(8)


@pytest.mark.parametrize(
    "error, change",
    [
        ("x is a list, expected a torch.Tensor", {"x": [1]}),
        ("f has shape (2, 8), expected (2, 3, 8) to match x", {"f": X[:, 0]}),
        ("f has dtype bfloat16, expected float32 to match x", {"f": X.bfloat16()}),
        ("f is None, expected a tensor, or emit='norm' without dropout and mask", {"f": None}),
        ("weight has shape (7,), expected (hidden=8,) to match x", {"weight": W[:7]}),
        ("weight is None with tail='layernorm', expected it if and only if there is a tail", {"weight": None}),
        ("weight is a tensor with tail=None", {"tail": None, "emit": "sum"}),
        ("bias is given with tail='rmsnorm', expected it with 'layernorm' only", {"tail": "rmsnorm", "bias": W}),
        ("tail is 'batchnorm', expected one of None, layernorm, rmsnorm", {"tail": "batchnorm"}),
        ("emit is 'all', expected one of sum, norm, both", {"emit": "all"}),
        ("emit is 'sum' with tail='layernorm', expected 'norm' or 'both'", {"emit": "sum"}),
        ("dropout is 1.0, expected a number in [0, 1)", {"dropout": 1.0}),
        ("eps is a str, expected a Python number", {"eps": "small"}),
        ("mask is a list, expected a bool tensor", {"mask": [True]}),
        ("mask is bool (3,) on cpu, expected bool (batch=2,) on cpu to match x", {"mask": torch.ones(3).bool()}),
        ("seed is a int, expected an int64 tensor of one element", {"dropout": 0.1, "seed": 3}),
        (
            "seed is int32 (1,) on cpu, expected int64 of one element on cpu",
            {"dropout": 0.1, "seed": torch.ones(1).int()},
        ),
        ("backend is 'fast', expected auto, cpp, triton, torch, reference", {"backend": "fast"}),
    ],
)
def test_errors(error, change):
    given = {"x": X, "f": X, "weight": W} | change
    with pytest.raises((ValueError, TypeError)) as caught:
        ops.residual_norm(**given)
    assert str(caught.value).startswith("residual_norm: ") and error in str(caught.value)


@pytest.mark.parametrize("emit", ["both", "norm"])
@needs_cpp
def test_what_is_measured_is_what_is_emitted(emit, monkeypatch):
    """A backend that is right is not rejected for an output nobody asked for."""
    monkeypatch.setenv("FASTPETL_TUNE", "1")
    backends.forget()
    x, f = torch.randn(40, 96), torch.randn(40, 96)
    with torch.no_grad():
        ops.residual_norm(x, f, torch.ones(96), torch.zeros(96), emit=emit)
    (found,) = (t for key, t in backends.tuned().items() if key[0] == "residual_norm")
    assert not found.rejected and set(found.milliseconds) == {"cpp", "torch"}
