"""What patching must leave as it was, in every family: names, objects, hooks, copies, other models, the way back."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import fastpetl
from fastpetl.patching import registry
from patching.contract_cases import (
    CASES,
    NAMES,
    assert_close,
    both,
    fell_back,
    numbers,
    plain,
    replica_of,
    run,
)
from vilt_tiny import everything, relative

every_family = pytest.mark.parametrize("name", NAMES)


def outputs(name, model):
    with torch.no_grad():
        return run(name, model), {}


@every_family
def test_names_objects_and_the_way_back(name):
    model = plain(name)
    before, keys = everything(model), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    assert fastpetl.patch(model) is model
    once = everything(model)
    assert list(model.state_dict()) == keys
    for (key, module), kind in zip(model.named_modules(), kinds, strict=True):
        assert isinstance(module, kind) and once[key][2] == before[key][2]  # the same parameter objects
        if not kind.__module__.startswith("fastpetl.nn"):
            assert type(module).__name__ == kind.__name__
    assert everything(fastpetl.patch(model)) == once != before
    outputs(name, model)  # packs weights
    assert fastpetl.unpatch(model) is model and everything(model) == before
    assert everything(fastpetl.unpatch(model)) == before


@every_family
def test_other_models_and_classes_stay(name):
    first, second = plain(name), plain(name)
    kinds = {type(module) for module in second.modules()}
    untouched, inside = everything(second), {kind: dict(vars(kind)) for kind in kinds}
    fastpetl.patch(first)
    assert everything(second) == untouched and {kind: dict(vars(kind)) for kind in kinds} == inside
    assert not any(type(module) not in kinds for module in plain(name).modules())
    fastpetl.patch(second)
    want = outputs(name, second)
    fastpetl.unpatch(first)
    assert everything(second) != untouched
    assert_close(outputs(name, second), want, 1e-6)
    assert_close(outputs(name, first), want)


@every_family
def test_an_optimizer_made_before_patching(name):
    models = plain(name), plain(name)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    fastpetl.patch(models[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        old = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            numbers(name, model.train())
            optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True))
    for (key, got), want in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative(got, want) <= 1e-4, key
    assert not fell_back(models[0])


@every_family
def test_hooks_of_a_block(name):
    """They fire as unpatched, and what they return counts."""
    models, seen = both(name), ([], [])
    for model, events in zip(models, seen, strict=True):
        block = model.get_submodule(CASES[name].block)

        def half(module, args, output, events=events):
            events.append(("after", shape(output)))
            return 0.5 * output if isinstance(output, torch.Tensor) else (0.5 * output[0], *output[1:])

        block.register_forward_pre_hook(lambda module, args, e=events: e.append(("before", len(args))))
        block.register_forward_hook(half)
        block.register_full_backward_hook(lambda module, gin, gout, e=events: e.append(("backward", shape(gout))))
    assert_close(*(numbers(name, model) for model in models))
    assert seen[0] == seen[1] and {event for event, _ in seen[0]} == {"before", "after", "backward"}
    assert not fell_back(models[0])


def shape(output):
    return (output if isinstance(output, torch.Tensor) else output[0]).shape


def _through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _through_file}


@every_family
@pytest.mark.parametrize("how", COPIES)
def test_copies(name, how):
    model = fastpetl.patch(plain(name))
    want = outputs(name, model)  # packs weights, which are not copied along
    again = COPIES[how](model)
    assert not any(len(p) for m in again.modules() for p in packs(m))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(a is not b for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert_close(outputs(name, again), want, 1e-6)
    assert not fell_back(again)
    assert_close(outputs(name, fastpetl.unpatch(again)), want)


def packs(module):
    kept = module.__dict__.get("_fastpetl_packs", ())
    return kept.values() if isinstance(kept, dict) else kept


@every_family
def test_state_dicts_go_both_ways(name):
    patched, model = both(name)
    outputs(name, patched)
    changed = {key: value * 1.1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.load_state_dict(changed)
    patched.load_state_dict(model.state_dict())
    assert_close(outputs(name, patched), outputs(name, model))
    model.load_state_dict(patched.state_dict())


@every_family
def test_moved_and_cast_in_place(name):
    model = fastpetl.patch(plain(name))
    want, weights = outputs(name, model), list(model.parameters())
    assert model.to(torch.bfloat16) is model and model.to(torch.float32) is model and model.to("cpu") is model
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert_close(outputs(name, model), want, 0.1)  # rounded once to bf16
    assert not fell_back(model)


@every_family
def test_data_parallel_replicas(name):
    model = fastpetl.patch(plain(name))
    want = outputs(name, model)
    replica = replica_of(model)
    torch.manual_seed(1)
    found = run(name, replica_ready(replica, model))
    assert_close((found, {}), want)
    sum(t.sum() for t in found if t.requires_grad).backward()
    assert any(p.grad is not None for p in model.parameters())
    assert not fell_back(replica)


def replica_ready(replica, model):
    """Its parameters are attributes: those who ask for its dtype ask for its first parameter."""
    replica.parameters = model.parameters
    return replica


# --- what is declined -------------------------------------------------------------------------------------------------


def _peft(model, linear):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=[linear], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


class Quantised(nn.Linear):
    """As bitsandbytes' linears: a subclass, whose weight means nothing without its own forward."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 1.5, self.bias)


class Marked(torch.Tensor):
    """As DTensor and torchao's weights: a tensor subclass with its own idea of a product."""


def _quantise(model, linear):
    model.get_submodule(linear).__class__ = Quantised


def _mark(model, linear):
    child = model.get_submodule(linear)
    data = child._parameters.pop("weight").detach()
    child._parameters["weight"] = data.as_subclass(Marked)


CHANGES = {"peft": (_peft, "peft"), "quantised": (_quantise, "Quantised"), "tensor subclass": (_mark, "Marked")}


@every_family
@pytest.mark.parametrize("change", CHANGES)
def test_children_that_somebody_wrapped(name, change):
    """Declined when patching, seen when it comes later; the numbers stay right."""
    how, reason = CHANGES[change]
    model, linear = plain(name), f"{CASES[name].block}.{CASES[name].linear}"
    early, late = copy.deepcopy(model), fastpetl.patch(copy.deepcopy(model))
    for one in (model, early, late):
        torch.manual_seed(0)
        how(one, linear)
    before = everything(model)
    with pytest.raises(ValueError, match=f"declined .strict=True.: .*{reason}"):
        fastpetl.patch(model, strict=True)
    assert everything(model) == before  # a patch that raises has changed nothing
    fastpetl.patch(early)
    want = outputs(name, model)
    for one, status in ((early, "declined"), (late, "patched")):
        assert_close(outputs(name, one), want)
        row = next(row for row in fastpetl.report(one) if row.name == CASES[name].block)
        assert row.status == status and reason in row.reason


@every_family
def test_a_subclass_with_a_forward_of_its_own(name):
    model = plain(name)
    block = model.get_submodule(CASES[name].block)
    block.__class__ = louder(type(block))
    before = type(block)
    patched = fastpetl.patch(copy.deepcopy(model))
    row = next(row for row in fastpetl.report(patched) if row.name == CASES[name].block)
    assert row.status == "declined"
    assert "a subclass of" in row.reason or "its forward is not the original's" in row.reason
    assert type(patched.get_submodule(CASES[name].block)) is before
    assert_close(outputs(name, patched), outputs(name, model))


def louder(cls):
    def forward(self, *args, **kwargs):
        out = cls.forward(self, *args, **kwargs)
        return 1.5 * out if isinstance(out, torch.Tensor) else (1.5 * out[0], *out[1:])

    return type("Louder", (cls,), {"forward": forward, "__module__": cls.__module__ + "_of_mine"})


@every_family
def test_a_forward_replaced_on_the_instance(name):
    model = plain(name)
    block = model.get_submodule(CASES[name].block)
    block.forward = block.forward
    fastpetl.patch(model)
    row = next(row for row in fastpetl.report(model) if row.name == CASES[name].block)
    assert row.status == "declined" and "its forward was replaced on the instance" in row.reason


@every_family
def test_strict_and_filter_fn(name):
    model, block = plain(name), CASES[name].block
    want = outputs(name, model)
    fastpetl.patch(model, filter_fn=lambda module, key: key == block)
    assert [row.name for row in fastpetl.report(model).patched] == [block]
    assert "filter_fn left it out" in str(fastpetl.report(model)) or len(fastpetl.report(model)) == 1
    assert_close(outputs(name, model), want)
    fastpetl.patch(model, strict=True)
    assert not fastpetl.report(model).declined


def test_families_define_what_their_bases_leave_open():
    """So that no user comes to a bare NotImplementedError."""
    for family in registry.families():
        for name, method in inspect.getmembers(type(family), inspect.isfunction):
            assert "raise NotImplementedError" not in inspect.getsource(method), (family.name, name)
