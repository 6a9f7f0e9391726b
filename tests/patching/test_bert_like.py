"""BERT, RoBERTa, CLIP, BridgeTower, LXMERT and METER patched: the numbers of the unpatched model, in every mode, and
what patching must leave as it was.
"""

import copy
import pickle

import pytest
import torch
import transformers as hf
from torch import nn

import fastpetl
from hf_tiny import DROP, FAMILIES, NAMES, TEXT, build, decoder_inputs, lxmert_inputs
from vilt_tiny import everything, one_thread, randomize, relative  # noqa: F401


def outputs(model, padded=True, seed=1, train=False, dtype=torch.float32, **kwargs):
    """Every floating-point tensor the model returns, as one vector per tensor."""
    name = next(n for n in NAMES if getattr(model, "_family", None) == n)
    given = FAMILIES[name][1](padded)
    given = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}
    model.train(train)
    torch.manual_seed(seed)
    out = model(**given, **kwargs)
    return [t for t in out.to_tuple() if isinstance(t, torch.Tensor) and t.is_floating_point()]


def numbers(model, **kwargs):
    model.zero_grad(set_to_none=True)
    found = outputs(model, **kwargs)
    generator = torch.Generator().manual_seed(3)
    sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in found).backward()
    return found, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def pair(name, **kwargs):
    plain = build(name, **kwargs)
    plain._family = name
    patched = fastpetl.patch(copy.deepcopy(plain))
    return patched, plain


def assert_same(patched, plain, **kwargs):
    (got, got_grads), (want, want_grads) = numbers(patched, **kwargs), numbers(plain, **kwargs)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) <= 1e-5
    assert got_grads.keys() == want_grads.keys()
    scale = max(g.norm() for g in want_grads.values())
    for name, grad in got_grads.items():
        assert (grad - want_grads[name]).norm() <= 1e-4 * want_grads[name].norm() + 1e-6 * scale, name


def fell_back(model):
    return [row.name for row in fastpetl.report(model).rows if "last original forward" in row.reason]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_fused(name):
    patched, _ = pair(name)
    rows = fastpetl.report(patched).rows
    assert {row.kind for row in rows if row.status == "patched"} == FAMILIES[name][2]
    assert not [row for row in rows if row.status != "patched"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_numbers(name, padded, frozen):
    """All of it trains, or only norms and adapters: then dx is all that frozen linears need."""
    plain = build(name)
    plain._family = name
    if frozen:
        for key, p in plain.named_parameters():
            p.requires_grad_("orm" in key or "adapter" in key)
    patched = fastpetl.patch(copy.deepcopy(plain))
    assert_same(patched, plain, padded=padded)
    assert not fell_back(patched)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_draws_what_torch_draws(name):
    patched, plain = pair(name, dropout=0.3)
    assert_same(patched, plain, train=True)
    one, two = outputs(patched, train=True, seed=1), outputs(patched, train=True, seed=2)
    assert any(relative(a, b) > 1e-3 for a, b in zip(one, two, strict=True))
    assert not fell_back(patched)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_by_the_rule_of_two(name):
    """DAS's adapters have a ReLU: one pre-activation that rounds to the other side of zero moves a gradient by more
    than all other rounding does, in either model. So their gradients are held to the rule in the best of some draws
    (a wrong kernel is wrong in all of them), the outputs in every one.
    """
    plain = build(name)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(8 if name == "das_meter" else 1):
        plain._family = name
        out, grad = bf16_errors(fastpetl.patch(copy.deepcopy(plain)), plain)
        assert out[0] <= 2 * out[1]
        errors.append(grad)
        with torch.no_grad():
            for p in plain.parameters():
                p.add_(0.02 * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    ours, theirs = (min(column) for column in zip(*errors, strict=True))
    assert ours <= 2 * theirs


def bf16_errors(patched, plain):
    """Semantics: ((patched, plain) errors of the bf16 outputs, (patched, plain) errors of the bf16 gradients)."""
    truth, truth_grads = numbers(copy.deepcopy(plain).double(), dtype=torch.float64)
    found = [numbers(copy.deepcopy(m).bfloat16(), dtype=torch.bfloat16) for m in (patched, plain)]
    assert not fell_back(patched)

    def error(a, b):
        return torch.cat([(x.double() - y).flatten() for x, y in zip(a, b, strict=True)]).norm().item()

    keys = sorted(truth_grads)
    outs = tuple(error(out, truth) for out, _ in found)
    return outs, tuple(error([g[k] for k in keys], [truth_grads[k] for k in keys]) for _, g in found)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("lxmert", "meter", "das_meter", "decoder")])
def test_maps_and_states_that_are_asked_for(name):
    patched, plain = pair(name)
    for model in (patched, plain):
        model.set_attn_implementation("eager")
    given = FAMILIES[name][1](True)
    asked = {"output_attentions": True, "output_hidden_states": True}
    got, want = patched(**given, **asked), plain(**given, **asked)
    flat = lambda part: [t for p in part for t in (flat(p) if isinstance(p, tuple) else [p]) if t is not None]  # noqa: E731
    for part in ("attentions", "hidden_states"):
        a, b = flat(getattr(got, part)), flat(getattr(want, part))
        assert len(a) == len(b) > 0 and all(relative(x, y) <= 1e-5 for x, y in zip(a, b, strict=True)), part


def test_lxmert_gives_its_maps_by_the_original():
    patched, plain = pair("lxmert")
    given = lxmert_inputs(True)
    got, want = (m(**given, output_attentions=True) for m in (patched, plain))
    for a, b in zip(got.cross_encoder_attentions, want.cross_encoder_attentions, strict=True):
        assert relative(a, b) <= 1e-5
    assert "output_attentions=True" in str(fastpetl.report(patched))


@pytest.mark.parametrize("name", ["bert", "roberta", "clip_vision", "das_meter"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    patched, plain = pair(name)
    want = numbers(plain, train=True)[1]
    fastpetl.backends.forget()  # measured inside a checkpoint: what is found must hold for the recomputation
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and name != "clip_vision":
        patched.enable_input_require_grads()
    got = numbers(patched, train=True)[1]
    if reentrant and name == "clip_vision":  # reentrant checkpoints give nothing where no input asks for a gradient
        want = {key: want[key] for key in got}
    scale = max(g.norm() for g in want.values())
    assert got.keys() == want.keys()
    for key, grad in got.items():
        assert (grad - want[key]).norm() <= 1e-4 * want[key].norm() + 1e-6 * scale, key


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_changes(name):
    model = build(name)
    model._family = name
    before, keys = everything(model), list(model.state_dict())
    names = [type(m).__name__ for m in model.modules()]
    assert fastpetl.patch(model) is model and list(model.state_dict()) == keys
    assert [type(m).__name__ for m in model.modules()] == names
    once = everything(model)
    assert everything(fastpetl.patch(model)) == once != before
    want = outputs(model)[0]
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model)))[0], want)
    assert torch.equal(outputs(copy.deepcopy(model))[0], want)
    assert everything(fastpetl.unpatch(model)) == before


@pytest.mark.parametrize("name", NAMES)
def test_autocast_takes_the_original(name):
    patched, plain = pair(name)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for a, b in zip(outputs(patched), outputs(plain), strict=True):
            assert torch.equal(a, b)
    assert "autocast" in str(fastpetl.report(patched))


@pytest.mark.parametrize("name", ["bert", "clip_vision", "das_meter"])
def test_torch_compile(name):
    patched, plain = pair(name)
    with torch.no_grad():
        want = outputs(plain)
        torch._dynamo.reset()
        patched.compile(backend="eager")
        for a, b in zip(outputs(patched), want, strict=True):
            assert relative(a, b) <= 1e-5


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
    assert_same(patched, plain)


def test_other_activations():
    for name, config in (("bert", {"hidden_act": "relu"}), ("clip_vision", {"hidden_act": "gelu"})):
        patched, plain = pair(name, **config)
        assert_same(patched, plain)
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
    assert_same(patched, plain)
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
