"""LoRA in cross-attention of few queries: the update stands in the value's weight, and values are never made."""

import copy

import pytest
import torch

import fastpetl
from methods.test_methods import KINDS, assert_same, fell_back, numbers
from vilt_tiny import one_thread  # noqa: F401
from vl_tiny import TASKS, randomize, tiny


def randomize_(model):
    randomize(model, 0.3)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tasks", "train", "calls"), [("gqa", True, 2), ("gqa", False, 2), (("vqa", "gqa", "gqa"), True, 0)]
)
def test_lora_with_values_never_made(kind, tasks, train, calls, monkeypatch):
    """Few queries over many keys: the update stands in the value's weight, and gets its gradients from there."""
    seen, op = [], fastpetl.ops.cross_attention
    monkeypatch.setattr(fastpetl.ops, "cross_attention_saves", lambda *sizes: True)
    monkeypatch.setattr(fastpetl.ops, "cross_attention", lambda *a, **k: seen.append(a[3]) or op(*a, **k))
    config = fastpetl.LoRAConfig(tasks=TASKS, rank=3, alpha=3, sharing="multiple", dropout=0.0)
    plain = randomize_(fastpetl.attach(tiny(kind), config, patch=False))
    fastpetl.task(plain, tasks)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    got = numbers(patched, train=train)
    assert len(seen) == calls and all(weight.requires_grad for weight in seen)
    assert_same(got, numbers(plain, train=train))
    assert not fell_back(patched)


def test_a_listening_value_beside_a_query_with_lora_is_called(monkeypatch):
    monkeypatch.setattr(fastpetl.ops, "cross_attention_saves", lambda *sizes: True)
    model, seen = fastpetl.attach(tiny("vlbart"), fastpetl.LoRAConfig(tasks=TASKS, rank=3), patch=False), []
    for layer in model.get_decoder().layers:
        attention = layer.encoder_attn
        attention.v_proj = torch.nn.Linear(attention.embed_dim, attention.embed_dim).requires_grad_(False)
        attention.v_proj.register_forward_hook(lambda *_: seen.append(1))
    want = numbers(copy.deepcopy(model))
    seen.clear()
    assert_same(numbers(fastpetl.patch(model)), want)
    assert len(seen) == len(model.get_decoder().layers)
