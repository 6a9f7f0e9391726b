"""LoRA folders that PEFT itself reads and writes."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import fastpetl
import hf_tiny
import vilt_tiny
from vilt_tiny import everything, one_thread, relative  # noqa: F401
from vl_tiny import TASKS, inputs, randomize, tiny

peft = pytest.importorskip("peft", reason="peft is not installed, whose reading and writing this is about")
KINDS = {"vlbart": ["q_proj", "v_proj"], "vlt5": ["q", "v"]}


def backbone(kind, seed=None):
    model = tiny(kind)
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.01)
    return model


def ours(kind, **options):
    model = backbone(kind)
    fastpetl.attach(
        model, fastpetl.LoRAConfig(tasks=TASKS, rank=3, alpha=6.0, sharing="multiple", **options), patch=False
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    randomize(model, 0.3)
    with torch.no_grad():  # the frozen ones are the backbone's
        for n, p in model.named_parameters():
            if not p.requires_grad:
                p.copy_(before[n])
    return fastpetl.patch(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs()).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"train_biases": False}, {"train_norms": True}, {"train_visual": False}])
def test_peft_reads_what_we_export(kind, options, tmp_path):
    model = ours(kind, **options)
    fastpetl.task(model, "gqa")
    fastpetl.export_peft(model, tmp_path, task="gqa")
    theirs = peft.PeftModel.from_pretrained(backbone(kind), tmp_path)
    assert relative(logits(theirs), logits(model)) <= 1e-5
    assert relative(logits(backbone(kind)), logits(model)) > 1e-2
    back = fastpetl.import_peft(backbone(kind), tmp_path, task="gqa")
    assert torch.equal(logits(back), logits(model))
    assert fastpetl.report(back).patched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_we_read_what_peft_saves(kind, bias, tmp_path):
    options = {"r": 3, "lora_alpha": 6, "target_modules": KINDS[kind], "bias": bias, "init_lora_weights": False}
    theirs = peft.get_peft_model(backbone(kind), peft.LoraConfig(**options, modules_to_save=["visual_embedding"]))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad and "obj_order" not in name:
                p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    model = fastpetl.import_peft(backbone(kind), tmp_path)
    assert relative(logits(model), logits(theirs)) <= 1e-5
    assert relative(logits(backbone(kind)), logits(theirs)) > 1e-2
    several = ours(kind, train_biases=bias == "all")
    fastpetl.import_peft(several, tmp_path, task="nlvr")
    fastpetl.task(several, "nlvr")
    if bias == "all" and kind == "vlbart":  # else `ours` has biases of its own; T5's relative ones are not in the files
        assert relative(logits(several), logits(theirs)) <= 1e-5


OTHERS = {
    "bert": ["query", "value"],
    "bert with a head": ["query", "value"],
    "roberta": ["query", "value"],
    "clip_text": ["q_proj", "v_proj"],
    "clip_vision": ["q_proj", "v_proj"],
    "vilt": ["query", "value"],
    "meter": r"meter\.cross_modal.*\.(query|value)",  # not its towers'
}


def other(kind):
    if kind != "bert with a head":
        return vilt_tiny.tiny_vilt() if kind == "vilt" else hf_tiny.build(kind)
    torch.manual_seed(7)
    model = hf.BertForSequenceClassification(hf.BertConfig(**hf_tiny.TEXT, num_labels=5)).eval()
    randomize(model)
    return model


def computed(model, kind):
    given = vilt_tiny.inputs() if kind == "vilt" else hf_tiny.FAMILIES[kind.split()[0]][1](True)
    torch.manual_seed(1)  # ViLT shuffles its patches
    with torch.no_grad():
        out = model.eval()(**given)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def moved(model):
    """What trains differs from the backbone's."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


@pytest.mark.parametrize("options", [{"train_norms": True}, {"train_biases": False}], ids=["all", "lora"])
@pytest.mark.parametrize("kind", OTHERS)
def test_peft_reads_what_we_export_of_other_backbones(kind, options, tmp_path):
    config = fastpetl.LoRAConfig(tasks=TASKS, rank=3, alpha=6.0, sharing="multiple", dropout=0.0, **options)
    model = moved(fastpetl.attach(other(kind), config))
    fastpetl.task(model, "gqa")
    fastpetl.export_peft(model, tmp_path, task="gqa")
    theirs = peft.PeftModel.from_pretrained(other(kind), tmp_path)
    want = computed(model, kind)
    assert relative(computed(theirs, kind), want) <= 1e-5 and relative(computed(other(kind), kind), want) > 1e-2
    lora = [n for n, _ in theirs.named_modules() if n.endswith("lora_A")]
    assert len(lora) == sum(n.endswith("lora_As") for n, _ in model.named_modules())
    assert torch.equal(computed(fastpetl.import_peft(other(kind), tmp_path, task="gqa"), kind), want)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("kind", OTHERS)
def test_we_read_what_peft_saves_of_other_backbones(kind, bias, tmp_path):
    whole = ["classifier"] if kind in ("bert with a head", "vilt", "meter") else None
    options = {"r": 3, "lora_alpha": 6, "target_modules": OTHERS[kind], "bias": bias, "modules_to_save": whole}
    theirs = peft.get_peft_model(other(kind), peft.LoraConfig(**options, init_lora_weights=False))
    moved(theirs).save_pretrained(tmp_path)
    model, want = fastpetl.import_peft(other(kind), tmp_path), computed(theirs, kind)
    assert relative(computed(model, kind), want) <= 1e-5 and relative(computed(other(kind), kind), want) > 1e-2
    assert fastpetl.report(model).patched


def test_errors(tmp_path):
    model = ours("vlbart")
    for call, message in (
        (lambda: fastpetl.export_peft(backbone("vlbart"), tmp_path), "export_peft: model is VLBart, expected one with"),
        (lambda: fastpetl.export_peft(model, tmp_path), "export_peft: task is None, expected one of vqa, gqa, nlvr"),
        (
            lambda: fastpetl.export_peft(fastpetl.attach(backbone("vlbart"), fastpetl.AdapterConfig()), tmp_path),
            "export_peft: model is AdapterConfig, expected one with",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="import_peft: .* has no adapter_config.json, expected a folder saved"):
        fastpetl.import_peft(model, tmp_path)
    fastpetl.export_peft(model, tmp_path, task="vqa")
    with pytest.raises(ValueError, match="import_peft: task is 'default', expected one of vqa, gqa, nlvr"):
        fastpetl.import_peft(model, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    bare = backbone("vlbart")
    before = everything(bare)
    first = next(name for name in weights if name.endswith("lora_A.weight"))
    for change, message in (
        ({"peft_type": "IA3"}, "import_peft: peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "import_peft: use_dora is True, expected False"),
        ({"rank_pattern": {"a": 1}}, "import_peft: rank_pattern is {'a': 1}, expected {}"),
        ({"bias": "lora_only"}, "import_peft: bias is 'lora_only', expected 'none' or 'all'"),
        ({"r": 4}, r"lora_A.weight has shape \(3, 32\), expected \(4, 32\) to match the model"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            fastpetl.import_peft(bare, tmp_path)
        assert everything(bare) == before
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    for wrong, message in (
        (
            {n: w for n, w in weights.items() if n != first},
            "the files have no .*lora_A.weight, expected LoRA on the quer",
        ),
        (
            {**weights, "base_model.model.more": torch.zeros(1)},
            "the files have more, for which this model has no place",
        ),
    ):
        save_file(wrong, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            fastpetl.import_peft(bare, tmp_path)
        assert everything(bare) == before
    wrong = fastpetl.attach(backbone("vlbart"), fastpetl.LoRAConfig(tasks=TASKS, rank=5))
    with pytest.raises(ValueError, match="import_peft: model has LoRAConfig.*attached, expected LoRAConfig with"):
        fastpetl.import_peft(wrong, tmp_path, task="vqa")
