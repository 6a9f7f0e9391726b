"""Research code that was copied: ViLT's Block and DAS's adapter are found by their children and proven by numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastpetl
from copied_vilt import Adapter_Layer, AdapterBlock, Block, Stack
from patching.contract_cases import assert_close, rows
from vilt_tiny import everything, one_thread, randomize, relative  # noqa: F401

MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


def made(block=AdapterBlock, **kwargs):
    model = Stack(block, **kwargs).eval()
    randomize(model, 0.3)
    return model


def numbers(model, mask=MASK, train=False):
    """Output and every gradient of one step."""
    model.train(train).zero_grad(set_to_none=True)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(5)
    y = model(x, mask)
    y.square().sum().backward()
    return [y.detach()], {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(patched, plain, **kwargs):
    assert_close(numbers(patched, **kwargs), numbers(plain, **kwargs))


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_without_adapters(mask, train, frozen):
    plain = made(Block)
    for name, p in plain.named_parameters():
        p.requires_grad_(not frozen or "adapter" in name)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    assert_same(patched, plain, mask=mask, train=train)
    assert all(row.status == "patched" and "last original forward" not in row.reason for row in rows(patched).values())


def test_what_is_swapped_and_back():
    plain = made()
    before = everything(plain)
    model = fastpetl.patch(plain)
    block = model.blocks[0]
    assert isinstance(block, AdapterBlock) and type(block) is not AdapterBlock
    assert type(block).__name__ == "AdapterBlock"
    assert type(block) is type(model.blocks[1])  # one class per original
    assert isinstance(model.adapter_list[0][0], Adapter_Layer)
    assert rows(model)["blocks.0"].kind == "vilt.block" and "second output is None" in rows(model)["blocks.0"].reason
    assert rows(model)["adapter_list.0.0"].kind == "das.adapter"
    once = everything(model)
    assert everything(fastpetl.patch(model)) == once
    assert everything(fastpetl.unpatch(model)) == before
    assert type(Block()) is Block


def test_the_map_is_left_out_and_flags_may_change_between_calls():
    plain = made()
    patched = fastpetl.patch(copy.deepcopy(plain))
    assert patched.blocks[0](torch.randn(2, 7, 16))[1] is None
    for model in (plain, patched):
        model.skip = (1,)  # the original's loop leaves blocks out by a flag
        model.blocks[0].adapter0.scale = 3.0
    assert_same(patched, plain)
    patched.blocks[2].adapter1.adapter_layernorm_option = plain.blocks[2].adapter1.adapter_layernorm_option = "out"
    assert_same(patched, plain)
    assert "adapter_layernorm_option is 'out'" in rows(patched)["blocks.2"].reason


def test_hooks_are_called_and_inlined_children_with_hooks_are_not_skipped():
    plain = made()
    patched, seen = fastpetl.patch(copy.deepcopy(plain)), []
    patched.blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    patched.blocks[1].mlp.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    assert_same(patched, plain)
    assert seen == ["block", "fc1"]
    assert "mlp.fc1 has forward hooks" in rows(patched)["blocks.1"].reason


@pytest.mark.parametrize(
    ("kwargs", "train"),
    [
        ({"act": nn.GELU(approximate="tanh")}, False),
        ({"act": nn.ReLU()}, True),
        ({"drop": 0.2}, True),
        ({"drop_path": True}, True),
        ({"adapter": {"option": "none"}}, True),
        ({"adapter": {"scalar": 0.5}}, True),
        ({"attn_drop": 0.3}, True),
    ],
)
def test_variants(kwargs, train):
    plain = made(**kwargs)
    patched = fastpetl.patch(copy.deepcopy(plain), strict=True)
    assert_same(patched, plain)
    if train:  # the same draws in the same order: torch's generator
        assert_same(patched, plain, train=True)
    assert "last original forward" not in str(fastpetl.report(patched))


class Scaled(AdapterBlock):
    """Looks right, is not: someone changed one number."""

    def forward(self, x, mask=None):
        y, weights = super().forward(x, mask)
        return y * 1.01, weights


class OneOutput(Block):
    def forward(self, x, mask=None):
        return super().forward(x, mask)[0]


class NoMask(Block):
    def forward(self, x):
        return super().forward(x)


class Three(Block):
    def forward(self, x, mask=None):
        return (*super().forward(x, mask), x)


class Narrow(Block):
    def forward(self, x, mask=None):
        y, weights = super().forward(x, mask)
        return y[:, 1:], weights


class Adapter_Gelu(Adapter_Layer):
    def forward(self, x, add_residual=True, residual=None):
        h = self.up_proj(F.gelu(self.down_proj(self.adapter_layer_norm_before(x))))
        return h + (x if residual is None else residual) if add_residual else h


class Uncopyable(Block):
    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


class OtherNames(Block):
    """The same arithmetic, but the number of heads has another name."""

    def __init__(self):
        super().__init__()
        self.attn.heads = self.attn.__dict__.pop("num_heads")

    def forward(self, x, mask=None):
        self.attn.num_heads = self.attn.heads
        try:
            return super().forward(x, mask)
        finally:
            del self.attn.num_heads


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OtherNames, "it lacks what the fused forward reads (AttributeError"),
        (Scaled, "its forward is not the original's: output 0 differs by"),
        (OneOutput, "its forward gives a Tensor, expected a tuple"),
        (NoMask, "its forward does not take the original's call (TypeError"),
        (Three, "its forward gives 3 values, expected 2"),
        (Narrow, "output 0 of its forward is (2, 4, 16), expected (2, 5, 16)"),
        (Uncopyable, "it cannot be copied for the probe (RuntimeError: one of a kind)"),
        (lambda: Adapter_Gelu(16, 4), "its forward is not the original's"),
        (lambda: AdapterBlock(adapter={"option": "out"}), "adapter0: adapter_layernorm_option is 'out'"),
        (lambda: Adapter_Layer(16, 4, scalar="learnable_scalar"), "scale is learnt, expected a number"),
        (lambda: Block().to("meta"), "its weights are on the meta device"),
    ],
)
def test_declined(make, reason):
    model = nn.Sequential(make())
    before = type(model[0])
    with pytest.raises(ValueError, match="declined") as error:
        fastpetl.patch(model, strict=True)
    assert reason in str(error.value)
    fastpetl.patch(model, filter_fn=lambda module, name: name == "0")
    assert type(model[0]) is before
    assert reason in rows(model)["0"].reason and rows(model)["0"].status == "declined"


class Doubled(AdapterBlock):
    """Differs only in what its adapter adds, which is nothing as long as the adapter is at its initial zero."""

    def forward(self, x, mask=None):
        y, weights = super().forward(x, mask)
        h = x + self.attn(self.norm1(x), mask)[0] + self.adapter0(x, add_residual=False)
        return y + self.adapter1(h, add_residual=False), weights


def test_what_starts_at_zero_is_compared_as_well():
    block = Doubled().eval()
    for p in block.adapter1.up_proj.parameters():
        torch.nn.init.zeros_(p)
    model = fastpetl.patch(nn.Sequential(block))
    assert "its forward is not the original's" in rows(model)["0"].reason
    assert not block.adapter1.up_proj.weight.any()


def test_declined_by_its_children():
    block, adapter = Block(), Adapter_Layer(16, 4)
    block.extra, adapter.extra = nn.Identity(), nn.Identity()
    model = fastpetl.patch(nn.ModuleList([block, adapter]))
    assert "its children are norm1, attn, drop_path, norm2, mlp, extra, expected" in rows(model)["0"].reason
    assert "expected down_proj, non_linear_func, up_proj" in rows(model)["1"].reason
    wrapped = Block()
    wrapped.attn.qkv = nn.Sequential(wrapped.attn.qkv)
    model = nn.Sequential(wrapped)
    assert "attn.qkv is torch.nn.modules.container.Sequential" in rows(fastpetl.patch(model))["0"].reason


def test_an_adapter_that_knows_no_dropout():
    plain = made()
    for module in plain.modules():
        module.__dict__.pop("dropout", None)
    adapters = [m for m in plain.modules() if isinstance(m, Adapter_Layer)]
    assert adapters and not any(hasattr(m, "dropout") for m in adapters)
    rows_of = rows(fastpetl.patch(plain))  # their forward cannot run without it: declined, and patch goes on
    assert "does not take the original's call (AttributeError" in rows_of["adapter_list.0.0"].reason


def test_adapter_dropout_takes_the_original_forward_in_training():
    plain = made(adapter={"dropout": 0.3})
    patched = fastpetl.patch(copy.deepcopy(plain))
    assert_same(patched, plain)
    assert_same(patched, plain, train=True)
    assert "dropout 0.3 inside the adapter while training" in rows(patched)["blocks.0"].reason


def test_the_probe_leaves_everything_as_it_was():
    model = made()
    weights = copy.deepcopy(model.state_dict())
    model.train()
    state = torch.get_rng_state()
    fastpetl.patch(model)
    fastpetl.report(model)
    assert torch.equal(torch.get_rng_state(), state) and model.blocks[0].training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
