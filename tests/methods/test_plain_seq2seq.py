"""VL-Adapter's methods on Hugging Face's own BART and T5: they are VL-BART and VL-T5 that see no image."""

import copy

import pytest
import torch
import transformers as hf

import fastpetl
from vilt_tiny import everything, one_thread, relative  # noqa: F401
from vl_tiny import SIZES, TASKS, inputs, randomize, tiny

CONFIGS = {
    "adapter": fastpetl.AdapterConfig(tasks=TASKS, bottleneck=4, sharing="half"),
    "compacter": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4, sharing="multiple"),
    "lowrank": fastpetl.LowRankConfig(tasks=TASKS, bottleneck=6, rank=2),
    "hyperformer": fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6),
    "lora": fastpetl.LoRAConfig(tasks=TASKS, rank=3, sharing="multiple", dropout=0.0),
    "norms": fastpetl.BaselineConfig(train="norms"),
    "biases": fastpetl.BaselineConfig(train="biases"),
}
PLAIN = {
    "vlbart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SIZES["vlbart"])),
    "vlt5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SIZES["vlt5"], decoder_start_token_id=0)),
}
CASES = [(kind, name) for kind in PLAIN for name in CONFIGS if (kind, name) != ("vlt5", "biases")]  # T5 has none


def text():
    given = {key: value for key, value in inputs().items() if key in ("input_ids", "attention_mask")}
    return {**given, "decoder_input_ids": inputs()["input_ids"][:, :5]}


def built(kind, name):
    """(the plain model, the one of ours with the same weights), both with the method."""
    torch.manual_seed(5)
    plain, ours = PLAIN[kind]().eval(), tiny(kind)
    for model in (plain, ours):
        fastpetl.attach(model, CONFIGS[name], patch=False)
    randomize(plain)
    state = plain.state_dict()
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and all("visual_embedding" in key for key in missing)
    if name not in ("norms", "biases"):
        for model in (plain, ours):
            fastpetl.task(model, "gqa")
    return plain, ours


def gradients(model):
    model.zero_grad(set_to_none=True)
    out = model(**text()).logits
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_it_is_our_model_without_an_image(kind, name):
    plain, ours = built(kind, name)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad and "visual_embedding" not in n}
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == trained
    patched = fastpetl.patch(copy.deepcopy(plain))
    exact = copy.deepcopy(ours).double()
    want = exact(**text()).logits
    error = relative(ours(**text()).logits, want)
    for model in (plain, patched):
        assert relative(model(**text()).logits, want) <= 2 * error + 2e-6
    grads, mine = gradients(plain), gradients(patched)
    assert grads and grads.keys() == mine.keys()
    scale = max(g.norm() for g in grads.values())
    for key, grad in grads.items():
        assert (mine[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, key
    assert not [row for row in fastpetl.report(patched).rows if "last original forward" in row.reason]


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[1] not in ("norms", "biases")])
def test_tasks_in_one_batch_and_the_way_back(kind, name):
    plain, _ = built(kind, name)
    fastpetl.patch(plain)
    mixed = ["nlvr", "vqa", "nlvr"]
    with torch.no_grad():
        with fastpetl.task(plain, mixed):
            got = plain(**text()).logits
        for i, task in enumerate(mixed):
            with fastpetl.task(plain, task):
                assert relative(got[i], plain(**text()).logits[i]) <= 2e-5
    bare = PLAIN[kind]().eval()
    fresh = everything(bare)
    fastpetl.detach(fastpetl.attach(bare, CONFIGS[name]))
    assert everything(bare) == fresh
