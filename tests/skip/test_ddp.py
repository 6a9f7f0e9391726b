"""Masks per sample under DistributedDataParallel (gloo, two processes): nobody waits for a block that all skip."""

from pathlib import Path

import pytest
import torch

import fastpetl
import meter_tiny
import two_ranks
from fastpetl import skip
from vilt_tiny import inputs as vilt_inputs
from vilt_tiny import one_thread, tiny_das  # noqa: F401
from vl_tiny import inputs as text_inputs
from vl_tiny import tiny_adapters


def build(kind):
    """(patched model, in training; four samples)."""
    if kind == "vilt":
        return tiny_das(patch=True).train(), vilt_inputs(4)
    if kind == "meter":
        return fastpetl.patch(meter_tiny.tiny(num_hidden_layers=2)).train(), meter_tiny.inputs(4)
    return tiny_adapters(kind, patch=True, sharing="single").train(), text_inputs(4)


KINDS = ("vilt", "meter", "vlbart", "vlt5")
# four samples, four blocks: nobody on rank 0 runs the first two, nobody on rank 1 the last, nobody at all the second
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]]).bool()


def loss(out):
    return out.logits.square().mean()


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for kind in KINDS:
        model, given = build(kind)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)  # find_unused_parameters=False
        own = slice(2 * rank, 2 * rank + 2)
        half = {name: value[own] for name, value in given.items()}
        skip.skip(model, MASK[own])
        for _ in range(2):  # the second iteration is where an unused parameter is missed
            model.zero_grad(set_to_none=True)
            torch.manual_seed(1)
            loss(wrapped(**half)).backward()
        found[kind] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save(found, Path(folder, f"{rank}.pt"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks.run(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_skip_differently_train_as_one(kind, found):
    model, given = build(kind)
    got, other = (rank[kind] for rank in found)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    total = 0
    for rank in (0, 1):  # each half as it is alone: ViLT orders patches by the generator
        own = slice(2 * rank, 2 * rank + 2)
        skip.skip(model, MASK[own])
        torch.manual_seed(1)
        total = total + loss(model(**{name: value[own] for name, value in given.items()})) / 2
    total.backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == other.keys() == want.keys() == trained
    scale = max(g.norm() for g in want.values())
    for name, grad in want.items():
        assert torch.equal(got[name], other[name])
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, name
    block = f"{fastpetl.blocks(model)[1].name}."
    unused = [name for name in trained if name.startswith(block) and "relative" not in name]
    assert unused and not any(got[name].any() for name in unused)
