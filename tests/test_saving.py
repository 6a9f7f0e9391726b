"""save and load: what was trained goes through files without pickle and comes back bit-equal."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpetl
from vilt_tiny import everything, one_thread, run, tiny_das, tiny_vilt  # noqa: F401


def trained():
    model = tiny_das(patch=True)
    fastpetl.skip(model, [False, True, False, False])
    return model


def test_round_trip(tmp_path):
    model = trained()
    assert fastpetl.save(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [
        "README.md",
        "fastpetl.json",
        "fastpetl.safetensors",
    ]
    backbone = fastpetl.detach(tiny_das())  # the frozen part of `model`
    with torch.no_grad():
        for p in backbone.classifier.parameters():
            p.zero_()
    assert fastpetl.load(backbone, tmp_path / "new" / "folder") is backbone
    assert fastpetl.skip.current(backbone) == fastpetl.SkipPlan((1,), "adapter")
    assert all(
        torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(run(backbone).logits, run(model).logits)
    assert fastpetl.report(backbone).patched
    fastpetl.load(backbone, tmp_path / "new" / "folder")  # into what is attached already
    unpatched = fastpetl.load(fastpetl.detach(tiny_das()), tmp_path / "new" / "folder", patch=False)
    assert not fastpetl.report(unpatched).patched


def test_only_what_is_trained_is_written(tmp_path):
    model = trained()
    fastpetl.save(model, tmp_path)
    weights = load_file(tmp_path / "fastpetl.safetensors")
    assert set(weights) == {name for name, p in model.named_parameters() if p.requires_grad}
    content = json.loads((tmp_path / "fastpetl.json").read_text())
    assert content["method"] == "das" and content["config"]["bottleneck"] == 6
    assert content["skip"] == {"blocks": [1], "shortcut": "adapter"}
    fastpetl.skip(model, None)
    fastpetl.save(model, tmp_path)
    assert json.loads((tmp_path / "fastpetl.json").read_text())["skip"] is None
    assert fastpetl.skip.current(fastpetl.load(model, tmp_path)) is None


def test_errors(tmp_path):
    bare = tiny_vilt()
    with pytest.raises(ValueError, match="save: model is ViltForQuestionAnswering with nothing attached"):
        fastpetl.save(bare, tmp_path)
    with pytest.raises(
        ValueError, match=r"save: model is Sequential with nothing attached .but model.0 has., expected"
    ):
        fastpetl.save(torch.nn.Sequential(trained()), tmp_path)
    with pytest.raises(FileNotFoundError, match="load: .* has no fastpetl.json, expected a directory written by"):
        fastpetl.load(bare, tmp_path)
    fastpetl.save(trained(), tmp_path)
    before = everything(bare)
    weights = load_file(tmp_path / "fastpetl.safetensors")
    for change, message in (
        (lambda w: w.pop("classifier.0.bias"), "load: the files do not have classifier.0.bias"),
        (lambda w: w.update(more=torch.zeros(1)), "load: the model does not have more"),
        (
            lambda w: w.update({"classifier.0.bias": torch.zeros(3)}),
            r"classifier.0.bias has shape \(3,\), expected \(64,\)",
        ),
    ):
        wrong = dict(weights)
        change(wrong)
        save_file(wrong, tmp_path / "fastpetl.safetensors")
        with pytest.raises(ValueError, match=message):
            fastpetl.load(bare, tmp_path)
        assert everything(bare) == before
    other = fastpetl.attach(tiny_vilt(), fastpetl.DASConfig(bottleneck=3))
    with pytest.raises(ValueError, match="load: model has DASConfig.bottleneck=3, .* attached, expected DASConfig"):
        fastpetl.load(other, tmp_path)
    content = json.loads((tmp_path / "fastpetl.json").read_text())
    fastpetl.save(trained(), tmp_path)
    for changed, message in (
        ({"skip": {"blocks": [77], "shortcut": "adapter"}}, "skip: plan skips block 77, expected indices below"),
        ({"config": {**content["config"], "later": 1}, "fastpetl": "9.9"}, "config has 'later', .* written by 9.9"),
    ):
        (tmp_path / "fastpetl.json").write_text(json.dumps({**content, **changed}))
        with pytest.raises(ValueError, match=message):
            fastpetl.load(bare, tmp_path)
        assert everything(bare) == before and bare.classifier[0].weight.requires_grad
    (tmp_path / "fastpetl.json").write_text("{")
    with pytest.raises(ValueError, match="load: .*fastpetl.json is not JSON"):
        fastpetl.load(bare, tmp_path)
    (tmp_path / "fastpetl.json").write_text(json.dumps({**content, "method": "magic"}))
    with pytest.raises(ValueError, match="load: method is 'magic', expected one of das"):
        fastpetl.load(bare, tmp_path)
