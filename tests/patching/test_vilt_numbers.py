"""A patched ViLT gives the numbers of the unpatched one: inference, training, checkpointing, autocast, other dtypes."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastpetl
from vilt_tiny import assert_same_training, inputs, pair, relative, run, tiny_das, tiny_vilt


def test_training_of_adapters():
    patched, plain = pair()
    patched.train(), plain.train()
    found = assert_same_training(patched, plain)
    assert any("adapter0.down_proj" in name for name in found)
    assert any("text_embeddings.token_type_embeddings" in name for name in found)  # dx reaches the first layer's input


def test_full_fine_tuning():
    plain = tiny_vilt().train()
    patched = fastpetl.patch(copy.deepcopy(plain))
    names = set(assert_same_training(patched, plain))
    assert names == {name for name, p in plain.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    patched, plain = pair()
    for model in (patched, plain):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_training(patched, plain)
    assert not any("_fastpetl_packs" in module.__dict__ for module in patched.modules())
    reference = tiny_das().train()
    assert_same_training(patched, reference)


def test_dropout_draws_the_same_numbers():
    kwargs = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    patched, plain = pair(**kwargs)
    patched.train(), plain.train()
    assert_same_training(patched, plain)
    assert "attention dropout 0.3" in str(fastpetl.report(patched))


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_10", "silu", "gelu_python"])
def test_other_activations(activation):
    patched, plain = pair(hidden_act=activation)
    assert_same_training(patched, plain)
    assert "is not the exact GELU" in str(fastpetl.report(patched))


def test_without_query_key_value_biases():
    patched, plain = pair(qkv_bias=False)
    assert_same_training(patched, plain)


def test_output_attentions_and_hidden_states():
    patched, plain = pair()
    kwargs = {"output_attentions": True, "output_hidden_states": True}
    got, want = run(patched, **kwargs), run(plain, **kwargs)
    assert len(got.attentions) == len(want.attentions) and len(got.hidden_states) == len(want.hidden_states)
    for a, b in zip((*got.attentions, *got.hidden_states), (*want.attentions, *want.hidden_states), strict=True):
        assert a.shape == b.shape
        assert relative(a, b) <= 1e-4
    states = run(patched, output_hidden_states=True).hidden_states  # by the fused blocks
    for a, b in zip(states, want.hidden_states, strict=True):
        assert relative(a, b) <= 1e-4


def test_return_dict_false():
    patched, plain = pair()
    got, want = run(patched, return_dict=False), run(plain, return_dict=False)
    assert type(got) is type(want) is tuple and len(got) == len(want)
    assert relative(got[0], want[0]) <= 1e-4


@pytest.mark.parametrize("shape", ["none", "key", "expanded", "equal_rows", "full", "one_for_all"])
def test_masks_a_layer_may_get(shape):
    patched, plain = pair()
    x = torch.randn(2, 9, 32)
    low = torch.finfo(torch.float32).min
    key = torch.zeros(2, 1, 1, 9)
    key[1, ..., 5:] = low
    full = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), low)
    mask = {
        "none": None,
        "key": key,
        "expanded": key.expand(2, 1, 9, 9),
        "equal_rows": key.expand(2, 1, 9, 9).contiguous(),
        "full": full,
        "one_for_all": key[1:],
    }[shape]
    for part in ("layer.1", ""):
        got = patched.vilt.encoder.get_submodule(part)(x, mask)[0]
        want = plain.vilt.encoder.get_submodule(part)(x, mask)[0]
        assert relative(got, want) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    patched, plain = pair()
    exact = run(plain.double()).logits
    patched, plain = patched.to(dtype), copy.deepcopy(plain).to(dtype)
    got, want = (run(model).logits for model in (patched, plain))
    assert got.dtype is dtype
    ours, theirs = relative(got.double(), exact), relative(want.double(), exact)
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * 4
    if dtype is torch.float64:
        assert "fell back" in str(fastpetl.report(patched)) and "float64" in str(fastpetl.report(patched))


def test_losses_of_fifty_steps():
    patched, plain = pair()
    curves = []
    for model in (patched, plain):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        labels = torch.eye(5)[:2]
        curve = []
        for step in range(50):
            loss = run(model, seed=step, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[1][-1] < 0.9 * curves[1][0]
    assert relative(curves[0], curves[1]) <= 1e-3


def test_weights_changed_after_packing_are_seen():
    patched, plain = pair()
    with torch.no_grad():
        run(patched)
        for model in (patched, plain):
            model.vilt.encoder.layer[0].intermediate.dense.weight.mul_(1.5)
        assert relative(run(patched).logits, run(plain).logits) <= 1e-4
        state = {name: value * 1.1 for name, value in plain.state_dict().items()}
        patched.load_state_dict(state), plain.load_state_dict(state)
        assert relative(run(patched).logits, run(plain).logits) <= 1e-4
        patched.train()
        run(patched)
    assert not any("_fastpetl_packs" in module.__dict__ for module in patched.modules())


def test_torch_compile_of_the_encoder():
    """In one graph, forward and backward, compiled once for all batches and lengths."""
    patched, plain = pair(num_hidden_layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(patched.vilt.encoder, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch, tokens in ((2, 9), (3, 9), (4, 14)):
        x = torch.randn(batch, tokens, 32)
        mask = torch.zeros(batch, 1, 1, tokens)
        mask[-1, ..., 5:] = torch.finfo(torch.float32).min
        outputs = []
        for encoder in (compiled, plain.vilt.encoder):
            leaf = x.clone().requires_grad_()
            encoder.zero_grad()
            y = encoder(leaf, mask).last_hidden_state
            y.square().sum().backward()
            outputs.append((y.detach(), leaf.grad))
        for got, want in zip(*outputs, strict=True):
            assert relative(got, want) <= 1e-4
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1
    patched.zero_grad()
    compiled(x, mask).last_hidden_state.square().sum().backward()
    down = [m.vilt.encoder.layer[0].adapter0.down_proj.weight.grad for m in (patched, plain)]
    assert relative(*down) <= 1e-4


def test_torch_func():
    patched, plain = pair()
    layer, original = patched.vilt.encoder.layer[0], plain.vilt.encoder.layer[0]
    x = torch.randn(3, 2, 9, 32)
    got = torch.func.vmap(lambda v: layer(v)[0])(x)
    want = torch.stack([original(v)[0] for v in x])
    assert relative(got, want) <= 1e-4


def test_forward_mode():
    """Tangents go through the composed forward, as they do unpatched."""
    found = []
    for model in pair():
        with torch.autograd.forward_ad.dual_level():
            given = inputs()
            given["pixel_values"] = torch.autograd.forward_ad.make_dual(given["pixel_values"], given["pixel_values"])
            out = run(model, **given).logits
            found.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    assert relative(*found) <= 1e-4 and found[1].norm() > 0


def test_inference_mode_and_tracing():
    patched, plain = pair()
    with torch.inference_mode():
        for _ in range(2):
            assert relative(run(patched).logits, run(plain).logits) <= 1e-4
    layer, original = patched.vilt.encoder.layer[0].eval(), plain.vilt.encoder.layer[0]
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        assert relative(traced(2 * x)[0], original(2 * x)[0]) <= 1e-4
