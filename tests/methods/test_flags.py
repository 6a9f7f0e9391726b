"""train_visual, train_norms and train_head: exactly what each trains or freezes, for every method on every backbone."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as hf

import fastpetl
import hf_tiny
import vilt_tiny
import vl_tiny
from vilt_tiny import one_thread  # noqa: F401

TASKS = ("vqa", "gqa")
METHODS = {
    "adapter": fastpetl.AdapterConfig(tasks=TASKS, bottleneck=4, norm_before=True),
    "compacter": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4, shared_rule=True),
    "lowrank": fastpetl.LowRankConfig(tasks=TASKS, bottleneck=4),
    "lora": fastpetl.LoRAConfig(tasks=TASKS, rank=2, train_biases=False),
    "lora, biases": fastpetl.LoRAConfig(tasks=TASKS, rank=2),
    "hyperformer": fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=4),
    "prompt": fastpetl.PromptConfig(tasks=TASKS, length=2, middle=5),
    "adapter, prompt": fastpetl.AdapterConfig(tasks=TASKS, bottleneck=4, prompts={"length": 2, "middle": 5}),
}
VL = ("vlbart", "vlt5")
EVERYWHERE = ("adapter", "compacter", "lowrank", "lora", "lora, biases")
BACKBONES = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**hf_tiny.TEXT, num_labels=5)),
    "roberta": lambda: hf_tiny.build("roberta"),
    "clip": lambda: hf_tiny.build("clip_vision"),
    "vilt": vilt_tiny.tiny_vilt,
    "meter": lambda: hf_tiny.build("meter"),
}
CASES = [(backbone, name) for backbone in VL for name in METHODS]
CASES += [(backbone, name) for backbone in BACKBONES for name in EVERYWHERE]
NORMS = ("LayerNorm", "T5LayerNorm")
HEADS = ("classifier.", "rank_output.")


def build(backbone):
    return vl_tiny.tiny(backbone) if backbone in VL else BACKBONES[backbone]()


def trained(backbone, config, patch=True, **flags):
    model = fastpetl.attach(build(backbone), replace(config, **flags), patch=patch)
    return {name for name, p in model.named_parameters() if p.requires_grad}


def backbone_sets(backbone):
    """(the visual embedding's own, the norms', the head's) parameters by the modules' classes, before attaching."""
    model = build(backbone)
    visual = {n for n, _ in model.named_parameters() if ".visual_embedding." in n and "obj_order" not in n}
    head = {n for n, _ in model.named_parameters() if n.startswith(HEADS)}
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if type(module).__name__ in NORMS
        for leaf, _ in module.named_parameters()
    }
    towers = {n for n in norms if "text_transformer" in n or "vit_model" in n}  # METER's, which never train
    return visual, norms - visual - head - towers, head


@pytest.mark.parametrize(("backbone", "name"), CASES)
def test_each_flag_is_about_its_own_parameters(backbone, name):
    visual, norms, head = backbone_sets(backbone)
    assert norms and bool(visual) == (backbone in VL) and bool(head) == (backbone in ("bert", "vilt", "meter"))
    config = METHODS[name]
    off = dict.fromkeys(("train_visual", "train_norms", "train_head"), False)
    least = trained(backbone, config, **off)
    if name == "lora, biases":  # whose biases are not a flag's of these
        norms = {n for n in norms if not n.endswith(".bias")}
        assert not any(n.endswith("bias") for n in (visual | head) & least)
    assert least and not least & (visual | norms | head)
    for flag, found in (("train_visual", visual), ("train_norms", norms), ("train_head", head)):
        assert trained(backbone, config, patch=False, **{**off, flag: True}) == least | found, flag
    assert trained(backbone, config, **dict.fromkeys(off, True)) == least | visual | norms | head


@pytest.mark.parametrize(("backbone", "name"), CASES)
def test_the_defaults_are_the_papers(backbone, name):
    """Visual embedding and head train; norms with adapters (not VL-T5's, which the original left frozen by mistake)."""
    _, norms, _ = backbone_sets(backbone)
    adapters = "lora" not in name and name != "prompt"
    train = adapters and backbone != "vlt5"
    same = {"train_visual": True, "train_head": True}
    assert trained(backbone, METHODS[name]) == trained(backbone, METHODS[name], train_norms=train, **same)
    if not adapters and name != "lora, biases":
        assert not trained(backbone, METHODS[name]) & norms


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backbone", VL)
def test_a_step_moves_what_trains_and_nothing_else(backbone, name):
    """All four settings of the two flags: who has a gradient, and who is bit-equal after an optimizer step."""
    visual, norms, _ = backbone_sets(backbone)
    for flags in ((False, False), (False, True), (True, False), (True, True)):
        flags = dict(zip(("train_visual", "train_norms"), flags, strict=True))
        model = fastpetl.attach(build(backbone), replace(METHODS[name], **flags))
        vl_tiny.randomize(model)
        fastpetl.task(model.train(), "gqa")
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)  # of all: what is frozen has no gradient
        vl_tiny.run(model).loss.backward()
        optimizer.step()
        parameters = dict(model.named_parameters())
        moved = {n for n, v in model.state_dict().items() if n in parameters and not torch.equal(v, before[n])}
        assert moved <= {n for n, p in parameters.items() if p.requires_grad}
        assert {n for n in visual if "pos_emb" not in n} <= moved if flags["train_visual"] else not visual & moved
        weights = {n for n in norms if n.endswith("weight")}
        assert weights <= moved if flags["train_norms"] else not weights & moved
        assert moved - visual - norms


@pytest.mark.parametrize("name", ["train_visual", "train_norms", "train_head"])
def test_errors(name):
    for value in (1, "no", None):
        if value is None and name == "train_norms":
            continue
        with pytest.raises(ValueError, match=f"AdapterConfig: {name} is {value!r}, expected True or False"):
            fastpetl.AdapterConfig(**{name: value})
