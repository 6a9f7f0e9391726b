"""Skipping METER's text and image layers per sample: compiled, recomputed, padded, pruned."""

import copy

import pytest
import torch
import torch._dynamo.testing

import fastpetl
from fastpetl import models, skip
from meter_tiny import config, inputs, tiny
from vilt_tiny import one_thread, relative  # noqa: F401

PLAN = fastpetl.SkipPlan((1, 4, 6, 9))


def masks(batch=4, seed=3):
    return torch.rand(batch, 12, generator=torch.Generator().manual_seed(seed)) < 0.5


def build(patch=False):
    model = tiny()
    return fastpetl.patch(model) if patch else model


def backward(logits):
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))).sum().backward()


def gradients(model, given, mask=None, capacity=None):
    model.zero_grad(set_to_none=True)
    with skip.skip(model, mask, capacity=capacity):
        logits = model(**given).logits
    backward(logits)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    assert got.keys() == want.keys()
    scale = max(g.norm() for g in want.values())
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, name


@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("shortcut", ["adapter", "identity"])
def test_a_uniform_mask_is_the_static_plan_exactly(shortcut, patch):
    model, given = build(patch), inputs(4)
    for row in ([False] * 12, [True] * 12, masks(1)[0].tolist()):
        with torch.no_grad(), skip.skip(model, row, shortcut=shortcut):
            want = model(**given).logits
        with torch.no_grad(), skip.skip(model, [row] * 4, shortcut=shortcut):
            assert torch.equal(model(**given).logits, want)
    with torch.no_grad(), skip.skip(model, [False] * 12):
        assert torch.equal(model(**given).logits, build(patch)(**given).logits)


def test_skipped_rows_are_exact():
    """A sample that skips all layers leaves them as it came, to the bit, whatever its neighbours run."""
    model, given, mask = build(), inputs(4), masks()
    mask[2] = True
    with torch.no_grad(), skip.skip(model, mask, shortcut="identity"):
        states = model(**given, output_hidden_states=True).hidden_states
    for before, after in zip(states[0], states[-1], strict=True):
        assert torch.equal(after[2], before[2]) and not torch.equal(after[3], before[3])
    with torch.no_grad(), skip.skip(model, mask, shortcut="adapter"):
        states = model(**given, output_hidden_states=True).hidden_states
    for x, after, adapters in zip(states[0], states[-1], (0, 1), strict=True):
        for adapter in model.meter._shortcuts(adapters):
            x = adapter(x)
        assert torch.equal(after[2], x[2])


def test_two_images_and_one_mask():
    """NLVR2: a sample's mask holds for both its images."""
    torch.manual_seed(0)
    model = models.MeterForImagesAndTextClassification(config(type_vocab_size=3, num_labels=2)).eval()
    given, mask = inputs(4), masks()
    given["pixel_values"] = torch.randn(4, 2, 3, 64, 64)
    with torch.no_grad():
        with skip.skip(model, mask):
            got = model(**given).logits
        for b in range(4):
            with skip.skip(model, mask[b].tolist()):
                alone = model(**{name: value[b : b + 1] for name, value in given.items()}).logits
            torch.testing.assert_close(got[b : b + 1], alone, rtol=1e-5, atol=1e-5)


def test_candidates_go_through_the_towers_once():
    model, given, seen = build(), inputs(3), []
    for tower in (model.meter.text_transformer.encoder, model.meter.vit_model.encoder):
        tower.register_forward_hook(lambda m, args, out: seen.append(len(out.last_hidden_state)))
    with torch.no_grad(), skip.skip(model, skip.policies.Candidates(masks(3))):
        assert len(model(**given).logits) == 9
    assert seen == [3, 3]


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "capacity"),
    [(True, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, None), (False, 3), (True, 3)))],
)
def test_compiled_once_for_all_masks(patch, capacity):
    """One graph, forward and backward, whatever the masks."""
    model, given = tiny(num_hidden_layers=2).train(), inputs(4)
    model = fastpetl.patch(model) if patch else model
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for mask in (masks()[:, :4], ~masks()[:, :4], torch.zeros(4, 4).bool()):
        want = gradients(model, given, mask, capacity)
        model.zero_grad(set_to_none=True)
        with skip.skip(model, mask, capacity=capacity):
            backward(compiled(**given).logits)
        assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, want)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["adapter", "identity"])
def test_what_nobody_runs_has_zero_gradients(shortcut):
    model, given = build(patch=True).train(), inputs(2)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad and "adapter_list" not in name}
    for mask in (torch.zeros(2, 12).bool(), torch.ones(2, 12).bool(), masks(2)):
        with skip.skip(model, [False] * 12, shortcut=shortcut):
            found = gradients(model, given, skip.policies.Masks(mask))
        assert adapters <= found.keys()
    with skip.skip(model, torch.tensor([[True] + [False] * 11] * 2), shortcut=shortcut):
        model.zero_grad(set_to_none=True)
        backward(model(**given).logits)
    layers = model.meter.cross_modal_text_layers
    assert layers[0].adapter.up_proj.weight.grad is not None and not layers[0].adapter.up_proj.weight.grad.any()
    assert not layers[0].attention.output.adapter.down_proj.weight.grad.any()
    assert layers[1].adapter.up_proj.weight.grad.any()
    if shortcut == "adapter":
        used, unused = (model.meter.adapter_list_l[i][0].up_proj.weight.grad for i in (0, 1))
        assert used.any() and not unused.any()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["kept", "reentrant"])
@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["plan", "masks"])
def test_the_recomputed_layers_are_those_that_ran(per_sample, patch, use_reentrant):
    """The skip set changes between forward and backward, as DAS's reward passes change it."""
    model, given = build(patch).train(), inputs(3)
    one, other = (masks(3), ~masks(3)) if per_sample else (PLAN, fastpetl.SkipPlan((0, 3, 7, 10, 11)))
    want = gradients(model, given, one)
    assert any(not torch.equal(grad, want.get(name, grad)) for name, grad in gradients(model, given, other).items())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.zero_grad(set_to_none=True)
    ran = []
    for block in [] if patch else fastpetl.blocks(model):  # a hook on a child would have the layer decline
        inside = model.get_submodule(block.name).intermediate
        inside.register_forward_hook(lambda m, args, out, i=block.index: ran.append((i, len(args[0]))))
    skip.skip(model, one)
    logits = model(**given).logits
    forward = sorted(ran)
    ran.clear()
    skip.skip(model, other)
    backward(logits)
    assert (patch or forward) and sorted(ran) == forward  # each once more, on as many samples
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, want)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
def test_padding_is_nobodys_business(patch):
    """Each sample, with a mask of its own, is itself without padding and without the others."""
    model, mask = build(patch), masks(4)
    given = inputs(4)
    lengths = (8, 12, 5, 10)
    for b, length in enumerate(lengths):
        given["attention_mask"][b, length:] = 0
    given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, 1)
    with torch.no_grad():
        with skip.skip(model, mask):
            got = model(**given).logits
        for b, length in enumerate(lengths):
            alone = {name: value[b : b + 1] for name, value in given.items()}
            alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
            with skip.skip(model, mask[b].tolist()):
                assert relative(got[b : b + 1], model(**alone).logits) <= 1e-5


# --- what is dropped for good -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("shortcut", ["adapter", "identity"])
def test_pruned_saved_and_loaded(shortcut, patch, tmp_path):
    model, given = build(patch), inputs()
    with skip.skip(model, PLAN, shortcut=shortcut):
        want = model(**given).logits
    backbone = fastpetl.detach(copy.deepcopy(model))
    size, keys = fastpetl.count(model).total, set(model.state_dict())
    fastpetl.prune(model, PLAN, shortcut=shortcut)
    assert torch.equal(model(**given).logits, want)
    left = set(model.state_dict())
    gone = ("text_layers.1.", "text_layers.4.", "image_layers.0.", "image_layers.3.", "adapter_list_l.0.")
    assert left < keys and not any(part in name for name in left for part in gone)
    assert any("adapter_list_v.3." in name for name in left) == (shortcut == "adapter")
    fastpetl.save(model, tmp_path)
    other = fastpetl.load(backbone, tmp_path, patch=patch)
    assert skip.pruned(other) and skip.current(other) == skip.current(model)
    assert relative(other(**given).logits, want) <= 1e-6
    assert other.state_dict().keys() == model.state_dict().keys() and fastpetl.count(other).total < size
    with pytest.raises(ValueError, match="skip: the model is pruned: expected the plan it was pruned by"):
        skip.skip(other, None)
    with pytest.raises(
        ValueError, match="load: the model does not have meter.adapter_list_l.4|cross_modal_image_layers.4"
    ):
        fastpetl.load(type(model)(config(num_hidden_layers=4)), tmp_path)
