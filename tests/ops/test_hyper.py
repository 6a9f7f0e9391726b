"""Hyperformer: generated weights against the layer-by-layer formula, gradients through the generators, the cache."""

import re

import pytest
import torch
import torch.nn.functional as F

from fastpetl import ops
from ops.op_cases import assert_two_times

T, S, H, P, L, D, R = 12, 12, 16, 8, 3, 24, 5  # task and layer embedding, hidden, projected, layers, width, bottleneck


def leaf(*shape, scale=0.3, offset=0.0, dtype=torch.float32):
    return (offset + scale * torch.randn(shape)).to(dtype).requires_grad_()


def network(kinds=0, norm=False):
    """Parameters by name: a controller and its generators."""
    width = T + S + (S if kinds else 0)
    p = dict(task=leaf(T), layers=leaf(L, S), w_in=leaf(H, width), b_in=leaf(H), w_out=leaf(P, H), b_out=leaf(P))
    p |= dict(norm_weight=leaf(P, offset=1.0), norm_bias=leaf(P))
    if kinds:
        p["kinds"] = leaf(kinds, S)
    for name, n in (("down_w", R * D), ("down_b", R), ("up_w", D * R), ("up_b", D)) + (
        (("norm_w", D), ("norm_b", D)) if norm else ()
    ):
        p[name], p[name + "_b"] = leaf(n, P, scale=0.1), leaf(n, scale=0.1)
    return p


def generate(p, kinds=False):
    keys = ("task", "layers", "w_in", "b_in", "w_out", "b_out", "norm_weight", "norm_bias")
    e = ops.hyper_embedding(*(p[k] for k in keys), kinds=p.get("kinds"))
    norm = [(p[k], p[k + "_b"]) for k in ("norm_w", "norm_b")] if "norm_w" in p else None
    down, up = ([(p[k + s], p[k + s + "_b"]) for s in ("_w", "_b")] for k in ("down", "up"))
    return ops.hyper_weights(e, down, up, norm=norm)


def original(p, layer, task=None, kind=None):
    """One layer's tensors, as the original makes them: one embedding, one matrix-vector product per tensor."""
    parts = [p["task"] if task is None else p["task"][task], p["layers"][layer]] + (
        [] if kind is None else [p["kinds"][kind]]
    )
    e = torch.relu(p["w_in"] @ torch.cat(parts) + p["b_in"])
    e = F.layer_norm(p["w_out"] @ e + p["b_out"], (P,), p["norm_weight"], p["norm_bias"], 1e-6)

    def linear(name, *shape):
        return (p[name] @ e + p[name + "_b"]).view(shape) if name in p else None

    return (
        linear("down_w", R, D), linear("down_b", R), linear("up_w", D, R), linear("up_b", D),
        linear("norm_w", D), linear("norm_b", D),
    )  # fmt: skip


def same(got, want):
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_weights_are_the_originals(norm):
    p = network(norm=norm)
    weights = generate(p)
    assert len(weights) == L
    for layer in range(L):
        same(weights[layer], original(p, layer))


def test_kinds_and_several_tasks():
    p = network(kinds=3)
    weights = generate(p)
    for layer in range(L):
        for kind in range(3):
            same((t if t is None else t[kind] for t in weights[layer]), original(p, layer, kind=kind))
    p["task"] = leaf(2, T)
    weights = generate(p)
    assert weights[0][0].shape == (3, 2, R, D)
    same((t if t is None else t[1, 0] for t in weights[2]), original(p, 2, task=0, kind=1))
    del p["kinds"]
    p["w_in"] = leaf(H, T + S)
    same((t if t is None else t[1] for t in generate(p)[1]), original(p, 1, task=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_adapter_and_gradients_against_float64(norm, dtype):
    p = {k: t.detach().to(dtype).requires_grad_() for k, t in network(norm=norm).items()}
    x = torch.randn(2, 33, D).to(dtype).requires_grad_()
    cotangent = torch.randn(2, 33, D).to(dtype)

    def run(kind, weights, adapter):
        q = {k: t.detach().to(kind).requires_grad_() for k, t in {**p, "x": x}.items()}
        y = q["x"]
        made = weights(q)
        for layer in range(L):
            y = adapter(y, made(layer), residuals=(y,))
        return y, torch.autograd.grad(y, list(q.values()), cotangent.to(kind))

    ours = run(dtype, lambda q: generate(q).__getitem__, ops.hyper_adapter)
    theirs, want = (
        run(kind, lambda q: lambda l: original(q, l), ops.hyper_adapter_reference) for kind in (dtype, torch.float64)
    )
    assert_two_times(ours[0], theirs[0], want[0], "y")
    for k, g, t, w in zip([*p, "x"], ours[1], theirs[1], want[1], strict=True):
        assert_two_times(g, t, w, f"gradient of {k}")


def test_one_product_per_generator_and_no_copies():
    """However many layers: two products for the embedding and one per generator; slices, not copies."""
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    p = network()
    with Count():
        weights = generate(p)
    assert sum(c in ("addmm", "mm", "linear") for c in calls) == 6 and "clone" not in calls
    assert len({weights[l][0].untyped_storage().data_ptr() for l in range(L)}) == 1
    assert all(weights[l][i].is_contiguous() for l in range(L) for i in range(4))


def test_cached_per_task():
    p = network()
    tasks = {"vqa": leaf(T), "gqa": leaf(T)}
    cache, made = ops.WeightCache(), []

    def get(task):
        q = {**p, "task": tasks[task]}
        return cache.get(task, q.values(), lambda: made.append(task) or generate(q))

    with torch.no_grad():
        assert get("vqa") is get("vqa") and get("gqa") is get("gqa") and made == ["vqa", "gqa"]
        tasks["gqa"].mul_(2)
        get("vqa"), get("gqa")
        assert made == ["vqa", "gqa", "gqa"]
        same(get("gqa")[1], original({**p, "task": tasks["gqa"]}, 1))
        p["down_w"].add_(1)
        get("vqa"), get("gqa")
        assert len(made) == 5 and len(cache) == 2
    get("vqa")[0][0].sum().backward()
    assert p["down_w"].grad is not None and len(made) == 6


def test_compiles_in_one_graph():
    p = network(norm=True)

    def function(x):
        weights = generate(p)
        for layer in range(L):
            x = ops.hyper_adapter(x, weights[layer], residuals=(x,))
        return x

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9):
        x = torch.randn(rows, D)
        grads = [torch.autograd.grad(f(x).square().sum(), list(p.values())) for f in (compiled, function)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


E = torch.zeros(L, P)
Z = torch.zeros
DOWN, UP = ((Z(R * D, P), Z(R * D)), (Z(R, P), Z(R))), ((Z(D * R, P), None), (Z(D, P), None))
NET = [Z(T), Z(L, S), Z(H, T + S), None, Z(P, H), None, Z(P), Z(P)]
BAD = [
    (lambda: ops.hyper_weights(Z(P), DOWN, UP), ValueError, "hyper_weights: embedding has shape (8,), expected (layers"),  # noqa: E501
    (lambda: ops.hyper_weights(E, Z(3), UP), TypeError, "hyper_weights: down is not a pair, expected (weight gener"),
    (lambda: ops.hyper_weights(E, (Z(3), Z(3)), UP), TypeError, "hyper_weights: the generator of the down weight is a T"),  # noqa: E501
    (lambda: ops.hyper_weights(Z(L, 9), DOWN, UP), ValueError,
     "hyper_weights: the generator of the down weight has shape (120, 8), expected (elements, 9) to match embedding"),
    (lambda: ops.hyper_weights(E, ((Z(7, P), None), DOWN[1]), UP), ValueError,
     "hyper_weights: the generator of the down weight makes 7 elements, expected r * d = 120 to match the biases' r=5"),
    (lambda: ops.hyper_weights(E, ((DOWN[0][0], Z(3)), DOWN[1]), UP), ValueError,
     "hyper_weights: the bias of the generator of the down weight has shape (3,), expected (120,)"),
    (lambda: ops.hyper_embedding(*NET[:2], Z(H, 9), *NET[3:]), ValueError,
     "hyper_embedding: w_in has shape (16, 9), expected (features, 24)"),
    (lambda: ops.hyper_embedding(*NET[:3], Z(3), *NET[4:]), ValueError, "hyper_embedding: b_in has shape (3,), expected ("),  # noqa: E501
    (lambda: ops.hyper_embedding(*NET[:6], Z(3), NET[7]), ValueError, "hyper_embedding: norm_weight has shape (3,), "),
    (lambda: ops.hyper_embedding(Z(T), Z(S), *NET[2:]), ValueError, "hyper_embedding: layers has shape (12,), expected"),  # noqa: E501
    (lambda: ops.hyper_embedding(*NET, eps=None), TypeError, "hyper_embedding: eps is a NoneType, expected a Python"),
    (lambda: ops.hyper_adapter(Z(3, D), (Z(1),)), TypeError, "hyper_adapter: weights is a tuple, expected a layer of"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, message", BAD, ids=[m[:60] for _, _, m in BAD])
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match="^" + re.escape(message)):
        call()
