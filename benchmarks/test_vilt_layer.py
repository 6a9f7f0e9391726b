"""One ViLT layer with DAS adapters at ViT-B size: unpatched and patched, forward and forward+backward."""

import copy

import pytest

from . import common
from .common import BATCH, HIDDEN, TOKENS, randn


def layers(dtype):
    """(unpatched, patched) with equal weights; gradients go to the adapters and the input."""
    from transformers import ViltConfig, ViltModel

    import fastpetl

    common.torch.manual_seed(0)
    model = ViltModel(ViltConfig(num_hidden_layers=1), add_pooling_layer=False)
    fastpetl.attach(model, fastpetl.DASConfig(bottleneck=96), patch=False)
    model = model.to(dtype).eval()
    patched = fastpetl.patch(copy.deepcopy(model))
    return model.encoder.layer[0], patched.encoder.layer[0]


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", ["unpatched", "patched"])
@pytest.mark.parametrize("short", common.DTYPES)
def test_vilt_layer(benchmark, short, name, mode):
    dtype = common.DTYPES[short]
    benchmark.group = f"ViLT layer {short} {mode}"
    plain, patched = layers(dtype)
    exact = copy.deepcopy(plain).double()
    x = randn(BATCH, TOKENS, HIDDEN, dtype=dtype, grad=mode != "forward")
    mask = common.torch.zeros(BATCH, 1, TOKENS, TOKENS, dtype=dtype)[:, :, :1].expand(-1, -1, TOKENS, -1)
    grad = randn(BATCH, TOKENS, HIDDEN, dtype=dtype) if mode != "forward" else None
    layer = plain if name == "unpatched" else patched

    def run(layer, x, grad):
        if grad is None:
            with common.torch.no_grad():
                return (layer(x, mask.to(x.dtype))[0],)
        y = layer(x, mask.to(x.dtype))[0]
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return (y.detach(), *common.torch.autograd.grad(y, wanted, grad))

    doubles = x.detach().double().requires_grad_(x.requires_grad), None if grad is None else grad.double()
    common.verify(run(layer, x, grad), run(plain, x, grad), run(exact, *doubles))
    benchmark.pedantic(lambda: run(layer, x, grad), rounds=9, warmup_rounds=2, iterations=1)
