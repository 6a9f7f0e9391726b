"""On a CPU a sample's numbers do not depend on its neighbours, to the bit.

The C++ kernels compute each row for itself. In plain torch two things ask for more: a matrix product of fewer than four
rows per thread takes another kernel (MKL's), and elementwise functions end in a scalar tail where a size is no multiple
of the vector's. So the plain models here have five samples and hidden sizes of 32. "auto" chooses by the number of
rows, by that of the whole batch, and where a sample has few, as in a step of generation, of the C++ kernels alone.
"""

import pytest
import torch

import fastpetl
import meter_tiny
import vilt_tiny
import vl_tiny
from fastpetl import backends, skip
from fastpetl.das import Scorer
from fastpetl.das.scoring import scoring, sequential
from skip import turn_families as turns
from skip.test_seq2seq_skip import build as build_seq2seq
from vilt_tiny import one_thread  # noqa: F401

FAMILIES = ("vilt", "meter", "bart", "t5", "vlbart", "vlt5")
ALL = (*FAMILIES, *turns.NAMES)
BACKENDS = (None, "cpp", "auto")
BATCH = 5


def cases(families, backends):
    """Backend "cpp" is promised everywhere; of the others the loops that are not ours have two examples."""
    few = (*FAMILIES, "bert", "copied_vlt5")
    slow = pytest.mark.slow
    every = [(family, backend) for family in families for backend in backends]
    fast = [case for case in every if case[0] in few or (case[1] == "cpp" and case[0] not in turns.LIKE_ANOTHER)]
    return [case if case in fast else pytest.param(*case, marks=slow) for case in every]


def build(family, backend):
    """(model, inputs of five samples, blocks)"""
    if family in turns.NAMES:
        model, given = turns.build(family), turns.inputs(family, BATCH)
    elif family == "vilt":
        model, given = vilt_tiny.tiny_das(), vilt_tiny.inputs(BATCH)
    elif family == "meter":
        model, given = meter_tiny.tiny(), meter_tiny.inputs(BATCH)
    else:
        model, given = build_seq2seq(family), vl_tiny.inputs(BATCH)
        given["decoder_input_ids"] = given.pop("labels").clamp(min=3)
        given["use_cache"] = False
        if not family.startswith("vl"):
            given.pop("vis_feats")
    if backend is not None:
        fastpetl.patch(model, backend=backend)
    return model, given, len(fastpetl.blocks(model))


@pytest.fixture(autouse=True)
def rows_of_plain_torch(one_thread):  # noqa: F811
    x, w = torch.randn(64, 32), torch.randn(48, 32)
    full = torch.nn.functional.linear(x, w)
    if not all(torch.equal(torch.nn.functional.linear(x[:n], w), full[:n]) for n in range(4, 64)):
        pytest.skip("this machine's matrix products depend on the number of rows")


@pytest.fixture(autouse=True)
def another_backend_for_each_size(monkeypatch):
    """In place of measuring: "auto" takes another backend for each power of two of rows."""
    found = {}

    def pick(key, runs, baseline, tolerance):
        size = key[1][0] if isinstance(key[1], tuple) else key[1]
        found[key] = sorted(runs)[size.bit_length() % len(runs)]
        return found[key]

    monkeypatch.setattr(backends, "pick", pick)
    monkeypatch.setattr(backends, "picked", found.get)
    return found


def logits(model, given, mask):
    with torch.no_grad(), skip.skip(model, mask):
        torch.manual_seed(1)  # ViLT orders patches by it
        return numbers(model(**given))


def numbers(out):
    return turns.values(out) if getattr(out, "logits", None) is None else out.logits


def drawn(rows, blocks, seed):
    return torch.rand(rows, blocks, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize(("family", "backend"), cases(ALL, BACKENDS))
def test_neighbours_do_not_matter(family, backend):
    model, given, n = build(family, backend)
    for seed in range(3):
        mask, others = drawn(BATCH, n, seed), drawn(BATCH, n, 100 + seed)
        others[seed] = mask[seed]
        got, other = logits(model, given, mask), logits(model, given, others)
        assert torch.equal(got[seed], other[seed]) and not torch.equal(got, other)
        assert torch.equal(got[seed], logits(model, given, mask[seed])[seed])  # nor that they skip something else


CANDIDATES = [family for family in ALL if family in FAMILIES or turns.FAMILIES[family].candidates]


# "auto" may take another for what follows the blocks
@pytest.mark.parametrize(("family", "backend"), cases(CANDIDATES, BACKENDS[:2]))
def test_candidates_in_one_pass_are_the_candidates_one_by_one(family, backend):
    """The search's losses too: the pooler and the head see three times the batch, in rows of their own."""
    model, given, n = build(family, backend)
    sets = torch.stack([drawn(1, n, seed)[0] for seed in (1, 2, 3)])
    target = torch.arange(BATCH)

    def loss(outputs, target):
        return torch.nn.functional.cross_entropy(numbers(outputs).reshape(BATCH, -1), target)

    def batches(round):
        torch.manual_seed(1)
        return given, target

    with scoring(model, train_mode=False):
        want = sequential(lambda r: loss(model(**batches(r)[0]), target), model, sets, None, 0)
        got = Scorer(batches, loss).losses(model, sets, None, 0)
    assert torch.equal(got, want) and len(set(want.tolist())) == 3


CHECKPOINTS = {"none": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}


def trained(model, given, mask, checkpoints):
    """The logits of a training step."""
    model.train().zero_grad()
    if CHECKPOINTS[checkpoints]:
        model.gradient_checkpointing_enable(CHECKPOINTS[checkpoints])
    with skip.skip(model, mask):
        torch.manual_seed(1)
        out = model(**given).logits
        out.square().sum().backward()
    return out.detach()


@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_do_not_matter_in_training(family, checkpoints):
    model, given, n = build(family, "auto")
    for seed in range(2):
        mask, others = drawn(BATCH, n, seed), drawn(BATCH, n, 100 + seed)
        others[seed] = mask[seed]
        got, other = trained(model, given, mask, checkpoints), trained(model, given, others, checkpoints)
        assert torch.equal(got[seed], other[seed]) and not torch.equal(got, other)


@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("family", ["vilt", "meter"])
def test_all_choices_are_for_the_batch(another_backend_for_each_size, family, checkpoints):
    """Those of what is recomputed in the backward, and of the backward's own, too: they are made where nobody skips."""
    chosen, seen = another_backend_for_each_size, []
    model, given, n = build(family, "auto")
    for mask in (torch.zeros(BATCH, n, dtype=torch.bool), drawn(BATCH, n, 0)):
        chosen.clear()
        trained(model, given, mask, checkpoints)
        # but for what a shortcut adapter needs
        seen.append({(key[0], key[1]) for key in chosen if key[0] in ("forward", "backward")})
        assert len(set(chosen.values())) > 1
    assert seen[1] <= seen[0] and {direction for direction, _ in seen[1]} == {"forward", "backward"}


def test_a_checkpoint_of_ones_own_chooses_twice_alike():
    """It does not know of the batch when it computes again: then its forward must not either."""
    from fastpetl.ops import _measured

    def choice():
        return _measured.of_the_batch(6), _measured.steady("linear", ("cpp", "torch"), 6)

    def same(t):
        return t

    alone, known = (6, ("cpp", "torch")), (15, ("cpp",))
    assert choice() == alone
    with _measured.part_of(2, 5):
        assert choice() == known
        again = _measured.as_part(choice)
        with torch.autograd.graph.saved_tensors_hooks(same, same):
            assert choice() == alone and again() == known
    with torch.autograd.graph.saved_tensors_hooks(same, same):
        assert choice() == alone and again() == known
        with _measured.part_of(2, 5):  # the checkpoint is around all of it
            assert choice() == known


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("family", FAMILIES[2:])
def test_steps_of_generation(family, backend):
    model, given, n = build(family, backend)
    given = {name: value for name, value in given.items() if not name.startswith(("decoder", "use_cache"))}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}

    def scores(mask):
        with skip.skip(model, mask):
            return torch.stack(model.generate(**given, **options).scores, 1)

    for seed in range(3):
        mask, others = drawn(BATCH, n, seed), drawn(BATCH, n, 100 + seed)
        others[seed] = mask[seed]
        assert torch.equal(scores(mask)[seed], scores(others)[seed])
        assert torch.equal(scores(mask)[seed], scores(mask[seed])[seed])  # nor that they skip something else
