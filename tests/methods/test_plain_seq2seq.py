"""VL-Adapter's methods on Hugging Face's own BART and T5: they are VL-BART and VL-T5 that see no image."""

import copy
import pickle

import pytest
import torch
import transformers as hf

import fastpetl
from fastpetl.nn.prompt import SeesPrompts
from vilt_tiny import everything, one_thread, relative  # noqa: F401
from vl_tiny import SIZES, TASKS, inputs, randomize, tiny

CONFIGS = {
    "adapter": fastpetl.AdapterConfig(tasks=TASKS, bottleneck=4, sharing="half"),
    "compacter": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4, sharing="multiple"),
    "lowrank": fastpetl.LowRankConfig(tasks=TASKS, bottleneck=6, rank=2),
    "hyperformer": fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6),
    "lora": fastpetl.LoRAConfig(tasks=TASKS, rank=3, sharing="multiple", dropout=0.0),
    "prompts": fastpetl.PromptConfig(tasks=TASKS, length=3, middle=10),
    "prompts, multiple": fastpetl.PromptConfig(tasks=TASKS, length=3, middle=10, sharing="multiple"),
    "compacter, prompts": fastpetl.CompacterConfig(
        tasks=TASKS, bottleneck=4, prompts={"length": 2, "middle": 10, "sharing": "multiple"}
    ),
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


PROMPTS = [(kind, name) for kind, name in CASES if "prompts" in name]


@pytest.mark.parametrize(("kind", "name"), PROMPTS)
def test_generation_with_prompts(kind, name):
    """The decoder sees them, with a cache, beams and a task for each sample; the padding of the text it does not."""
    plain, ours = built(kind, name)
    given = {key: value for key, value in text().items() if not key.startswith("decoder")}
    for model in (plain, ours):
        model.generation_config.forced_eos_token_id = None
    ours.generation_config.update(**plain.generation_config.to_diff_dict())
    for tasks in ("gqa", ["nlvr", "vqa", "nlvr"]):
        for options in ({}, {"num_beams": 2}, {"use_cache": False}):
            options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
            found = []
            for model in (plain, ours, fastpetl.patch(copy.deepcopy(plain))):
                with fastpetl.task(model, tasks):
                    found.append(model.generate(**given, **options))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), (tasks, options)
    padded = {key: value.clone() for key, value in text().items()}
    padded["input_ids"][padded["attention_mask"] == 0] += 1
    assert torch.equal(plain(**padded).logits, plain(**text()).logits)


@pytest.mark.parametrize(("kind", "name"), PROMPTS)
def test_prompts_beside_the_rest(kind, name, tmp_path):
    """Files, pickles, skipped blocks, a task named in the call, and states that came with prompts."""
    plain, ours = built(kind, name)
    want = plain(**text()).logits
    fastpetl.save(plain, tmp_path)
    bare = PLAIN[kind]().eval()
    bare.load_state_dict({n: v for n, v in plain.state_dict().items() if n in bare.state_dict()})
    fastpetl.task(fastpetl.load(bare, tmp_path), "gqa")
    assert relative(bare(**text()).logits, want) <= 1e-5
    again = pickle.loads(pickle.dumps(plain))
    assert torch.equal(again(**text()).logits, want)
    other = ours(**text(), task="vqa").logits
    assert relative(plain(**text(), task="vqa").logits, other) <= 2e-5
    states = plain.get_encoder()(**{k: v for k, v in text().items() if k != "decoder_input_ids"})
    given = {k: v for k, v in text().items() if k != "input_ids"}
    assert torch.equal(plain(encoder_outputs=states, **given).logits, want)
    host = plain.model if kind == "vlbart" else plain
    blocks = [i == 1 for i in range(4)]
    with fastpetl.skip(plain, blocks), fastpetl.skip(ours, blocks):
        assert relative(plain(**text()).logits, ours(**text()).logits) <= 2e-5
        fastpetl.detach(plain)
        assert relative(plain(**text()).logits, want) > 1e-3
        fastpetl.attach(plain, CONFIGS[name], patch=False)
        assert "prompt_modules" in host.encoder._modules and isinstance(host.decoder, SeesPrompts)
    assert type(host.decoder).__mro__[1] is SeesPrompts  # and no longer skips


@pytest.mark.parametrize("kind", PLAIN)
def test_hidden_states_and_maps_with_prompts(kind):
    """The library finds by a class's name what it gives besides its output."""
    plain, _ = built(kind, "prompts")
    plain.set_attn_implementation("eager")
    out = plain(**text(), output_hidden_states=True, output_attentions=True)
    tokens = text()["input_ids"].shape[1] + 3
    assert len(out.encoder_hidden_states) == 3 and len(out.decoder_hidden_states) == 3
    assert all(states.shape[1] == tokens for states in out.encoder_hidden_states)
    assert [weights.shape[-1] for weights in out.cross_attentions] == [tokens] * 2
    assert type(plain.get_encoder()).__qualname__ in ("BartEncoder", "T5Stack")


def test_what_takes_no_prompts():
    class Encoder(hf.models.bart.modeling_bart.BartEncoder):
        pass

    model = PLAIN["vlbart"]()
    model.model.encoder.__class__ = Encoder
    before = everything(model)
    with pytest.raises(ValueError, match=r"attach: the encoder is .*Encoder, expected .*modeling_bart.BartEncoder for"):
        fastpetl.attach(model, CONFIGS["prompts"])
    assert everything(model) == before
