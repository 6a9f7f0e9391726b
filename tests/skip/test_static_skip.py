"""fastpetl.skip and fastpetl.blocks: which blocks run, what a skipped one gives, and what is restored."""

import copy

import numpy as np
import pytest
import torch

import fastpetl
from fastpetl import SkipPlan
from vilt_tiny import assert_same_training, everything, gradients, pair, relative, run, tiny_das, tiny_vilt


def manual(model, skipped, shortcut="adapter"):
    """The same by hand: the encoder's blocks called one by one, as the original loop does."""
    encoder = model.vilt.encoder
    states = {}
    handle = encoder.register_forward_pre_hook(
        lambda module, args, kwargs: states.update(x=args[0], mask=kwargs["attention_mask"]), with_kwargs=True
    )
    run(model)
    handle.remove()
    x = states["x"]
    for i, layer in enumerate(encoder.layer):
        if i not in skipped:
            x = layer(x, states["mask"])[0]
        elif shortcut == "adapter":
            x = encoder.adapter_list[i](x)
    return model.classifier(model.vilt.pooler(model.vilt.layernorm(x)))


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("skipped", [(), (0,), (1, 3), (0, 1, 2, 3)])
def test_skipped_blocks_give_the_shortcut(skipped, patch):
    model = tiny_das(patch=patch)
    for shortcut in ("adapter", "identity"):
        want = manual(model, skipped, shortcut)
        with fastpetl.skip(model, SkipPlan(skipped), shortcut=shortcut):
            assert relative(run(model).logits, want) <= 1e-5
    bare = tiny_vilt()
    want = manual(bare, skipped, "identity")
    with fastpetl.skip(bare, SkipPlan(skipped).mask(4)):
        assert relative(run(bare).logits, want) <= 1e-5


def test_skipping_nothing_is_bit_equal():
    for model in (tiny_das(), tiny_das(patch=True), tiny_vilt()):
        want = run(model).logits
        with fastpetl.skip(model, [False] * 4):
            assert torch.equal(run(model).logits, want)


def test_training_with_skipped_blocks():
    for mask in ([False, True, False, True], [True] * 4):
        patched, plain = pair()
        for model in (patched, plain):
            fastpetl.skip(model, mask)
            model.train()
        found = assert_same_training(patched, plain)
        for i, skipped in enumerate(mask):
            assert (f"vilt.encoder.adapter_list.{i}.0.up_proj.weight" in found) == skipped
            assert (f"vilt.encoder.layer.{i}.adapter0.up_proj.weight" in found) == (not skipped)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("patch", [False, True])
def test_the_backward_is_of_the_blocks_that_ran(patch, use_reentrant):
    model = tiny_das(patch=patch).train()
    fastpetl.skip(model, [False, True, False, False])
    _, want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.zero_grad(set_to_none=True)
    logits = run(model).logits
    fastpetl.skip(model, [True, False, False, True])  # between forward and backward: as DAS's reward passes do
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * cotangent).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name in want:
        assert relative(got[name], want[name]) <= 1e-4 or want[name].norm() < 1e-4, name


def test_forms_of_a_mask():
    model = tiny_das()
    want = SkipPlan((1, 2), "adapter")
    mask = [False, True, True, False]
    for form in (mask, tuple(mask), torch.tensor(mask), np.array(mask), SkipPlan((2, 1)), SkipPlan.from_mask(mask)):
        fastpetl.skip(model, None)
        fastpetl.skip(model, form)
        assert fastpetl.skip.current(model) == want
    fastpetl.skip(model, SkipPlan((1,), "identity"))
    assert fastpetl.skip.current(model) == SkipPlan((1,), "identity")
    fastpetl.skip(model, SkipPlan((1,), "identity"), shortcut="adapter")
    assert fastpetl.skip.current(model).shortcut == "adapter"


def test_a_context_restores_what_was_set_before():
    model = tiny_vilt()
    before = everything(model)
    with fastpetl.skip(model, [True, False, False, False]) as plan:
        assert plan == SkipPlan((0,), "identity")
        with fastpetl.skip(model, [False, True, False, False]):
            assert fastpetl.skip.current(model).blocks == (1,)
            with fastpetl.skip(model, None):
                assert fastpetl.skip.current(model) is None
        assert fastpetl.skip.current(model).blocks == (0,)
    assert everything(model) == before
    with pytest.raises(KeyError), fastpetl.skip(model, [True] * 4):
        raise KeyError
    assert everything(model) == before
    fastpetl.skip(model, [True, False, False, False])
    fastpetl.skip(model, None)
    assert everything(model) == before


def test_patching_and_skipping_in_any_order():
    plain = tiny_das()
    fastpetl.skip(plain, [False, True, False, False])
    want, other = run(plain).logits, run(tiny_das()).logits
    patched = fastpetl.patch(copy.deepcopy(plain))
    late = tiny_das(patch=True)
    fastpetl.skip(late, [False, True, False, False])
    for model in (patched, late):
        assert relative(run(model).logits, want) <= 1e-4
        fastpetl.unpatch(model)
        assert relative(run(model).logits, want) <= 1e-6
        fastpetl.skip(model, None)
        assert relative(run(model).logits, other) <= 1e-6


def test_hidden_states_and_attentions_of_skipped_blocks():
    patched, plain = pair()
    for model in (patched, plain):
        fastpetl.skip(model, [False, True, True, False])
        for kwargs in ({}, {"return_dict": False}):
            out = run(model, output_attentions=True, output_hidden_states=True, **kwargs)
            _, states, maps = out[-3:] if kwargs else (None, out.hidden_states, out.attentions)
            assert [m is None for m in maps] == [False, True, True, False]
            assert len(states) == 5 and relative(states[2], plain.vilt.encoder.adapter_list[1](states[1])) <= 1e-5


def test_skipped_blocks_are_not_called():
    model, called = tiny_das(patch=True), []
    for i, layer in enumerate(model.vilt.encoder.layer):
        layer.register_forward_hook(lambda *_, i=i: called.append(i))
    fastpetl.skip(model, [True, False, True, False])
    run(model)
    assert called == [1, 3]


def test_blocks():
    blocks = fastpetl.blocks(tiny_das())
    assert [b.index for b in blocks] == [0, 1, 2, 3] and {b.kind for b in blocks} == {"multimodal"}
    assert [b.name for b in blocks] == [f"vilt.encoder.layer.{i}" for i in range(4)]
    tokens, d = 12 + 16 + 1, 32
    linears = tokens * (4 * d * d + 2 * d * 64) + 2 * tokens**2 * d
    assert {b.macs for b in blocks} == {linears + tokens * 2 * 2 * d * 6}
    assert {b.shortcut_macs for b in blocks} == {tokens * 2 * d * 10}
    bare = tiny_vilt()
    assert {(b.macs, b.shortcut_macs) for b in fastpetl.blocks(bare)} == {(linears, 0)}
    assert fastpetl.blocks(bare.vilt.encoder)[2].name == "layer.2"


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True] * 3, ValueError, r"skip: mask has shape \(3,\), expected \(n_blocks=4,\)"),
        (
            torch.zeros(5, dtype=torch.bool),
            ValueError,
            r"skip: mask has shape \(5,\), expected \(n_blocks=4,\) or \(batch, n_blocks=4\)",
        ),
        (torch.zeros(4), ValueError, "skip: mask has dtype torch.float32, expected bools"),
        (torch.zeros(4, dtype=torch.long), ValueError, "skip: mask has dtype torch.int64, expected bools"),
        (
            [0, 1, 0, 1],
            ValueError,
            r"skip: mask has the element 0, expected bools \(True = skip\); block indices go in a",
        ),
        (torch.zeros(2, 3, dtype=torch.bool), ValueError, r"mask has shape \(2, 3\), expected \(batch, n_blocks=4\)"),
        (torch.zeros(2, 4), ValueError, "skip: mask has dtype torch.float32, expected bools"),
        ([[True] * 3], ValueError, r"skip: mask has shape \(3,\), expected \(n_blocks=4,\)"),
        ([[0, 1, 0, 1]], ValueError, "skip: mask has the element 0, expected bools"),
        (torch.zeros(4, 1, 1, dtype=torch.bool), ValueError, r"skip: mask has shape \(4, 1, 1\)"),
        (torch.tensor(True), ValueError, r"skip: mask has shape \(\), expected"),
        ("1010", TypeError, "skip: mask is str, expected a SkipPlan or a bool mask of shape"),
        (SkipPlan((1, 4)), ValueError, "skip: plan skips block 4, expected indices below n_blocks=4"),
    ],
)
def test_wrong_masks(mask, error, message):
    model = tiny_das()
    before = everything(model)
    with pytest.raises(error, match=message):
        fastpetl.skip(model, mask)
    assert everything(model) == before


def test_wrong_shortcuts_and_plans():
    with pytest.raises(ValueError, match="skip: shortcut is 'adapter', but the model has no shortcut adapters: attach"):
        fastpetl.skip(tiny_vilt(), [True] * 4, shortcut="adapter")
    with pytest.raises(ValueError, match="skip: shortcut is 'zero', expected one of adapter, identity"):
        fastpetl.skip(tiny_das(), [True] * 4, shortcut="zero")
    with pytest.raises(ValueError, match="skip: model is Linear with no blocks known here"):
        fastpetl.skip(torch.nn.Linear(2, 2), [True])
    with pytest.raises(ValueError, match=r"SkipPlan: blocks is \(1, 1\), expected each index once"):
        SkipPlan((1, 1))
    with pytest.raises(ValueError, match="SkipPlan: blocks has -1, expected block indices >= 0"):
        SkipPlan((-1,))
    with pytest.raises(ValueError, match="SkipPlan: blocks has True, expected block indices"):
        SkipPlan((True, False))
    with pytest.raises(TypeError, match="SkipPlan: blocks is 3, expected block indices"):
        SkipPlan(3)
