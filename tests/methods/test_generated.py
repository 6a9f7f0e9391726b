"""Hyperformer in training, patched: one product per generator for all layers, and never another forward's weights."""

import copy
import gc

import pytest
import torch

import fastpetl
from fastpetl import ops
from fastpetl.nn import generated
from vilt_tiny import one_thread, relative  # noqa: F401
from vl_tiny import TASKS, inputs, randomize, tiny

LAYERS = 3


def attached(unified=False):
    model = tiny("vlbart", encoder_layers=LAYERS, decoder_layers=LAYERS)
    fastpetl.attach(model, fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6, unified=unified), patch=False)
    randomize(model, 0.3)
    fastpetl.task(model, "gqa")
    return model.train()


def net_of(model):
    return model.get_encoder().adapter_layers_hyper_net


def step(model, backward=True):
    loss = model(**inputs()).loss
    if backward:
        loss.backward()
    return loss


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(patched, plain):
    got, want = gradients(patched), gradients(plain)
    assert got.keys() == want.keys()
    scale = max(g.norm() for g in want.values())
    for name, grad in got.items():
        assert (grad - want[name]).norm() <= 1e-4 * want[name].norm() + 1e-6 * scale, name


def held():
    gc.collect()
    return [sheet for sheets in generated._local.held.values() for sheet in sheets.values()]


@pytest.mark.parametrize("unified", [False, True])
def test_products_do_not_grow_with_the_layers(unified, monkeypatch):
    made, make = [], ops.hyper_weights
    monkeypatch.setattr(ops, "hyper_weights", lambda e, *g, **k: made.append(len(e)) or make(e, *g, **k))
    plain = attached(unified)
    patched = fastpetl.patch(copy.deepcopy(plain))
    step(plain)
    assert made == [1] * 5 * LAYERS
    made.clear()
    step(patched)
    assert made == [LAYERS] * 5 and not held()
    assert_same_gradients(patched, plain)


@pytest.mark.parametrize("tasks", ["vqa", ("vqa", "gqa", "gqa")])
def test_the_site_is_one_launch_unless_tasks_are_mixed(tasks, monkeypatch):
    sites, site = [], ops.adapter_residual_norm
    monkeypatch.setattr(ops, "adapter_residual_norm", lambda *a, **k: sites.append(1) or site(*a, **k))
    plain = attached()
    patched = fastpetl.patch(copy.deepcopy(plain))
    for model in (plain, patched):
        with fastpetl.task(model, tasks):
            step(model)
    assert len(sites) == (5 * LAYERS if tasks == "vqa" else 0)
    assert_same_gradients(patched, plain)


def test_forwards_do_not_share():
    """Two before one backward, two backwards, a step between, one that never gets a backward."""
    plain = attached()
    patched = fastpetl.patch(copy.deepcopy(plain))
    for model in (plain, patched):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        step(model, backward=False)
        (step(model, backward=False) + step(model, backward=False)).backward()
        step(model)
        optimizer.step()
        step(model)
    assert_same_gradients(patched, plain)


@pytest.mark.parametrize("hooked", [False, True])
def test_hooks_are_called(hooked):
    patched, seen = fastpetl.patch(attached()), []
    site = patched.get_encoder().layers[1].ff_adapter
    if hooked:
        site.register_forward_hook(lambda *a: seen.append(1))
    step(patched)
    assert len(seen) == hooked and not held()


def ask(net, layer, kind="feed_forward"):
    return generated.shared_weights(net, "gqa", layer, kind)


def assert_right(net, layer, found):
    for got, want in zip(found[:4], net.weights("gqa", layer, "feed_forward")[:4], strict=True):
        torch.testing.assert_close(got, want)
    sum(t.sum() for t in found[:4]).backward()  # raises if its graph is gone


def test_out_of_turn():
    net = net_of(attached())
    for layer in (0, 2, 1, 1, 0):
        assert_right(net, layer, ask(net, layer))
        generated._sheets(net).clear()
    first = ask(net, 0)
    assert_right(net, 2, ask(net, 2))  # layer 1 was skipped
    assert_right(net, 0, ask(net, 0))  # and the next forward begins
    assert_right(net, 0, first)


def test_what_was_left_by_a_forward_of_before():
    net = net_of(attached())
    sum(t.sum() for t in ask(net, 0)[:4]).backward()  # stopped after its first layer
    assert_right(net, 1, ask(net, 1))
    ask(net, 0)
    with torch.no_grad():
        net.LayerNorm.weight.mul_(2)
    assert_right(net, 1, ask(net, 1))


def test_not_within_a_checkpoint_nor_a_backward():
    assert generated.can_be_shared()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not generated.can_be_shared()
    with torch.no_grad():
        assert not generated.can_be_shared()
    seen, x = [], torch.ones(1, requires_grad=True)
    x.register_hook(lambda g: seen.append(generated.can_be_shared()))
    with torch.enable_grad():
        x.sum().backward()
    assert seen == [False]


def test_losses_of_a_few_steps():
    plain = attached()
    patched, found = fastpetl.patch(copy.deepcopy(plain)), []
    for model in (plain, patched):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(4):
            optimizer.zero_grad()
            found.append(step(model).detach())
            optimizer.step()
    assert relative(torch.stack(found[4:]), torch.stack(found[:4])) <= 1e-4
