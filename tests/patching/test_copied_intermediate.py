"""A copied `BertIntermediate`: which activations are computed behind its product, and which are called."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers.activations import ACT2FN

import fastpetl
from copied_bert import Intermediate
from copied_clipvil import gelu
from fastpetl import ops
from fastpetl.nn import activations
from fastpetl.nn.activations import own_gelu, recognised
from patching.contract_cases import INTERMEDIATE, assert_close, fell_back, rows
from vilt_tiny import one_thread, randomize, relative  # noqa: F401

SEEN = []


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def swish(x):
    return x * torch.sigmoid(x)


def by_cdf(x):
    """GELU, written another way."""
    return x * 0.5 * torch.erfc(-x * math.sqrt(0.5))


def calls_torchs(x):
    return F.gelu(x)


def leaves_half(x):
    return F.gelu(x[..., : x.shape[-1] // 2])


def flat_far_out(x):
    return torch.where(x > 300, x.clamp(max=300), F.gelu(x))


def tells_a_list(x):
    SEEN.append(x.shape)
    return F.gelu(x)


def says_so(x):
    print(x.shape)
    return F.gelu(x)


def drops(x):
    return F.dropout(F.gelu(x), 0.5)


def refuses(x):
    raise TypeError("float64")


def counts(x):
    global CALLS
    CALLS = x.numel()
    return F.gelu(x)


def hides(x):
    tell = lambda: SEEN.append(x.shape)  # noqa: E731
    tell()
    return F.gelu(x)


def imports(x):
    import builtins

    builtins.print(x.shape)
    return F.gelu(x)


def within(act):
    return lambda x: act(x)


GELUS = {"lxmert": gelu, "erfc": by_cdf, "torch": calls_torchs, "lambda": lambda x: F.gelu(x)}
TELLING = [tells_a_list, says_so, counts, hides, imports, within(F.gelu)]
OTHERS = [tanh_gelu, swish, leaves_half, flat_far_out, drops, refuses, *TELLING]


@pytest.mark.parametrize("name", GELUS)
def test_a_projects_own_gelu(name):
    assert own_gelu(GELUS[name]) and own_gelu(GELUS[name]) and recognised(GELUS[name]) == "gelu"


@pytest.mark.parametrize("function", OTHERS, ids=lambda f: f.__name__)
def test_functions_that_are_not_gelu_or_not_that_alone(function):
    before = torch.get_rng_state()
    assert not own_gelu(function) and recognised(function) is None
    assert torch.equal(before, torch.get_rng_state()) and not SEEN


def test_a_function_is_asked_once_and_not_kept_alive():
    asked = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            asked.append(function)
            return function(*args, **(kwargs or {}))

    def mine(x):
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))

    with Counting():
        assert own_gelu(mine) and asked
        asked.clear()
        assert own_gelu(mine) and not asked
    before = len(activations._found)
    del mine
    assert len(activations._found) == before - 1


# --- the module -------------------------------------------------------------------------------------------------------

# activation -> its name for the op, None where it is called
ACTIVATIONS = {
    "transformers'": (lambda: ACT2FN["gelu"], "gelu"),
    "F.gelu": (lambda: F.gelu, "gelu"),
    "nn.GELU": (nn.GELU, "gelu"),
    "own": (lambda: gelu, "gelu"),
    "F.relu": (lambda: F.relu, "relu"),
    "torch.relu": (lambda: torch.relu, "relu"),
    "nn.ReLU": (nn.ReLU, "relu"),
    "gelu_new": (lambda: ACT2FN["gelu_new"], None),
    "nn.GELU by tanh": (lambda: nn.GELU("tanh"), None),
    "own by tanh": (lambda: tanh_gelu, None),
    "F.silu": (lambda: F.silu, None),
    "nn.Tanh": (nn.Tanh, None),
}


@pytest.fixture
def called(monkeypatch):
    """The activations of all calls of the op."""
    seen, op = [], ops.activated_linear
    monkeypatch.setattr(ops, "activated_linear", lambda *a, **k: seen.append(k["activation"]) or op(*a, **k))
    return seen


def made(act, inner=64, trains=False):
    torch.manual_seed(3)
    model = nn.Sequential(Intermediate(16, inner, act)).eval()
    randomize(model, 0.5)
    return model.requires_grad_(trains)


def numbers(model):
    model.zero_grad(set_to_none=True)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        packed = model(x)
    return [y.detach(), packed], {"x": x.grad, **grads}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["auto", "cpp"])
@pytest.mark.parametrize("inner", [64, 50])
def test_every_activation(name, backend, inner, called):
    act, fused = ACTIVATIONS[name]
    plain = made(act(), inner)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True, backend=backend)
    called.clear()  # the proof's
    assert_close(numbers(patched), numbers(plain))
    assert set(called) == ({fused} if fused else set()) and not fell_back(patched)
    (row,) = rows(patched).values()
    assert row.kind == INTERMEDIATE and row.status == "patched" and ("runs as it is" in row.reason) == (not fused)


@pytest.mark.parametrize("name", ["own", "nn.ReLU", "nn.Tanh"])
def test_what_trains_has_its_gradient(name):
    plain = made(ACTIVATIONS[name][0](), trains=True)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    found = numbers(patched), numbers(plain)
    assert_close(*found)
    assert {"x", "0.dense.weight", "0.dense.bias"} == found[0][1].keys() and not fell_back(patched)


@pytest.mark.parametrize("kind", [nn.GELU, nn.ReLU, lambda: ACT2FN["gelu"]])
def test_an_activation_that_somebody_listens_to_is_called(kind, called):
    plain = made(kind())
    patched, heard = fastpetl.patch(copy.deepcopy(plain), strict=True), []
    called.clear()
    for model in (patched, plain):
        act = model[0].intermediate_act_fn
        act.register_forward_hook(lambda module, args, output: heard.append(output.shape) or 2 * output)
    assert_close(numbers(patched), numbers(plain))
    assert heard == [(2, 7, 64)] * 4 and not called and not fell_back(patched)
    act = patched[0].intermediate_act_fn
    act._forward_hooks.clear(), plain[0].intermediate_act_fn._forward_hooks.clear()
    for model in (patched, plain):
        model[0].intermediate_act_fn.forward = torch.tanh
    assert_close(numbers(patched), numbers(plain))
    assert not called


def test_an_activation_that_is_another_one_later(called):
    plain = made(gelu)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    called.clear()
    for act, name in ((tanh_gelu, None), (F.relu, "relu"), (swish, None), (gelu, "gelu")):
        patched[0].intermediate_act_fn = plain[0].intermediate_act_fn = act
        assert_close(numbers(patched), numbers(plain))
        assert set(called) == {name} - {None}
        called.clear()


@pytest.mark.parametrize("how", ["fake", "compiled"])
def test_nothing_is_asked_of_a_call_without_values(how, called):
    """A function that was not seen before is called there, and recognised in the first call with values."""

    def mine(x):
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))

    plain = made(mine)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    activations._found.pop(mine)
    called.clear()
    x = torch.randn(2, 7, 16)
    if how == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert patched(mode.from_tensor(x)).shape == (2, 7, 64)
    else:
        got = torch.compile(patched, fullgraph=True, backend="aot_eager")(x)
        assert relative(got, plain(x)) <= 1e-5
    assert not called and mine not in activations._found
    assert relative(patched(x), plain(x)) <= 1e-5 and called == ["gelu"] and not fell_back(patched)


def test_hooks_of_the_linear_are_heard():
    plain = made(gelu)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    for model in (patched, plain):
        model[0].dense.register_forward_hook(lambda module, args, output: 2 * output)
    assert_close(numbers(patched), numbers(plain))
    assert "dense has forward hooks" in rows(patched)["0"].reason


class Twice(Intermediate):
    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states)) * 2


class Dropping(Intermediate):
    """With a child more, which makes it another thing."""

    def __init__(self, *args):
        super().__init__(*args)
        self.dropout = nn.Dropout(0.5)


def test_look_alikes():
    torch.manual_seed(3)
    model = nn.ModuleList([Twice(16, 32), Dropping(16, 32), Intermediate(16, 32)])
    model[2].dense = nn.Sequential(nn.Linear(16, 32))
    found = rows(fastpetl.patch(model))
    assert found.keys() == {"0", "2"} and {row.status for row in found.values()} == {"declined"}
    assert "its forward is not the original's" in found["0"].reason
    assert "dense is torch.nn.modules.container.Sequential, expected torch.nn" in found["2"].reason


def test_less_is_kept_for_the_backward():
    """Of GELU's derivative 20 bits an element, where their own function keeps several tensors of four bytes."""
    plain = made(gelu, inner=256)
    kept = {}
    for name, model in (("plain", plain), ("patched", fastpetl.patch(copy.deepcopy(plain), backend="cpp"))):
        frozen, sizes = {p.data_ptr() for p in model.parameters()}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t) or t, lambda t: t):
            model(torch.randn(2, 50, 16).requires_grad_())
        kept[name] = sum(t.numel() * t.element_size() for t in sizes if t.data_ptr() not in frozen)
    assert kept["patched"] == 100 * 256 * 5 // 2 and kept["plain"] >= 100 * 256 * 4
