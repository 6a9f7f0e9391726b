"""BART and T5, patched: the numbers of the unpatched model, generation, and what patching must leave as it was."""

import copy
import pickle

import pytest
import torch

import fastpetl
from vilt_tiny import everything, one_thread, relative  # noqa: F401
from vl_tiny import TEXT, inputs, text_model, tiny, tiny_adapters

KINDS = ("vlbart", "vlt5")


def arguments(model, padded=True, **changes):
    given = {**inputs(padded=padded, dtype=model.dtype), **changes}
    if not type(model).__name__.startswith("VL"):
        given.pop("vis_feats", None)
    return given


def numbers(model, train=False, padded=True, seed=1, **kwargs):
    """Logits, loss and every gradient of one step."""
    model.train(train).zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(**arguments(model, padded), **kwargs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(patched, plain, tolerance=1e-5, **kwargs):
    (got, got_grads), (want, want_grads) = numbers(patched, **kwargs), numbers(plain, **kwargs)
    assert relative(got.logits, want.logits) <= tolerance
    assert abs(got.loss - want.loss) <= tolerance * abs(want.loss)
    assert got_grads.keys() == want_grads.keys()
    scale = max(g.norm() for g in want_grads.values())
    for name, grad in got_grads.items():
        assert (grad - want_grads[name]).norm() <= 1e-4 * want_grads[name].norm() + 1e-6 * scale, name


def pair(plain):
    return fastpetl.patch(copy.deepcopy(plain), strict=True), plain


def fell_back(model):
    return [row.name for row in fastpetl.report(model).rows if "last original forward" in row.reason]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_adapters_with_norms(kind, train):
    patched, plain = pair(tiny_adapters(kind, norm_before=True, norm_after=True))
    assert_same(patched, plain, train=train)
    assert not fell_back(patched)


def test_attention_dropout_runs_in_torch():
    patched, plain = pair(tiny_adapters("vlbart", config={"attention_dropout": 0.4}))
    assert_same(patched, plain, train=True)
    assert_same(patched, plain)
    row = next(r for r in fastpetl.report(patched).rows if r.kind == "bart.attention")
    assert "attention dropout 0.4: attention runs in torch while training" in row.reason


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize(
    "config", [{"activation_function": "relu"}, {"activation_function": "gelu_new"}, {"scale_embedding": True}]
)
def test_other_configurations(kind, config):
    if kind == "t5":
        act = config.get("activation_function")
        config = {"feed_forward_proj": {"relu": "relu", "gelu_new": "gated-gelu"}.get(act, "gelu")}
    patched, plain = pair(text_model(kind, **config))
    assert_same(patched, plain)
    assert not fell_back(patched)


@pytest.mark.parametrize("kind", [*KINDS, *TEXT])
def test_generation(kind):
    plain = tiny_adapters(kind) if kind in KINDS else text_model(kind)
    patched, plain = pair(plain)
    given = arguments(plain)
    given.pop("labels")
    for options in ({"use_cache": False}, {}, {"num_beams": 3}, {"cache_implementation": "static"}):
        options = {"max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(patched.generate(**given, **options), plain.generate(**given, **options)), options
    assert not fell_back(patched)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_beside_the_logits(kind):
    patched, plain = pair(tiny_adapters(kind))
    for model in (patched, plain):
        model.set_attn_implementation("eager")
    got, want = (m(**arguments(m), output_attentions=True, output_hidden_states=True) for m in (patched, plain))
    for name in ("encoder_hidden_states", "decoder_hidden_states", *("encoder_attentions", "cross_attentions")):
        a, b = getattr(got, name), getattr(want, name)
        assert len(a) == len(b) > 0 and all(relative(x, y) <= 1e-5 for x, y in zip(a, b, strict=True)), name
    assert len(got.decoder_attentions) == 2
    if kind == "vlt5":
        for model in (patched, plain):
            model.set_attn_implementation("sdpa")
    assert relative(patched(**arguments(patched)).logits, plain(**arguments(plain)).logits) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    patched, plain = pair(tiny_adapters(kind))
    _, want = numbers(plain, train=True)
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        patched.enable_input_require_grads()
    with fastpetl.task(patched, "gqa"):
        patched.train().zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = patched(**arguments(patched)).loss
    with fastpetl.task(patched, "vqa"):  # the recomputed layers are those of the forward's task
        loss.backward()
    got = {name: p.grad for name, p in patched.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    scale = max(g.norm() for g in want.values())
    for name, grad in got.items():
        assert (grad - want[name]).norm() <= 1e-4 * want[name].norm() + 1e-6 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_changes(kind):
    model = tiny_adapters(kind)
    before, keys = everything(model), list(model.state_dict())
    names = [type(m).__name__ for m in model.modules() if "Controller" not in type(m).__name__]
    assert fastpetl.patch(model) is model and list(model.state_dict()) == keys
    assert [type(m).__name__ for m in model.modules() if "Controller" not in type(m).__name__] == names
    once = everything(model)
    assert everything(fastpetl.patch(model)) == once != before
    other = pickle.loads(pickle.dumps(model))
    want = model(**arguments(model)).logits
    assert torch.equal(other(**arguments(model)).logits, want)
    assert torch.equal(copy.deepcopy(model)(**arguments(model)).logits, want)
    model.generate(input_ids=arguments(model)["input_ids"], vis_feats=arguments(model)["vis_feats"], max_new_tokens=2)
    fastpetl.unpatch(model)
    assert everything(model) == before
    fastpetl.patch(model)
    fastpetl.detach(model)
    layer = model.model.encoder.layers[0] if kind == "vlbart" else model.encoder.block[0].layer[0].SelfAttention
    assert type(layer).__module__ == f"fastpetl.nn.{kind[2:]}"  # still patched, without adapters
    assert relative(model(**arguments(model)).logits, fastpetl.unpatch(model)(**arguments(model)).logits) <= 1e-5


def test_children_that_somebody_listens_to():
    patched, plain = pair(tiny_adapters("vlbart"))
    seen = []
    patched.model.encoder.layers[0].fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    patched.model.encoder.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: seen.append("q"))
    patched.model.encoder.layers[1].self_attn.register_forward_hook(lambda *_: seen.append("attention"))
    assert_same(patched, plain)
    assert seen == ["fc1", "q", "attention"]
    listened = [row.name for row in fastpetl.report(patched).rows if "has forward hooks" in row.reason]
    assert listened == ["model.encoder.layers.0", "model.encoder.layers.1.self_attn"]
    wrapped = tiny("vlbart")
    wrapped.model.decoder.layers[0].self_attn.q_proj = torch.nn.Sequential(
        wrapped.model.decoder.layers[0].self_attn.q_proj
    )
    fastpetl.patch(wrapped)
    row = next(r for r in fastpetl.report(wrapped).rows if r.name == "model.decoder.layers.0.self_attn")
    assert row.status == "declined" and "q_proj is torch.nn.modules.container.Sequential" in row.reason


def test_a_bias_missing_in_one_projection():
    model = tiny("vlbart")
    model.model.encoder.layers[0].self_attn.k_proj.bias = None
    fastpetl.patch(model)
    row = next(r for r in fastpetl.report(model).rows if r.name == "model.encoder.layers.0.self_attn")
    assert row.reason == "query, key and value differ in having a bias"


def test_a_norm_kept_in_fp32_says_so():
    plain = text_model("t5").bfloat16()
    plain.encoder.block[0].layer[0].layer_norm.float()
    patched = fastpetl.patch(copy.deepcopy(plain))
    x = torch.randn(2, 3, 32).bfloat16()
    norms = [m.encoder.block[0].layer[0].layer_norm for m in (patched, plain)]
    assert torch.equal(norms[0](x), norms[1](x))
    assert "weight has dtype torch.float32, the input torch.bfloat16" in str(fastpetl.report(patched))


def test_another_transformers(monkeypatch):
    from transformers.models.bart import modeling_bart

    def forward(self, hidden_states, layer_head_mask=None):
        pass

    monkeypatch.setattr(modeling_bart.BartEncoderLayer, "forward", forward)
    with pytest.raises(
        ValueError, match=r"has a BartEncoderLayer with forward\(hidden_states, layer_head_mask\), expected"
    ):
        fastpetl.patch(tiny("vlbart"), strict=True)


@pytest.mark.parametrize("where", ["self_attn", "ff_adapter"])
def test_what_a_hook_keeps_is_not_written_to(where):
    """In inference temporaries are reused: not those that somebody has seen."""
    plain = tiny_adapters("vlbart") if where == "ff_adapter" else text_model("bart")
    patched, kept = fastpetl.patch(copy.deepcopy(plain), backend="torch"), []
    for model in (patched, plain):
        layer = model.model.encoder.layers[0].get_submodule(where)
        layer.register_forward_hook(lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            model(**arguments(model))
    assert relative(*kept) <= 1e-5
