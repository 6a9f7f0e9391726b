"""CLIP-ViL's own BERT modules and OpenAI's CLIP block, copied: found by their children, proven by numbers."""

import copy

import pytest
import torch
from torch import nn

import fastpetl
from copied_clipvil import Layer, ResidualAttentionBlock
from patching.contract_cases import INTERMEDIATE, assert_close, fell_back, rows
from vilt_tiny import everything, one_thread, randomize, relative  # noqa: F401

MASK = torch.zeros(2, 1, 1, 6)
MASK[0, ..., 4:] = -10000.0
CAUSAL = torch.full((6, 6), float("-inf")).triu(1)
BLOCKS = {"vision": {}, "text": {"mask": CAUSAL}, "gelu": {"act": nn.GELU}, "batch_first": {"batch_first": True}}


def layer(**kwargs):
    torch.manual_seed(3)
    model = Layer(**kwargs).eval()
    randomize(model, 0.3)
    return model


def block(**kwargs):
    torch.manual_seed(3)
    model = nn.Sequential(ResidualAttentionBlock(**kwargs), ResidualAttentionBlock(**kwargs)).eval()
    randomize(model, 0.3)
    return model


def numbers(model, train=False, **kwargs):
    model.train(train).zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(2, n, 16, generator=generator).requires_grad_() for n in (6, 4))
    torch.manual_seed(5)
    if isinstance(model, Layer):
        out = model(x, y, task="gqa", **kwargs)
    else:
        first = model[0].attn.batch_first
        out = model(x if first else x.transpose(0, 1))
    out.square().sum().backward()
    return [out.detach()], {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(patched, plain, **kwargs):
    assert_close(numbers(patched, **kwargs), numbers(plain, **kwargs))


@pytest.mark.parametrize("adapters", ["none", "adapters", "gate", "gate_and_norms"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("mask", [None, MASK])
def test_the_layers_numbers(adapters, drop, mask):
    given = {"none": None, "gate_and_norms": {"norms": True}}.get(adapters, {})
    plain = layer(drop=drop, adapters=given, gate=adapters.startswith("gate"))
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    kinds = {"lxmert.copied_attention", "lxmert.copied_output", INTERMEDIATE}
    assert {row.kind for row in rows(patched).values()} == kinds | (
        set() if given is None else {"vlbart.copied_controller"}
    )
    for train in (False, True):
        assert_same(patched, plain, mask=mask, train=train)
    assert not fell_back(patched)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_blocks_numbers(kind, frozen):
    plain = block(**BLOCKS[kind])
    for name, p in plain.named_parameters():
        p.requires_grad_(not frozen or "ln_" in name)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    assert {row.kind for row in rows(patched).values()} == {"clip.copied_block"}
    for train in (False, True):
        assert_same(patched, plain, train=train)
    assert not fell_back(patched)


def test_what_the_fused_block_does_not_do():
    plain = block(drop=0.3)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    assert_same(patched, plain)
    assert_same(patched, plain, train=True)
    assert "attn drops 0.3 while training" in rows(patched)["0"].reason
    x, hidden = torch.randn(6, 2, 16), torch.zeros(2, 6, dtype=torch.bool)
    hidden[0, 4:] = True
    assert relative(patched.eval()[0](x, x_mask=hidden), plain.eval()[0](x, x_mask=hidden)) <= 1e-6
    assert "a mask is given" in rows(patched)["0"].reason


class PostNorm(ResidualAttentionBlock):
    def forward(self, x, x_mask=None):
        x = self.ln_1(x + self.attn(x, x, x, need_weights=False)[0])
        return self.ln_2(x + self.mlp(x))


def test_look_alikes_are_declined():
    plain = block()
    plain[0].__class__ = PostNorm
    plain[1].mlp.c_fc = nn.Sequential(plain[1].mlp.c_fc)
    patched = fastpetl.patch(copy.deepcopy(plain))
    found = rows(patched)
    assert "its forward is not the original's" in found["0"].reason and found["0"].status == "declined"
    assert "mlp.c_fc is torch.nn.modules.container.Sequential" in found["1"].reason
    assert_same(patched, plain)
