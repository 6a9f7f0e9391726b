"""BottleneckAdapter: the paper's names, sizes and initialisation; fused and plain agree."""

import copy

import pytest
import torch

import fastpetl
from fastpetl.nn import BottleneckAdapter
from vilt_tiny import relative


@pytest.mark.parametrize(("bottleneck", "parameters"), [(96, 149_856), (192, 297_408), (288, 444_960)])
def test_names_and_sizes(bottleneck, parameters):
    adapter = BottleneckAdapter(768, bottleneck)
    leaves = [f"{m}.{p}" for m in ("adapter_layer_norm_before", "down_proj", "up_proj") for p in ("weight", "bias")]
    assert list(adapter.state_dict()) == leaves
    assert sum(p.numel() for p in adapter.parameters()) == parameters
    assert adapter.adapter_layer_norm_before.eps == 1e-5


def test_initialisation_is_not_the_identity():
    adapter = BottleneckAdapter(768, 96)
    for linear in (adapter.down_proj, adapter.up_proj):
        assert abs(linear.weight.std().item() - 0.02) < 5e-4
        assert not linear.bias.any()
    x = torch.randn(400, 768)
    added = (adapter(x) - x).std().item()
    assert abs(added - 0.077) < 0.01  # the noise a fresh r=96 adapter adds, by arithmetic


def adapters(activation="relu", scale=1.0, norm=True):
    plain = BottleneckAdapter(20, 7, activation=activation, scale=scale, norm=norm)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return fastpetl.patch(copy.deepcopy(plain), strict=True), plain


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh", "silu"])
def test_fused_is_plain(activation, norm):
    fused, plain = adapters(activation, 0.7, norm)
    x, f = torch.randn(3, 5, 20), torch.randn(3, 5, 20)
    for kwargs in ({}, {"residual": f}, {"add_residual": False}):
        results = []
        for module in (fused, plain):
            leaf = x.clone().requires_grad_()
            module.zero_grad()
            y = module(leaf, **kwargs)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
        for got, want in zip(*results, strict=True):
            assert relative(got, want) <= 1e-5
    assert "_fastpetl_fallback" not in fused.__dict__


def test_the_formula():
    _, plain = adapters(scale=2.0)
    x = torch.randn(4, 20)
    norm, down, up = plain.adapter_layer_norm_before, plain.down_proj, plain.up_proj
    n = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt() * norm.weight + norm.bias
    want = 2.0 * ((n @ down.weight.T + down.bias).clamp_min(0) @ up.weight.T + up.bias)
    torch.testing.assert_close(plain(x, add_residual=False), want)
    torch.testing.assert_close(plain(x), want + x)
    torch.testing.assert_close(plain(x, residual=3 * x), want + 3 * x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "BottleneckAdapter: hidden is 0, expected an integer >= 1"),
        ((4, 2.5), "BottleneckAdapter: bottleneck is 2.5, expected an integer >= 1"),
        ((4, True), "BottleneckAdapter: bottleneck is True"),
        ((4, 4, "tanh"), "BottleneckAdapter: activation is 'tanh', expected one of identity, relu"),
    ],
)
def test_errors(arguments, message):
    activation = {"activation": arguments[2]} if len(arguments) > 2 else {}
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(*arguments[:2], **activation)
