"""A tiny random ViLT, its inputs, and the comparisons the tests of nn, patching, methods and skip share."""

import copy

import pytest
import torch
from transformers import ViltConfig, ViltForQuestionAnswering

import fastpetl

LAYERS, HIDDEN, LABELS, TEXT = 4, 32, 5, 12


@pytest.fixture(autouse=True)
def one_thread():
    """For tests that import it: on models this small threads wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_vilt(**config):
    """Weights of unit-ish scale, so that attention is not uniform and an error anywhere is seen in the logits."""
    torch.manual_seed(7)
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 50,
        "image_size": 64,
        "patch_size": 16,
        "max_position_embeddings": TEXT,
        "num_labels": LABELS,
    }
    model = ViltForQuestionAnswering(ViltConfig(**{**sizes, **config})).eval()
    randomize(model)
    return model


def randomize(model, std=0.15):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p) * std
            is_gain = p.dim() == 1 and "norm" in name.lower() and name.endswith("weight")
            p.copy_(noise + 1 if is_gain else noise)


def tiny_das(patch=False, shortcut="adapter", **config):
    """The same with DAS adapters that matter (random, not the small initial ones)."""
    model = tiny_vilt(**config)
    fastpetl.attach(model, fastpetl.DASConfig(bottleneck=6, skip_bottleneck=10, shortcut=shortcut), patch=False)
    randomize(model)
    return fastpetl.patch(model) if patch else model


def inputs(batch=2, padded=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    if padded:
        mask[-1, 7:] = 0
    return {
        "input_ids": torch.randint(0, 50, (batch, TEXT), generator=generator),
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, 3, 64, 64, generator=generator).to(dtype),
    }


def run(model, seed=1, **kwargs):
    """One forward. ViLT shuffles patches with the global generator, also in eval: seeded before each."""
    torch.manual_seed(seed)
    return model(**{**inputs(dtype=model.dtype), **kwargs})


def gradients(model, **kwargs):
    """Logits, and the gradient of every trainable parameter for a fixed cotangent."""
    model.zero_grad(set_to_none=True)
    logits = run(model, **kwargs).logits
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits)
    (logits * cotangent).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(got, want):
    return ((got - want).norm() / want.norm().clamp_min(1e-12)).item()


def assert_same_training(patched, plain, tolerance=1e-4, **kwargs):
    """Logits and every gradient agree to a relative tolerance, and the same parameters have one."""
    got, got_grads = gradients(patched, **kwargs)
    want, want_grads = gradients(plain, **kwargs)
    assert relative(got, want) <= tolerance
    assert got_grads.keys() == want_grads.keys()
    # A key's bias moves all scores of a query alike: its gradient is noise around 0, judged by the largest one.
    scale = max(g.norm().item() for g in want_grads.values())
    for name, grad in got_grads.items():
        error = (grad - want_grads[name]).norm().item()
        assert error <= tolerance * want_grads[name].norm().item() + 1e-6 * scale, name
    return want_grads


def pair(**kwargs):
    """(patched, plain), equal otherwise."""
    plain = tiny_das(**kwargs)
    return fastpetl.patch(copy.deepcopy(plain)), plain


def everything(model):
    """All that identifies a model: classes, instance dictionaries, parameter objects, state_dict keys."""
    return {
        name: (type(module), sorted(module.__dict__), [id(p) for p in module.parameters(recurse=False)])
        for name, module in model.named_modules()
    }
