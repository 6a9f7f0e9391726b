"""Where a block's adapter has a norm right behind it, both are one site; the numbers are those of the original."""

import copy

import pytest
import torch

import fastpetl
from fastpetl import ops
from fastpetl.nn import adapter as nn_adapter
from fastpetl.nn.adapter_controller import controller_site
from fastpetl.nn.vilt import FusedDASViltLayer
from meter_tiny import inputs, tiny
from vilt_tiny import assert_same_training, pair, relative, run
from vl_tiny import run as vl_run
from vl_tiny import tiny_adapters


@pytest.fixture
def sites(monkeypatch):
    """The specifications of all sites that were called."""
    seen, op = [], ops.adapter_residual_norm
    monkeypatch.setattr(ops, "adapter_residual_norm", lambda *a, **k: seen.append(k["spec"]) or op(*a, **k))
    return seen


def test_vilt_norms_in_the_site_where_its_linear_would_not(sites, monkeypatch):
    patched, plain = pair()
    assert_same_training(patched, plain)
    on_cpu = len(sites)
    monkeypatch.setattr(FusedDASViltLayer, "_norm_in_site", lambda *_: True)
    assert_same_training(patched, plain)
    layers = len(fastpetl.blocks(patched))
    assert len(sites) >= on_cpu + layers and {spec.emit for spec in sites[on_cpu:]} == {"both"}
    assert {spec.tail_eps for spec in sites[on_cpu:]} == {plain.vilt.encoder.layer[0].layernorm_after.eps}
    with torch.no_grad():
        assert relative(run(patched.eval()).logits, run(plain.eval()).logits) <= 1e-4


def test_the_condition_asks_the_backends(monkeypatch):
    patched, _ = pair()
    layer, x = patched.vilt.encoder.layer[0], torch.zeros(1, 2, 8)
    answers = {"site": "triton", "linear": "torch"}
    monkeypatch.setattr(fastpetl.backends, "if_served_constant", lambda op, *_: answers[op])
    choice = fastpetl.backends.Choice
    monkeypatch.setattr(fastpetl.backends, "resolve_constant", lambda op, *_: choice(answers[op], ""))
    with torch.no_grad():
        assert layer._norm_in_site(x, "auto")
        for change in ({"site": "composed"}, {"site": None}, {"linear": "cpp"}):
            answers.update({"site": "triton", "linear": "torch"} | change)
            assert not layer._norm_in_site(x, "auto")


def test_in_training_on_the_cpu_the_site_norms(sites):
    patched, _ = pair()
    layer, x = patched.vilt.encoder.layer[0], torch.randn(1, 2, 32)
    assert layer._norm_in_site(x, "auto") and not layer._norm_in_site(x.bfloat16(), "auto")
    with torch.no_grad():
        assert not layer._norm_in_site(x, "auto")
    layer(x)[0].sum().backward()
    assert [spec.emit for spec in sites] == ["both"]
    fastpetl.unpatch(patched)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPETL_BACKEND", "reference")
        composed, _ = pair()
        assert not composed.vilt.encoder.layer[0]._norm_in_site(x, "auto")


def test_a_specification_is_made_once_for_equal_layers():
    made = [nn_adapter.site_spec(8, 2, "relu", 1.0, (1e-5, True), (True, True), 1e-12, "norm") for _ in range(2)]
    assert made[0] is made[1] and made[0].tail == "layernorm" and made[0].parameters == 2 * 16 + 2 + 8 + 16
    bare = nn_adapter.site_spec(8, 2, "gelu", 0.5, None, (False, False), 1e-6, "both")
    assert not (bare.norm or bare.norm_bias or bare.down_bias or bare.up_bias)


def test_meter_attention_output_is_a_site(sites):
    plain = tiny()
    patched = fastpetl.patch(tiny())
    for model in (plain, patched):
        model.train()
    want, got = plain(**inputs()).logits, patched(**inputs()).logits
    assert sites and {spec.emit for spec in sites} == {"norm"} and {spec.placement for spec in sites} == {"inside"}
    assert relative(got, want) <= 1e-4
    found = []
    for model, y in ((plain, want), (patched, got)):
        y.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("attention.output.adapter" in n for n in found[0])
    for n in found[0]:
        assert relative(found[1][n], found[0][n]) <= 2e-3, n


def test_a_site_of_a_block_compiles_whole(sites):
    torch._dynamo.reset()
    adapter, norm = nn_adapter.BottleneckAdapter(16, 4), torch.nn.LayerNorm(16, eps=1e-6)
    x, f = torch.randn(3, 5, 16), torch.randn(3, 5, 16)

    def block(x, f):
        return nn_adapter.fused_site(adapter, x, f, norm, "both", "auto")

    got = torch.compile(block, fullgraph=True, backend="aot_eager")(x, f)
    s = adapter(x, residual=x + f)
    torch.testing.assert_close(got, (s, norm(s)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_before", [False, True])
def test_bart_sites(sites, norm_before):
    plain = tiny_adapters("vlbart", norm_before=norm_before)
    patched, found = fastpetl.patch(copy.deepcopy(plain)), []
    for model in (plain, patched):
        loss = vl_run(model.train()).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    layers = [m for m in patched.modules() if hasattr(m, "fc1")]
    assert len(sites) >= 2 * len(layers) and {(s.input, s.emit) for s in sites} == {("sublayer", "norm")}
    assert {s.norm for s in sites} == {norm_before}
    (want, grads), (got, ours) = found
    assert abs(got - want) <= 1e-5 * abs(want) and grads.keys() == ours.keys()
    largest = max(g.norm() for g in grads.values())
    for name, g in grads.items():
        assert (ours[name] - g).norm() <= 1e-4 * g.norm() + 1e-6 * largest, name


def test_a_bart_adapter_that_must_be_called(sites):
    model = tiny_adapters("vlbart", patch=True)
    seen = []
    layer = next(m for m in model.modules() if hasattr(m, "attn_adapter"))
    layer.attn_adapter.register_forward_hook(lambda *_: seen.append(1))
    vl_run(model)
    assert seen and sites
    x, norm, controller = torch.randn(1, 3, 32), layer.self_attn_layer_norm, layer.ff_adapter
    assert controller_site(controller, x, x, "gqa", norm, "auto") is not None
    assert controller_site(layer.attn_adapter, x, x, "gqa", norm, "auto") is None  # hooked
    assert controller_site(controller, x, x, ["gqa"], norm, "auto") is not None
    assert controller_site(controller, x.double(), x.double(), "gqa", norm, "auto") is None
    behind = tiny_adapters("vlbart", patch=True, norm_after=True)
    layer = next(m for m in behind.modules() if hasattr(m, "attn_adapter"))
    assert controller_site(layer.ff_adapter, x, x, "gqa", norm, "auto") is None


def test_bart_drops_before_its_residual(sites):
    """With dropout in training torch draws, and the adapter is called."""
    model = tiny_adapters("vlbart", patch=True, config={"dropout": 0.3}).train()
    vl_run(model)
    assert not sites
    with torch.no_grad():
        vl_run(model.eval())
    assert sites
