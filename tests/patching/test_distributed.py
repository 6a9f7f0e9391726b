"""Patched models under DistributedDataParallel and FSDP2 (gloo, two processes on the CPU), and the methods' models
in DataParallel's replicas (every family's: test_contract.py).
"""

import functools
from itertools import product
from pathlib import Path

import pytest
import torch

import fastpetl
import meter_tiny
import two_ranks
from patching.contract_cases import CASES as FAMILIES
from patching.contract_cases import arguments, flat, plain, replica_of
from vilt_tiny import one_thread, randomize, relative  # noqa: F401
from vl_tiny import TASKS, inputs, tiny, tiny_adapters

METHODS = {
    "compacter": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4),
    "hyperformer": fastpetl.HyperformerConfig(tasks=TASKS[:1], bottleneck=4),
    "lora": fastpetl.LoRAConfig(tasks=TASKS, rank=3, alpha=3, dropout=0.0),
    "prompt": fastpetl.PromptConfig(tasks=TASKS, length=3, middle=10),
}


def build(name):
    """(unpatched model, whose trainable parameters all get a gradient; arguments; the loss of its output)."""
    torch.manual_seed(4)
    if name in ("vlbart", "vlt5"):
        return tiny_adapters(name, sharing="single"), inputs(4, padded=False), lambda out: out.loss
    if name in METHODS:
        model = tiny("vlbart")
        fastpetl.attach(model, METHODS[name], patch=False)
        randomize(model, 0.2)
        fastpetl.task(model, "vqa")
        return model, inputs(4, padded=False), lambda out: out.loss
    if name == "das_meter":
        model = meter_tiny.tiny(False, num_hidden_layers=2)
        fastpetl.attach(model, fastpetl.DASConfig(bottleneck=6, shortcut="identity"), patch=False)
        randomize(model, 0.2)
        return model, meter_tiny.inputs(4), lambda out: out.logits.square().mean()
    model = plain(name)
    given = {k: v[:2] if isinstance(v, torch.Tensor) else v for k, v in arguments(name, model).items()}  # two halves
    loss = lambda out: flat(out)[1 if "labels" in given else 0].square().mean()  # noqa: E731
    loss(model(**given)).backward()
    for p in model.parameters():
        p.requires_grad_(p.grad is not None)
    model.zero_grad(set_to_none=True)
    return model, given, loss


@pytest.mark.parametrize("name", METHODS)
def test_data_parallel_replicas(name):
    model, given, loss = build(name)
    want = loss(model(**given))
    got = loss(replica_of(fastpetl.patch(model))(**given))
    assert relative(got, want) <= 1e-5
    got.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- two processes, started once for all cases: each imports for seconds --------------------------------------------

NAMES = ("vlbart", "vlt5", "compacter", "lora", "das_meter", "bert", "vilt", "copied_vilt", "copied_t5")
MORE = tuple(name for name in FAMILIES if name not in NAMES)
KINDS = ("ddp", "fsdp")


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found, names = {}, Path(folder, "names").read_text().split()
    for name, kind in product(names, KINDS):
        model, given, loss = build(name)
        fastpetl.patch(model)
        half = {key: value.chunk(2)[rank] if hasattr(value, "chunk") else value for key, value in given.items()}
        if kind == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(model)  # find_unused_parameters=False
        else:
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(model)
        for _ in range(2):  # the second iteration is where an unused parameter is missed
            model.zero_grad()
            loss(wrapped(**half)).backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        grads = {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in grads.items()}
        found[name, kind] = grads, str(fastpetl.report(model))
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    @functools.cache
    def of(names):
        folder = tmp_path_factory.mktemp("ranks")
        Path(folder, "names").write_text(" ".join(names))
        two_ranks.run(__file__, folder)
        return torch.load(folder / "found.pt", weights_only=False)

    return of


EVERY = [
    pytest.param(name, kind, marks=pytest.mark.slow if name in MORE else ())
    for name, kind in product((*NAMES, *MORE), KINDS)
]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_two_processes_train_as_one(name, kind, found):
    plain, given, loss = build(name)
    loss(plain(**given)).backward()
    grads, report = found(NAMES if name in NAMES else MORE)[name, kind]
    want = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    assert grads.keys() == want.keys()
    scale = max(g.norm() for g in want.values())
    for key, grad in want.items():
        assert (grads[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, key
    assert "last original forward" not in report
