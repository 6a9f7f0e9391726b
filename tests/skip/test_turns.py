"""Skipping in models whose loops are not ours: BERT, RoBERTa, CLIP, LXMERT, BridgeTower and the copied originals."""

import copy
import itertools
import pickle

import pytest
import torch
import torch._dynamo.testing

import fastpetl
from fastpetl import skip
from fastpetl.das import Scorer
from fastpetl.das.scoring import scoring, sequential
from fastpetl.skip import policies
from skip.turn_families import BATCH, FAMILIES, NAMES, build, each, inputs, mask_of, output, rows, values
from vilt_tiny import everything, one_thread, relative  # noqa: F401


@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("name", each(NAMES))
def test_each_sample_runs_its_own_blocks(name, patch):
    model, given, mask = build(name, "auto" if patch else None), inputs(name), mask_of(name)
    n = mask.shape[1]
    with torch.no_grad():
        want = values(model(**given))
        before = everything(model)
        # Streams of four or five tokens: where samples may go their own ways, "auto" leaves out kernels that give so
        # few rows other bits than many.
        same = torch.equal if not patch or name not in ("decoder", "lxmert") else lambda a, b: relative(a, b) <= 1e-6
        for keep_all in ([False] * n, [[False] * n] * BATCH):
            assert same(output(model, given, keep_all), want)
        got = output(model, given, mask)
        few = output(model, given, mask, capacity=BATCH - 1) if not (~mask).all(0).any() else None
        for b in range(BATCH):
            full = output(model, given, mask[b])
            assert not torch.allclose(full, want)
            if b < 2:  # a uniform mask: the static plan
                assert torch.equal(output(model, given, mask[b].expand(BATCH, n)), full)
            assert relative(got[b], full[b]) <= 1e-5
            assert few is None or relative(few[b], full[b]) <= 1e-5
        none = output(model, given, [True] * n)
        assert torch.equal(output(model, given, [[True] * n] * BATCH), none)
    assert everything(model) == before


@pytest.mark.parametrize("name", each(NAMES))
def test_what_a_plan_leaves_out(name):
    """Those blocks are not called, the others once each, on all samples; masks: on the samples that keep them."""
    model, given, called = build(name), inputs(name), []
    blocks, mask = fastpetl.blocks(model), mask_of(name)
    assert [b.index for b in blocks] == list(range(len(blocks)))
    assert "".join(b.kind[0] for b in blocks) == FAMILIES[name].kinds and all(b.macs > 0 for b in blocks)
    whole = [b for b in blocks if not b.name.endswith((".lang", ".visn"))]
    for block in whole:
        layer = model.get_submodule(block.name)
        norms = (m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm) or hasattr(m, "variance_epsilon"))
        first = next(norms)
        first.register_forward_pre_hook(lambda m, args, i=block.index: called.append((i, args[0].numel())))
    with torch.no_grad():
        output(model, given)
        sizes = dict(called)
        assert len(called) == len(sizes) == len(whole)
        called.clear()
        output(model, given, mask[0])
        assert sorted(called) == [(i, size) for i, size in sorted(sizes.items()) if not mask[0, i]]
        called.clear()
        output(model, given, mask)
        kept = (~mask).sum(0).tolist()
        assert sorted(called) == [(i, size // BATCH * kept[i]) for i, size in sorted(sizes.items()) if kept[i]]


def gradients(model, given, mask, run=None):
    model.zero_grad(set_to_none=True)
    with fastpetl.skip(model, mask):
        out = values((model if run is None else run)(**given))
    out.backward(cotangent(out))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cotangent(out):
    """Each sample's own, whatever its neighbours."""
    row = torch.randn(out.shape[1], generator=torch.Generator().manual_seed(2))
    return row.expand_as(out)


def assert_same(got, want):
    scale = max(g.norm() for g in want.values())
    for name, grad in got.items():
        other = want.get(name, torch.zeros_like(grad))
        assert (grad - other).norm() <= 1e-4 * grad.norm() + 1e-5 * scale, name
    assert want.keys() <= got.keys()


@pytest.mark.parametrize("name", each(NAMES))
def test_gradients_are_the_sum_of_the_samples(name):
    model, given, mask = build(name, "auto").train(), inputs(name, 3), mask_of(name, 3)
    total = {}
    for b in range(3):
        for key, grad in gradients(model, rows(given, slice(b, b + 1)), mask[b]).items():
            total[key] = total.get(key, 0) + grad
    got = gradients(model, given, mask)
    assert_same(got, total)
    for reentrant in (False, True) if FAMILIES[name].checkpoints else ():
        recompute(name, model, reentrant)
        model.zero_grad(set_to_none=True)
        skip.skip(model, mask)
        out = values(model(**given))
        skip.skip(model, ~mask)  # between forward and backward
        out.backward(cotangent(out))
        assert_same({key: p.grad for key, p in model.named_parameters() if p.grad is not None}, got)
        skip.skip(model, mask[0])
        out = values(model(**given))
        skip.skip(model, None)
        model.zero_grad(set_to_none=True)
        out.backward(cotangent(out))
        again = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        recompute(name, model, None)
        assert_same(again, gradients(model, given, mask[0]))


def recompute(name, model, reentrant):
    if FAMILIES[name].checkpoints == "loop":
        model.reentrant = reentrant
    elif reentrant is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("name", each(NAMES))
def test_what_nobody_runs_has_zero_gradients(name):
    model, given = build(name).train(), inputs(name, 3)
    every = gradients(model, given, None).keys()
    n = len(FAMILIES[name].kinds)
    skipped = (0, n - 1)
    mask = torch.tensor([[i in skipped for i in range(n)]] * 3)
    got = gradients(model, given, mask)
    assert every <= got.keys() and all("adapter" in key for key in got.keys() - every)  # DAS's shortcuts, other tasks'
    blocks = fastpetl.blocks(model)
    for block in [blocks[i].name for i in skipped]:
        block, _, half = block.rpartition(".") if block.endswith(".visn") else (block, "", "")
        own = [
            g for key, g in got.items() if key.startswith(f"{block}.{half}") and "relative" not in key
        ]  # T5's is all's
        assert own and not any(g.any() for g in own)
    with torch.no_grad():
        assert every <= gradients_of_none(model, given, n).keys()


def gradients_of_none(model, given, n):
    with torch.enable_grad():
        return gradients(model, given, torch.ones(3, n).bool())


@pytest.mark.parametrize("name", each(NAMES))
def test_pruning_and_copies(name):
    n, given = len(FAMILIES[name].kinds), inputs(name)
    every = [tuple(range(n))] if name in ("bert", "lxmert", "copied_das_vilt", "copied_vlt5") else []
    for plan in ((0, n - 1), *every):
        model = build(name)
        with torch.no_grad():
            want = output(model, given, fastpetl.SkipPlan(plan))
            keys, total = model.state_dict().keys(), fastpetl.count(model).total
            counted = [fastpetl.count(model, given).macs]
            skip.skip(model, fastpetl.SkipPlan(plan))
            counted.append(fastpetl.count(model, given).macs)
            fastpetl.prune(model)
            assert torch.equal(values(model(**given)), want)
        assert counted[1] == fastpetl.count(model, given).macs < counted[0] and fastpetl.count(model).total < total
        assert model.state_dict().keys() < keys and fastpetl.skip.pruned(model)
        if len(plan) < n:
            assert [b.macs == 0 for b in fastpetl.blocks(model)] == [i in plan for i in range(n)]
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in others if len(plan) == n else [*others, fastpetl.patch(model)]:
            with torch.no_grad():
                assert relative(values(other(**given)), want) <= 1e-5
    model, mask = build(name), mask_of(name)
    skip.skip(model, mask)
    with torch.no_grad():
        want = values(model(**given))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(values(other(**given)), want)
            skip.skip(other, None)
            assert not torch.equal(values(other(**given)), want) and torch.equal(values(model(**given)), want)


def unpadded(sample, length):
    """One sample without its padding; length: of a copied original's."""
    if "x" not in sample:
        length = int(sample["attention_mask"].sum())
        return sample | {key: sample[key][:, :length] for key in ("input_ids", "attention_mask")}
    return sample | {"x": sample["x"][:, :length]} | {k: sample[k][..., :length] for k in sample if k == "mask"}


@pytest.mark.parametrize("name", each(name for name in NAMES if FAMILIES[name].pooled))
def test_padding_is_nobodys_business(name):
    model, given, mask = build(name), inputs(name), mask_of(name)
    router = policies.Router(FAMILIES[name].hidden, mask.shape[1])
    torch.nn.init.normal_(router.gate.weight, std=2.0)
    torch.nn.init.zeros_(router.gate.bias)
    with torch.no_grad():
        for chosen in (mask, router):
            with fastpetl.skip(model, chosen):
                got = model(**given)[FAMILIES[name].pooled]
            for b in range(BATCH):
                alone = unpadded(rows(given, slice(b, b + 1)), 12 if b % 2 == 0 else 16)
                with fastpetl.skip(model, mask[b] if chosen is mask else router):
                    assert relative(got[b : b + 1], model(**alone)[FAMILIES[name].pooled]) <= 1e-4


@pytest.mark.parametrize("name", each(NAMES))
def test_candidates_and_policies(name):
    model, given, n = build(name), inputs(name), len(FAMILIES[name].kinds)
    sets = torch.tensor([[i in chosen for i in range(n)] for chosen in ((1, n - 1), (1, 2), (1,))])
    target = torch.arange(BATCH)

    def loss(out, target):
        numbers = values(out)
        head = torch.randn(numbers.shape[1], BATCH, generator=torch.Generator().manual_seed(1))
        return torch.nn.functional.cross_entropy(numbers @ head / 30, target)

    with scoring(model, train_mode=False):
        want = sequential(lambda r: loss(model(**given), target), model, sets, None, 0)
        scorer = Scorer(lambda r: (given, target), loss)
        if FAMILIES[name].candidates:
            assert relative(scorer.losses(model, sets, None, 0), want) <= 1e-5 and len(set(want.tolist())) == 3
        else:
            with pytest.raises(ValueError, match="skip: Candidates on .*, expected one set after the other"):
                scorer.losses(model, sets, None, 0)
    asked = []

    def first_half(x, n_blocks):
        asked.append((tuple(x.shape[:1]), n_blocks))
        return mask_of(name)

    with torch.no_grad():
        assert torch.equal(output(model, given, first_half), output(model, given, mask_of(name)))
        assert asked == [((BATCH,), n)]
        skip.skip(model.train(), policies.RandomSkip(0.5))
        assert not torch.equal(values(model(**given)), values(model(**given)))
        assert skip.current(model).rate == 0.5


def test_shared_beginnings_are_computed_once():
    model, seen = build("bert"), []
    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    sets = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0]]).bool()
    with torch.no_grad():
        got = output(model, inputs("bert"), policies.Candidates(sets))
        assert seen == [BATCH, BATCH, BATCH, BATCH]
        for row, part in zip(sets, got.chunk(3), strict=True):
            assert relative(part, output(model, inputs("bert"), row)) <= 1e-6


def test_what_follows_with_the_same_set_is_not_gathered_again(monkeypatch):
    from fastpetl.skip import columns

    model, given, moved = build("bert"), inputs("bert"), []
    select = columns._select
    monkeypatch.setattr(columns, "_select", lambda t, index: moved.append(t.dim()) or select(t, index))
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]).bool()
    with torch.no_grad():
        output(model, given, mask)
    assert moved.count(3) == 2 + 2 + 4  # kept and skipped of two sets, and the order of all after each block


@pytest.mark.slow
@pytest.mark.parametrize(("name", "patch", "capacity"), itertools.product(NAMES, (False, True), (None, 2)))
def test_compiled_once_for_all_masks(name, patch, capacity):
    model, given, mask = build(name, "auto" if patch else None).train(), inputs(name, 3), mask_of(name, 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for one in (mask, ~mask, torch.zeros_like(mask)):
        policy = policies.Masks(one, capacity=capacity)
        want = gradients(model, given, policy)
        got = gradients(model, given, policy, compiled)
        assert_same(got, {key: grad for key, grad in want.items() if key in got or grad.any()})
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_search():
    model, given = build("bert").train(), inputs("bert")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def loss(out, target):
        numbers = values(out)
        head = torch.randn(numbers.shape[1], BATCH, generator=torch.Generator().manual_seed(1))
        return torch.nn.functional.cross_entropy(numbers @ head / 30, target)

    def step(i):
        optimizer.zero_grad()
        loss(model(**given), torch.arange(BATCH)).backward()
        optimizer.step()

    scorer = Scorer(lambda r: (given, torch.arange(BATCH)), loss)
    options = {"turn": 2, "warmup_steps": 0, "progress": False, "per_sample": True}
    plan = fastpetl.das.search(model, step, scorer, steps=4, n_skip=2, **options)
    assert len(plan.blocks) == 2 and plan.names[0].startswith("encoder.layer.") and plan.macs_saved > 0
    assert any(plan.gates) and skip.current(model) is None
