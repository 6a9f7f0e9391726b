"""attach and detach: what is added, what is trained, what comes back, and that a failure leaves no trace."""

import pytest
import torch
from transformers import ViltConfig, ViltForImageAndTextRetrieval, ViltModel

import fastpetl
from fastpetl.patching import vilt as vilt_family
from vilt_tiny import everything, relative, run, tiny_vilt

SMALL = fastpetl.DASConfig(bottleneck=6, skip_bottleneck=10)


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_what_is_added():
    model = tiny_vilt()
    keys = set(model.state_dict())
    assert fastpetl.attach(model, SMALL) is model
    leaves = [f"{m}.{p}" for m in ("adapter_layer_norm_before", "down_proj", "up_proj") for p in ("weight", "bias")]
    encoder = "vilt.encoder"
    added = {f"{encoder}.layer.{i}.adapter{j}.{leaf}" for i in range(4) for j in (0, 1) for leaf in leaves}
    added |= {f"{encoder}.adapter_list.{i}.0.{leaf}" for i in range(4) for leaf in leaves}
    assert set(model.state_dict()) - keys == added
    assert model.vilt.encoder.layer[0].adapter0.down_proj.weight.shape == (6, 32)
    assert model.vilt.encoder.adapter_list[3][0].down_proj.weight.shape == (10, 32)


def test_what_is_trained():
    model = fastpetl.attach(tiny_vilt(), SMALL)
    trained = {name for name, flag in flags(model).items() if flag}
    rest = {name for name in trained if "adapter" not in name}
    assert {name for name in flags(model) if "adapter" in name} <= trained
    assert rest == {
        "vilt.embeddings.text_embeddings.token_type_embeddings.weight",
        "vilt.embeddings.token_type_embeddings.weight",
        *(f"vilt.pooler.dense.{p}" for p in ("weight", "bias")),
        *(f"classifier.{i}.{p}" for i in (0, 1, 3) for p in ("weight", "bias")),
    }


def test_defaults_are_the_papers():
    model = fastpetl.attach(tiny_vilt(), fastpetl.DASConfig())
    assert model.vilt.encoder.layer[0].adapter1.down_proj.out_features == 96
    assert model.vilt.encoder.adapter_list[0][0].down_proj.out_features == 192
    reduced = fastpetl.attach(tiny_vilt(), fastpetl.DASConfig(reduction_factor=8))
    assert reduced.vilt.encoder.layer[0].adapter0.down_proj.out_features == 4


def test_other_models_of_the_family():
    config = tiny_vilt().config
    bare = fastpetl.attach(ViltModel(config), SMALL)
    assert flags(bare)["pooler.dense.weight"] and "encoder.layer.0.adapter0.up_proj.weight" in flags(bare)
    ranking = fastpetl.attach(ViltForImageAndTextRetrieval(config), SMALL)
    assert flags(ranking)["rank_output.weight"]


def test_identity_shortcut_makes_no_shortcut_adapters():
    model = fastpetl.attach(tiny_vilt(), fastpetl.DASConfig(bottleneck=6, shortcut="identity"))
    assert not any("adapter_list" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="skip: shortcut is 'adapter', but the model has no shortcut adapters"):
        fastpetl.skip(model, [True, False, False, False], shortcut="adapter")
    fastpetl.detach(model)


@pytest.mark.parametrize("patched_before", [False, True])
@pytest.mark.parametrize("patch", [False, True])
def test_detach_brings_everything_back(patch, patched_before):
    model = tiny_vilt()
    model.vilt.pooler.requires_grad_(False)
    if patched_before:
        fastpetl.patch(model)
    before, weights = everything(model), {name: w.clone() for name, w in model.state_dict().items()}
    want, grads = run(model).logits, flags(model)
    fastpetl.attach(model, SMALL, patch=patch)
    assert flags(model)["vilt.pooler.dense.weight"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad and p.grad is None], lr=0.0)
    fastpetl.skip(model, [True, True, False, False])
    run(model.train(), labels=torch.eye(5)[:2]).loss.backward()
    optimizer.step()
    assert fastpetl.detach(model.eval()) is model
    model.zero_grad(set_to_none=True)
    assert everything(model) == before and flags(model) == grads
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert relative(run(model).logits, want) <= 1e-6
    assert fastpetl.skip.current(model) is None


def test_a_trained_head_stays_and_the_backbone_is_bit_equal():
    model = tiny_vilt()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    fastpetl.attach(model, SMALL)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run(model.train(), labels=torch.eye(5)[:2]).loss.backward()
    optimizer.step()
    fastpetl.detach(model)
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert changed and all(fastpetl.DASConfig.trainable(name) for name in changed)


def test_what_was_set_to_be_skipped_by_identity_stays():
    model = tiny_vilt()
    fresh = everything(model)
    fastpetl.skip(model, [False, True, False, False])
    want = run(model).logits
    fastpetl.attach(model, SMALL)
    assert fastpetl.skip.current(model) == fastpetl.SkipPlan((1,), "identity")
    fastpetl.detach(model)
    assert fastpetl.skip.current(model) == fastpetl.SkipPlan((1,), "identity")
    assert relative(run(model).logits, want) <= 1e-4
    fastpetl.skip(model, None)
    assert everything(fastpetl.unpatch(model)) == fresh


def test_dtype_and_mode_follow_the_block():
    model = tiny_vilt().bfloat16().train()
    fastpetl.attach(model, SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in fastpetl.attach(tiny_vilt(), SMALL).modules())


def test_an_attach_that_raises_changes_nothing(monkeypatch):
    model = tiny_vilt()
    fastpetl.patch(model, filter_fn=lambda module, name: name.endswith("layer.1"))
    before, grads = everything(model), flags(model)
    real, made = torch.nn.init.trunc_normal_, []

    def fails_late(*args, **kwargs):
        made.append(1)
        if len(made) == 9:
            raise MemoryError("no room for layer 2")
        return real(*args, **kwargs)

    monkeypatch.setattr(vilt_family.nn.init, "trunc_normal_", fails_late)
    with pytest.raises(MemoryError):
        fastpetl.attach(model, SMALL)
    assert everything(model) == before and flags(model) == grads
    monkeypatch.undo()
    monkeypatch.setattr("fastpetl.methods._patch", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("patch")))
    other = tiny_vilt()
    before = everything(other)
    with pytest.raises(RuntimeError, match="patch"):
        fastpetl.attach(other, SMALL)
    assert everything(other) == before and all(flags(other).values())


def test_errors():
    model = tiny_vilt()
    before = everything(model)
    with pytest.raises(TypeError, match="attach: config is dict, expected one of: DASConfig, AdapterConfig"):
        fastpetl.attach(model, {"bottleneck": 6})
    with pytest.raises(ValueError, match="attach: model is Linear with no blocks known here, expected one of: .*ViLT"):
        fastpetl.attach(torch.nn.Linear(2, 2), SMALL)
    with pytest.raises(TypeError, match="attach: model is str, expected a torch.nn.Module"):
        fastpetl.attach("vilt", SMALL)
    with pytest.raises(
        ValueError, match="attach: model has 2 stacks of blocks .0.vilt.encoder, 1.vilt.encoder., expected"
    ):
        fastpetl.attach(torch.nn.ModuleList([tiny_vilt(), tiny_vilt()]), SMALL)
    with pytest.raises(ValueError, match="reduction_factor is 64, expected at most the hidden size 32"):
        fastpetl.attach(model, fastpetl.DASConfig(reduction_factor=64))
    with pytest.raises(ValueError, match="detach: model is .* with nothing attached"):
        fastpetl.detach(model)
    assert everything(model) == before
    fastpetl.attach(model, SMALL)
    with pytest.raises(ValueError, match="attach: model has adapters attached already"):
        fastpetl.attach(model, SMALL)
    for kwargs, message in (
        ({"bottleneck": 0}, "DASConfig: bottleneck is 0, expected an integer >= 1 or None"),
        ({"bottleneck": 4, "reduction_factor": 2}, "bottleneck and reduction_factor are both given"),
        ({"activation": "tanh"}, "DASConfig: activation is 'tanh', expected one of identity, relu"),
        ({"shortcut": "zero"}, "DASConfig: shortcut is 'zero', expected one of adapter, identity"),
        ({"scale": "big"}, "DASConfig: scale is 'big', expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            fastpetl.DASConfig(**kwargs)


def test_a_subclassed_layer_is_refused():
    from transformers.models.vilt.modeling_vilt import ViltLayer

    class Other(ViltLayer):
        pass

    model = tiny_vilt()
    model.vilt.encoder.layer[2].__class__ = Other
    with pytest.raises(
        ValueError, match="attach: layer 2 is .*Other, expected transformers.models.vilt.modeling_vilt.Vi"
    ):
        fastpetl.attach(model, SMALL)
    assert not any("adapter" in name for name in model.state_dict())


def test_full_size_trains_what_the_paper_trains():
    with torch.device("meta"):
        from transformers import ViltForQuestionAnswering

        model = ViltForQuestionAnswering(ViltConfig(num_labels=3129))
    assert sum(p.numel() for p in model.parameters()) == 117_588_537
    fastpetl.attach(model, fastpetl.DASConfig(), patch=False)
    assert sum(p.numel() for p in model.parameters()) == 124_753_977
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 13_752_633
