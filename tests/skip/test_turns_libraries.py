"""What skipping does beside what each library does: maps, hidden states, caches, two sides, tasks."""

import pytest
import torch

import fastpetl
import hf_tiny
from fastpetl import skip
from fastpetl.skip import policies
from skip.turn_families import BATCH, build, inputs, mask_of, output, rows, values
from vilt_tiny import one_thread, randomize, relative  # noqa: F401


def test_attention_maps_and_hidden_states():
    """BERT's and CLIP's are collected where the layers run; LXMERT and BridgeTower hand theirs on."""
    for name in ("bert", "clip_text"):
        model, given = build(name), inputs(name)
        plan = [False, True, False, True]
        with fastpetl.skip(model, plan):
            assert len(model(**given, output_hidden_states=True).hidden_states) == 3
        for asked in ("output_hidden_states", "output_attentions"):
            message = f"skip: {asked} is True while samples skip blocks of their own, expected not"
            with fastpetl.skip(model, mask_of(name)), pytest.raises(ValueError, match=message):
                model(**given, **{asked: True})
    model, given, mask = build("lxmert"), inputs("lxmert"), mask_of("lxmert")
    mask[:, 1] = torch.tensor([0, 1, 0, 1, 1]).bool()
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad(), fastpetl.skip(model, mask):
        out = model(**given, **asked)
    maps = out.cross_encoder_attentions[0]
    assert [bool(one.any()) for one in maps] == [True, False, True, False, False]
    for b in range(BATCH):
        with torch.no_grad(), fastpetl.skip(model, mask[b]):
            alone = model(**given, **asked)
        if not mask[b, 1]:
            assert relative(maps[b], alone.cross_encoder_attentions[0][b]) <= 1e-5
        else:
            assert alone.cross_encoder_attentions[0] is None
        for one, other in zip(out.vision_hidden_states, alone.vision_hidden_states, strict=True):
            assert relative(one[b], other[b]) <= 1e-5


@pytest.mark.parametrize("half", [1, 4])
def test_both_halves_of_a_cross_modal_layer_read_the_pair_as_it_was(half):
    """LXMERT: skipping one half leaves the other as it is in the layer that runs both."""
    model, given, pairs = build("lxmert"), inputs("lxmert"), []
    layer = model.encoder.x_layers[0]
    layer.register_forward_hook(lambda m, args, out: pairs.append((args, out)))
    with torch.no_grad():
        model(**given)
        states = model(**given, output_hidden_states=True)
        plan = [i == half for i in range(6)]
        with fastpetl.skip(model, plan):
            got = model(**given, output_hidden_states=True)
    (lang, _, visn, *_), (new_lang, new_visn) = pairs[0]
    want = (lang, new_visn) if half == 1 else (new_lang, visn)
    assert torch.equal(got.language_hidden_states[1], want[0]) and torch.equal(got.vision_hidden_states[1], want[1])
    assert not torch.equal(states.language_hidden_states[-1], got.language_hidden_states[-1])


def test_a_decoder_with_a_cache():
    model, given = build("decoder"), {**inputs("decoder"), "use_cache": True}
    with torch.no_grad():
        for plan in ([True, False, False, True], [False, True, True, True]):
            with fastpetl.skip(model, plan):
                want = model(**{**given, "use_cache": False}).last_hidden_state
                part = rows(given, slice(None)) | {"input_ids": given["input_ids"][:, :5]}
                part["attention_mask"] = given["attention_mask"][:, :5]
                past = model(**part).past_key_values
                rest = given | {"input_ids": given["input_ids"][:, 5:], "past_key_values": past}
                full = given["attention_mask"].bool().all(1)
                assert relative(model(**rest).last_hidden_state[full], want[:, 5:][full]) <= 1e-5
        message = "skip: past_key_values are given while samples skip blocks of their own, expected use_cache=False"
        with fastpetl.skip(model, mask_of("decoder")), pytest.raises(ValueError, match=message):
            model(**given)


def test_both_sides_of_clip():
    import transformers as hf

    torch.manual_seed(7)
    text = {**hf_tiny.SIZES, "vocab_size": 60, "eos_token_id": 59}
    vision = {**hf_tiny.SIZES, "hidden_size": 48, "image_size": 32, "patch_size": 8}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    given = {**inputs("clip_text"), **inputs("clip_vision")}
    blocks = fastpetl.blocks(model)
    assert [b.kind for b in blocks] == ["text"] * 2 + ["image"] * 2
    assert blocks[2].name == "vision_model.encoder.layers.0"
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]]).bool()
    with torch.no_grad():
        with fastpetl.skip(model, mask):
            got = model(**given)
            model.get_image_features(pixel_values=given["pixel_values"])
            assert torch.equal(model(**given).logits_per_text, got.logits_per_text)
        for b in range(BATCH):
            with fastpetl.skip(model, mask[b]):
                alone = model(**given)
            assert relative(got.text_embeds[b], alone.text_embeds[b]) <= 1e-5
            assert relative(got.image_embeds[b], alone.image_embeds[b]) <= 1e-5
        with (
            fastpetl.skip(model, policies.Candidates(mask[:2])),
            pytest.raises(ValueError, match="skip: Candidates on CLIPModel, which compares .*, expected one set after"),
        ):
            model(**given)


def test_with_adapters_of_a_task_and_patched_later():
    model, given = build("bert"), inputs("bert")
    fastpetl.attach(model, fastpetl.AdapterConfig(tasks=("vqa", "gqa")), patch=False)
    fastpetl.task(model, "gqa")
    mask = mask_of("bert")
    assert all(b.macs > 0 for b in fastpetl.blocks(model))
    with torch.no_grad():
        skip.skip(model, mask)
        want = values(model(**given))
        assert relative(values(fastpetl.patch(model)(**given)), want) <= 1e-5
        assert torch.equal(values(fastpetl.unpatch(model)(**given)), want)
    with pytest.raises(ValueError, match="task: blocks are skipped per sample, expected one task, or skip"):
        fastpetl.task(model, ["gqa"] * BATCH)
    with pytest.raises(ValueError, match="skip: shortcut is 'adapter', but the model has no shortcut adapters"):
        skip.skip(model, mask, shortcut="adapter")


@pytest.mark.parametrize("config", [fastpetl.PromptConfig(), fastpetl.HyperformerConfig(tasks=("vqa", "gqa"))])
def test_with_prompts_and_generated_adapters(config):
    """What stands among the tokens is the batch's, what is generated knows its layer."""
    model, given, mask = build("roberta"), inputs("roberta"), mask_of("roberta")
    fastpetl.attach(model, config)
    randomize(model, 0.05)
    if isinstance(config, fastpetl.HyperformerConfig):
        fastpetl.task(model, "gqa")
    assert all(b.macs > 0 for b in fastpetl.blocks(model))
    with torch.no_grad():
        got = output(model, given, mask)
        for b in range(BATCH):
            assert relative(got[b], output(model, given, mask[b])[b]) <= 1e-5
    model.train()
    with fastpetl.skip(model, mask):
        values(model(**given)).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "vqa" not in name)


def test_replicas_and_batches_that_do_not_fit():
    model, given = build("bert"), inputs("bert")
    skip.skip(model, mask_of("bert"))
    with pytest.raises(ValueError, match="skip: mask is .* expected a bool tensor of shape"):
        model(**rows(given, slice(3)))
    model(**given)  # what was begun there is not gone on with
    replica = model.encoder.layer._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="skip: nn.DataParallel while samples skip blocks of their own, expected DDP"):
        replica[0](torch.zeros(5, 3, 32))
