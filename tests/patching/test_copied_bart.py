"""VL-Adapter's own BART layers and controllers, copied: found by their children, proven by numbers, equal in every
mode.
"""

import copy
import re

import pytest
import torch
from torch import nn

import fastpetl
from copied_bart import Act, Attention, Controller, EncoderLayer, Net
from patching.contract_cases import assert_close, fell_back, rows
from vilt_tiny import everything, one_thread, randomize, relative  # noqa: F401

LOW = torch.finfo(torch.float32).min
MASK = torch.zeros(2, 1, 6, 6)
MASK[0, ..., 4:] = LOW
CAUSAL = torch.full((4, 4), LOW).triu(1).expand(2, 1, 4, 4)
ADAPTERS = {"none": None, "multiple": {}, "single": {"single": True}, "norms": {"norms": True}, "relu": {"act": "relu"}}


def made(adapters="multiple", **kwargs):
    torch.manual_seed(3)
    model = Net(adapters=ADAPTERS[adapters], **kwargs).eval()
    randomize(model, 0.3)
    return model


def streams():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, n, 16, generator=generator).requires_grad_() for n in (6, 4)]


def numbers(model, mask=MASK, train=False, task="gqa"):
    model.train(train).zero_grad(set_to_none=True)
    x, y = streams()
    torch.manual_seed(5)
    out, past = model(x, y, mask, CAUSAL, task)
    (out.square().sum() + sum(t.sum() for t in past)).backward()
    grads = {"x": x.grad, "y": y.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    return [out, *past], grads


def assert_same(patched, plain, **kwargs):
    assert_close(numbers(patched, **kwargs), numbers(plain, **kwargs))


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("frozen", [False, True])
def test_same_numbers(adapters, drop, mask, frozen):
    plain = made(adapters, drop=drop)
    for name, p in plain.named_parameters():
        p.requires_grad_(not frozen or "adapter" in name or "norm" in name)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    names = ("attention", "encoder_layer", "decoder_layer", *(() if adapters == "none" else ("controller",)))
    assert {row.kind for row in rows(patched).values()} == {f"vlbart.copied_{name}" for name in names}
    for train in (False, True):
        assert_same(patched, plain, mask=mask, train=train)
    assert not fell_back(patched)
    with torch.inference_mode():
        x, y = streams()
        got, want = (model.eval()(x, y, mask, CAUSAL, "vqa")[0] for model in (patched, plain))
        assert relative(got, want) <= 1e-5


def test_step_by_step_with_keys_and_values():
    """Decoding token by token gives what the whole sequence gives, patched and not."""
    plain = made()
    patched = fastpetl.patch(copy.deepcopy(plain))
    x, y = (t.detach() for t in streams())
    with torch.no_grad():
        whole = plain(x, y, MASK, CAUSAL, "gqa")[0]
        for model in (plain, patched):
            past, out = None, []
            for i in range(y.shape[1]):
                step, past = model(x, y[:, i : i + 1], MASK, None, "gqa", past)
                out.append(step)
            assert relative(torch.cat(out, 1), whole) <= 1e-5
    assert not fell_back(patched)


def test_what_is_asked_for_beside():
    plain = made()
    patched = fastpetl.patch(copy.deepcopy(plain))
    x, _ = (t.detach() for t in streams())
    for model in (plain, patched):
        out = model.encoder(x, MASK, task="gqa", output_attentions=True)
        assert len(out) == 2 and out[1].shape == (2, 2, 6, 6)
    assert "output_attentions is given" in rows(patched)["encoder"].reason
    want, got = (m.encoder.self_attn(x, output_attentions=True)[1] for m in (plain, patched))
    assert relative(got, want) <= 1e-6
    assert "output_attentions is given" in rows(patched)["encoder.self_attn"].reason


class Other(Attention):
    def forward(self, *args, **kwargs):
        out, *rest = super().forward(*args, **kwargs)
        return 1.01 * out, *rest


class Wider(nn.Linear):
    pass


def changed(how):
    model = made()
    how(model)
    return model


def hyper(model):
    model.encoder.adapter_hypernet = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("how", "name", "reason"),
    [
        (
            lambda m: setattr(m.encoder.self_attn, "__class__", Other),
            "encoder.self_attn",
            "forward is not the original",
        ),
        (hyper, "encoder", "its adapters' weights are generated"),
        (
            lambda m: setattr(m.encoder.self_attn, "q_proj", Wider(16, 16)),
            "encoder.self_attn",
            "q_proj is .*Wider, expected torch.nn.modules.linear.Linear",
        ),
        (
            lambda m: setattr(m.encoder.ff_adapter.adapters["gqa"], "activation", Act("sin")),
            "encoder.ff_adapter",
            "adapters.gqa: its activation is none of identity, relu, gelu, gelu_tanh, silu",
        ),
        (
            lambda m: setattr(m.encoder.ff_adapter.adapters["gqa"], "track_z", True),
            "encoder.ff_adapter",
            "adapters.gqa: track_z is set",
        ),
        (
            lambda m: m.encoder.ff_adapter.adapters["gqa"].add_module("more", nn.Identity()),
            "encoder.ff_adapter",
            "its children are .*more, expected activation, down_sampler, up_sampler",
        ),
    ],
)
def test_declined(how, name, reason):
    plain = changed(how)
    patched = fastpetl.patch(copy.deepcopy(plain))
    row = rows(patched)[name]
    assert row.status == "declined" and re.search(reason, row.reason), row.reason
    if name != "encoder":  # a stand-in's layer does not know what a generated adapter is
        assert_same(patched, plain)


@pytest.mark.parametrize(
    ("how", "name", "reason"),
    [
        (lambda m: setattr(m.encoder.ff_adapter.adapters["gqa"], "track_z", True), "encoder.ff_adapter", "track_z"),
        (
            lambda m: setattr(m.encoder.ff_adapter.adapters["gqa"], "activation", Act("sin")),
            "encoder.ff_adapter",
            "its activation is none of",
        ),
        (
            lambda m: setattr(m.encoder.ff_adapter.adapters["gqa"].activation, "kind", "relu"),
            "encoder.attn_adapter",
            "",
        ),
        (
            lambda m: m.encoder.fc1.register_forward_hook(lambda *a: None),
            "encoder",
            "fc1 has forward hooks, which a fused block would not call",
        ),
        (
            lambda m: (
                setattr(m.encoder.ff_adapter, "add_layer_norm_after_adapter", True)
                or setattr(m.encoder.ff_adapter, "post_layer_norm", nn.LayerNorm(16))
            ),
            "encoder.attn_adapter",
            "",
        ),
    ],
)
def test_changed_after_patching(how, name, reason):
    """What is set on a module after it was patched counts, as it would have unpatched."""
    plain = made()
    patched = fastpetl.patch(copy.deepcopy(plain))
    assert_same(patched, plain)
    for model in (plain, patched):
        torch.manual_seed(1)
        how(model)
    assert_same(patched, plain)
    assert reason in rows(patched)[name].reason


def test_an_unknown_task_is_the_originals_error():
    patched = fastpetl.patch(made())
    x, y = streams()
    with pytest.raises(KeyError, match="snli"):
        patched(x, y, MASK, CAUSAL, "snli")


def test_alone_and_beside_others():
    controller = Controller(16, single=True)
    patched = fastpetl.patch(nn.Sequential(EncoderLayer(), controller), filter_fn=lambda m, n: n == "1")
    assert [row.name for row in rows(patched).values() if row.status == "patched"] == ["1"]
