"""multi_adapter, lora_linear, gather_rows and scatter_rows: parity with their parts, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpetl import ops
from ops.op_cases import _cpu_isas, assert_two_times, using

BACKENDS = ["reference", *_cpu_isas()]


def leaf(*shape, scale=1.0, offset=0.0, dtype=torch.float32):
    return (offset + scale * torch.randn(shape)).to(dtype).requires_grad_()


def stacks(tasks, d, r, shared="", dtype=torch.float32, norm=True):
    down, up = (1 if shared == "down" else tasks), (1 if shared == "up" else tasks)
    own = (
        (leaf(d, scale=0.2, offset=1.0, dtype=dtype), leaf(tasks, d, scale=0.2, dtype=dtype)) if norm else (None, None)
    )
    return [leaf(down, r, d, scale=d**-0.5, dtype=dtype), leaf(down, r, scale=0.1, dtype=dtype),
            leaf(up, d, r, scale=r**-0.5, dtype=dtype), leaf(up, d, scale=0.1, dtype=dtype), *own]  # fmt: skip


def gradients(function, x, weights, ids, cotangent, **options):
    w, (gamma, beta) = weights[:4], weights[4:]
    y = function(x, *w, ids, norm_weight=gamma, norm_bias=beta, residuals=(x,), **options)
    wanted = [x, *(t for t in weights if t is not None)]
    return [y.detach(), *torch.autograd.grad(y, wanted, cotangent)]


def double(t):
    return None if t is None else t.detach().double().requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shared", ["", "down", "up"])
@pytest.mark.parametrize("per_row", [False, True])
def test_multi_adapter_matches_float64(backend, dtype, shared, per_row):
    x, weights = leaf(5, 7, 76, dtype=dtype), stacks(4, 76, 24, shared, dtype)
    ids = torch.randint(0, 3, (5, 7) if per_row else (5,))  # task 3 has no rows
    cotangent = torch.randn(5, 7, 76).to(dtype)
    want = gradients(ops.multi_adapter_reference, double(x), list(map(double, weights)), ids, cotangent.double())
    theirs = gradients(ops.multi_adapter_reference, x, weights, ids, cotangent)
    with using("adapter", backend, dtype) as name:
        ours = gradients(ops.multi_adapter, x, weights, ids, cotangent, backend=name)
    for i, (o, t, w) in enumerate(zip(ours, theirs, want, strict=True)):
        assert_two_times(o, t, w, f"result {i}")
    assert not ours[-1][3].any()  # zeros, not None


@pytest.mark.parametrize("ids", [[0, 0, 0], [1, 1, 1], [2, 0, 2]], ids=str)
def test_multi_adapter_is_each_task_by_itself(ids):
    x, weights = leaf(3, 5, 32), stacks(3, 32, 8, norm=False)
    y = ops.multi_adapter(x, *weights[:4], torch.tensor(ids))
    for i, t in enumerate(ids):
        alone = ops.adapter(x[i : i + 1], *(w[t] for w in weights[:4]), activation="gelu_tanh")
        torch.testing.assert_close(y[i], alone[0], atol=1e-6, rtol=1e-5)  # auto may serve the two differently


# inductor's C++ takes seconds; that it takes registered ops as they are, test_registered.py and test_site.py show
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compositions_compile_whatever_the_ids(backend):
    torch._dynamo.reset()
    weights = stacks(3, 32, 8)

    @torch.compile(fullgraph=True, backend=backend)
    def block(x, ids, index, count):
        y = ops.multi_adapter(x, *weights[:4], ids, norm_weight=weights[4])
        return ops.scatter_rows(y, ops.gather_rows(y, index, count) * 2, index, count)

    for i in range(3):
        x, ids, index, count = (
            torch.randn(4, 6, 32),
            torch.randint(0, 3, (4,)),
            torch.randperm(4)[:3],
            torch.tensor([i]),
        )
        y = ops.multi_adapter_reference(x, *weights[:4], ids, norm_weight=weights[4])
        want = y.clone()
        want[index[:i]] *= 2
        torch.testing.assert_close(block(x, ids, index, count), want, rtol=1e-4, atol=1e-4)
        if i == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_padding_behind_count_may_be_anything():
    base, rows, count = torch.randn(3, 4), torch.randn(4, 4), torch.tensor([2])
    for padding in ([1, 1], [9, -5]):  # a kept row again, or no row at all
        index = torch.tensor([1, 2, *padding])
        want = base.clone()
        want[1:] = rows[:2]
        assert torch.equal(ops.scatter_rows(base, rows, index, count), want)
        got = ops.gather_rows(base, index, count)
        assert torch.equal(got[:2], base[1:]) and not got[2:].any()


def test_an_infinity_stays_in_its_task():
    x, weights = torch.randn(2, 3, 16), stacks(2, 16, 4, norm=False)
    x[1] = float("inf")
    for function in (ops.multi_adapter, ops.multi_adapter_reference):
        y = function(x, *weights[:4], torch.tensor([0, 1]), residuals=(x,))
        (dw,) = torch.autograd.grad(y[0].sum(), weights[0])
        assert dw[0].isfinite().all() and y[0].isfinite().all()


def test_lora_without_bias_and_masks_of_its_own():
    x, w, _, la, lb = lora((4, 8), 32, (32, 32), 4, torch.float32, (True, True))
    torch.testing.assert_close(ops.lora_linear(x, w, (None, None), la, lb)[1], x @ w[1].T + x @ la[1].T @ lb[1].T)
    same = (la[0], la[0]), (lb[0], lb[0])
    zero = tuple(torch.zeros_like(t) for t in w)
    runs = [ops.lora_linear(x, zero, (None, None), *same, dropout=0.5, seed=torch.tensor([s])) for s in (7, 8)]
    outs = [y for run in runs for y in run]
    assert not any(torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])


def test_lora_trains_biases_on_the_frozen_path():
    """VL-Adapter's LoRA trains every bias beside a frozen weight."""
    x, w, b, la, lb = lora((4, 8), 32, (32,), 4, torch.float32, (True,))
    b = (b[0].requires_grad_(),)
    (ours,) = torch.autograd.grad(ops.lora_linear(x, w, b, la, lb)[0].square().sum(), b)
    (want,) = torch.autograd.grad(ops.lora_linear_reference(x, w, b, la, lb)[0].square().sum(), b)
    torch.testing.assert_close(ours, want)


def test_a_merged_weight_that_was_written_to_is_not_undone():
    w, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    merged = ops.merge_lora(w, a, b)
    w.zero_()
    with pytest.raises(RuntimeError, match="merge_lora: weight was written to since the merge"):
        merged.undo()


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 6), kept=st.integers(0, 6), width=st.integers(1, 9), counted=st.booleans(), seed=st.integers(0, 9)
)
def test_rows(n, kept, width, counted, seed):
    torch.manual_seed(seed)
    index = torch.randperm(n)[: min(kept, n)]
    m = len(index)
    count = torch.tensor([m // 2]) if counted else None
    valid = m // 2 if counted else m
    base, rows = (torch.randn(k, 2, width, dtype=torch.float64, requires_grad=True) for k in (n, m))
    got = ops.gather_rows(base, index, count)
    assert torch.equal(got[:valid], base[index[:valid]]) and not got[valid:].any()
    want = base.detach().clone()
    want[index[:valid]] = rows.detach()[:valid]
    assert torch.equal(ops.scatter_rows(base, rows, index, count), want)
    torch.autograd.gradcheck(lambda b: ops.gather_rows(b, index, count), base)
    torch.autograd.gradcheck(lambda b, r: ops.scatter_rows(b, r, index, count), (base, rows))


def lora(shape, d, outs, r, dtype, with_lora):
    x = leaf(*shape, d, dtype=dtype)
    w = tuple(leaf(n, d, scale=d**-0.5, dtype=dtype).detach() for n in outs)
    b = tuple(leaf(n, scale=0.1, dtype=dtype).detach() for n in outs)
    la = tuple(leaf(r, d, scale=d**-0.5, dtype=dtype) if k else None for k in with_lora)
    lb = tuple(leaf(n, r, scale=0.3, dtype=dtype) if k else None for n, k in zip(outs, with_lora, strict=True))
    return x, w, b, la, lb


def lora_results(function, made, **options):
    x, w, b, la, lb = made
    out = function(x, w, b, la, lb, **options)
    torch.manual_seed(9)
    grads = [torch.randn(y.shape).to(y.dtype) for y in out]
    wanted = [x, *(t for t in (*la, *lb) if t is not None)]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, wanted, grads)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("outs", [(76, 76, 76), (76, 30, 5)], ids=str)
def test_lora_matches_float64(backend, dtype, dropout, outs):
    made = lora((3, 11), 76, outs, 8, dtype, (True, False, True))
    options = {"scale": 0.25, "dropout": dropout, "seed": torch.tensor([3]) if dropout else None}
    wide = tuple(double(t) if isinstance(t, torch.Tensor) else tuple(map(double, t)) for t in made)
    want, theirs = (lora_results(ops.lora_linear_reference, m, **options) for m in (wide, made))
    with using("adapter", backend, dtype) as name:
        ours = lora_results(ops.lora_linear, made, backend=name, **options)
    for i, (o, t, w) in enumerate(zip(ours, theirs, want, strict=True)):
        assert_two_times(o, t, w, f"result {i}")


@pytest.mark.parametrize("wanted", [(1, 2), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("out", [32, 20])
def test_lora_weight_is_the_merged_one_and_trains_its_factors(out, wanted):
    _, (w,), _, (a,), (b,) = lora((4,), 32, (out,), 3, torch.float32, (True,))
    cotangent = torch.randn(32, out).t()  # not dense
    found = []
    for function, dtype in ((ops.lora_weight, torch.float32), (_merged, torch.float32), (_merged, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_(i in wanted) for i, t in enumerate((w, a, b))]
        y = function(*leaves, scale=0.25)
        found.append((y, *torch.autograd.grad(y, [leaves[i] for i in wanted], cotangent.to(dtype))))
    for ours, theirs, exact in zip(*found, strict=True):
        assert_two_times(ours, theirs, exact, str(wanted))
    with torch.no_grad():
        torch.testing.assert_close(ops.lora_weight(w, a, b, scale=0.25), found[1][0])


def _merged(w, a, b, scale):
    return w + scale * (b @ a)


def test_lora_is_loralib_s_formula_and_trains_weights_that_want_it():
    x, w, b, la, lb = lora((4,), 12, (12,), 3, torch.float32, (True,))
    w = (w[0].requires_grad_(),)
    (y,) = ops.lora_linear(x, w, b, la, lb, scale=32 / 128)
    torch.testing.assert_close(y, F.linear(x, w[0], b[0]) + (x @ la[0].T @ lb[0].T) * 0.25)
    assert torch.autograd.grad(y.sum(), w[0])[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_merging_comes_undone_to_the_bit(dtype):
    x, w, b, la, lb = lora((4,), 12, (20,), 3, dtype, (True,))
    before = w[0].clone()
    with ops.merge_lora(w[0], la[0], lb[0], 0.5) as merged:
        (want,) = ops.lora_linear_reference(x, (before,), b, la, lb, scale=0.5)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(F.linear(x, w[0], b[0]), want, **tolerance)
    assert torch.equal(w[0], before)
    with pytest.raises(RuntimeError, match="merge_lora: undo was called before"):
        merged.undo()


X, WD, WU = torch.randn(2, 3, 8), torch.randn(4, 5, 8), torch.randn(4, 8, 5)


@pytest.mark.parametrize(
    "error, call",
    [
        ("multi_adapter: task_ids goes from 0 to 4, expected 0 to 3 (tasks=4)", lambda: multi(torch.tensor([0, 4]))),
        ("multi_adapter: task_ids goes from -1 to 0", lambda: multi(torch.tensor([0, -1]))),
        ("multi_adapter: task_ids has shape (3,), expected (2,) or (2, 3)", lambda: multi(torch.zeros(3).long())),
        ("multi_adapter: task_ids is float32 on cpu, expected int64", lambda: multi(torch.zeros(2))),
        ("multi_adapter: task_ids is a list, expected an int64 tensor", lambda: multi([0, 1])),
        (
            "multi_adapter: w_up has shape (3, 8, 5), expected 4 or 1 tasks",
            lambda: multi(torch.zeros(2).long(), WU[:3]),
        ),
        (
            "multi_adapter: w_up has shape (8, 5), expected tasks (or 1) in front",
            lambda: multi(torch.zeros(2).long(), WU[0]),
        ),
        (
            "multi_adapter: residuals[0] has shape (3, 2, 8)",
            lambda: multi(torch.tensor([0, 1]), residuals=(X.view(3, 2, 8),)),
        ),
        ("merge_lora: a is NoneType, expected a tensor of two dim", lambda: ops.merge_lora(WD[0], None, WU[0])),
        ("merge_lora: b has shape (8, 5), expected (5, 5)", lambda: ops.merge_lora(WD[0], WD[1], WU[0])),
        ("gather_rows: index is a list, expected an int64 tensor", lambda: ops.gather_rows(X, [0])),
        ("gather_rows: index is int32 on cpu, expected int64", lambda: ops.gather_rows(X, torch.zeros(1).int())),
        ("gather_rows: index has shape (1, 1)", lambda: ops.gather_rows(X, torch.zeros(1, 1).long())),
        ("gather_rows: count has shape (2,)", lambda: ops.gather_rows(X, torch.zeros(1).long(), torch.zeros(2).long())),
        (
            "scatter_rows: rows has shape (2, 8), expected (1, 3, 8)",
            lambda: ops.scatter_rows(X, X[0, :2], torch.zeros(1).long()),
        ),
        ("lora_weight: b has shape (8, 5), expected (5, 5)", lambda: ops.lora_weight(WD[0], WD[1], WU[0])),
        ("lora_weight: a has shape (8,), expected two dim", lambda: ops.lora_weight(WD[0], WD[1][0], WU[0])),
        ("lora_linear: weights is a Tensor, expected a tuple", lambda: ops.lora_linear(X, WD[0], (), (), ())),
        (
            "lora_linear: biases has 0 entries, expected 1, one per weight",
            lambda: ops.lora_linear(X, (WD[0],), (), (), ()),
        ),
        ("lora_linear: weights[0] is (8, 5), expected (out, in=8)", lambda: lora_call(w=WU[0])),
        ("lora_linear: lora_a[0] and lora_b[0]: one is None", lambda: lora_call(b=None)),
        ("lora_linear: lora_a[0] is (8, 5), expected (rank, in=8)", lambda: lora_call(a=WU[0])),
        ("lora_linear: lora_b[0] has shape (8, 5), expected (out=5, rank=2)", lambda: lora_call(b=WU[0])),
        ("lora_linear: dropout is 1, expected a number in [0, 1)", lambda: lora_call(dropout=1)),
        ("lora_linear: seed is a NoneType, expected an int64 tensor", lambda: lora_call(dropout=0.1)),
    ],
)
def test_errors(error, call):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert str(caught.value).startswith(error)


def multi(ids, w_up=WU, **options):
    return ops.multi_adapter(X, WD, None, w_up, None, ids, **options)


def lora_call(w=WD[0], a=torch.randn(2, 8), b=torch.randn(5, 2), **options):  # noqa: B008
    return ops.lora_linear(X, (w,), (None,), (a,), (b,), **options)
