"""PHM weights (Compacter): every backend against float64, the low-rank form, and bad input."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.library import opcheck

from fastpetl import ops
from ops.op_cases import _cpu_isas, assert_two_times, needs_cpp, using

BACKENDS = ["reference", *_cpu_isas(), "triton"]
FUSED = ["cpp", "triton"]
# (n, in', out') of each layer of a call: a model's down and up projections, odd sizes, one layer, tiny ones
CALLS = [
    [(2, 384, 48), (2, 48, 384)] * 2,
    [(4, 33, 7), (4, 17, 21), (4, 1, 5)],
    [(3, 20, 50)],
    [(1, 5, 9), (1, 1, 1)],
    [(8, 95, 3)],
]


def draw(calls, shared=False, dtype=torch.float32):
    """(rules, weights): leaves that want gradients."""
    rules = [torch.randn(n, n, n).to(dtype).requires_grad_() for n, _, _ in calls]
    weights = [(torch.randn(s) / 4).to(dtype).requires_grad_() for s in calls]
    return (rules[:1] if shared else rules), weights


def index_form(rule, weight):
    """H, written independently: x @ sum_i kron(rule[i], W[i]) is F.linear(x, H)."""
    return sum(torch.kron(r, w) for r, w in zip(rule, weight, strict=True)).t()


def results(function, rules, weights, cotangents, shared):
    hs = function(rules[0] if shared else rules, weights)
    return hs, torch.autograd.grad(hs, [*rules, *weights], [c.to(hs[0].dtype) for c in cotangents])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Triton's interpreter takes seconds for n = 8: n^3 sums in each program; and for a model's sizes, made smaller for it
@pytest.mark.parametrize(
    "label, calls",
    [(b, c) for b in BACKENDS for c in CALLS if b != "triton"]
    + [("triton", c) for c in ([(2, 96, 24), (2, 24, 96)] * 2, *CALLS[1:-1])],
    ids=lambda v: str(v)[:16],
)
def test_weights_against_float64(label, calls, dtype):
    shared = len(calls) == 3
    rules, weights = draw(calls, shared, dtype)
    cotangents = [torch.randn(n * q, n * k).to(dtype) for n, k, q in calls]

    def at(kind):
        return tuple([t.detach().to(kind).requires_grad_() for t in ts] for ts in (rules, weights))

    with using("phm", label, dtype) as name:
        ours, got = results(lambda r, w: ops.phm_weights(r, w, backend=name), rules, weights, cotangents, shared)
    theirs, says = results(ops.phm_weights_reference, *at(dtype), cotangents, shared)
    wide = at(torch.float64)
    want, exact = results(ops.phm_weights_reference, *wide, cotangents, shared)
    for i, (h, t, w) in enumerate(zip(ours, theirs, want, strict=True)):
        torch.testing.assert_close(w, index_form(wide[0][0 if shared else i], wide[1][i]))
        assert_two_times(h, t, w, f"H {i}")
    for i, (g, t, w) in enumerate(zip(got, says, exact, strict=True)):
        assert_two_times(g, t, w, f"gradient {i}")


@pytest.mark.parametrize("label", FUSED)
def test_strided_arguments_and_gradients(label):
    rule, w = torch.randn(3, 3, 3), torch.randn(3, 10, 7)
    strided = [rule.permute(2, 0, 1).requires_grad_()], [w.transpose(1, 2).requires_grad_()]
    dense = [strided[0][0].detach().clone().requires_grad_()], [strided[1][0].detach().clone().requires_grad_()]
    with using("phm", label) as name:
        h = ops.phm_weights(*strided, backend=name)[0]
        got = torch.autograd.grad(h.sum(), [strided[0][0], strided[1][0]])
    want = ops.phm_weights_reference(*dense)[0]
    torch.testing.assert_close(h, want)
    for g, t in zip(got, torch.autograd.grad(want.sum(), [dense[0][0], dense[1][0]]), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("label", FUSED)
def test_gradients_only_where_wanted(label):
    """Frozen rules or weights get none, and the others have the same bits; a layer that is not used gets zeros."""
    calls = [(2, 20, 9), (2, 9, 20)]
    rules, weights = draw(calls)
    with using("phm", label) as name:
        full = torch.autograd.grad(
            sum(h.square().sum() for h in ops.phm_weights(rules, weights, backend=name)), weights
        )
        frozen = [r.detach() for r in rules]
        loss = sum(h.square().sum() for h in ops.phm_weights(frozen, weights, backend=name))
        assert all(torch.equal(a, b) for a, b in zip(full, torch.autograd.grad(loss, weights), strict=True))
        one = [weights[0].detach(), weights[1]]
        hs = ops.phm_weights(frozen, one, backend=name)
        assert torch.equal(torch.autograd.grad(sum(h.square().sum() for h in hs), one[1])[0], full[1])
        unused = torch.autograd.grad(ops.phm_weights(rules, weights, backend=name)[0].sum(), [rules[1], weights[1]])
        assert not any(t.any() for t in unused)


@needs_cpp
def test_the_same_bits_for_any_number_of_threads():
    rules, weights = draw([(4, 192, 24), (4, 24, 192)] * 6)
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            hs = ops.phm_weights(rules, weights, backend="cpp")
            seen.append([*hs, *torch.autograd.grad(sum(h.square().sum() for h in hs), [*rules, *weights])])
    finally:
        torch.set_num_threads(threads)
    for run in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], run, strict=True))


def test_factorised_rules_and_weights():
    n, k = 4, 2
    left, right = torch.randn(n, n, 1, requires_grad=True), torch.randn(n, 1, n, requires_grad=True)
    downs = [(torch.randn(n, 9, k, requires_grad=True), torch.randn(n, k, 3, requires_grad=True)) for _ in range(3)]
    ups = [torch.randn(n, 3, 9, requires_grad=True)]
    weights = [*downs, *ups, downs[0]]
    leaves = [left, right, *(t for pair in downs for t in pair), *ups]
    got, want = ops.phm_weights((left, right), weights), ops.phm_weights_reference((left, right), weights)
    for h, t, w in zip(got, want, weights, strict=True):
        torch.testing.assert_close(h, t)
        torch.testing.assert_close(h, index_form(left @ right, w[0] @ w[1] if isinstance(w, tuple) else w))
    cotangents = [torch.randn_like(h) for h in got]
    for a, b in zip(*(torch.autograd.grad(hs, leaves, cotangents) for hs in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_reference_gradcheck():
    rules, weights = draw([(2, 3, 2), (2, 1, 2)], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: ops.phm_weights_reference(list(t[:2]), list(t[2:])), (*rules, *weights))


def layer(n, k, q, rank=0, dtype=torch.float32, pair=False):
    """(rule, weight) of in = n k, out = n q, near what a trained layer has."""

    def leaf(*shape, scale):
        return (torch.randn(shape) * scale).to(dtype).requires_grad_()

    rule = (leaf(n, n, 1, scale=1), leaf(n, 1, n, scale=1)) if pair else leaf(n, n, n, scale=1)
    if not rank:
        return rule, leaf(n, k, q, scale=(n * n * k) ** -0.5)
    return rule, (leaf(n, k, rank, scale=(n * k) ** -0.5), leaf(n, rank, q, scale=(n * rank) ** -0.5))


def leaves(*arguments):
    out = []
    for t in arguments:
        out += leaves(*t) if isinstance(t, tuple) else [] if t is None else [t]
    return out


def like(argument, dtype):
    if isinstance(argument, tuple):
        return tuple(like(t, dtype) for t in argument)
    return None if argument is None else argument.detach().to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_adapter_against_float64(rank, dtype):
    n, k, q = 4, 24, 3
    x, f = (torch.randn(2, 35, n * k).to(dtype).requires_grad_() for _ in range(2))
    biases = [(torch.randn(m) / 4).to(dtype).requires_grad_() for m in (n * q, n * k)]
    down, up = layer(n, k, q, rank, dtype), layer(n, q, k, rank, dtype, pair=True)
    norm = [
        (1 + torch.randn(n * k) / 5).to(dtype).requires_grad_(),
        (torch.randn(n * k) / 5).to(dtype).requires_grad_(),
    ]
    cotangent = torch.randn(2, 35, n * k).to(dtype)

    def run(function, kind):
        a = like((x, down, biases[0], up, biases[1], *norm, f), kind)
        x_, down_, bd, up_, bu, nw, nb, f_ = a
        y = function(x_, down_, bd, up_, bu, norm_weight=nw, norm_bias=nb, scale=0.7, residuals=(x_, f_))
        return y, torch.autograd.grad(y, leaves(*a), cotangent.to(kind))

    (y, got), (t, says), (w, exact) = (
        run(*case)
        for case in (
            (ops.phm_adapter, dtype), (ops.phm_adapter_reference, dtype), (ops.phm_adapter_reference, torch.float64)
        )
    )  # fmt: skip
    assert_two_times(y, t, w, "y")
    for i, (g, s, e) in enumerate(zip(got, says, exact, strict=True)):
        assert_two_times(g, s, e, f"gradient {i}")


def test_adapter_is_the_original_formula():
    """x @ H + b on both sides of gelu_new, H of the index form; given H from one call for the model the same bits."""
    down, up = layer(2, 16, 2), layer(2, 2, 16)
    x, bd, bu = torch.randn(5, 32), torch.randn(4), torch.randn(32)
    z = F.gelu(x @ index_form(*down).t() + bd, approximate="tanh")
    want = z @ index_form(*up).t() + bu + x
    y = ops.phm_adapter(x, down, bd, up, bu, residuals=(x,))
    torch.testing.assert_close(y, want)
    h_down, h_up = ops.phm_weights([down[0], up[0]], [down[1], up[1]])
    assert torch.equal(y, ops.phm_adapter(x, h_down, bd, h_up, bu, residuals=(x,)))


def test_lowrank_builds_no_h(monkeypatch):
    monkeypatch.setattr(ops.phm_weights.__globals__["_phm"], "run_forward", None)
    monkeypatch.setattr(ops.phm_weights.__globals__["_phm"], "formula", None)
    down, up = layer(4, 8, 1, rank=1), layer(4, 1, 8, rank=1)
    x = torch.randn(3, 5, 32)
    assert ops.phm_adapter(x, down, None, up, None).shape == x.shape
    with pytest.raises(RuntimeError, match="phm_adapter: backend is 'cpp', .* composed of torch's products"):
        ops.phm_adapter(x, down, None, up, None, backend="cpp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.phm_adapter(x, down, None, up, None, residuals=(x,))
    assert y.dtype == torch.float32


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["cpp"])
def test_opcheck(label):
    rules, weights = draw([(2, 8, 3), (2, 3, 8)])
    with using("phm", label) as name:
        opcheck(torch.ops.fastpetl.phm_weights.default, (rules, weights, name))
        opcheck(torch.ops.fastpetl.phm_weights.default, (rules[:1], [w.detach() for w in weights], name))
        plain = [[t.detach() for t in ts] for ts in (rules, weights)]
        for needs in (1, 2, 3):
            opcheck(torch.ops.fastpetl.phm_weights_backward.default, (torch.randn(192), *plain, needs, name))


def test_compiles_without_breaks_or_recompiles():
    down, up = layer(2, 16, 2), layer(2, 2, 16)
    low_down, low_up = layer(4, 8, 1, rank=1), layer(4, 1, 8, rank=1)
    parameters = leaves(down, up, low_down, low_up)
    cache = ops.WeightCache()

    def function(x):
        hs = cache.get("h", parameters, lambda: ops.phm_weights([down[0], up[0]], [down[1], up[1]]))
        y = ops.phm_adapter(x, hs[0], None, hs[1], None, residuals=(x,))
        return ops.phm_adapter(y, low_down, None, low_up, None, residuals=(y,))

    counters.clear()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    graphs = []
    for shape in ((2, 7), (3, 9), (5, 6), (4, 11)):
        x = torch.randn(*shape, 32)
        runs = [torch.autograd.grad(f(x).square().sum(), parameters) for f in (compiled, function)]
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == [graphs[1]] * 3 and graphs[1] <= 2 and not counters["graph_break"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), function(x))


# --- bad input --------------------------------------------------------------------------------------------------------

R, W, X = torch.zeros(2, 2, 2), torch.zeros(2, 5, 3), torch.zeros(4, 10)
Z = torch.zeros
BAD = [
    ((R, W), TypeError, "phm_weights: weights is a Tensor, expected a list of tensors or pairs"),
    ((R, []), ValueError, "phm_weights: weights is empty, expected at least one"),
    (([R, R], [W]), ValueError, "phm_weights: rules has 2 entries, expected 1 to match weights"),
    (([1], [W]), TypeError, "phm_weights: rules[0] is a int, expected a torch.Tensor"),
    ((R, [(W, W, W)]), TypeError, "phm_weights: weights[0] is a tuple of 3, expected a tensor or a pair of tensors"),
    ((Z(2, 2, 3), [W]), ValueError, "phm_weights: rules[0] has shape (2, 2, 3), expected (n, n, n)"),
    (((Z(2, 2, 1), Z(2, 2, 1)), [W]), ValueError, "phm_weights: rules[0] has shape (2, 2, 1), expected (n, 1, n) of a"),
    (
        (R, [Z(3, 5, 3)]),
        ValueError,
        "phm_weights: weights[0] has shape (3, 5, 3), expected (n, in / n, out / n) with n=2",
    ),
    (
        (R, [(Z(2, 5, 1), Z(2, 2, 3))]),
        ValueError,
        "phm_weights: weights[0] has shapes (2, 5, 1) and (2, 2, 3), expected",
    ),
    ((R, [W.double()]), ValueError, "phm_weights: weights[0] has dtype float64, expected float32 to match rules[0]"),
    (
        (R, [Z(2, 5, 3, device="meta")]),
        ValueError,
        "phm_weights: weights[0] is on meta, expected cpu to match rules[0]",
    ),
    ((R, [W, 3]), TypeError, "phm_weights: weights[1] is a int, expected a torch.Tensor"),
]
LOW = (R, (Z(2, 5, 1), Z(2, 1, 3))), None, (R, (Z(2, 3, 1), Z(2, 1, 5))), None


@pytest.mark.parametrize("arguments, kind, message", BAD, ids=[m[:60] for _, _, m in BAD])
def test_bad_input(arguments, kind, message):
    with pytest.raises(kind, match="^" + re.escape(message)):
        ops.phm_weights(*arguments)


def test_bad_input_of_the_adapter():
    for arguments, kind, message in [
        ((X, [R, W], None, LOW[2], None), TypeError, "phm_adapter: down is a list, expected H as a tensor or a pair"),
        ((Z(4, 11), *LOW), ValueError, "phm_adapter: down makes an H of shape (6, 10), expected (6, 11) to match x"),
        ((X, LOW[0], Z(5), *LOW[2:]), ValueError, "phm_adapter: b_down has shape (5,), expected (6,)"),
        ((X, (R, W), None, Z(11, 6), None), ValueError, "adapter: w_up has shape (11, 6), expected (hidden=10, bottl"),
    ]:
        with pytest.raises(kind, match="^" + re.escape(message)):
            ops.phm_adapter(*arguments)
    assert ops.phm_adapter(X, *LOW).shape == X.shape
    with pytest.raises(ValueError, match="phm: backend is 'fast', expected auto, cpp, triton, reference"):
        ops.phm_weight(R, W, backend="fast")
