"""Masks per sample and policies: each sample runs its own blocks, whatever its neighbours do."""

import copy

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpetl
from fastpetl.skip import compaction, policies
from skip.skip_cases import MASK, batch, logits
from vilt_tiny import everything, gradients, inputs, one_thread, pair, relative, run, tiny_das, tiny_vilt  # noqa: F401


def one_by_one(model, mask, **kwargs):
    """Each sample by the static plan of its own row, out of the full batch."""
    full = [logits(model, row.tolist(), **kwargs) for row in mask]
    return torch.stack([full[b][b] for b in range(len(mask))])


@pytest.mark.parametrize("shortcut", ["adapter", "identity"])
@pytest.mark.parametrize("patch", [False, True])
def test_each_sample_runs_its_own_blocks(patch, shortcut):
    model = tiny_das(patch=patch)
    want = one_by_one(model, MASK, shortcut=shortcut)
    for mask in (MASK, MASK.numpy(), MASK.tolist()):
        assert relative(logits(model, mask, shortcut=shortcut), want) <= 1e-6
    bare = tiny_vilt()
    assert relative(logits(bare, MASK), one_by_one(bare, MASK)) <= 1e-6


@pytest.mark.parametrize("patch", [False, True])
def test_a_uniform_mask_is_the_static_plan_exactly(patch):
    model = tiny_das(patch=patch)
    for row in ([False] * 4, [True] * 4, [False, True, True, False]):
        assert torch.equal(logits(model, [row] * 5), logits(model, row))


@pytest.mark.parametrize("patch", [False, True])
def test_neighbours_do_not_matter(patch):
    model = fastpetl.patch(tiny_das(), backend="cpp") if patch else tiny_das()
    want = logits(model, MASK)
    for rows in (1, 2, 3):
        mask = MASK.clone()
        mask[rows + 1 :] = ~mask[rows + 1 :]
        got = logits(model, mask)
        assert torch.equal(got[: rows + 1], want[: rows + 1])
        assert not torch.equal(got[rows + 1 :], want[rows + 1 :])
    data = batch()
    data["pixel_values"][3] = float("nan")
    got = logits(model, MASK, data)
    assert got[3].isnan().any() and torch.equal(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]])


def test_training_equals_sample_by_sample():
    patched, plain = pair()
    for model in (plain, patched):
        model.train()
        fastpetl.skip(model, MASK[:2])
        _, got = gradients(model)
        want = {}
        cotangent = torch.randn(2, 5, generator=torch.Generator().manual_seed(5))
        for b in range(2):
            fastpetl.skip(model, MASK[b].tolist())
            model.zero_grad(set_to_none=True)
            (run(model).logits[b] * cotangent[b]).sum().backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    want[name] = want.get(name, 0) + p.grad
        scale = max(g.norm() for g in want.values())
        assert want.keys() <= got.keys()
        for name, grad in got.items():
            if name not in want:
                assert not grad.any(), name
            else:
                assert (grad - want[name]).norm() <= 1e-4 * want[name].norm() + 1e-6 * scale, name


def test_what_nobody_runs_has_zero_gradients():
    model = tiny_das(patch=True).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for mask in (torch.zeros(2, 4).bool(), torch.ones(2, 4).bool(), MASK[:2]):
        fastpetl.skip(model, mask)
        _, found = gradients(model)
        adapters = {name for name in trained if "adapter" in name}
        assert adapters <= found.keys()
    fastpetl.skip(model, torch.ones(2, 4).bool())
    _, found = gradients(model)
    assert not found["vilt.encoder.layer.1.adapter0.up_proj.weight"].any()
    assert found["vilt.encoder.adapter_list.1.0.up_proj.weight"].any()
    model.vilt.encoder.layer[0].adapter0.requires_grad_(False)
    assert "vilt.encoder.layer.0.adapter0.up_proj.weight" not in gradients(model)[1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_recomputed_blocks_are_those_that_ran(use_reentrant):
    model = tiny_das(patch=True).train()
    fastpetl.skip(model, MASK[:2])
    _, want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.zero_grad(set_to_none=True)
    out = run(model).logits
    fastpetl.skip(model, ~MASK[:2])
    (out * torch.randn(2, 5, generator=torch.Generator().manual_seed(5))).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert relative(p.grad, want[name]) <= 1e-4 or want[name].norm() < 1e-4, name


def test_blocks_run_on_the_samples_that_keep_them():
    model, seen = tiny_das(patch=True), []
    for layer in model.vilt.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    logits(model, MASK)
    assert seen == [1, 4, 3, 3]
    seen.clear()
    logits(model, torch.ones(5, 4).bool())
    assert seen == []


def test_samples_move_only_where_the_kept_set_changes(monkeypatch):
    moved = []
    select = compaction._select
    monkeypatch.setattr(
        compaction, "_select", lambda rows, index: moved.append(isinstance(index, torch.Tensor)) or select(rows, index)
    )
    model = tiny_das(patch=True)
    column = torch.tensor([True, False, True, False, False])
    logits(model, column[:, None].expand(5, 4))
    assert sum(moved) == 2 + 1 + 1  # both parts once, the mask of the kept once, all back home once
    for uniform in (True, False):
        moved.clear()
        logits(model, torch.full((5, 4), uniform))
        assert not any(moved)
    moved.clear()
    logits(model, torch.tensor([False, True])[:, None].expand(2, 4), batch(2))
    assert not any(moved)  # neighbours are taken as they lie


def test_hidden_states_and_attentions():
    patched, plain = pair()
    for model in (plain, patched):
        fastpetl.skip(model, torch.stack([MASK[0], MASK[2]]))
        out = run(model, output_attentions=True, output_hidden_states=True)
        assert out.attentions[0] is None and all(a.shape[0] == 2 for a in out.attentions[1:])
        assert not out.attentions[1][1].any() and torch.allclose(out.attentions[1][0].sum(-1), torch.ones(()))
        assert not out.attentions[3][0].any() and out.attentions[3][1].any()
        assert [len(s) for s in out.hidden_states] == [2] * 5
        adapter = plain.vilt.encoder.adapter_list
        assert relative(out.hidden_states[2][1], adapter[1](out.hidden_states[1])[1]) <= 1e-5
    with pytest.raises(ValueError, match="skip: output_attentions of a block that part of the samples run"):
        fastpetl.skip(plain, MASK[:2], capacity=1)
        run(plain, output_attentions=True)


def test_settings_and_copies():
    model = tiny_das()
    before = everything(model)
    with fastpetl.skip(model, MASK) as policy:
        assert isinstance(policy, policies.Masks) and fastpetl.skip.current(model) is policy
        other = copy.deepcopy(model)
        with fastpetl.skip(model, [True] * 4):
            pass
        assert fastpetl.skip.current(model) is policy
    assert everything(model) == before
    torch.manual_seed(1)
    assert torch.equal(other(**batch()).logits, logits(model, MASK))


@pytest.mark.parametrize(
    ("given", "kwargs", "message"),
    [
        (MASK[:3], {}, r"skip: mask is torch.bool \(3, 4\), expected a bool tensor of shape \(batch=5, n_blocks=4\)"),
        (lambda x, n: torch.zeros(5, n), {}, r"skip: mask is torch.float32 \(5, 4\), expected a bool tensor"),
        (lambda x, n: None, {}, "skip: mask is NoneType, expected a bool tensor"),
        (MASK, {"capacity": 0}, "Masks: capacity is 0, expected an integer >= 1 or None"),
        (policies.Masks(MASK), {"capacity": 2}, "skip: capacity is 2 beside a policy"),
        ([True] * 4, {"capacity": 2}, "skip: capacity is 2 without masks per sample"),
    ],
)
def test_wrong_settings(given, kwargs, message):
    with pytest.raises(ValueError, match=message):
        logits(tiny_das(), given, **kwargs)


# --- shapes that do not depend on the mask ----------------------------------------------------------------------------


def test_capacity():
    model = tiny_das(patch=True)
    want = logits(model, MASK)
    assert relative(logits(model, MASK, capacity=4), want) <= 1e-6
    assert relative(logits(model, MASK, capacity=7), want) <= 1e-6
    seen = []
    for layer in model.vilt.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    got = logits(model, MASK, capacity=2)
    assert seen == [2] * 4
    first = MASK.clone()  # only the first two that keep a block run it
    for i in range(4):
        first[torch.nonzero(~MASK[:, i])[2:, 0], i] = True
    assert relative(got, logits(model, first)) <= 1e-6


def test_compiled_without_recompiling_for_a_mask():
    model = tiny_das()
    encoder = model.vilt.encoder
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(encoder, backend=counter)
    x = torch.randn(5, 9, 32)
    with torch.no_grad():
        for mask in (MASK, ~MASK, torch.zeros_like(MASK)):
            with fastpetl.skip(model, mask):
                got, want = compiled(x).last_hidden_state, encoder(x).last_hidden_state
            assert relative(got, want) <= 1e-5
    assert counter.frame_count == 1
    with torch.no_grad(), fastpetl.skip(model, policies.Candidates(MASK[:2])):
        mask = torch.zeros(5, 1, 1, 9)
        mask[1, ..., 4:] = -1e9
        assert relative(compiled(x, mask).last_hidden_state, encoder(x, mask).last_hidden_state) <= 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("patch", [False, True])
def test_candidates_in_one_pass(patch):
    model = tiny_das(patch=patch)
    sets = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 1, 1]]).bool()
    want = torch.cat([logits(model, row.tolist()) for row in sets])
    seen = []
    model.vilt.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    got = logits(model, policies.Candidates(sets))
    assert relative(got, want) <= 1e-6
    assert seen == [5]  # all keep it: computed once
    same = logits(model, policies.Candidates(sets[:1].expand(3, 4)))
    assert torch.equal(same, logits(model, sets[0].tolist()).repeat(3, 1))
    hidden = model.vilt.encoder
    with fastpetl.skip(model, policies.Candidates(sets)):
        torch.manual_seed(1)
        out = model(**batch(), output_hidden_states=True, output_attentions=True)
    assert {len(h) for h in out.hidden_states} == {15} and {len(a) for a in out.attentions if a is not None} == {15}
    assert hidden is model.vilt.encoder


def test_candidates_share_each_distinct_beginning():
    model, seen = tiny_das(patch=True), []
    sets = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1]]).bool()
    for layer in model.vilt.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    got = logits(model, policies.Candidates(sets))
    assert seen == [5, 5, 3 * 5, 3 * 5]  # of five copies of five samples
    for row, part in zip(sets, got.chunk(5), strict=True):
        assert relative(part, logits(model, row.tolist())) <= 1e-6


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mask_moves_every_sample_home(data):
    n, blocks, copies = (
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 5)),
        data.draw(st.sampled_from([1, 1, 2, 3])),
    )
    rows = data.draw(
        st.lists(st.lists(st.booleans(), min_size=blocks, max_size=blocks), min_size=copies, max_size=copies)
    )
    if copies == 1:
        cell = st.lists(st.booleans(), min_size=blocks, max_size=blocks)
        rows = data.draw(st.lists(cell, min_size=n, max_size=n))
        mask = torch.tensor(rows)
    else:
        mask = torch.tensor(rows).repeat_interleave(n, 0)
    x = torch.arange(1.0, n + 1)[:, None] * torch.ones(1, 3)
    side = torch.arange(n)[:, None]
    want = x.repeat(copies, 1)
    stream = compaction.Samples(x, mask, None, copies)
    for i in range(blocks):

        def block(rows, take, i=i):
            got = take(side)[:, 0]  # one row stands for every sample
            assert torch.equal(got.expand(len(rows)) if n == 1 else got, rows[:, 0].long() % 10 - 1)
            return rows + 10 ** (i + 1)

        stream.run(i, block, lambda rows: rows - 0.0)
        want = torch.where(mask[:, i : i + 1], want, want + 10 ** (i + 1))
        assert np.array_equal(stream.whole().numpy(), want.numpy())
