"""Prompts in BERT, RoBERTa, CLIP, ViLT and METER, whose callers see nothing of them: against the library's encoder run
on [prompts; tokens] by hand, what comes out besides, what trains, and what has no prompts.
"""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import fastpetl
import hf_tiny
import vilt_tiny
from vilt_tiny import everything, one_thread, randomize, relative  # noqa: F401

LENGTH, HIDDEN = 3, 32
CONFIG = fastpetl.PromptConfig(tasks=("vqa", "gqa"), length=LENGTH, middle=10, sharing="multiple")


def built(backbone):
    """(the bare model, the same with prompts, for task gqa)"""
    bare = vilt_tiny.tiny_vilt().vilt if backbone == "vilt" else hf_tiny.build(backbone)
    model = fastpetl.attach(copy.deepcopy(bare), CONFIG, patch=False)
    for name, module in model.named_modules():
        randomize(module, 0.5) if name.endswith("prompt_modules") else None
    fastpetl.task(model, "gqa")
    return bare, model


def prompts_of(model, task="gqa"):
    (controller,) = [m for n, m in model.named_modules() if n.endswith("prompt_modules")]
    table, first, _, last = controller.prompts[task].prefix_embedding
    return last(torch.tanh(first(table.weight)))


def in_front(x, prompts):
    return torch.cat([prompts.expand(x.shape[0], -1, -1), x], 1)


def padded(mask):
    """Additive over keys, [B, 1, 1, LENGTH + T]: prompts are seen."""
    seen = nn.functional.pad(mask, (LENGTH, 0), value=1)
    return (1.0 - seen[:, None, None].float()) * -1e9


def by_hand(bare, model, backbone):
    """(last hidden state, pooled), of the library's layers run on [prompts; tokens]."""
    if backbone == "clip_vision":
        x = bare.pre_layrnorm(in_front(bare.embeddings(hf_tiny.pixels()), prompts_of(model)))
        y = bare.encoder(x).last_hidden_state[:, LENGTH:]
        return y, bare.post_layernorm(y[:, 0])
    if backbone == "vilt":
        torch.manual_seed(1)
        given = vilt_tiny.inputs()
        x, mask = bare.embeddings(
            *(given["input_ids"], given["attention_mask"], None, given["pixel_values"]),
            *(torch.ones(2, 64, 64), None, None),
        )
        text = bare.embeddings.text_embeddings
        prompts = text.LayerNorm(prompts_of(model)) + bare.embeddings.token_type_embeddings.weight[0]
        y = bare.layernorm(bare.encoder(in_front(x, prompts), padded(mask))[0])[:, LENGTH:]
        return y, bare.pooler(y)
    given = hf_tiny.ids()
    x = in_front(bare.embeddings(given["input_ids"]), bare.embeddings.LayerNorm(prompts_of(model)))
    y = bare.encoder(x, attention_mask=padded(given["attention_mask"])).last_hidden_state[:, LENGTH:]
    return y, bare.pooler(y)


def given(backbone):
    if backbone == "vilt":
        torch.manual_seed(1)
        return vilt_tiny.inputs()
    return {"pixel_values": hf_tiny.pixels()} if backbone == "clip_vision" else hf_tiny.ids()


@pytest.mark.parametrize("backbone", ["bert", "roberta", "clip_vision", "vilt"])
def test_it_is_the_encoder_on_prompts_and_tokens(backbone):
    bare, model = built(backbone)
    with torch.no_grad():
        last, pooled = by_hand(bare, model, backbone)
        out = model(**given(backbone))
        assert out.last_hidden_state.shape == last.shape and out.pooler_output.shape == pooled.shape
        seen = given(backbone).get("attention_mask", torch.ones(last.shape[:2])).bool()
        seen = nn.functional.pad(seen, (0, last.shape[1] - seen.shape[1]), value=True)
        assert relative(out.last_hidden_state[seen], last[seen]) <= 1e-5
        assert relative(out.pooler_output, pooled) <= 1e-5
        plain = bare(**given(backbone)).pooler_output
        assert relative(out.pooler_output, plain) > 1e-2
        with fastpetl.task(model, "vqa"):
            assert relative(model(**given(backbone)).pooler_output, out.pooler_output) > 1e-2


@pytest.mark.parametrize("backbone", ["bert", "roberta", "clip_vision", "clip_text", "vilt"])
def test_what_else_comes_out_is_of_the_tokens(backbone):
    """Hidden states, maps and tuples are as the bare model gives them; nobody looks at padding."""
    bare, model = built(backbone)
    for one in (bare, model):
        one.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        want, got = bare(**given(backbone), **asked), model(**given(backbone), **asked)
        assert list(want) == list(got)
        for name in ("hidden_states", "attentions"):
            assert [t.shape for t in want[name]] == [t.shape for t in got[name]]
        assert not torch.equal(got.hidden_states[1], want.hidden_states[1])
        rows = got.attentions[0].sum(-1)
        causal = backbone == "clip_text"  # whose first token sees itself alone
        assert (rows[..., causal:] < 1 - 1e-4).all() and (not causal or (rows[..., 0] == 1).all())
        parts = model(**given(backbone), **asked, return_dict=False)
        want = bare(**given(backbone), **asked, return_dict=False)
        assert type(parts) is tuple and [type(t) for t in parts] == [type(t) for t in want]


@pytest.mark.parametrize("backbone", ["bert", "roberta", "clip_text", "vilt"])
def test_padding_is_not_seen_and_no_mask_is_a_mask_of_ones(backbone):
    _, model = built(backbone)
    full = given(backbone)
    mask = full.pop("attention_mask")

    def last(**changes):
        torch.manual_seed(1)
        return model(**{**full, **changes}).last_hidden_state

    with torch.no_grad():
        changed = torch.where(mask == 0, 40, full["input_ids"])
        want, got = last(attention_mask=mask), last(attention_mask=mask, input_ids=changed)
        text = mask.shape[1]
        assert torch.equal(got[:, :text][mask == 1], want[:, :text][mask == 1])
        assert relative(last()[:, :text][mask == 1], want[:, :text][mask == 1]) > 1e-3 or backbone == "clip_text"
        assert relative(last(attention_mask=torch.ones_like(mask)), last()) <= 1e-5


def test_clip_texts_first_token_sees_no_prompts():
    """Its attention looks back: the first token is as without, and in the end the last token is pooled, as without."""
    bare, model = built("clip_text")
    last = hf_tiny.ids(padded=False)
    last["input_ids"] = nn.functional.pad(last["input_ids"][:, 1:].clamp(max=58), (0, 1), value=59)
    with torch.no_grad():
        want, got = bare(**last), model(**last)
    assert relative(got.last_hidden_state[:, 0], want.last_hidden_state[:, 0]) <= 1e-5
    assert (got.last_hidden_state - want.last_hidden_state).abs().amax(-1)[:, 1:].min() > 1e-3
    assert torch.equal(got.pooler_output, got.last_hidden_state[:, -1])


def test_what_trains_and_how_much():
    config = hf.BertConfig(**hf_tiny.TEXT, num_labels=5)
    model = hf.BertForTokenClassification(config).eval()
    plain = sum(p.numel() for p in model.parameters())
    fastpetl.attach(model, CONFIG)
    one = LENGTH * HIDDEN + (HIDDEN + 1) * 10 + (10 + 1) * HIDDEN
    assert sum(p.numel() for p in model.parameters()) == plain + 2 * one
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    prompts = {n for n in trained if n.startswith("bert.embeddings.prompt_modules.prompts.")}
    assert trained - prompts == {"classifier.weight", "classifier.bias"} and len(prompts) == 2 * 5
    fastpetl.task(model, "gqa")
    labels = torch.ones(3, 7, dtype=torch.long)
    model(**hf_tiny.ids(), labels=labels).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n in trained if ".vqa." not in n}
    meter = fastpetl.attach(hf_tiny.build("meter"), CONFIG)
    trained = [n for n, p in meter.named_parameters() if p.requires_grad]
    prompts = [n for n in trained if ".text_transformer.embeddings.prompt_modules." in n]
    assert len(prompts) == 10 and all(n.startswith("classifier.") for n in set(trained) - set(prompts))


def test_both_sides_of_clip_have_prompts_of_their_width():
    model = fastpetl.attach(hf_tiny.clip(), CONFIG)
    assert model.text_model.embeddings.prompt_modules.hidden == 32
    assert model.vision_model.embeddings.prompt_modules.hidden == 48
    fastpetl.add_task(model, "more")
    assert model.vision_model.embeddings.prompt_modules.prompts["more"]().shape == (LENGTH, 48)


def test_the_task_of_a_call_and_a_batch_of_two_tasks():
    _, model = built("bert")
    fastpetl.task(model, None)
    with torch.no_grad():
        alone = {task: model(**hf_tiny.ids(), task=task).last_hidden_state for task in CONFIG.tasks}
        mixed = model(**hf_tiny.ids(), task=("vqa", "gqa", "vqa")).last_hidden_state
        assert relative(mixed[1], alone["gqa"][1]) <= 1e-5 and relative(mixed[2], alone["vqa"][2]) <= 1e-5
        with pytest.raises(ValueError, match="PromptController: task is None, expected one of vqa, gqa"):
            model(**hf_tiny.ids())
    with pytest.raises(ValueError, match=r"ViltModel: task is given, expected fastpetl.task\(model, name\)"):
        built("vilt")[1](**vilt_tiny.inputs(), task="vqa")


@pytest.mark.parametrize("mask", [[False, True, False, False], [[False, True, False, False], [False] * 4]])
def test_vilts_blocks_are_skipped_as_without(mask):
    model = fastpetl.attach(vilt_tiny.tiny_vilt(), CONFIG, patch=False)
    randomize(model)
    fastpetl.task(model, "gqa")
    with torch.no_grad(), fastpetl.skip(model, torch.tensor(mask)):
        want, got = vilt_tiny.run(model).logits, vilt_tiny.run(fastpetl.patch(copy.deepcopy(model))).logits
    assert relative(got, want) <= 1e-5
    with torch.no_grad():
        assert relative(vilt_tiny.run(model).logits[0], want[0]) > 1e-3
        assert relative(vilt_tiny.run(model).logits[1], want[1]) < 1e-5 or isinstance(mask[0], bool)


def test_two_images_and_image_classes():
    """Heads that call the model more than once, or look at its tokens."""
    torch.manual_seed(3)
    two = hf.ViltForImagesAndTextClassification(
        hf.ViltConfig(**{**vilt_tiny.tiny_vilt().config.to_diff_dict(), "num_images": 2, "modality_type_vocab_size": 3})
    ).eval()
    fastpetl.task(fastpetl.attach(two, CONFIG), "gqa")
    pixels = torch.stack([vilt_tiny.inputs()["pixel_values"]] * 2, 1)
    images = hf.CLIPForImageClassification(
        hf.CLIPConfig(vision_config={**hf_tiny.SIZES, "image_size": 32, "patch_size": 8}, num_labels=3)
    ).eval()
    fastpetl.task(fastpetl.attach(images, CONFIG), "gqa")
    with torch.no_grad():
        assert two(**{**vilt_tiny.inputs(), "pixel_values": pixels}).logits.shape[0] == 2
        assert images(hf_tiny.pixels()).logits.shape == (3, 3)


def test_what_has_no_prompts():
    class Embeddings(hf.models.bert.modeling_bert.BertEmbeddings):
        pass

    other = hf_tiny.build("bert")
    other.embeddings.__class__ = Embeddings
    alone = vilt_tiny.tiny_vilt().vilt.encoder
    for model, message in (
        (other, "attach: embeddings is .*Embeddings, expected .*modeling_bert.BertEmbeddings for prompts"),
        (hf_tiny.build("decoder"), "attach: the BertModel is a decoder, expected an encoder for prompts"),
        (alone, "attach: the ViltEncoder is alone, expected it in a ViltModel for prompts"),
    ):
        before = everything(model)
        with pytest.raises(ValueError, match=message):
            fastpetl.attach(model, CONFIG)
        assert everything(model) == before
    _, model = built("bert")
    with pytest.raises(
        ValueError, match=r"BertModel: attention_mask has shape \(3, 1, 7, 7\), expected \(batch, text\)"
    ):
        model(hf_tiny.ids()["input_ids"], torch.ones(3, 1, 7, 7))
    vilt = vilt_tiny.tiny_vilt()
    fastpetl.attach(vilt.vilt, CONFIG)
    with pytest.raises(ValueError, match="attach: model has adapters attached already"):
        fastpetl.attach(vilt, fastpetl.AdapterConfig())
