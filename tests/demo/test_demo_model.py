"""The shipped backbone and the four models made from it."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("easy_vqa", reason="the demo's data set is the package easy-vqa")
pytest.importorskip("transformers", reason="the demo's model is Hugging Face's")

import fastpetl
from fastpetl.demo import data, model, train
from fastpetl.demo.memory import PeakMemory


def test_backbone_is_small_and_loads_in_fp32():
    assert (data.ASSETS / "backbone.safetensors").stat().st_size <= 4_000_000
    vilt = model.load_backbone(seed=3)
    assert type(vilt).__name__ == "ViltForQuestionAnswering" and len(vilt.vilt.encoder.layer) == 12
    assert {p.dtype for p in vilt.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in vilt.parameters())
    assert torch.equal(vilt.classifier[0].weight, model.load_backbone(seed=3).classifier[0].weight)
    assert not torch.equal(vilt.classifier[0].weight, model.load_backbone(seed=4).classifier[0].weight)


def test_backbone_tells_colours_and_shapes_apart():
    """Pooled outputs of test images: a question's nearest neighbour among others of the same wording has its answer."""
    for text, least in (("what color is the shape?", 0.9), ("what shape is present?", 0.6)):
        questions = [q for q in data.downstream(data.load_questions("test")) if q.text == text][:150]
        images = data.load_images("test", (q.image for q in questions), quiet=True)
        masked = "is there a [MASK] shape?" if "color" in text else "is there a [MASK]?"
        tensors = data.Tensors(
            [data.Question(masked, q.answer, q.image) for q in questions], images, data.load_tokenizer()
        )
        with torch.no_grad():
            pooled = model.load_backbone().eval().vilt(**tensors.batch(torch.arange(len(tensors)))).pooler_output
        distance = torch.cdist(pooled, pooled).fill_diagonal_(torch.inf)
        right = (tensors.answers[distance.argmin(1)] == tensors.answers).float().mean().item()
        assert right >= least, (text, right)


def test_a_backbone_that_does_not_fit_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(data.ASSETS, tmp_path / "assets")
    file = tmp_path / "assets" / "backbone.safetensors"
    weights = load_file(str(file))
    weights.pop("vilt.layernorm.weight")
    save_file(weights, str(file))
    with pytest.raises(ValueError, match="load_backbone: .* does not fit config.json: vilt.layernorm.weight"):
        model.load_backbone(tmp_path / "assets")


def test_adapters_train_a_small_share_and_leave_the_backbone():
    settings = model.Settings()
    full, das = model.build("full", settings), model.build("adapters", settings)
    assert all(p.requires_grad for p in full.parameters())
    trained = {name for name, p in das.named_parameters() if p.requires_grad}
    assert all(any(part in name for part in ("adapter", "pooler", "classifier", "token_type")) for name in trained)
    before = full.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in das.state_dict().items() if name in before)
    down = das.vilt.encoder.layer[0].adapter0.down_proj.weight
    skip = das.vilt.encoder.adapter_list[0][0].down_proj.weight
    assert down.shape == (model.BOTTLENECK, 128) and skip.shape == (2 * model.BOTTLENECK, 128)


def test_the_skipped_variant_skips_four_blocks():
    made = model.build("skipped", model.Settings())
    ran = []
    for i, layer in enumerate(made.vilt.encoder.layer):
        layer.attention.register_forward_hook(lambda *_, i=i: ran.append(i))
    fastpetl.unpatch(made)  # fused blocks do not call their attention child
    made(**data.load("test", "downstream", limit=2, quiet=True).batch(torch.arange(2)))
    assert ran == [i for i in range(12) if i not in model.SKIPPED_BLOCKS]


def test_an_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="build: variant is 'lora', expected one of full, adapters, patched, skipped"):
        model.build("lora", model.Settings())


def test_order_is_the_seeds_and_passes_over_all_questions():
    settings = model.Settings(steps=10, batch=8)
    first = train.order(50, settings)
    assert first.shape == (10, 8) and torch.equal(first, train.order(50, settings))
    assert sorted(first.flatten()[:50].tolist()) == list(range(50))
    assert not torch.equal(first, train.order(50, model.Settings(steps=10, batch=8, seed=1)))


def test_peak_memory_sees_what_was_freed():
    memory = PeakMemory()
    block = torch.ones(64 * 2**20 // 4)
    del block
    assert 60 <= memory.peak_mib() <= 200
