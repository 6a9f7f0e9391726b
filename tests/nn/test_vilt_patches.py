"""ViLT's patch embedding as one frozen linear per patch, against the convolution it replaces."""

import copy

import pytest
import torch
from torch import nn
from transformers import ViltConfig
from transformers.models.vilt.modeling_vilt import ViltPatchEmbeddings

import fastpetl
from fastpetl.nn.vilt import FusedViltPatchEmbeddings
from vilt_tiny import one_thread  # noqa: F401


def patches(trainable=False, **config):
    torch.manual_seed(0)
    module = ViltPatchEmbeddings(ViltConfig(hidden_size=24, image_size=64, patch_size=16, **config))
    return module.requires_grad_(trainable)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (70, 33)])  # the last: a border that no patch covers
@pytest.mark.parametrize("channels", [3, 1])
def test_the_convolution(size, channels):
    module = patches(num_channels=channels)
    fast = fastpetl.patch(copy.deepcopy(module))
    assert type(fast) is FusedViltPatchEmbeddings
    x = torch.randn(2, channels, *size)
    expected, got = module(x), fast(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    as_tokens = (t.flatten(2).transpose(1, 2) for t in (got, expected))  # what ViltEmbeddings does next
    torch.testing.assert_close(*as_tokens, rtol=1e-5, atol=1e-5)


def test_the_image_gets_its_gradient():
    module = patches()
    fast = fastpetl.patch(copy.deepcopy(module))
    x = torch.randn(2, 3, 48, 64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(a).square().sum().backward()
    fast(b).square().sum().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)


def test_a_projection_that_trains_keeps_the_convolution():
    fast = fastpetl.patch(patches(trainable=True))
    fast(torch.randn(2, 3, 64, 64)).sum().backward()
    assert fast.projection.weight.grad is not None and fast.projection.bias.grad is not None


def test_a_hook_on_the_projection_is_called():
    fast, seen = fastpetl.patch(patches()), []
    fast.projection.register_forward_hook(lambda *args: seen.append(1))
    fast(torch.randn(2, 3, 64, 64))
    assert seen and "forward hooks" in str(fastpetl.report(fast))


@pytest.mark.parametrize("conv", [{"padding": 1}, {"dilation": 2}, {"stride": 8}])
def test_overlapping_or_padded_patches_are_declined(conv):
    module = patches()
    module.projection = nn.Conv2d(3, 24, 16, **{"stride": 16, **conv})
    fastpetl.patch(module)
    assert type(module) is ViltPatchEmbeddings and "stride is its kernel" in str(fastpetl.report(module))


def test_the_originals_error_for_wrong_channels():
    with pytest.raises(ValueError, match="channel dimension"):
        fastpetl.patch(patches())(torch.randn(2, 4, 64, 64))
