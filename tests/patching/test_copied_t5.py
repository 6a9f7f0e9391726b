"""VL-T5's own T5 blocks, copied: found by their children, proven by numbers, equal in every mode."""

import copy
import re

import pytest
import torch
from torch import nn

import fastpetl
from copied_t5 import Attention, Dense, Net, Norm
from patching.contract_cases import assert_close, fell_back, rows
from vilt_tiny import everything, one_thread, randomize, relative  # noqa: F401

LOW = -1e4  # what transformers added in 2021
MASK = torch.zeros(2, 1, 6, 6)
MASK[0, ..., 4:] = LOW
CAUSAL = torch.full((4, 4), LOW).triu(1).expand(2, 1, 4, 4)
ADAPTERS = {"none": None, "multiple": {}, "single": {"single": True}, "norms": {"norms": True}}
KINDS = {f"vlt5.copied_{kind}" for kind in ("attention", "norm", "feed_forward", "block")}


def made(adapters="multiple", later=False, **kwargs):
    torch.manual_seed(3)
    model = Net(adapters=ADAPTERS[adapters], **kwargs).eval()
    randomize(model, 0.15)  # at 0.3 one rounding of the weights moves gradients by 1e-4 in training: no test of 1e-5
    for module in model.modules():
        if isinstance(module, Norm):
            module.later = later
            nn.init.normal_(module.weight, 1, 0.3)
    return model


def streams():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, n, 16, generator=generator).requires_grad_() for n in (6, 4)]


def flat(past):
    return [t for keys in past for t in keys]


def numbers(model, mask=MASK, train=False, task="gqa"):
    model.train(train).zero_grad(set_to_none=True)
    x, y = streams()
    torch.manual_seed(5)
    out, past = model(x, y, mask, CAUSAL, task)
    (out.square().sum() + sum(t.sum() for t in flat(past))).backward()
    grads = {"x": x.grad, "y": y.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    return [out, *flat(past)], grads


def assert_same(patched, plain, **kwargs):
    assert_close(numbers(patched, **kwargs), numbers(plain, **kwargs))


FORMS = [  # each with and without mask: gated ones without dropout, others with it; the rest of the grid is slow
    (drop, gated) if bool(drop) != gated else pytest.param(drop, gated, marks=pytest.mark.slow)
    for drop in (0.0, 0.3)
    for gated in (False, True)
]


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(("drop", "gated"), FORMS)
def test_same_numbers(adapters, drop, mask, gated):
    plain = made(adapters, drop=drop, gated=gated)
    for name, p in plain.named_parameters():
        p.requires_grad_(gated or "adapter" in name or "norm" in name)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    assert {row.kind for row in rows(patched).values()} == KINDS | (
        set() if adapters == "none" else {"vlbart.copied_controller"}
    )
    for train in (False, True):
        assert_same(patched, plain, mask=mask, train=train)
    assert not fell_back(patched)
    with torch.inference_mode():
        x, y = streams()
        got, want = (model.eval()(x, y, mask, CAUSAL, "vqa")[0] for model in (patched, plain))
        assert relative(got, want) <= 1e-5


def test_a_norm_that_leaves_bf16_does_so_patched():
    """Transformers of 2021 casts back to float16 alone."""
    norms = [Norm(16).bfloat16(), fastpetl.patch(nn.Sequential(Norm(16)))[0].bfloat16()]
    x = torch.randn(2, 3, 16).bfloat16()
    want, got = (norm(x) for norm in norms)
    assert torch.equal(got, want) and got.dtype == torch.float32
    assert "does not give torch.bfloat16" in rows(norms[1])[""].reason


def test_step_by_step_with_keys_and_values():
    """Decoding token by token gives what the whole sequence gives, patched and not."""
    plain = made()
    patched = fastpetl.patch(copy.deepcopy(plain))
    x, y = (t.detach() for t in streams())
    with torch.no_grad():
        whole = plain(x, y, MASK, CAUSAL, "gqa")[0]
        for model in (plain, patched):
            past, out = (None, None), []
            for i in range(y.shape[1]):
                step, past = model(x, y[:, i : i + 1], MASK, None, "gqa", past)
                out.append(step)
            assert relative(torch.cat(out, 1), whole) <= 1e-5
    assert not fell_back(patched)


def test_what_is_asked_for_beside():
    plain = made()
    patched = fastpetl.patch(copy.deepcopy(plain))
    x, y = (t.detach() for t in streams())
    asked = {"encoder_hidden_states": x, "task": "gqa", "output_attentions": True}
    got, want = (model.decoder[0](y, CAUSAL, **asked) for model in (patched, plain))
    assert len(got) == len(want) == 6 and got[1] is None and want[1] is None
    for a, b in zip(got[2:], want[2:], strict=True):
        assert relative(a, b) <= 1e-6
    assert "output_attentions is given" in rows(patched)["decoder.0.layer.0.SelfAttention"].reason
    half = {"head_mask": torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)}
    got, want = (model.encoder[0](x, None, **half, task="gqa")[0] for model in (patched, plain))
    assert relative(got, want) <= 1e-5
    assert "head_mask is given" in rows(patched)["encoder.0.layer.0.SelfAttention"].reason


@pytest.mark.parametrize("model", ["plain", "patched"])
def test_keys_and_values_that_are_not_the_blocks(model):
    block = made().decoder[0]
    block = fastpetl.patch(block) if model == "patched" else block
    x, y = (t.detach() for t in streams())
    with pytest.raises(AssertionError, match="past states"):
        block(y, encoder_hidden_states=x, past_key_value=(y, y), task="gqa")


def test_float16_takes_the_originals_way():
    plain = made().half()
    patched = fastpetl.patch(copy.deepcopy(plain))
    x = streams()[0].detach().half()
    got, want = (m.encoder[0](x, task="gqa")[0] for m in (patched, plain))
    assert relative(got.float(), want.float()) <= 5e-3
    assert "float16: overflow is cut" in rows(patched)["encoder.0"].reason


class Other(Attention):
    def forward(self, *args, **kwargs):
        out, *rest = super().forward(*args, **kwargs)
        return 1.01 * out, *rest


class Silu(Dense):
    def forward(self, x):
        return self.wo(self.dropout(torch.nn.functional.silu(self.wi(x))))


class Centred(Norm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("how", "name", "reason"),
    [
        (
            lambda m: setattr(m.encoder[0].layer[0].SelfAttention, "__class__", Other),
            "encoder.0.layer.0.SelfAttention",
            "forward is not the original",
        ),
        (
            lambda m: setattr(m.encoder[0].layer[1].DenseReluDense, "__class__", Silu),
            "encoder.0.layer.1.DenseReluDense",
            "forward is not the original",
        ),
        (
            lambda m: setattr(m.encoder[0].layer[1].layer_norm, "__class__", Centred),
            "encoder.0.layer.1.layer_norm",
            "forward is not the original",
        ),
        (
            lambda m: setattr(m.encoder[1].layer[0].SelfAttention, "q", nn.Sequential(nn.Linear(16, 12, bias=False))),
            "encoder.1.layer.0.SelfAttention",
            "q is .*Sequential, expected torch.nn.modules.linear.Linear",
        ),
    ],
)
def test_declined(how, name, reason):
    plain = made()
    how(plain)
    patched = fastpetl.patch(copy.deepcopy(plain))
    row = rows(patched)[name]
    assert row.status == "declined" and re.search(reason, row.reason), row.reason
    assert len([row for row in rows(patched).values() if row.status == "declined"]) == 1
    assert_same(patched, plain)


def test_generated_adapters_are_declined():
    model = made("none")
    model.decoder[1].layer[1].adapter_hypernet = nn.Linear(2, 2)
    row = rows(fastpetl.patch(model))["decoder.1"]
    assert row.status == "declined" and row.reason == "layer.1: its adapters' weights are generated (Hyperformer)"
