"""What the originals do that a patch gets wrong when it does not look: forms, masks, draws, flags, epsilons."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import copied_bert
import fastpetl
from copied_vilt import Adapter_Layer, Stack
from patching.contract_cases import (
    CASES,
    KEEP,
    NAMES,
    assert_close,
    both,
    fell_back,
    forget_fallbacks,
    numbers,
    plain,
    run,
)
from vilt_tiny import inputs, randomize, relative, tiny_das, tiny_vilt

LOW = torch.finfo(torch.float32).min


def pair(model):
    randomize(model.eval(), 0.3)
    return fastpetl.patch(copy.deepcopy(model), strict=True), model


@pytest.mark.parametrize("name", NAMES)
def test_outputs_keep_their_form(name):
    """Callers write layer(...)[0] or unpack: a module of each kind returns what it did, a tuple of as many or a tensor.
    One is listened to at a time, for what has hooks is not inlined.
    """
    models = both(name)
    for key in {row.kind: row.name for row in fastpetl.report(models[0]).rows}.values():
        forget_fallbacks(models[0])
        forms = []
        for model in models:
            module, found = model.get_submodule(key), []
            handle = module.register_forward_hook(lambda _, args, out, found=found: found.append(form(out)))
            with torch.no_grad():
                run(name, model)
            handle.remove()
            forms.append(found)
        assert forms[0] == forms[1], key
        assert "_fastpetl_fallback" not in models[0].get_submodule(key).__dict__


def form(out):
    return (type(out), len(out)) if isinstance(out, tuple | list) else type(out)


@pytest.mark.parametrize("make", [tiny_vilt, tiny_das])
def test_vilt_permutes_patches_by_the_global_generator_also_in_eval(make):
    """As many draws, in the same order: hidden states agree token by token, and so does what is drawn next."""
    model = make(num_hidden_layers=2)
    models, found = (fastpetl.patch(copy.deepcopy(model)), model), []
    for one in models:
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad():
                found.append(one(**inputs(), output_hidden_states=True).hidden_states[-1])
            found.append(torch.rand(3))
    for got, want in zip(found[:4], found[4:], strict=True):
        assert relative(got, want) <= 1e-5
    assert relative(found[0], found[2]) > 1e-3  # another seed is another order


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.float32])
def test_vilts_masks_say_what_is_kept(dtype):
    patched, model = pair(Stack())
    x, keep = torch.randn(2, 6, 16), KEEP.to(dtype)
    assert relative(patched(x, keep), model(x, keep)) <= 1e-5
    other = x.clone()
    other[0, 4:] += 1  # hidden
    assert relative(patched(other, keep)[0, :4], patched(x, keep)[0, :4]) <= 1e-5
    assert not fell_back(patched)


@pytest.mark.parametrize("low", [LOW, float("-inf"), -1e4])
def test_meters_masks_are_added(low):
    patched, model = pair(copied_bert.Pair())
    x, y, mask = torch.randn(2, 6, 16), torch.randn(2, 4, 16), torch.zeros(2, 1, 1, 6)
    mask[0, ..., 4:] = low
    mask[1, ..., 2] = -0.7  # any number may be added
    assert relative(patched(x, y, mask), model(x, y, mask)) <= 1e-5
    assert relative(patched(x, y, mask), patched(x, y)) > 1e-4
    assert not fell_back(patched)


@pytest.mark.parametrize("name", [name for name in NAMES if "attention_mask" in CASES[name].inputs(True)])
def test_a_sample_of_padding_alone(name):
    """It gives what it gave, gradients too: zeros where SDPA is told by a bool mask, the mean of all where numbers are
    added, of which a log-sum-exp loses how many there were.
    """
    found = []
    for model in both(name):

        def padding_first(attention_mask, model=model, **given):
            attention_mask[0] = 0
            return model(attention_mask=attention_mask, **given)

        outputs, grads = numbers(name, model, True, padding_first)
        found.append((outputs, {k: g for k, g in grads.items() if not k.endswith(("key.bias", "k_proj.bias"))}))
    assert_close(*found, 1e-2)  # METER's mask is 10,000: scores beside it keep three digits


@pytest.mark.parametrize(
    "given", [{}, {"add_residual": False}, {"residual": 1}, {"add_residual": False, "residual": 1}]
)
def test_das_adapters_and_their_residual(given):
    patched, model = pair(nn.Sequential(Adapter_Layer(16, 6)))
    x = torch.randn(2, 5, 16)
    given = {**given, "residual": torch.randn(2, 5, 16)} if "residual" in given else given
    assert relative(patched[0](x, **given), model[0](x, **given)) <= 1e-5
    assert not fell_back(patched)


class Flagged(Stack):
    """DAS's own way to skip: tensors that the search changes between calls."""

    def __init__(self):
        super().__init__()
        self.skip_flag = torch.zeros(3)

    def forward(self, x, mask=None):
        for block, adapter, flag in zip(self.blocks, self.adapter_list, self.skip_flag, strict=True):
            x = adapter(x) if flag else checkpoint(block, x, mask, use_reentrant=False)[0]
        return x


def test_skip_flags_are_tensors_changed_between_calls():
    """Each call by the flags as they stand; the backward is of the blocks that ran, whatever they say by then."""
    models = pair(Flagged())
    for flags in ([0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]):
        found = []
        for model in models:
            model.zero_grad(set_to_none=True)
            model.skip_flag.copy_(torch.tensor(flags))
            out = model(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2)), KEEP)
            model.skip_flag.copy_(1 - model.skip_flag)
            out.square().sum().backward()
            found.append(([out.detach()], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        assert_close(*found)
        assert [f"blocks.{i}.norm1.weight" in found[0][1] for i in range(3)] == [not flag for flag in flags]
    assert not fell_back(models[0])


class Cross(copied_bert.CrossLayer):
    """METER's cross layer returns a tuple; DAS's skip path wraps what it makes in a list."""

    def forward(self, *args):
        return (super().forward(*args),)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Cross() for _ in range(2))
        self.adapter_list = nn.ModuleList(nn.Sequential(Adapter_Layer(16, 8)) for _ in range(2))

    def forward(self, x, y, skipped):
        for i, layer in enumerate(self.layers):
            out = [self.adapter_list[i](x)] if i in skipped else layer(x, y)
            x = out[0]
        return x


@pytest.mark.parametrize("skipped", [(), (0,), (0, 1)])
def test_meters_tuples_and_the_skip_paths_lists(skipped):
    patched, model = pair(Wrapped())
    x, y = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    assert relative(patched(x, y, skipped), model(x, y, skipped)) <= 1e-5
    assert not fell_back(patched)


@pytest.mark.parametrize("name", ["das_vilt", "bridgetower", "das_meter", "copied_vilt", "copied_meter"])
def test_every_norm_has_its_own_epsilon(name):
    """1e-12, 1e-6 and 1e-5 meet in a block: on inputs so small that they count, each norm keeps its own."""
    patched, model = both(name)
    norms = [m for one in (patched, model) for m in one.modules() if isinstance(m, nn.LayerNorm)]
    args = {"copied_meter": (torch.randn(2, 4, 16),)}.get(name, ())
    if name in ("bridgetower", "das_meter"):
        args = (torch.randn(2, 4, 32),)
    block = "text" if name == "copied_meter" else CASES[name].block
    x = 1e-3 * torch.randn(2, 6, 16 if name.startswith("copied") else 32)
    got, want = (one.get_submodule(block)(x, *args) for one in (patched, model))
    assert relative(first(got), first(want)) <= 1e-5
    for norm in norms:
        norm.eps = 1e-3
    moved = [first(one.get_submodule(block)(x, *args)) for one in (patched, model)]
    assert relative(*moved) <= 1e-5 and relative(moved[1], first(want)) > 1e-4


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def test_a_meter_layers_weights_are_bridgetowers():
    """Same names, same arithmetic: the cross layer of either loads the other's, patched or not."""
    from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer

    meter = plain("meter").meter.cross_modal_text_layers[0]
    config = plain("bridgetower").config.text_config
    config.intermediate_size, config.layer_norm_eps = 128, meter.output.LayerNorm.eps
    layer = BridgeTowerBertCrossLayer(config).eval()
    layer.load_state_dict(meter.state_dict(), strict=True)
    fastpetl.patch(layer, strict=True)
    x, y, mask = torch.randn(2, 6, 32), torch.randn(2, 4, 32), torch.zeros(2, 1, 1, 6)
    mask[0, ..., 4:] = LOW
    want = meter(x, y, attention_mask=mask)[0]
    assert relative(layer(x, y, attention_mask=mask)[0], want) <= 1e-5
    fastpetl.patch(meter, strict=True).load_state_dict(layer.state_dict(), strict=True)
    assert relative(meter(x, y, attention_mask=mask)[0], want) <= 1e-5
