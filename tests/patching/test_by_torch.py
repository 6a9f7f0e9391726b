"""Where torch's own kernels serve, as on a GPU: they are called at once, and everything is as with ours."""

import copy

import pytest
import torch
from torch import nn

import fastpetl
from fastpetl import _by_torch, ops
from patching.contract_cases import CASES, NAMES, assert_close, fell_back, numbers, plain, replica_of, run
from patching.test_contract import CHANGES, replica_ready

# Those whose linears are called at once; the other copies' still are `ops.linear`s.
DIRECT = ("vilt", "das_vilt", "bert", "roberta", "bridgetower", "meter", "das_meter", "clip_vision", "clip_text")
DIRECT += ("bart", "t5", "vlbart", "vlt5")
every_family = pytest.mark.parametrize("name", NAMES)
directly = pytest.mark.parametrize("name", DIRECT)


def by_torch(name, dropout=0.0):
    """(patched, plain), patched for torch's own kernels."""
    model = plain(name, dropout)
    return fastpetl.patch(copy.deepcopy(model), backend="torch"), model


@every_family
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("few", [False, True])
def test_outputs_and_gradients(name, dropout, few):
    """few: only norms and adapters train."""
    models = by_torch(name, dropout)
    for model in models:
        for key, p in model.train().named_parameters():
            p.requires_grad_(not few or any(part in key for part in ("adapter", "orm", "ln_")))
    assert_close(*(numbers(name, model) for model in models))
    with torch.no_grad():
        assert_close(*((run(name, model.eval()), {}) for model in models))
    assert not dropout or fell_back(models[0]) or CASES[name].original.get("dropout") is None


@directly
def test_no_op_of_ours_stands_between(name, monkeypatch):
    """Neither `ops.linear` nor a backward in Python, in training and in inference."""
    patched, _ = by_torch(name)
    for module in patched.modules():  # an op of its own, on the CPU alone
        if type(module).__name__ == "ViltPatchEmbeddings":
            fastpetl.unpatch(module)
    want = numbers(name, patched)

    def refuse(*args, **kwargs):
        raise AssertionError("an op was asked where torch's own serves")

    for op in ("linear", "feed_forward", "attention", "residual_norm"):
        monkeypatch.setattr(ops, op, refuse)
    assert_close(numbers(name, patched), want)
    with torch.no_grad():
        run(name, patched.eval())
    assert not fell_back(patched)


@every_family
def test_a_linear_that_somebody_listens_to(name):
    models, seen = by_torch(name), ([], [])
    for model, heard in zip(models, seen, strict=True):
        linear = model.get_submodule(f"{CASES[name].block}.{CASES[name].linear}")
        linear.register_forward_hook(lambda m, a, y, heard=heard: heard.append(y.detach()) or 0.5 * y)
    assert_close(*(numbers(name, model) for model in models))
    assert len(seen[0]) == len(seen[1]) > 0


@every_family
@pytest.mark.parametrize("change", CHANGES)
def test_a_linear_that_somebody_wraps_later(name, change):
    models = by_torch(name)
    run(name, models[0])  # whatever is remembered of the first call
    for model in models:
        torch.manual_seed(0)
        CHANGES[change][0](model, f"{CASES[name].block}.{CASES[name].linear}")
    with torch.no_grad():
        assert_close(*((run(name, model), {}) for model in models))


@directly
def test_a_weight_in_its_own_dtype(name):
    """Torch refuses it, or the original casts: patched or not, the same."""
    models, found = by_torch(name), []
    for model in models:
        linear = model.get_submodule(f"{CASES[name].block}.{CASES[name].linear}")
        linear.weight.data = linear.weight.data.double()
        try:
            with torch.no_grad():
                found.append(run(name, model))
        except RuntimeError as error:
            found.append(type(error))
    assert found == [RuntimeError, RuntimeError]


@directly
def test_data_parallel_replicas(name):
    model, _ = by_torch(name)
    with torch.no_grad():
        want = run(name, model)
    torch.manual_seed(1)
    replica = replica_of(model)
    found = run(name, replica_ready(replica, model))
    assert_close(([t.detach() for t in found], {}), (want, {}))
    sum(t.sum() for t in found if t.requires_grad).backward()
    assert any(p.grad is not None for p in model.parameters()) and not fell_back(replica)


@pytest.mark.parametrize("name", [name for name in DIRECT if name not in ("das_vilt", "das_meter", "vlbart", "vlt5")])
def test_frozen_linears_keep_nothing(name):
    """What autograd keeps for them is torch's: a frozen weight's product needs its input for nothing."""
    held = []
    for model in by_torch(name):
        for key, p in model.train().named_parameters():
            p.requires_grad_("orm" in key)
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=seen: s.setdefault(t.data_ptr(), t), lambda t: t):
            out = run(name, model)
        weights = {p.data_ptr() for p in model.parameters()}
        held.append(sum(t.numel() for at, t in seen.items() if at not in weights))
        assert out
    assert held[0] <= 1.02 * held[1]


def test_the_backend_may_change(monkeypatch):
    """What is remembered is remembered of a backend, a device and a dtype."""
    x = torch.zeros(2, 8)
    assert not _by_torch.by_torch("linear", "auto", x) and _by_torch.by_torch("linear", "torch", x)
    assert not _by_torch.by_torch("linear", "torch", nn.Parameter(x)) and _by_torch.norm_by_torch("torch", x)
    assert not _by_torch.norm_by_torch("torch", x.bfloat16())  # its statistics are fp32 with us
    monkeypatch.setenv("FASTPETL_BACKEND", "torch")
    assert _by_torch.by_torch("linear", "auto", x)
    monkeypatch.setenv("FASTPETL_BACKEND", "reference")
    assert not _by_torch.by_torch("linear", "auto", x)
    assert _by_torch.by_torch("linear", "auto", x.to("meta")) is False
    monkeypatch.delenv("FASTPETL_BACKEND")
    assert _by_torch.by_torch("linear", "auto", x.to("meta"))  # a device without kernels of ours
    monkeypatch.setenv("FASTPETL_BACKEND", "fast")
    for _ in range(2):
        with pytest.raises(ValueError, match="FASTPETL_BACKEND is 'fast'"):
            _by_torch.by_torch("linear", "auto", x)
