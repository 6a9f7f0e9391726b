"""The raw C++ ops cpu_multi_adapter_forward and _backward: each row through its task's adapter, in one call."""

import sys

import pytest
import torch

from fastpetl.ops import multi_adapter, multi_adapter_reference
from ops.op_cases import assert_two_times, needs_cpp

ops = torch.ops.fastpetl
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias")
ACT, EPS, SCALE = "gelu_tanh", 1e-5, 0.7
CONFIG = (True, EPS, 3, SCALE)  # add_x, eps, gelu_tanh, scale
pytestmark = needs_cpp


def arguments(rows, d, r, tasks, dtype, norm=True, bias=True, shared=()):
    """x, a residual, a cotangent and the stacks by name; those in `shared` have one entry for all tasks."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape, scale=1.0, offset=0.0):
        return (offset + scale * torch.randn(*shape, generator=generator)).to(dtype)

    def stack(name, *shape, want=True, **how):
        t = draw(tasks, *shape, **how)
        return (t[:1].contiguous() if name in shared else t) if want else None

    stacks = {
        "w_down": stack("w_down", r, d, scale=d**-0.5),
        "b_down": stack("b_down", r, scale=0.1, want=bias),
        "w_up": stack("w_up", d, r, scale=r**-0.5),
        "b_up": stack("b_up", d, scale=0.1, want=bias),
        "norm_weight": stack("norm_weight", d, scale=0.2, offset=1.0, want=norm),
        "norm_bias": stack("norm_bias", d, scale=0.2, want=norm and bias),
    }
    return draw(rows, d, scale=1.5, offset=0.3), draw(rows, d), draw(rows, d), stacks


def run(x, res, g, stacks, ids, tasks, needs=127):
    """y, z, stats, dx and the six gradients per task."""
    out = ops.cpu_multi_adapter_forward(x, *stacks.values(), res, None, ids, tasks, *CONFIG, True)
    saved = (x, *out[1:], stacks["w_down"], stacks["w_up"], stacks["norm_weight"], stacks["norm_bias"])
    return [*out, *ops.cpu_multi_adapter_backward(g, *saved, ids, tasks, True, 3, SCALE, needs)]


def one_by_one(x, res, g, stacks, ids, tasks):
    """The same by the adapter's ops, on each task's rows gathered."""
    results = None
    for t in range(tasks):
        rows = (ids.repeat_interleave(x.shape[0] // ids.numel()) == t).nonzero().squeeze(1)
        own = {k: None if s is None else s[t if s.shape[0] == tasks else 0] for k, s in stacks.items()}
        u = x[rows]
        out = ops.cpu_adapter_forward(u, *own.values(), res[rows], None, *CONFIG, True)
        weights = (own["w_down"], own["w_up"], own["norm_weight"], own["norm_bias"])
        grads = ops.cpu_adapter_backward(g[rows], u, *out[1:], *weights, True, 3, SCALE, 127)
        if results is None:
            results = [s.new_empty(len(x), *s.shape[1:]) if s.numel() else s for s in (*out, grads[0])]
            results += [s.new_empty(tasks, *s.shape) if s.numel() else s for s in grads[1:]]
        for i, s in enumerate((*out, *grads)):
            if s.numel():
                results[i][rows if i < 4 else t] = s
    return results


IDS = {
    "rows": torch.tensor([2, 0, 0, 3, 2, 2, 0, 3, 3, 3, 0] * 18 + [2]),
    "samples": torch.tensor([3, 0, 0, 2, 3]),
    "one": torch.tensor([0] * 5),
    "alternating": torch.tensor([0, 3] * 50),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d, r, norm, bias", [(760, 20, True, True), (264, 100, False, True), (1024, 8, True, False)])
def test_the_bits_of_each_task_by_itself(isa, dtype, name, d, r, norm, bias):
    """Task 1 has no rows: its gradients are zeros. Shared parameters get their gradients task by task."""
    ids, tasks = IDS[name], 4
    rows = {"rows": 199, "samples": 130, "one": 40, "alternating": 100}[name]
    a = arguments(rows, d, r, tasks, DTYPES[dtype], norm, bias, ("w_down", "norm_weight", "norm_bias"))
    kept = [t for t in range(tasks) if bool((ids == t).any())]
    got, want = run(*a, ids, tasks), one_by_one(*a, ids, tasks)
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.shape == theirs.shape or ours.numel() == theirs.numel() == 0, i
        if i < 4:
            assert torch.equal(ours, theirs), i
        elif ours.numel():
            assert torch.equal(ours[kept], theirs[kept]), i
            assert not ours[[t for t in range(tasks) if t not in kept]].any(), i


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(isa, dtype):
    dtype, ids = DTYPES[dtype], IDS["samples"]
    x, res, g, stacks = arguments(130, 264, 40, 4, dtype)
    ours = dict(zip(("y", "z", "stats", "dx", *NAMES), run(x, res, g, stacks, ids, 4), strict=True))

    def reference(dtype):
        leaves = {k: s.to(dtype).requires_grad_() for k, s in {"x": x, **stacks}.items()}
        u, more = leaves["x"].view(5, 26, 264), {k: leaves[k] for k in ("norm_weight", "norm_bias")}
        weights = [leaves[k] for k in NAMES[:4]]
        options = dict(eps=EPS, activation=ACT, scale=SCALE, residuals=(u, res.to(dtype).view_as(u)))
        y = multi_adapter_reference(u, *weights, ids, **more, **options)
        grads = torch.autograd.grad(y, list(leaves.values()), g.to(dtype).view_as(y))
        return {"y": y.detach().view(x.shape)} | dict(zip(("dx", *NAMES), grads, strict=True))

    want, theirs = reference(torch.float64), reference(dtype)
    for k in want:
        assert_two_times(ours[k], theirs[k], want[k], k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(isa, dtype):
    a = arguments(600, 264, 40, 4, DTYPES[dtype])
    ids = torch.arange(600) % 7 % 4
    torch.set_num_threads(1)
    expected = run(*a, ids, 4)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for i, (t, e) in enumerate(zip(run(*a, ids, 4), expected, strict=True)):
            assert torch.equal(t, e), (threads, i)


def test_only_what_is_needed(isa):
    a = arguments(40, 264, 40, 4, torch.bfloat16)
    full = run(*a, IDS["samples"], 4)[3:]
    for needs in (0, 1, 2, 4, 8, 16, 32, 64, 2 | 64):
        for i, t in enumerate(run(*a, IDS["samples"], 4, needs)[3:]):
            assert torch.equal(t, full[i]) if needs >> i & 1 else t.numel() == 0, (needs, i)


def test_a_task_does_not_see_another_one(isa):
    x, res, g, stacks = arguments(40, 264, 40, 4, torch.float32)
    clean = run(x, res, g, stacks, IDS["samples"], 4)
    x[10] = float("nan")  # of sample 1, task 0
    got = run(x, res, g, stacks, IDS["samples"], 4)
    others = torch.arange(40) != 10
    assert not got[0][10].isfinite().any() and torch.equal(got[0][others], clean[0][others])
    for ours, theirs in zip(got[4:], clean[4:], strict=True):
        assert torch.equal(ours[1:], theirs[1:])
    assert not got[4][0].isfinite().all()


def test_no_rows(isa):
    a = arguments(0, 264, 40, 3, torch.float32)
    out = run(*a, torch.zeros(0, dtype=torch.int64), 3)
    assert out[0].shape == (0, 264) and out[3].shape == (0, 264)
    assert [t.shape[0] for t in out[4:]] == [3] * 6 and not any(t.any() for t in out[4:])


@pytest.mark.parametrize(
    "error, change",
    [
        ("task_ids holds 4, expected 0 to 3", {"ids": torch.tensor([0, 4])}),
        ("task_ids holds -1, expected 0 to 3", {"ids": torch.tensor([-1, 0])}),
        ("task_ids must be contiguous int64", {"ids": torch.tensor([0, 1, 2])}),
        ("task_ids must be contiguous int64", {"ids": torch.tensor([0, 1], dtype=torch.int32)}),
        ("w_up has 1320 elements, expected 1760", {"w_up": torch.ones(3, 44, 10)}),
        ("expected x .* w_down", {"w_down": torch.ones(10, 44)}),
    ],
)
def test_errors(error, change):
    x, res, g, stacks = arguments(4, 44, 10, 4, torch.float32)
    stacks |= {k: t for k, t in change.items() if k != "ids"}
    with pytest.raises(RuntimeError, match=error):
        run(x, res, g, stacks, change.get("ids", torch.tensor([0, 1])), 4)


# --- behind ops.multi_adapter -----------------------------------------------------------------------------------------


def public(x, res, stacks, ids, **options):
    named = {k: stacks[k] for k in ("norm_weight", "norm_bias")}
    weights = [stacks[k] for k in NAMES[:4]]
    return multi_adapter(x, *weights, ids, **named, eps=EPS, activation=ACT, scale=SCALE, residuals=res, **options)


@pytest.mark.parametrize("shared", [(), ("w_down", "b_down"), ("norm_weight", "b_up")])
def test_the_public_op_makes_one_call(isa, monkeypatch, shared):
    """Its bits; shared stacks, and a norm without tasks, get the sum of the tasks' gradients."""
    monkeypatch.setattr(sys.modules["fastpetl.ops.multi_adapter"], "_grouped", None)
    x, res, g, stacks = arguments(130, 264, 40, 4, torch.float32, shared=shared)
    if "norm_weight" in shared:
        stacks["norm_weight"] = stacks["norm_weight"][0]
    y, _, _, *want = run(x, res, g, stacks, IDS["samples"], 4)  # x is a residual there too
    leaves = [t.requires_grad_() for t in (x.view(5, 26, 264), *stacks.values())]
    got = public(leaves[0], (res.view(5, 26, 264), leaves[0]), stacks, IDS["samples"], backend="cpp")
    assert torch.equal(got.view(130, 264), y)
    grads = torch.autograd.grad(got, leaves, g.view(5, 26, 264))
    for ours, theirs, leaf in zip(grads, want, leaves, strict=True):
        summed = theirs if theirs.numel() == leaf.numel() else theirs.sum(0)
        assert torch.equal(ours.flatten(), summed.flatten())


def test_the_public_op_without_gradients_and_with_part_of_them(isa):
    x, res, g, stacks = arguments(130, 264, 40, 4, torch.bfloat16)
    full = run(x, res, g, stacks, IDS["samples"], 4)
    shape = (5, 26, 264)
    y = public(x.view(shape), (x.view(shape), res.view(shape)), stacks, IDS["samples"], backend="cpp")
    assert not y.requires_grad
    stacks["w_up"].requires_grad_()
    y = public(x.view(shape), (res.view(shape),), stacks, IDS["samples"], backend="cpp")
    (dw,) = torch.autograd.grad(y, stacks["w_up"], g.view(shape))
    assert torch.equal(dw, full[6])


def test_the_public_op_where_one_call_does_not_serve():
    """Under autocast, and with three residuals besides x, it is composed: as before, or an error."""
    x, res, g, stacks = arguments(130, 264, 40, 4, torch.float32)
    shape = (5, 26, 264)
    with torch.autocast("cpu", torch.bfloat16):
        y = public(x.view(shape), (res.view(shape),), stacks, IDS["samples"], backend="cpp")
    want = public(x.view(shape), (res.view(shape),), stacks, IDS["samples"], backend="reference")
    torch.testing.assert_close(y, want, rtol=0.05, atol=0.08)
    three = tuple(res.view(shape).clone() for _ in range(3))
    with pytest.raises(ValueError, match="adapter: residuals has 3 tensors beside x, expected at most 2"):
        public(x.view(shape), three, stacks, IDS["samples"], backend="cpp")
    stacks["w_up"] = stacks["w_up"][:, :3]
    with pytest.raises(ValueError, match=r"adapter: w_up has shape \(3, 40\), expected \(hidden=264, bottleneck=40\)"):
        public(x.view(shape), (), stacks, IDS["samples"], backend="cpp")


def test_the_public_op_is_of_first_order():
    x, res, g, stacks = arguments(10, 24, 8, 4, torch.float32)
    x.requires_grad_()
    y = public(x.view(5, 2, 24), (), stacks, IDS["samples"], backend="cpp")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="multi_adapter: the fused backends cannot be differentiated twice"):
        dx.sum().backward()
