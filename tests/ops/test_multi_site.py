"""multi_adapter_residual_norm: each sample's site with its task's weights, beside each task's samples by themselves."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastpetl import ops
from fastpetl.ops import multi_site
from fastpetl.spec import AdapterSpec
from ops.op_cases import assert_two_times, needs_cpp

D, R = 40, 6
FORMS = {
    "vlbart": {"norm": False, "norm_bias": False, "activation": "gelu_tanh", "tail": "layernorm"},
    "vlt5": {"norm": False, "norm_bias": False, "activation": "gelu_tanh", "tail": "rmsnorm", "tail_eps": 1e-6},
    "own norm": {"norm": True, "activation": "relu", "scale": 0.5, "tail": "layernorm"},
    "bare": {"norm": True, "norm_bias": False, "activation": "silu", "up_bias": False, "down_bias": False,
             "tail": "rmsnorm"},
}  # fmt: skip
IDS = {"four": [3, 0, 0, 2, 3], "two": [1, 1, 0, 1, 0], "one": [2] * 5}
PARTS = ("w_down", "b_down", "w_up", "b_up")
NORMS = ("norm_weight", "norm_bias", "tail_weight", "tail_bias")
pytestmark = needs_cpp


def spec_of(form, d=D, r=R):
    return AdapterSpec(d, r, input="sublayer", emit="norm", **FORMS[form])


def arguments(spec, shape=(5, 3), tasks=4, dtype=torch.float32, seed=3):
    """(x, f, weights of each task, the norms by name), without gradients."""
    generator = torch.Generator().manual_seed(seed)
    d, r, layernorm = spec.hidden, spec.bottleneck, spec.tail == "layernorm"

    def draw(*shape, scale=1.0, offset=0.0, want=True):
        return (offset + scale * torch.randn(*shape, generator=generator)).to(dtype) if want else None

    weights = [
        (draw(r, d, scale=d**-0.5), draw(r, scale=0.1, want=spec.down_bias), draw(d, r, scale=r**-0.5),
         draw(d, scale=0.1, want=spec.up_bias))
        for _ in range(tasks)
    ]  # fmt: skip
    norms = [draw(d, scale=0.2, offset=1.0, want=spec.norm), draw(d, scale=0.2, want=spec.norm_bias),
             draw(d, scale=0.2, offset=1.0), draw(d, scale=0.2, want=layernorm)]  # fmt: skip
    return draw(*shape, d, offset=-0.5), draw(*shape, d, scale=1.5), weights, dict(zip(NORMS, norms, strict=True))


def leaves(a, dtype=None):
    """The same as leaves that want gradients, and these in a list with their names."""
    x, f, weights, norms = a
    fresh = lambda t: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()  # noqa: E731
    x, f = fresh(x), fresh(f)
    weights, norms = [tuple(map(fresh, group)) for group in weights], {k: fresh(t) for k, t in norms.items()}
    named = {"x": x, "f": f, **norms}
    named |= {f"{k}{i}": t for i, group in enumerate(weights) for k, t in zip(PARTS, group, strict=True)}
    return (x, f, weights, norms), {k: t for k, t in named.items() if t is not None}


def run(function, a, ids, spec, dtype=None, **options):
    """n and the gradients by name; the cotangent depends on the shape alone."""
    (x, f, weights, norms), wanted = leaves(a, dtype)
    n = function(x, f, weights, ids, spec=spec, **norms, **options)
    cotangent = torch.linspace(-2, 3, n.numel(), dtype=torch.float64).sin().view(n.shape).to(n.dtype)
    grads = torch.autograd.grad(n, list(wanted.values()), cotangent)
    return {"n": n.detach(), **dict(zip(wanted, grads, strict=True))}


def one_by_one(a, ids, spec, **options):
    """`run` of `adapter_residual_norm` on each task's samples, gathered."""
    (x, f, weights, norms), wanted = leaves(a)
    n = torch.empty_like(x)
    for t, group in enumerate(weights):
        mine = ids == t
        if mine.any():
            y = ops.adapter_residual_norm(x[mine], f[mine], *group, spec=spec, **norms, **options)
            n = n.masked_scatter(mine.view(-1, *(1,) * (x.dim() - 1)).expand_as(n), y)
    cotangent = torch.linspace(-2, 3, n.numel(), dtype=torch.float64).sin().view(n.shape).to(n.dtype)
    grads = torch.autograd.grad(n, list(wanted.values()), cotangent, allow_unused=True)
    return {"n": n.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64(isa, dtype, form, ids):
    """All gradients of all tasks."""
    spec, ids = spec_of(form), torch.tensor(IDS[ids])
    a = arguments(spec, dtype=dtype)
    ours = run(ops.multi_adapter_residual_norm, a, ids, spec, backend="cpp")
    theirs = run(ops.multi_adapter_residual_norm_reference, a, ids, spec)
    exact = run(ops.multi_adapter_residual_norm_reference, a, ids, spec, dtype=torch.float64)
    for name in exact:
        assert_two_times(ours[name], theirs[name], exact[name], name)
    absent = [str(t) for t in range(4) if t not in ids]
    for name in (f"{part}{t}" for part in PARTS for t in absent):
        assert name not in ours or not ours[name].any(), name


@pytest.mark.parametrize(("d", "r", "shape"), [
    (40, 6, (5, 3)), (264, 100, (5, 27)), (760, 8, (5, 1)), (24, 3, (5,)), (33, 5, (5, 2, 3)), (1024, 48, (5, 4)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_of_each_task_by_itself(isa, dtype, d, r, shape):
    for form in ("own norm", "vlt5"):
        spec, ids = spec_of(form, d, r), torch.tensor(IDS["four"])
        a = arguments(spec, shape, dtype=dtype)
        got = run(ops.multi_adapter_residual_norm, a, ids, spec, backend="cpp")
        want = one_by_one(a, ids, spec, backend="cpp")
        for name, theirs in want.items():
            if name in NORMS:
                continue  # summed over the tasks in another order: test_matches_float64
            zeros = theirs is None
            assert torch.equal(got[name], torch.zeros_like(got[name]) if zeros else theirs), (form, name)


@pytest.mark.parametrize("keep", ["norm", "inputs"])
def test_keep(isa, keep):
    spec, ids = spec_of("vlbart"), torch.tensor(IDS["four"])
    a = arguments(spec)
    got, want = (run(ops.multi_adapter_residual_norm, a, ids, spec, backend="cpp", keep=k) for k in (keep, "sum"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)
    x, f, weights, norms = leaves(a)[0]
    kept = ops.multi_adapter_residual_norm(x, f, weights, ids, spec=spec, **norms, backend="cpp", keep=keep)
    assert (kept.grad_fn.saved_tensors[0].data_ptr() == kept.data_ptr()) == (keep == "norm")
    norms["tail_weight"].data[0] = 1e-6  # dividing by it would magnify its rounding
    kept = ops.multi_adapter_residual_norm(x, f, weights, ids, spec=spec, **norms, backend="cpp", keep=keep)
    assert kept.grad_fn.saved_tensors[0].data_ptr() != kept.data_ptr()


def test_the_same_bits_for_any_number_of_threads(isa):
    """Whether the tasks are each one thread's or all threads', one after the other."""
    for ids in ([0, 1, 2, 3] * 4, [0] * 13 + [1, 2, 3], [0, 1] * 8):
        spec, ids = spec_of("own norm", 264, 40), torch.tensor(ids)
        a, expected = arguments(spec, (16, 21)), None
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found = run(ops.multi_adapter_residual_norm, a, ids, spec, backend="cpp")
            expected = expected or found
            assert all(torch.equal(found[name], expected[name]) for name in expected), threads


def test_only_what_is_asked_for():
    spec, ids = spec_of("own norm"), torch.tensor(IDS["four"])
    a = arguments(spec)
    full = run(ops.multi_adapter_residual_norm, a, ids, spec, backend="cpp")
    for name in full:
        if name == "n":
            continue
        (x, f, weights, norms), wanted = leaves(a)
        for other, t in wanted.items():
            t.requires_grad_(other == name)
        n = ops.multi_adapter_residual_norm(x, f, weights, ids, spec=spec, **norms, backend="cpp")
        assert torch.equal(n, full["n"])
        n.backward(torch.linspace(-2, 3, n.numel(), dtype=torch.float64).sin().view(n.shape).float())
        assert [k for k, t in wanted.items() if t.grad is not None] == [name]
        torch.testing.assert_close(wanted[name].grad, full[name], rtol=1e-5, atol=1e-6)
    x, f, weights, norms = a
    assert torch.equal(
        ops.multi_adapter_residual_norm(x, f, weights, ids, spec=spec, **norms, backend="cpp"), full["n"]
    )


def test_weights_that_tasks_share_get_the_sum():
    spec, ids = spec_of("vlbart"), torch.tensor(IDS["four"])
    a = arguments(spec)
    for group in range(1, 4):
        a[2][group] = (*a[2][group][:2], *a[2][0][2:])
    apart = run(ops.multi_adapter_residual_norm, a, ids, spec, backend="cpp")
    x, f, weights, norms = leaves(a)[0]
    weights = [(*group[:2], *weights[0][2:]) for group in weights]
    n = ops.multi_adapter_residual_norm(x, f, weights, ids, spec=spec, **norms, backend="cpp")
    n.backward(torch.linspace(-2, 3, n.numel(), dtype=torch.float64).sin().view(n.shape).float())
    for i, part in ((2, "w_up"), (3, "b_up")):
        torch.testing.assert_close(weights[0][i].grad, sum(apart[f"{part}{t}"] for t in range(4)))


def test_a_task_does_not_see_another_one(isa):
    spec, ids = spec_of("own norm"), torch.tensor(IDS["four"])
    a = arguments(spec)
    clean = run(ops.multi_adapter_residual_norm, a, ids, spec, backend="cpp")
    a[1][1, 2] = float("nan")  # of sample 1, task 0
    got = run(ops.multi_adapter_residual_norm, a, ids, spec, backend="cpp")
    here = torch.zeros(5, 3, dtype=torch.bool)
    here[1, 2] = True
    assert got["n"][here].isnan().all() and torch.equal(got["n"][~here], clean["n"][~here])
    for t in (1, 2, 3):
        assert all(torch.equal(got[f"{part}{t}"], clean[f"{part}{t}"]) for part in PARTS)
    assert got["w_down0"].isnan().any()


@pytest.mark.parametrize("backend", ["auto", "cpp", "composed", "reference"])
def test_backends_agree_and_auto_calls_once(backend, monkeypatch):
    spec, ids, calls = spec_of("own norm"), torch.tensor(IDS["four"]), []
    a = arguments(spec)
    want = run(ops.multi_adapter_residual_norm_reference, a, ids, spec)
    monkeypatch.setattr(multi_site, "choose", lambda op, name, *_: name)  # not by the time it takes
    forward = multi_site._forward
    monkeypatch.setattr(multi_site, "_forward", lambda *a: calls.append(1) or forward(*a))
    got = run(ops.multi_adapter_residual_norm, a, ids, spec, backend=backend)
    assert len(calls) == (backend in ("auto", "cpp"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_measures_both_in_fp32(dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(multi_site, "choose", lambda *a: asked.append(a) or "composed")
    spec, ids = spec_of("vlbart"), torch.tensor(IDS["four"])
    run(ops.multi_adapter_residual_norm, arguments(spec, dtype=dtype), ids, spec)
    if dtype == torch.bfloat16:
        assert not asked
        return
    ((op, name, names, _, one, tensors, grad, baseline, _),) = asked
    assert (op, name, names, grad, baseline) == ("multi_site", "cpp", ("cpp", "composed"), True, "composed")
    both = [one(n, tensors) for n in names]
    torch.testing.assert_close(*both)


def test_strided_arguments(isa):
    spec, ids = spec_of("own norm"), torch.tensor([3, 9, 0, 9, 0, 9, 2, 9, 3, 9])[::2]
    x, f, weights, norms = arguments(spec)
    want = ops.multi_adapter_residual_norm(x, f, weights, ids.contiguous(), spec=spec, **norms, backend="cpp")
    turned = [tuple(t.t().contiguous().t() if t.dim() == 2 else t for t in group) for group in weights]
    x, f = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, f))
    got = ops.multi_adapter_residual_norm(x, f, turned, ids, spec=spec, **norms, backend="cpp")
    assert torch.equal(got, want)
    f = f[:, :1].expand(5, 3, D).requires_grad_()
    assert ops.multi_adapter_residual_norm(x, f, turned, ids, spec=spec, **norms, backend="cpp").requires_grad


def test_no_samples():
    spec = spec_of("vlbart")
    x, f, weights, norms = arguments(spec, (0, 3))
    n = ops.multi_adapter_residual_norm(x, f, weights, torch.zeros(0).long(), spec=spec, **norms, backend="cpp")
    assert n.shape == (0, 3, D)


def test_compiled():
    """Made of registered ops, in one graph; its task ids may change without another one."""
    spec, counter = spec_of("own norm"), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(ops.multi_adapter_residual_norm, backend=counter, fullgraph=True)
    a = arguments(spec)
    for ids in (torch.tensor(IDS["four"]), torch.tensor(IDS["two"])):
        want = run(ops.multi_adapter_residual_norm_reference, a, ids, spec)
        got = run(compiled, a, ids, spec)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)
    assert counter.frame_count == 1


def test_under_autocast_it_is_composed():
    spec, ids = spec_of("own norm"), torch.tensor(IDS["four"])
    x, f, weights, norms = arguments(spec)
    want = ops.multi_adapter_residual_norm(x, f, weights, ids, spec=spec, **norms, backend="cpp")
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.multi_site_serves(x)
        mixed = [tuple(t.bfloat16() for t in group) for group in weights]
        got = ops.multi_adapter_residual_norm(x, f, mixed, ids, spec=spec, **norms)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.08)


def test_of_first_order():
    spec, ids = spec_of("vlbart"), torch.tensor(IDS["four"])
    (x, f, weights, norms), _ = leaves(arguments(spec))
    n = ops.multi_adapter_residual_norm(x, f, weights, ids, spec=spec, **norms, backend="cpp")
    (dx,) = torch.autograd.grad(n.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="multi_adapter_residual_norm: the fused backends cannot be differentiated"):
        dx.sum().backward()


def test_reference_gradcheck():
    spec, ids = spec_of("own norm", 4, 2), torch.tensor([1, 0])
    (x, f, weights, norms), wanted = leaves(arguments(spec, (2, 2), 2), torch.float64)
    names = list(wanted)

    def call(*tensors):
        named = dict(zip(names, tensors, strict=True))
        groups = [tuple(named.get(f"{part}{t}") for part in PARTS) for t in range(2)]
        norms = {k: named.get(k) for k in NORMS}
        return ops.multi_adapter_residual_norm_reference(named["x"], named["f"], groups, ids, spec=spec, **norms)

    torch.nn.init.uniform_(weights[0][1].data, 1, 2)  # away from the ReLU's kink
    torch.nn.init.uniform_(weights[1][1].data, 1, 2)
    assert torch.autograd.gradcheck(call, list(wanted.values()))


# --- what is refused --------------------------------------------------------------------------------------------------

IDS5 = torch.tensor(IDS["four"])
PLAIN = {"input": "sublayer", "placement": "inside", "emit": "norm", "dropout": 0.0}


def changed(spec=None, **change):
    """The op called with some arguments changed; a weight of task 1 by its name."""
    spec = spec or spec_of("own norm")
    x, f, weights, norms = arguments(spec_of("own norm"))
    given = {"x": x, "f": f, "weights": weights, "task_ids": IDS5, "spec": spec, "backend": "cpp", **norms}
    for name, value in change.items():
        if name in PARTS:
            group = [value if part == name else t for part, t in zip(PARTS, weights[1], strict=True)]
            weights[1] = tuple(group)
        else:
            given[name] = value
    for function in (ops.multi_adapter_residual_norm, ops.multi_adapter_residual_norm_reference):
        if function is not ops.multi_adapter_residual_norm:
            given = {k: t for k, t in given.items() if k not in ("backend", "keep")}
        yield lambda function=function, given=given: function(**given)


ERRORS = [
    (TypeError, "spec is a dict, expected an AdapterSpec", {"spec": {"a": 1}}),
    (ValueError, f"spec has {PLAIN | {'input': 'residual'}}, expected {PLAIN}",
     {"spec": AdapterSpec(D, R, tail="layernorm", emit="norm")}),
    (ValueError, f"spec has {PLAIN | {'dropout': 0.1}}, expected {PLAIN}",
     {"spec": AdapterSpec(D, R, input="sublayer", tail="layernorm", emit="norm", dropout=0.1)}),
    (TypeError, "x is a list, expected a torch.Tensor", {"x": [1]}),
    (ValueError, "x has dtype int64, expected a floating-point dtype", {"x": torch.zeros(5, 3, D).long()}),
    (ValueError, "x has shape (5, 3, 39), expected (batch, ..., hidden=40) as in spec", {"x": torch.zeros(5, 3, 39)}),
    (ValueError, "x has shape (40,), expected (batch, ..., hidden=40) as in spec", {"x": torch.zeros(40)}),
    (ValueError, "f is None, expected the contrary", {"f": None}),
    (ValueError, "f has shape (5, 2, 40), expected (5, 3, 40) to match x", {"f": torch.zeros(5, 2, D)}),
    (ValueError, "f has dtype float64, expected float32 to match x", {"f": torch.zeros(5, 3, D).double()}),
    (ValueError, "norm_weight is None, expected the contrary as spec says", {"norm_weight": None}),
    (ValueError, "norm_bias has shape (3,), expected (40,) to match spec", {"norm_bias": torch.zeros(3)}),
    (ValueError, "tail_weight is None, expected the contrary as spec says", {"tail_weight": None}),
    (ValueError, "tail_bias is given, expected the contrary as spec says",
     {"spec": AdapterSpec(D, R, activation="relu", input="sublayer", tail="rmsnorm", emit="norm")}),
    (ValueError, "weights is empty, expected a tuple (w_down, b_down, w_up, b_up) for each task", {"weights": []}),
    (ValueError, "weights is a Tensor, expected a tuple", {"weights": torch.zeros(3)}),
    (ValueError, "weights[0] is a Tensor, expected a tuple", {"weights": [torch.zeros(3)]}),
    (ValueError, "weights[0] is of 1, expected a tuple (w_down, b_down, w_up, b_up)", {"weights": [(torch.zeros(3),)]}),
    (ValueError, "b_down of weights[1] is None, expected the contrary as spec says", {"b_down": None}),
    (ValueError, "w_up of weights[1] has shape (40, 7), expected (40, 6) to match spec", {"w_up": torch.zeros(D, 7)}),
    (TypeError, "w_down of weights[1] is a int, expected a torch.Tensor", {"w_down": 3}),
    (ValueError, "b_up of weights[1] has dtype bfloat16, expected float32", {"b_up": torch.zeros(D).bfloat16()}),
    (TypeError, "task_ids is a list, expected an int64 tensor", {"task_ids": [0] * 5}),
    (ValueError, "task_ids is int32 on cpu, expected int64 on cpu", {"task_ids": IDS5.int()}),
    (ValueError, "task_ids has shape (5, 1), expected (5,), one for each sample", {"task_ids": IDS5[:, None]}),
    (ValueError, "task_ids goes from 0 to 4, expected 0 to 3 (tasks=4)", {"task_ids": IDS5 + (IDS5 == 3)}),
    (ValueError, "task_ids goes from -1 to 3, expected 0 to 3 (tasks=4)", {"task_ids": IDS5 - (IDS5 == 0).long()}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "change"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_errors(kind, message, change):
    for call in changed(**change):
        with pytest.raises(kind) as caught:
            call()
        assert message in str(caught.value)
        assert str(caught.value).startswith(("multi_adapter_residual_norm: ", "multi_adapter_reference: task_ids goes"))


def test_a_backend_or_keep_that_is_not():
    with pytest.raises(ValueError, match="keep is 'all', expected one of sum, norm, inputs"):
        next(changed(keep="all"))()
    with pytest.raises(ValueError, match="'fast'"):
        next(changed(backend="fast"))()


def raw(ids, tail=1, **change):
    spec = spec_of("vlbart")
    x, f, weights, norms = arguments(spec)
    kinds = [list(kind) for kind in zip(*weights, strict=True)]
    for i, part in enumerate(PARTS):
        kinds[i] = change.get(part, kinds[i])
    tails = norms["tail_weight"], norms["tail_bias"]
    return torch.ops.fastpetl.cpu_multi_site_forward(
        f.view(-1, D), *kinds, None, None, x.view(-1, D), *tails, ids, 1e-5, 3, 1.0, tail, 1e-5, True, True
    )  # fmt: skip


@pytest.mark.parametrize(("message", "change"), [
    ("task_ids holds 4, expected 0 to 3", {"ids": torch.tensor([0, 1, 2, 4, 0])}),
    ("task_ids must be contiguous int64", {"ids": torch.tensor([0, 1])}),
    ("task_ids must be contiguous int64", {"ids": IDS5.int()}),
    ("tail is 0, expected 1 .LayerNorm. or 2", {"ids": IDS5, "tail": 0}),
    ("w_up has 3 tensors, expected one per task", {"ids": IDS5, "w_up": [torch.zeros(D, R)] * 3}),
    ("b_up has 3 elements, expected 40", {"ids": IDS5, "b_up": [torch.zeros(3)] * 4}),
    ("expected x .rows, d. and w_down", {"ids": IDS5, "w_down": []}),
])  # fmt: skip
def test_what_the_raw_op_refuses(message, change):
    with pytest.raises(RuntimeError, match=f"cpu_multi_site_forward: .*{message}"):
        raw(**change)
