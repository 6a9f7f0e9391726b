"""METER's own BERT modules, copied: found by their children, proven by numbers, equal in every mode."""

import copy

import pytest
import torch
from torch import nn

import fastpetl
from copied_bert import Output, Pair, SelfAttention
from patching.contract_cases import METER, assert_close, rows
from vilt_tiny import everything, one_thread, randomize, relative  # noqa: F401

MASK = torch.zeros(2, 1, 1, 7)
MASK[0, ..., 4:] = torch.finfo(torch.float32).min


def made(**kwargs):
    torch.manual_seed(3)
    model = Pair(**kwargs).eval()
    randomize(model, 0.3)
    return model


def numbers(model, mask=MASK, train=False):
    model.train(train).zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(2, n, 16, generator=generator).requires_grad_() for n in (7, 5))
    torch.manual_seed(5)
    out = model(x, y, mask)
    out.square().sum().backward()
    return [out.detach()], {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(patched, plain, **kwargs):
    assert_close(numbers(patched, **kwargs), numbers(plain, **kwargs))


@pytest.mark.parametrize("das", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("frozen", [False, True])
def test_same_numbers(das, drop, mask, frozen):
    plain = made(das=das, drop=drop)
    for name, p in plain.named_parameters():
        p.requires_grad_(not frozen or "adapter" in name or "Norm" in name)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    assert {row.kind for row in rows(patched).values()} == METER | ({"das.adapter"} if das else set())
    for train in (False, True):
        assert_same(patched, plain, mask=mask, train=train)
    assert not any("last original forward" in row.reason for row in rows(patched).values())


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"output_attentions": True}, "output_attentions is given"),
        ({"head_mask": torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)}, "head_mask is given"),
    ],
)
def test_what_the_fused_forward_does_not_do(asked, reason):
    model = made()
    plain, patched = model.text.attention.self, fastpetl.patch(copy.deepcopy(model)).text.attention.self
    x = torch.randn(2, 7, 16)
    for a, b in zip(patched(x, MASK, **asked), plain(x, MASK, **asked), strict=True):
        assert torch.equal(a, b)
    assert reason in str(fastpetl.report(patched))


def test_a_mask_of_queries_and_other_masks():
    model = made()
    plain, patched = model.text.attention.self, fastpetl.patch(copy.deepcopy(model)).text.attention.self
    x, causal = torch.randn(2, 7, 16), torch.full((7, 7), float("-inf")).triu(1).view(1, 1, 7, 7)
    assert relative(patched(x, causal)[0], plain(x, causal)[0]) <= 1e-5


class _Scaled(SelfAttention):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(2 * hidden_states, *args, **kwargs)


class _PreNorm(Output):
    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states)) + self.LayerNorm(input_tensor)


def test_look_alikes_are_declined():
    model = made(das=False)
    model.text.attention.self.__class__ = _Scaled
    model.text.output.__class__ = _PreNorm
    model.image.attention.self.position_embedding_type = "relative_key"
    model.image.crossattention.self.is_decoder = True
    model.image.output.adapter = nn.Linear(16, 16)
    plain = copy.deepcopy(model)
    found = rows(fastpetl.patch(model))
    for name, reason in {
        "text.attention.self": "its forward is not the original's: output 0 differs by",
        "text.output": "its forward is not the original's: output 0 differs by",
        "image.attention.self": "position_embedding_type is 'relative_key', expected 'absolute'",
        "image.crossattention.self": "it is a decoder's",
        "image.output": "adapter is Linear, expected DAS's ParallelAdapter",
    }.items():
        assert found[name].status == "declined" and reason in found[name].reason, name
    del model.image.output.adapter, plain.image.output.adapter
    assert_same(model, plain)


def test_an_adapter_changed_after_patching():
    plain = made()
    patched = fastpetl.patch(copy.deepcopy(plain))
    for model in (patched, plain):
        model.text.attention.output.adapter.scale = nn.Parameter(torch.tensor([2.0]))
    assert_same(patched, plain)
    assert "adapter: scale is learnt" in rows(patched)["text.attention.output"].reason
