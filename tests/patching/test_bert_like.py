"""BERT, RoBERTa, CLIP, BridgeTower, LXMERT and METER patched: what they have beside the contract."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import fastpetl
from hf_tiny import DROP, TEXT, build, decoder_inputs, lxmert_inputs
from patching.contract_cases import assert_close, numbers
from vilt_tiny import one_thread, randomize, relative  # noqa: F401


def pair(name, **kwargs):
    plain = build(name, **kwargs)
    return fastpetl.patch(copy.deepcopy(plain)), plain


def assert_same(name, patched, plain):
    assert_close(numbers(name, patched), numbers(name, plain))


def test_lxmert_gives_its_maps_by_the_original():
    patched, plain = pair("lxmert")
    given = lxmert_inputs(True)
    got, want = (m(**given, output_attentions=True) for m in (patched, plain))
    for a, b in zip(got.cross_encoder_attentions, want.cross_encoder_attentions, strict=True):
        assert relative(a, b) <= 1e-5
    assert "output_attentions=True" in str(fastpetl.report(patched))


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_lxmerts_intermediates(act, monkeypatch):
    """Its exact GELU, or a ReLU, is computed where the product's results are; any other activation is called."""
    from transformers.models.lxmert import modeling_lxmert as hf

    from fastpetl import ops

    config, calls = hf.LxmertConfig(hidden_size=32, intermediate_size=64, hidden_act=act), []
    plain = hf.LxmertIntermediate(config).requires_grad_(False)
    patched, op = fastpetl.patch(copy.deepcopy(plain), strict=True), ops.activated_linear
    assert [row.kind for row in fastpetl.report(patched).rows] == ["lxmert.intermediate"]
    assert ("runs as it is" in str(fastpetl.report(patched))) == (act == "gelu_new")
    monkeypatch.setattr(ops, "activated_linear", lambda *a, **k: calls.append(k["activation"]) or op(*a, **k))
    found = []
    for module in (patched, plain):
        x = torch.linspace(-4, 4, 5 * 32).view(1, 5, 32).requires_grad_()
        y = module(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(relative(a, b) <= 1e-5 for a, b in zip(*found, strict=True))
    assert calls == ([] if act == "gelu_new" else [act])


# --- traps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bridgetowers_self_attention_is_what_hf_makes_of_is_causal(implementation):
    """HF marks it causal: its eager attention ignores the mark, SDPA without a mask would not."""
    from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer, BridgeTowerTextConfig

    config = BridgeTowerTextConfig(**TEXT, **dict.fromkeys(DROP, 0.0))
    config._attn_implementation = implementation
    plain = BridgeTowerBertCrossLayer(config).eval()
    randomize(plain, 0.3)
    assert plain.attention.self.is_causal
    patched = fastpetl.patch(copy.deepcopy(plain))
    x, memory = torch.randn(2, 6, 32), torch.randn(2, 4, 32)
    for mask in (None, torch.zeros(2, 1, 1, 6).index_fill(3, torch.tensor([4]), torch.finfo(torch.float32).min)):
        got, want = patched(x, memory, attention_mask=mask), plain(x, memory, attention_mask=mask)
        assert relative(got[0], want[0]) <= 1e-5
        if implementation == "eager":
            assert relative(got[1], want[1]) <= 1e-5 and relative(got[2], want[2]) <= 1e-5
    if implementation == "eager":  # bidirectional: the first token sees the last
        moved = x.clone()
        moved[:, -1] += 1
        assert (patched(moved, memory)[0] - patched(x, memory)[0])[:, 0].abs().max() > 1e-3


def test_meters_self_attention_sees_both_ways():
    patched, plain = pair("meter")
    layers = [m.meter.cross_modal_image_layers[0] for m in (patched, plain)]
    x, memory = torch.randn(2, 6, 32), torch.randn(2, 4, 32)
    moved = x.clone()
    moved[:, -1] += 1
    for layer in layers:
        assert (layer(moved, memory)[0] - layer(x, memory)[0])[:, 0].abs().max() > 1e-3
    assert relative(layers[0](x, memory)[0], layers[1](x, memory)[0]) <= 1e-5


def test_a_decoder_with_its_cache():
    patched, plain = pair("decoder")
    given = decoder_inputs(False)
    given.pop("use_cache")
    first = {**given, "input_ids": given["input_ids"][:, :6], "attention_mask": None, "use_cache": True}
    for model in (patched, plain):
        past = model(**first).past_key_values
        model.step = model(
            **{**first, "input_ids": given["input_ids"][:, 6:]}, past_key_values=past
        ).last_hidden_state.detach()
        model.whole = model(**{**given, "attention_mask": None}).last_hidden_state[:, 6:].detach()
        assert relative(model.step, model.whole) <= 1e-5
    assert relative(patched.step, plain.step) <= 1e-5


def test_chunked_feed_forward():
    patched, plain = pair("bert", chunk_size_feed_forward=1)
    assert_same("bert", patched, plain)


def test_other_activations():
    for name, config in (("bert", {"hidden_act": "relu"}), ("clip_vision", {"hidden_act": "gelu"})):
        patched, plain = pair(name, **config)
        assert_same(name, patched, plain)
    patched, _ = pair("bert", hidden_act="relu")
    assert "is not the exact GELU and runs as it is" in str(fastpetl.report(patched))


def test_children_that_somebody_listens_to():
    patched, plain = pair("das_meter")
    layer = patched.meter.cross_modal_text_layers[0]
    seen = []
    layer.output.dense.register_forward_hook(lambda *_: seen.append("fc2"))
    layer.attention.self.query.register_forward_hook(lambda *_: seen.append("q"))
    layer.crossattention.output.adapter.down_proj.register_forward_hook(lambda *_: seen.append("down"))
    patched.meter.vit_model.encoder.layers[0].layer_norm2.register_forward_hook(lambda *_: seen.append("norm"))
    patched.meter.vit_model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    assert_same("das_meter", patched, plain)
    assert sorted(seen) == sorted(["fc2", "q", "down", "norm", "fc1"])


def test_what_is_declined():
    class Mine(hf.models.bert.modeling_bert.BertSelfAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = build("bert")
    first, second = model.encoder.layer
    first.attention.self.__class__ = Mine
    second.attention.self.key = nn.Sequential(second.attention.self.key)
    second.output.dense = nn.Sequential(second.output.dense)
    second.attention.output.LayerNorm = nn.Identity()
    fastpetl.patch(model)
    rows = {row.name: row for row in fastpetl.report(model).rows if row.status == "declined"}
    assert type(first.attention.self) is Mine
    for name, reason in {
        "encoder.layer.1.attention.self": "key is torch.nn.modules.container.Sequential",
        "encoder.layer.1": "output.dense is torch.nn.modules.container.Sequential",
        "encoder.layer.1.attention.output": "LayerNorm is torch.nn.modules.linear.Identity",
    }.items():
        assert reason in rows[name].reason


@pytest.mark.parametrize(
    ("name", "library", "cls"),
    [
        ("bert", "bert.modeling_bert", "BertSelfAttention"),
        ("bert", "bert.modeling_bert", "BertSelfOutput"),
        ("bert", "bert.modeling_bert", "BertOutput"),
        ("clip_vision", "clip.modeling_clip", "CLIPMLP"),
        ("clip_vision", "clip.modeling_clip", "CLIPAttention"),
        ("lxmert", "lxmert.modeling_lxmert", "LxmertAttention"),
        ("lxmert", "lxmert.modeling_lxmert", "LxmertIntermediate"),
        ("lxmert", "lxmert.modeling_lxmert", "LxmertOutput"),
    ],
)
def test_another_transformers(monkeypatch, name, library, cls):
    import importlib

    model = build(name)
    module = importlib.import_module(f"transformers.models.{library}")
    monkeypatch.setattr(getattr(module, cls), "forward", lambda self, hidden_states, head_mask=None: None)
    with pytest.raises(ValueError, match=rf"has a {cls} with forward\(hidden_states, head_mask\), expected"):
        fastpetl.patch(model, strict=True)
