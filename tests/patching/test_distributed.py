"""Patched models under DataParallel's replicas, DistributedDataParallel and FSDP2 (gloo, two processes on the CPU)."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import fastpetl
import meter_tiny
import two_ranks
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
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    model = BertModel(BertConfig(**sizes, **still, intermediate_size=64), add_pooling_layer=False)
    given = {"input_ids": inputs(4)["input_ids"]}
    return model.eval(), given, lambda out: out.last_hidden_state.square().mean()


NAMES = ("vlbart", "vlt5", *METHODS, "das_meter", "bert")


@pytest.mark.parametrize("name", NAMES)
def test_data_parallel_replicas(name):
    """As torch.nn.parallel.replicate makes them, without its GPUs: copies whose parameters are plain attributes."""
    model, given, loss = build(name)
    want = loss(model(**given))
    fastpetl.patch(model)
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for key, child in module._modules.items():
            replica._modules[key] = copies.get(child)
        for key, p in module._parameters.items():
            setattr(replica, key, None if p is None else p * 2 - p.detach())
    replica = copies[model]
    assert not list(replica.parameters())
    got = loss(replica(**given))
    assert relative(got, want) <= 1e-5
    got.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- two processes, started once for all cases: each imports for seconds --------------------------------------------

DISTRIBUTED = ("vlbart", "vlt5", "compacter", "lora", "das_meter", "bert")
CASES = [(name, kind) for name in DISTRIBUTED for kind in ("ddp", "fsdp")]


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, kind in CASES:
        model, given, loss = build(name)
        fastpetl.patch(model)
        half = {key: value[2 * rank : 2 * rank + 2] for key, value in given.items()}
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
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks.run(__file__, folder)
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_processes_train_as_one(name, kind, found):
    plain, given, loss = build(name)
    loss(plain(**given)).backward()
    grads, report = found[name, kind]
    want = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    assert grads.keys() == want.keys()
    scale = max(g.norm() for g in want.values())
    for key, grad in want.items():
        assert (grads[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, key
    assert "last original forward" not in report
