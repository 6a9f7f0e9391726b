"""What patching must leave as it was: names, objects, hooks, copies, pickles, other models, and the way back."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from transformers.models.vilt import modeling_vilt

import fastpetl
from vilt_tiny import everything, inputs, pair, relative, run, tiny_das, tiny_vilt


def test_same_object_names_and_parameters():
    model = tiny_das()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    modules = list(model.modules())
    assert fastpetl.patch(model) is model
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    layer, encoder = model.vilt.encoder.layer[0], model.vilt.encoder
    assert isinstance(layer, modeling_vilt.ViltLayer) and type(layer).__name__ == "ViltLayer"
    assert isinstance(encoder, modeling_vilt.ViltEncoder) and type(encoder).__name__ == "ViltEncoder"
    assert isinstance(layer.adapter0, fastpetl.nn.BottleneckAdapter)
    assert type(layer.adapter0).__name__ == "BottleneckAdapter"
    assert type(layer) is not modeling_vilt.ViltLayer


@pytest.mark.parametrize("make", [tiny_vilt, tiny_das])
def test_unpatch_is_exact(make):
    model = make()
    before = everything(model)
    fastpetl.patch(model, backend="reference")
    assert everything(model) != before
    with torch.no_grad():
        run(model)
        run(model, output_attentions=True)
    assert fastpetl.unpatch(model) is model
    assert everything(model) == before
    assert fastpetl.unpatch(model) is model  # nothing to undo: nothing done
    assert everything(model) == before


def test_hooks_of_the_block_fire():
    model, seen = tiny_das(patch=True), []
    layer = model.vilt.encoder.layer[1]
    layer.register_forward_pre_hook(lambda module, args: seen.append(("pre", args[0].shape, args[1].shape)))
    layer.register_forward_hook(lambda module, args, output: seen.append(("post", type(output), len(output))))
    layer.register_full_backward_hook(lambda module, gin, gout: seen.append(("backward", gout[0].shape)))
    model.vilt.encoder.register_forward_hook(lambda *_: seen.append("encoder"))
    run(model).logits.sum().backward()
    shape = torch.Size([2, 29, 32])
    mask = torch.Size([2, 1, 29, 29])
    assert seen == [("pre", shape, mask), ("post", tuple, 1), "encoder", ("backward", shape)]
    assert fastpetl.report(model).declined == ()


def test_parameter_hooks_fire():
    model, seen = tiny_das(patch=True), []
    model.vilt.encoder.layer[0].adapter1.up_proj.weight.register_hook(lambda grad: seen.append(grad.shape))
    run(model).logits.sum().backward()
    assert seen == [torch.Size([32, 6])]


def assert_fast_and_equal(again, model):
    assert {type(m) for m in again.modules()} == {type(m) for m in model.modules()}
    assert list(again.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert relative(run(again).logits, run(model).logits) <= 1e-6
    fastpetl.unpatch(again)
    assert relative(run(again).logits, run(model).logits) <= 1e-4


def copies():
    yield "deepcopy", copy.deepcopy
    yield "pickle", lambda model: pickle.loads(pickle.dumps(model))
    yield "torch.save", _through_file


def _through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make_copy", [c for _, c in copies()], ids=[name for name, _ in copies()])
def test_copies(make_copy):
    model = tiny_das(patch=True)
    fastpetl.skip(model, [True, False, False, True])
    with torch.no_grad():
        run(model)  # packs its weights, which are not copied along
    again = make_copy(model)
    assert fastpetl.skip.current(again) == fastpetl.SkipPlan((0, 3), "adapter")
    packs = [len(cache) for module in again.modules() for cache in module.__dict__.get("_fastpetl_packs", ())]
    assert not any(packs)
    assert_fast_and_equal(again, model)
    assert fastpetl.detach(again) is again


def test_state_dict_and_save_pretrained(tmp_path):
    patched, plain = pair()
    plain.load_state_dict(patched.state_dict())
    patched.load_state_dict(plain.state_dict())
    model = fastpetl.patch(tiny_vilt())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert relative(run(loaded).logits, run(model).logits) <= 1e-4


def test_data_parallel_replicas():
    """As torch.nn.parallel.replicate makes them, without its GPUs: copies whose parameters are plain attributes."""
    model = tiny_das(patch=True)
    fastpetl.skip(model, [False, True, False, False])
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = copies.get(child)
        for name, p in module._parameters.items():
            setattr(replica, name, None if p is None else p * 2 - p.detach())
    replica = copies[model]
    assert not list(replica.parameters())
    torch.manual_seed(1)
    logits = replica(**inputs()).logits
    assert relative(logits, run(model).logits) <= 1e-4
    logits.sum().backward()
    assert model.vilt.encoder.layer[0].adapter0.down_proj.weight.grad is not None
    assert "_fastpetl_fallback" not in replica.vilt.encoder.layer[0].__dict__


def test_strict_and_zero_matches():
    bare = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="patch: model is Sequential, in which nothing matches a patch rule"):
        assert fastpetl.patch(bare) is bare
    with pytest.raises(ValueError, match="patch: model is Sequential, in which nothing matches"):
        fastpetl.patch(bare, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastpetl.patch(tiny_das(), strict=True)


def test_a_patch_that_raises_changes_nothing():
    model = tiny_das()
    before = everything(model)

    def broken(module, name):
        if name.endswith("layer.3"):
            raise RuntimeError("no")
        return True

    with pytest.raises(RuntimeError, match="no"):
        fastpetl.patch(model, filter_fn=broken)
    for unknown in (model, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="patch: backend is 'magic', expected one of auto, cpp, .*onednn"):
            fastpetl.patch(unknown, backend="magic")
    with pytest.raises(ValueError, match="patch: filter_fn leaves out all 18 modules that match a patch rule"):
        fastpetl.patch(model, filter_fn=lambda module, name: name == "encoder.layer.3", strict=True)
    with pytest.warns(UserWarning, match="patch: filter_fn leaves out all 18 modules"):
        fastpetl.patch(model, filter_fn=lambda module, name: False)
    with pytest.raises(TypeError, match="unexpected keyword"):
        fastpetl.patch(model, fast=True)
    with pytest.raises(TypeError, match="patch: filter_fn is int"):
        fastpetl.patch(model, filter_fn=3)
    with pytest.raises(RuntimeError, match="which cannot serve this call: the C"):
        fastpetl.patch(copy.deepcopy(model).double(), backend="cpp")
    assert everything(model) == before
    for function in (fastpetl.patch, fastpetl.unpatch, fastpetl.report):
        with pytest.raises(TypeError, match=f"{function.__name__}: model is str, expected a torch.nn.Module"):
            function("vilt")


@pytest.mark.parametrize("backend", ["reference", "torch", "onednn"])
def test_an_explicit_backend_is_used_where_there_is_one(backend):
    patched, plain = pair()
    fastpetl.patch(patched, backend=backend)
    used = {row.backend for row in fastpetl.report(patched).patched if row.kind == "vilt.das_layer"}
    assert len(used) == 1 and f"linear: {backend}" in used.pop()
    with torch.no_grad():
        assert relative(run(patched).logits, run(plain).logits) <= 1e-4
    fastpetl.patch(patched)
    assert not any("_fastpetl_backend" in module.__dict__ for module in patched.modules())
