"""Several models compiled in one process share the code of their forwards, and so Dynamo's recompile limit: one that is
made like another must find its graph, patched or not, whatever models come and go.
"""

import copy
import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastpetl
from copied_bart import Act
from methods.test_methods import attached
from patching.contract_cases import CASES, block_call
from patching.test_copied_bart import made
from vilt_tiny import one_thread, randomize, relative  # noqa: F401
from vl_tiny import tiny_adapters

MIXED = ("nlvr", "vqa", "vqa")
AT_ONCE = ("bert", "vlbart", "copied_clipvil")


@pytest.fixture
def counter():
    """The backend to compile with; counter.frame_count: how many graphs there were."""
    return CompileCounter()


def graphs(build, call, counter, models=3):
    """How many of them `models` models need that build() gives, the first called after each; one is gone in between."""
    kept = []
    for i in range(models):
        compiled = torch.compile(build(), backend=counter, fullgraph=True)
        if i != 1:
            kept.append(compiled)
        call(compiled)
        del compiled
        gc.collect()
        call(kept[0])
    return counter.frame_count


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in AT_ONCE else pytest.mark.slow) for n in CASES])
def test_a_block_of_every_family(name, counter):
    model = CASES[name].make(0.0)
    args, kwargs = block_call(name, model)
    build = lambda: fastpetl.patch(copy.deepcopy(model)).get_submodule(CASES[name].block)  # noqa: E731
    assert graphs(build, lambda block: block(*args, **kwargs), counter) == 1


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize(("name", "task"), [
    ("compacter multiple", MIXED), ("compacter shared", "gqa"), ("lora multiple", MIXED), ("lora", None),
    ("prompt", None),
])  # fmt: skip
def test_a_layer_with_tasks(name, task, patch, counter):
    """Tasks that share an adapter are found without their ids, on which Dynamo would guard."""
    model, x = attached("vlbart", name).eval(), torch.randn(3, 5, 32)

    def build():
        copied = copy.deepcopy(model)
        return (fastpetl.patch(copied) if patch else copied).model.encoder.layers[0]

    assert graphs(build, lambda layer: layer(x, None, task=task), counter) == 1


@pytest.mark.parametrize("order", [("single", "multiple"), ("multiple", "single")])
def test_whose_tasks_share_is_seen(order, counter):
    """A graph for tasks that share an adapter must not serve a model where they do not."""
    x = torch.randn(3, 5, 32)
    for sharing in order:
        layer = tiny_adapters("vlbart", sharing=sharing, patch=True).eval().model.encoder.layers[0]
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        assert relative(compiled(x, None, task=MIXED), layer(x, None, task=MIXED)) <= 1e-6


# --- which activation a copied adapter has, where there are no values to tell it by -----------------------------------


class Held(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self._function = function

    def forward(self, x):
        return self._function(x)


def controller(*activations):
    """A patched one, with an activation for each task."""
    torch.manual_seed(3)
    model = made()
    for adapter, activation in zip(model.encoder.ff_adapter.adapters.values(), activations, strict=False):
        adapter.activation = activation
    randomize(model, 0.3)
    return fastpetl.patch(model).encoder.ff_adapter


class Ops:
    """A backend that notes which of our ops are called."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, inputs):
        self.seen.append([str(n.target) for n in graph.graph.nodes if "fastpetl" in str(n.target)])
        return graph.forward


def leaky(slope):
    return lambda x: torch.where(x > 0, x, slope * x)


@pytest.mark.parametrize(("activation", "fused"), [
    (Act("gelu_new"), True), (Act("relu"), True), (torch.nn.GELU(), True), (Held(torch.relu), True),
    (Held(torch.nn.functional.silu), True), (Held(leaky(0.0)), False), (Held(torch.sin), False),
    (torch.nn.PReLU(init=0.0), False),
])  # fmt: skip
def test_known_since_it_was_patched(activation, fused):
    """No eager call before; not of what may differ from its like: a closure, a parameter."""
    module, backend, x = controller(activation), Ops(), torch.randn(2, 6, 16)
    copied = copy.deepcopy(module)
    for one in (module, copied):
        got = torch.compile(one, backend=backend, fullgraph=True)(x, "vqa")
        assert relative(got, one(x, "vqa")) <= 1e-6
    assert bool(backend.seen[0]) == fused


@pytest.mark.parametrize("change", [
    lambda act: setattr(act, "kind", "relu"),
    lambda act: setattr(act, "kind", "sin"),
    lambda act: act.known.update(gelu_new=torch.sin),
    lambda act: setattr(act, "known", {"gelu_new": leaky(0.5)}),
])  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
def test_changed_without_an_eager_call(change, when):
    """Before it is compiled, or after."""
    module, x = controller(), torch.randn(2, 6, 16)
    module(x, "vqa")
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    if when == "after":
        compiled(x, "vqa")
    change(module.adapters["vqa"].activation)
    got = compiled(x, "vqa")
    plain = fastpetl.unpatch(module)
    assert relative(got, plain(x, "vqa")) <= 1e-5


def test_models_with_other_activations(counter):
    """Of one class, told apart by what they hold."""
    x = torch.randn(2, 6, 16)
    for function in (torch.relu, torch.nn.functional.silu, leaky(0.0), leaky(0.5), torch.relu):
        module = controller(Held(function))
        got = torch.compile(module, backend=counter, fullgraph=True)(x, "vqa")
        assert relative(got, module(x, "vqa")) <= 1e-6
