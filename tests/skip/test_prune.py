"""fastpetl.prune: the same outputs from fewer weights, for good."""

import copy

import pytest
import torch

import fastpetl
from vilt_tiny import everything, gradients, one_thread, relative, run, tiny_das, tiny_vilt  # noqa: F401

PLAN = fastpetl.SkipPlan((1, 2))


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("shortcut", ["adapter", "identity"])
def test_same_outputs_from_fewer_weights(patch, shortcut):
    model = tiny_das(patch=patch)
    fastpetl.skip(model, PLAN, shortcut=shortcut)
    want, keys, size = run(model).logits, set(model.state_dict()), fastpetl.count(model).total
    blocks = fastpetl.blocks(model)
    assert fastpetl.prune(model) is model
    assert torch.equal(run(model).logits, want)
    left = set(model.state_dict())
    assert left < keys and not any(".layer.1." in name or ".adapter_list.0." in name for name in left)
    assert any(".adapter_list.1." in name for name in left) == (shortcut == "adapter")
    assert fastpetl.count(model).total < size - 2 * 8000
    assert [b.macs for b in fastpetl.blocks(model)] == [0 if i in (1, 2) else b.macs for i, b in enumerate(blocks)]
    assert torch.equal(run(copy.deepcopy(model)).logits, want)
    fastpetl.unpatch(model)
    assert relative(run(model).logits, want) <= 1e-4
    assert relative(run(fastpetl.patch(model)).logits, want) <= 1e-4


def test_training_goes_on():
    model = tiny_das(patch=True).train()
    fastpetl.skip(model, PLAN)
    _, want = gradients(model)
    fastpetl.prune(model)
    _, got = gradients(model)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


def test_without_adapters_and_with_a_plan_given():
    model = tiny_vilt()
    with fastpetl.skip(model, PLAN):
        want = run(model).logits
    assert torch.equal(run(fastpetl.prune(model, [False, True, True, False])).logits, want)


@pytest.mark.parametrize("build", [tiny_das, tiny_vilt])
def test_inside_a_context(build):
    """Leaving it does not bring the dropped blocks back: the plan stays."""
    model = build()
    with fastpetl.skip(model, PLAN):
        want = run(model).logits
        fastpetl.prune(model)
    assert fastpetl.skip.current(model).blocks == PLAN.blocks and torch.equal(run(model).logits, want)


def test_saved_and_loaded(tmp_path):
    model = tiny_das()
    backbone = fastpetl.detach(copy.deepcopy(model))
    fastpetl.prune(model, PLAN)
    want = run(model).logits
    fastpetl.save(model, tmp_path)
    other = fastpetl.load(backbone, tmp_path)
    assert relative(run(other).logits, want) <= 1e-4 and fastpetl.skip.pruned(other)
    assert set(other.state_dict()) == set(model.state_dict())
    again = fastpetl.load(other, tmp_path)
    assert relative(run(again).logits, want) <= 1e-4


def test_what_cannot_be():
    model = tiny_das()
    before = everything(model)
    with pytest.raises(ValueError, match="prune: nothing is skipped, expected a SkipPlan or one mask"):
        fastpetl.prune(model)
    with pytest.raises(ValueError, match="prune: Masks is set, expected a SkipPlan"):
        fastpetl.prune(model, [[True] * 4])
    assert everything(model) == before
    fastpetl.prune(model, PLAN)
    for other in (None, [True] * 4, [[True] * 4]):
        with pytest.raises(ValueError, match="skip: the model is pruned: expected the plan it was pruned by, SkipPlan"):
            fastpetl.skip(model, other)
    fastpetl.skip(model, PLAN)
    with pytest.raises(ValueError, match="prune: the model is pruned already"):
        fastpetl.prune(model, PLAN)
    with pytest.raises(ValueError, match="detach: the model is pruned, expected one that still has all its blocks"):
        fastpetl.detach(model)
    run(model)
