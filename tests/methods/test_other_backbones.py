"""VL-Adapter's methods on plain BERT, RoBERTa, CLIP, ViLT and METER: what is added and trained, patched against plain,
and the way back.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn

import fastpetl
import hf_tiny
import vilt_tiny
from vilt_tiny import everything, one_thread, randomize, relative  # noqa: F401

TASKS = ("vqa", "gqa")
CONFIGS = {
    "adapter": fastpetl.AdapterConfig(tasks=TASKS, bottleneck=6, norm_before=True),
    "half": fastpetl.AdapterConfig(tasks=TASKS, bottleneck=6, sharing="half"),
    "multiple": fastpetl.AdapterConfig(tasks=TASKS, bottleneck=6, sharing="multiple", norm_after=True),
    "compacter": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4, sharing="multiple"),
    "shared_rule": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4, shared_rule=True, rank=1),
    "lowrank": fastpetl.LowRankConfig(tasks=TASKS, bottleneck=6, rank=2),
    "hyper": fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6),
    "hyper_unified": fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6, features=5, unified=True),
    "lora": fastpetl.LoRAConfig(tasks=TASKS, rank=3, alpha=3, dropout=0.0),
    "lora_multiple": fastpetl.LoRAConfig(tasks=TASKS, rank=3, alpha=3, dropout=0.0, sharing="multiple"),
    "prompts": fastpetl.PromptConfig(tasks=TASKS, length=3, middle=10, sharing="multiple"),
    "adapter_prompts": fastpetl.AdapterConfig(tasks=TASKS, bottleneck=6, prompts={"length": 2, "middle": 10}),
    "all": fastpetl.BaselineConfig(),
    "norms": fastpetl.BaselineConfig(train="norms"),
    "biases": fastpetl.BaselineConfig(train="biases"),
}
ADDING = [name for name in CONFIGS if name not in ("all", "norms", "biases")]
BACKBONES = ("bert", "decoder", "roberta", "clip_vision", "clip_text", "clip", "vilt", "meter")
GRID = [(b, name) for b in BACKBONES for name in CONFIGS if b != "decoder" or "prompts" not in name]  # has a cache


def on(*backbones, of=GRID):
    """The cases; of Hyperformer and prompts, which share their way with adapters, those on other backbones are slow."""
    rare = {"hyper": backbones, "prompts": backbones, "hyper_unified": ("bert",), "adapter_prompts": ("bert",)}
    slow = [backbone not in rare.get(name, BACKBONES) for backbone, name in of]
    return [pytest.param(*c, marks=pytest.mark.slow) if s else c for c, s in zip(of, slow, strict=True)]


def build(backbone):
    if backbone == "vilt":
        return vilt_tiny.tiny_vilt()
    if backbone == "clip":
        return hf_tiny.clip()
    return hf_tiny.build(backbone)


def inputs(backbone):
    if backbone == "vilt":
        return vilt_tiny.inputs()
    if backbone == "clip":
        return {**hf_tiny.ids(), "pixel_values": hf_tiny.pixels()}
    return hf_tiny.FAMILIES[backbone][1](True)


def output(model, backbone):
    torch.manual_seed(1)  # ViLT shuffles its patches
    out = model(**inputs(backbone))
    if backbone == "clip":
        return out.logits_per_text
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def attached(backbone, name, patch=False, **changes):
    model = fastpetl.attach(build(backbone), replace(CONFIGS[name], **changes), patch=False)
    randomize(model)
    if name in ADDING:
        fastpetl.task(model, "gqa")
    return fastpetl.patch(model) if patch else model


def gradients(model, backbone):
    model.zero_grad(set_to_none=True)
    out = output(model, backbone)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("backbone", "name"), on("bert", "clip", "vilt", "meter"))
def test_patched_is_the_same(backbone, name):
    """Output and the gradient of every trained parameter, in eval and in training; the same parameters have one."""
    plain = attached(backbone, name)
    patched = fastpetl.patch(copy.deepcopy(plain))
    assert not [row for row in fastpetl.report(patched).rows if row.status != "patched"]
    with torch.no_grad():
        assert relative(output(patched, backbone), output(plain, backbone)) <= 1e-5
    for model in (plain, patched):
        model.train()
    want, got = gradients(plain, backbone), gradients(patched, backbone)
    assert want and want.keys() == got.keys()
    scale = max(g.norm().item() for g in want.values())
    for key, grad in want.items():
        assert (got[key] - grad).norm() <= 1e-5 * grad.norm() + 1e-6 * scale, key
    fallbacks = [row.reason for row in fastpetl.report(patched).rows if "last original forward" in row.reason]
    assert not fallbacks


MIXED = [case for case in GRID if case[1] in ("multiple", "compacter", "hyper", "lora_multiple", "prompts")]


@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize(("backbone", "name"), on("bert", "vilt", of=MIXED))
def test_tasks_mixed_in_one_batch(backbone, name, patch):
    """Each sample is as in a batch of its task alone; a task nobody has gets no gradient."""
    model = attached(backbone, name, patch, tasks=(*TASKS, "idle"))
    with torch.no_grad():
        alone = {}
        for task in TASKS:
            with fastpetl.task(model, task):
                alone[task] = output(model, backbone)
        batch = inputs(backbone)["input_ids" if "pixel_values" not in inputs(backbone) else "pixel_values"].shape[0]
        mixed = [TASKS[i % 2] for i in range(batch)]
        if backbone == "clip":  # scores every text with every image
            mixed = [TASKS[1]] * batch
        with fastpetl.task(model, mixed):
            got = output(model, backbone)
    assert relative(alone[TASKS[0]], alone[TASKS[1]]) > 1e-3
    for i, task in enumerate(mixed):
        assert relative(got[i], alone[task][i]) <= 1e-5
    with fastpetl.task(model, mixed):
        grads = gradients(model, backbone)
    assert grads and not any(".idle." in n or n.endswith(".idle") for n in grads)


@pytest.mark.parametrize("patched_before", [False, True])
@pytest.mark.parametrize(("backbone", "name"), on("bert", "clip", "vilt"))
def test_detach_brings_everything_back(backbone, name, patched_before):
    model = build(backbone)
    next(model.parameters()).requires_grad_(False)
    if patched_before:
        fastpetl.patch(model)
    before, flags = everything(model), [p.requires_grad for p in model.parameters()]
    values = {n: v.clone() for n, v in model.state_dict().items()}
    fastpetl.attach(model, CONFIGS[name])
    if name in ADDING:
        fastpetl.task(model, "gqa")
        assert everything(model) != before
    with torch.no_grad():
        output(model, backbone)
    fastpetl.detach(model)
    for module in model.modules():
        for cache in ("_fastpetl_packs", "_fastpetl_fallback"):
            module.__dict__.pop(cache, None)
    assert everything(model) == before and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, values[n]) for n, v in model.state_dict().items())


# Each method on BERT, each backbone with two methods; the rest of the grid is slow
SAVED = [
    (backbone, name)
    if backbone == "bert"
    or name in ("multiple", "compacter")
    or (backbone, name) in (("clip", "hyper"), ("vilt", "prompts"))
    else pytest.param(backbone, name, marks=pytest.mark.slow)
    for backbone, name in GRID
    if name in ADDING
]


@pytest.mark.parametrize(("backbone", "name"), SAVED)
def test_save_and_load(backbone, name, tmp_path):
    model = attached(backbone, name, patch=True)
    with torch.no_grad():
        want = output(model, backbone)
    fastpetl.save(model, tmp_path)
    other = fastpetl.detach(attached(backbone, name))  # the same backbone
    with torch.no_grad():
        for n, p in other.named_parameters():  # what is trained comes from the files
            p.zero_() if CONFIGS[name].trainable(n) else None
    fastpetl.load(other, tmp_path)
    fastpetl.task(other, "gqa")
    with torch.no_grad():
        assert torch.equal(output(other, backbone), want)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        with torch.no_grad():
            assert torch.equal(output(copied, backbone), want)
    fastpetl.save(model, tmp_path / "one", task="vqa")
    alone = fastpetl.load(fastpetl.detach(copy.deepcopy(model)), tmp_path / "one")
    with torch.no_grad(), fastpetl.task(model, "vqa"):
        assert torch.equal(output(alone, backbone), output(model, backbone))


COMING = [(b, name) for b in ("bert", "clip", "vilt", "meter") for name in ADDING]


@pytest.mark.parametrize(("backbone", "name"), on("bert", "vilt", of=COMING))
def test_tasks_come_and_go(backbone, name, tmp_path):
    model = attached(backbone, name, patch=True)
    fastpetl.add_task(model, "more", like="gqa")
    with torch.no_grad():
        want = output(model, backbone)
        with fastpetl.task(model, "more"):
            assert torch.equal(output(model, backbone), want)
    fastpetl.add_task(model, "fresh")
    fastpetl.remove_task(model, "more")
    shared = CONFIGS[name].sharing == "single" and "hyper" not in name
    with torch.no_grad(), fastpetl.task(model, "fresh"):
        assert torch.equal(output(model, backbone), want) if shared else relative(output(model, backbone), want) > 1e-4
    fastpetl.save(model, tmp_path, task="gqa")
    fastpetl.rename_task(model, "gqa", "old")
    fastpetl.task(model, "old")
    with torch.no_grad():
        assert torch.equal(output(model, backbone), want)
    fastpetl.remove_task(model, "old")
    fastpetl.load(model, tmp_path)  # beside those that are there
    assert fastpetl.methods.tasks.tasks(model) == ("vqa", "fresh", "gqa")
    with torch.no_grad(), fastpetl.task(model, "gqa"):
        assert torch.equal(output(model, backbone), want)


@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("name", ["multiple", "lora_multiple"])
@pytest.mark.parametrize("backbone", ["bert", "clip_vision", "vilt"])
def test_a_layer_recomputed_has_its_forwards_task(backbone, name, patch):
    model = attached(backbone, name, patch).train()
    want = gradients(model, backbone)
    model.gradient_checkpointing_enable()
    model.zero_grad(set_to_none=True)
    out = output(model, backbone)
    fastpetl.task(model, "vqa")  # set before the backward of a gqa batch
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert want.keys() == got.keys()
    assert all(relative(got[n], grad) <= 1e-4 or grad.norm() < 1e-5 for n, grad in want.items())


def test_what_is_added_and_trained():
    """BERT with a head: two adapters in a layer, of the paper's size; they, norms and head train."""
    config = hf.BertConfig(**hf_tiny.TEXT, num_labels=5)
    model = hf.BertForSequenceClassification(config)
    plain = sum(p.numel() for p in model.parameters())
    fastpetl.attach(model, fastpetl.AdapterConfig(tasks=TASKS))
    added = [n for n, _ in model.named_parameters() if "output_adapter" in n]
    assert len(added) == 2 * 2 * 4 and model.bert.encoder.layer[0].output.dense.output_adapter.hidden == 32
    one = 2 * 32 * 4 + 32 + 4
    assert sum(p.numel() for p in model.parameters()) == plain + 4 * one
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    norms = {n for n, _ in model.named_parameters() if "LayerNorm" in n}
    assert trained == set(added) | norms | {"classifier.weight", "classifier.bias"} and len(norms) == 10
    frozen = fastpetl.attach(fastpetl.detach(model), fastpetl.AdapterConfig(train_head=False, train_norms=False))
    assert all("output_adapter" in n for n, p in frozen.named_parameters() if p.requires_grad)


def test_the_widths_of_both_sides_of_clip():
    model = attached("clip", "multiple")
    assert model.text_model.encoder.layers[0].mlp.fc2.output_adapter.hidden == 32
    assert model.vision_model.encoder.layers[0].mlp.fc2.output_adapter.hidden == 48


def test_meters_towers_stay_frozen():
    for name in ("adapter", "lora", "norms", "biases"):
        trained = [n for n, p in attached("meter", name).named_parameters() if p.requires_grad]
        assert trained and not any("text_transformer" in n or "vit_model" in n for n in trained)


def test_adapters_compute_what_they_say():
    """BERT's layer written out: LN(x + dense(h) + U(gelu(D(dense(h))))) after attention and feed-forward."""
    model = attached("bert", "multiple", tasks=("gqa",))
    layer, x = model.encoder.layer[0].double(), torch.randn(2, 5, 32, dtype=torch.float64)

    def site(block, h, residual):
        f = nn.functional.linear(h, block.dense.weight, block.dense.bias)
        a = block.dense.output_adapter
        one = a.adapters["gqa"]
        u = nn.functional.gelu(f @ one.down_sampler.weight.T + one.down_sampler.bias, approximate="tanh")
        u = u @ one.up_sampler.weight.T + one.up_sampler.bias
        post = a.post_layer_norm
        f = f + nn.functional.layer_norm(u, (32,), post.weight, post.bias)
        norm = block.LayerNorm
        return nn.functional.layer_norm(f + residual, (32,), norm.weight, norm.bias, norm.eps)

    context = layer.attention.self(x)[0]
    y = site(layer.attention.output, context, x)
    h = nn.functional.gelu(y @ layer.intermediate.dense.weight.T + layer.intermediate.dense.bias)
    assert relative(layer(x), site(layer.output, h, y)) <= 1e-12


def test_what_a_model_does_not_take():
    for backbone in ("bert", "clip", "roberta"):
        model = build(backbone)
        before = everything(model)
        takes = "AdapterConfig, CompacterConfig, LowRankConfig, HyperformerConfig, LoRAConfig, PromptConfig, Baseline"
        with pytest.raises(ValueError, match=f"attach: config is DASConfig, expected for .*: {takes}"):
            fastpetl.attach(model, fastpetl.DASConfig())
        with pytest.raises(ValueError, match="attach: BaselineConfig.*train='visual'.* leaves nothing to train in "):
            fastpetl.attach(model, fastpetl.BaselineConfig(train="visual"))
        assert everything(model) == before
    model = build("bert")
    model.encoder.layer[1].output.dense = nn.Identity()
    with pytest.raises(ValueError, match="attach: encoder.layer.1 has .*Identity, expected torch.nn.Linear"):
        fastpetl.attach(model, CONFIGS["adapter"])
    with pytest.raises(ValueError, match="expected one of vqa, gqa"):
        output(fastpetl.attach(build("bert"), CONFIGS["multiple"]), "bert")


def test_the_original_names_of_a_bert():
    """VL-Adapter's BERT has its adapters beside the linear; its checkpoints load."""
    from fastpetl.methods import load_original

    model = fastpetl.attach(build("bert"), replace(CONFIGS["adapter"], tasks=("vqa",)))
    randomize(model)
    theirs = {n.replace("dense.output_adapter", "adapter"): v.clone() for n, v in model.state_dict().items()}
    assert any(".attention.output.adapter.adapters.vqa.down_sampler.weight" in n for n in theirs)
    other = fastpetl.attach(build("bert"), replace(CONFIGS["adapter"], tasks=("vqa",)))
    load_original(other, theirs)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in other.state_dict().items())
