"""METER's hidden states and attention maps, asked for by name or by the configuration, patched and not."""

import pytest
import torch

import fastpetl
from meter_tiny import inputs, tiny
from vilt_tiny import relative


def run(model, **asked):
    with torch.no_grad():
        return model.eval()(**inputs(), **asked)


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("skipped", [(), (1,), "masks"])
def test_hidden_states(patch, skipped):
    model = tiny()
    n = model.config.num_hidden_layers
    if skipped == "masks":
        fastpetl.skip(model, torch.tensor([[True, False] * n, [False, True] * n]))
    elif skipped:
        fastpetl.skip(model, fastpetl.SkipPlan(skipped))
    before, kept = [], []
    model.meter.cross_modal_text_pooler.register_forward_pre_hook(lambda m, given: kept.append(given[0]))
    model.meter.cross_modal_image_pooler.register_forward_pre_hook(lambda m, given: kept.append(given[0]))
    model.meter.cross_modal_text_layers[0].register_forward_pre_hook(lambda m, given: before.append(given[0]))
    if patch:
        fastpetl.patch(model)
    out = run(model, output_hidden_states=True)
    assert len(out.hidden_states) == n + 1 and all(len(pair) == 2 for pair in out.hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[-1], kept, strict=True))
    if skipped != "masks":
        assert torch.equal(out.hidden_states[0][0], before[0])
    assert torch.equal(out.logits, run(model).logits) and run(model).hidden_states is None
    for i, (text, image) in enumerate(out.hidden_states[1:]):
        assert text.shape == before[0].shape if skipped != "masks" else text.shape[0] == 2
        assert not torch.equal(image, out.hidden_states[i][1])
    model.config.output_hidden_states = True
    assert len(run(model).hidden_states) == n + 1


@pytest.mark.parametrize("patch", [False, True])
def test_attention_maps(patch):
    model = tiny()
    plain = run(model).logits
    model.set_attn_implementation("eager")
    if patch:
        fastpetl.patch(model)
    out = run(model, output_attentions=True)
    assert relative(out.logits, plain) <= 1e-5
    given = inputs()
    b, t = given["input_ids"].shape
    heads, n = model.config.num_attention_heads, model.config.num_hidden_layers
    assert len(out.attentions) == n
    for (own, other), (image_own, image_other) in out.attentions:
        tokens = image_own.shape[-1]
        shapes = [tuple(w.shape) for w in (own, other, image_own, image_other)]
        assert shapes == [(b, heads, q, k) for q, k in ((t, t), (t, tokens), (tokens, tokens), (tokens, t))]
        for weights in (own, other, image_own, image_other):
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-5, atol=1e-5)
        hidden = given["attention_mask"] == 0
        assert own.transpose(0, 3)[..., 0].shape and (own.permute(0, 3, 1, 2)[hidden] == 0).all()
    fastpetl.skip(model, fastpetl.SkipPlan((0,)))
    assert run(model, output_attentions=True).attentions[0][0] is None


def test_maps_that_nobody_makes():
    model = tiny()
    with pytest.raises(ValueError, match="output_attentions is True with attn_implementation 'sdpa', expected 'eager'"):
        run(model, output_attentions=True)
    model.set_attn_implementation("eager")
    fastpetl.skip(model, torch.zeros(2, 2 * model.config.num_hidden_layers, dtype=torch.bool))
    with pytest.raises(ValueError, match="output_attentions is True while samples skip blocks of their own"):
        run(model, output_attentions=True)
