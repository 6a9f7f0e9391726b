"""What a fused block must not read past: declined when patching, seen when it comes later; the numbers stay right."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers.models.vilt import modeling_vilt

import fastpetl
from vilt_tiny import relative, run, tiny_das


class Wrapped(nn.Module):
    """As PEFT wraps a linear: the original is a child, the delta is added in forward."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x) * 1.5


class MyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class Marked(torch.Tensor):
    """Stands for DTensor and quantised weights: a tensor subclass with its own idea of a product."""


def replace(module, name, make):
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, make(module.get_submodule(name)))


def like(cls):
    def make(old):
        new = cls(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        return new

    return make


def scaled_instance_forward(linear):
    original = linear.forward
    linear.forward = lambda x: original(x) * 1.5


def subclassed_weight(linear):
    data = linear.weight.detach()
    del linear._parameters["weight"]
    linear._parameters["weight"] = data.as_subclass(Marked)


QUERY, FC1, OUT = "attention.attention.query", "intermediate.dense", "output.dense"
CHANGES = {
    "forward_hook": (lambda m: m.get_submodule(QUERY).register_forward_hook(lambda *a: a[-1] * 1.5), "forward hooks"),
    "pre_hook": (
        lambda m: m.layernorm_after.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        "layernorm_after has forward pre hooks",
    ),
    "backward_hook": (lambda m: m.output.register_full_backward_hook(lambda *a: None), "output has backward hooks"),
    "hook_on_an_adapters_child": (
        lambda m: m.adapter1.up_proj.register_forward_hook(lambda *a: a[-1] * 1.5),
        "adapter1.up_proj has forward hooks",
    ),
    "peft": (lambda m: replace(m, QUERY, Wrapped), "Wrapped, expected torch.nn.modules.linear.Linear"),
    "subclass_of_linear": (
        lambda m: replace(m, FC1, like(MyLinear)),
        "MyLinear, expected torch.nn.modules.linear.Linear",
    ),
    "parametrised": (
        lambda m: parametrize.register_parametrization(m.get_submodule(OUT), "weight", Double()),
        "Parametrized",
    ),
    "weight_norm": (lambda m: parametrizations.weight_norm(m.get_submodule(OUT)), "Parametrized"),
    "instance_forward": (
        lambda m: scaled_instance_forward(m.get_submodule(FC1)),
        "forward was replaced on the instance",
    ),
    "tensor_subclass": (lambda m: subclassed_weight(m.get_submodule(FC1)), "Marked, expected a plain tensor"),
    "extra_child": (lambda m: m.get_submodule(FC1).add_module("lora", nn.Identity()), "has a child 'lora'"),
    "dropout_replaced": (
        lambda m: replace(m, "output.dropout", lambda old: nn.Identity()),
        "output.dropout is torch.nn",
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_children(change, when):
    make_change, reason = CHANGES[change]
    plain, model = tiny_das(), tiny_das()
    make_change(plain.vilt.encoder.layer[1])
    if when == "after":
        fastpetl.patch(model)
    make_change(model.vilt.encoder.layer[1])
    if when == "before":
        with pytest.raises(ValueError, match="declined .strict=True.: vilt.encoder.layer.1"):
            fastpetl.patch(model, strict=True)
        assert not fastpetl.report(model).patched
        fastpetl.patch(model)
    assert relative(run(model).logits, run(plain).logits) <= 1e-4
    row = next(row for row in fastpetl.report(model) if row.name == "vilt.encoder.layer.1")
    assert row.status == ("declined" if when == "before" else "patched")
    assert reason in row.reason
    others = [
        row for row in fastpetl.report(model) if row.kind == "vilt.das_layer" and row.name != "vilt.encoder.layer.1"
    ]
    assert {row.status for row in others} == {"patched"} and {row.reason for row in others} == {""}


def test_numbers_come_back_when_a_hook_goes():
    model = tiny_das(patch=True)
    want = run(tiny_das()).logits
    handle = model.vilt.encoder.layer[1].intermediate.register_forward_hook(lambda *a: a[-1] * 2)
    assert relative(run(model).logits, want) > 1e-2
    handle.remove()
    assert relative(run(model).logits, want) <= 1e-4


def test_global_hooks_are_called():
    model, names = tiny_das(patch=True), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: names.append(type(m).__name__))
    try:
        logits = run(model).logits
    finally:
        hook.remove()
    assert names.count("ViltSelfAttention") == 4
    assert relative(logits, run(model).logits) <= 1e-4


class OtherLayer(modeling_vilt.ViltLayer):
    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        return (hidden_states * 2,)


def test_subclasses_and_replaced_forwards_are_declined():
    model = tiny_das()
    fastpetl.detach(model)
    model.vilt.encoder.layer[2].__class__ = OtherLayer
    layer = model.vilt.encoder.layer[3]
    layer.forward = lambda *args, **kwargs: (args[0] * 3,)
    want = run(model).logits
    fastpetl.patch(model)
    rows = {row.name: row for row in fastpetl.report(model)}
    assert "a subclass of transformers.models.vilt.modeling_vilt:ViltLayer" in rows["vilt.encoder.layer.2"].reason
    assert "its forward was replaced on the instance" in rows["vilt.encoder.layer.3"].reason
    assert [rows[f"vilt.encoder.layer.{i}"].status for i in range(4)] == ["patched"] * 2 + ["declined"] * 2
    assert relative(run(model).logits, want) <= 1e-4


def test_peft_itself():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_das()
    fastpetl.detach(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    want = run(model.base_model.model).logits
    fastpetl.patch(model)
    rows = [row for row in fastpetl.report(model) if row.kind == "vilt.layer"]
    assert {row.status for row in rows} == {"declined"} and "peft" in rows[0].reason
    assert relative(run(model.base_model.model).logits, want) <= 1e-5  # the patches' embedding is fused


def test_the_report_is_a_table():
    model = tiny_das(patch=True)
    text = str(fastpetl.report(model))
    assert "vilt.encoder.layer.[0-3]" in text and "18 patched, 0 declined" in text
    model.vilt.encoder.layer[1].output.register_forward_hook(lambda *a: None)
    fastpetl.unpatch(model)
    fastpetl.patch(model)
    report = fastpetl.report(model)
    assert "vilt.encoder.layer.[0,2-3]" in str(report) and "17 patched, 1 declined" in str(report)
    assert len(report) == 18 and {row.status for row in report} == {"patched", "declined"}
    assert "nothing in this model matches" in str(fastpetl.report(nn.Linear(2, 2)))
