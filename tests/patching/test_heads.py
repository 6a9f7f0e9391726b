"""A language model's output projection on the frozen linear: where it is taken, and when it must be torch's own."""

import copy

import pytest
import torch
from torch import nn

import fastpetl
from fastpetl import ops
from vilt_tiny import one_thread, relative  # noqa: F401
from vl_tiny import TEXT, inputs, text_model, tiny

MODELS = {"vlbart": tiny, "vlt5": tiny} | dict.fromkeys(TEXT, text_model)


def rows(model):
    return [row for row in fastpetl.report(model).rows if row.kind == "head"]


def calls(monkeypatch):
    """The weights of the calls of `ops.linear` from here on."""
    seen, linear = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, weights, *a, **k: seen.append(weights) or linear(x, weights, *a, **k))
    return seen


def run(model):
    given = inputs(dtype=next(model.parameters()).dtype)
    if not type(model).__name__.startswith("VL"):
        given.pop("vis_feats", None)
    return model(**given)


@pytest.mark.parametrize("kind", MODELS)
def test_one_head_and_back(kind):
    model = MODELS[kind](kind)
    head, tied = model.lm_head, model.get_input_embeddings().weight
    fastpetl.patch(model, strict=True)
    assert [(row.name, row.status) for row in rows(model)] == [("lm_head", "patched")]
    assert model.lm_head is head and head.weight is tied and type(head) is not nn.Linear
    fastpetl.unpatch(model)
    assert type(head) is nn.Linear and "_fastpetl_fallback" not in vars(head)


@pytest.mark.parametrize("kind", MODELS)
def test_frozen(kind, monkeypatch):
    plain = MODELS[kind](kind).requires_grad_(False)
    patched, seen = fastpetl.patch(copy.deepcopy(plain)), calls(monkeypatch)
    got, want = run(patched), run(plain)
    assert any(weights[0] is patched.lm_head.weight for weights in seen)
    assert relative(got.logits, want.logits) <= 1e-5


def test_trainable_but_not_in_training(monkeypatch):
    """A fully fine-tuned model's evaluation records no gradient."""
    patched, seen = fastpetl.patch(text_model("bart")), calls(monkeypatch)
    with torch.no_grad():
        run(patched)
    assert any(weights[0] is patched.lm_head.weight for weights in seen)
    seen.clear()
    run(patched)
    assert not any(weights[0] is patched.lm_head.weight for weights in seen)


@pytest.mark.parametrize("bias", [False, True])
def test_dx(bias):
    patched = fastpetl.patch(text_model("bart"))
    patched.lm_head.requires_grad_(False)
    if bias:
        patched.lm_head.bias = nn.Parameter(torch.randn(patched.lm_head.out_features), requires_grad=False)
    x = torch.randn(3, 5, patched.lm_head.in_features, requires_grad=True)
    g = torch.randn(3, 5, patched.lm_head.out_features)
    got, want = patched.lm_head(x), nn.Linear.forward(patched.lm_head, x)
    assert relative(got, want) <= 1e-5
    (got_dx,), (want_dx,) = torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g)
    assert relative(got_dx, want_dx) <= 1e-5


def test_a_trained_head_has_its_gradient(monkeypatch):
    plain = text_model("bart")
    patched, seen = fastpetl.patch(copy.deepcopy(plain), backend="cpp"), calls(monkeypatch)
    for model in (plain, patched):
        for p in model.parameters():
            p.requires_grad_(p is model.lm_head.weight)
        run(model).loss.backward()
    assert not any(w[0] is patched.lm_head.weight for w in seen)
    assert relative(patched.lm_head.weight.grad, plain.lm_head.weight.grad) <= 1e-5


def test_declined():
    """A head of another class, and one that is not where a language model has it."""

    class Mine(nn.Linear):
        pass

    model = text_model("t5")
    model.lm_head.__class__ = Mine
    (row,) = rows(fastpetl.patch(model))
    assert row.status == "declined" and "Mine, expected torch.nn.modules.linear:Linear" in row.reason
    other = nn.Sequential(text_model("bart"), nn.Linear(4, 4))
    other.lm_head = nn.Linear(4, 4)
    fastpetl.patch(other)
    assert [row.name for row in rows(other)] == ["0.lm_head"]


def test_mixed_dtypes():
    """Under autocast they are cast; elsewhere the original forward says no."""
    model = fastpetl.patch(text_model("bart").requires_grad_(False))
    x = torch.randn(2, model.lm_head.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.lm_head(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, model.lm_head.weight))
    assert "dtype" not in rows(model)[0].reason
    with pytest.raises(RuntimeError):
        model.lm_head(x.bfloat16())
    assert "weight has dtype torch.float32, the input torch.bfloat16" in rows(model)[0].reason
