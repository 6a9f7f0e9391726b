"""New weights are drawn as the original code draws them (spread, bounds, zeros), on VL-BART and VL-T5, which differ."""

import math
import re

import pytest
import torch

import fastpetl
from vl_tiny import KINDS, TASKS, tiny


def drawn(kind, config, pattern):
    """The new parameters whose name ends as `pattern` says, side by side."""
    model = tiny(kind)
    known = dict(model.named_parameters())
    fastpetl.attach(model, config)
    found = [p.detach().flatten() for n, p in model.named_parameters() if n not in known and re.search(pattern, n)]
    assert found, pattern
    return torch.cat(found)


def assert_normal(values, std):
    spread = 4 / math.sqrt(2 * values.numel())  # of the sample's, four of its standard deviations
    assert abs(values.std() / std - 1) <= spread and abs(values.mean()) <= 4 * std / math.sqrt(values.numel())
    assert values.numel() < 500 or values.abs().max() > 2 * std  # with tails


def assert_uniform(values, bound):
    assert values.abs().max() <= bound * (1 + 1e-6) and values.abs().max() > 0.8 * bound
    assert abs(values.std() / (bound / math.sqrt(3)) - 1) <= 4 / math.sqrt(values.numel())


def assert_linear(kind, config, name, inputs):
    """A Linear: BART draws each anew, N(0, 0.02) and zeros; T5 leaves them as torch makes them."""
    weights, biases = (drawn(kind, config, rf"{name}\.{leaf}$") for leaf in ("weight", "bias"))
    if kind == "vlbart":
        assert_normal(weights, 0.02)
        assert not biases.any()
    else:
        assert_uniform(weights, 1 / math.sqrt(inputs))
        assert_uniform(biases, 1 / math.sqrt(inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharing", ["single", "half", "multiple"])
def test_adapters(kind, sharing):
    config = fastpetl.AdapterConfig(tasks=TASKS, bottleneck=12, sharing=sharing, norm_before=True, norm_after=True)
    assert_linear(kind, config, "down_sampler", 32)
    assert_linear(kind, config, "up_sampler", 12)
    assert (drawn(kind, config, r"(pre|post)_layer_norm\.weight") == 1).all()
    assert not drawn(kind, config, r"(pre|post)_layer_norm\.bias").any()


def glorot(inputs, outputs):
    return math.sqrt(2) * math.sqrt(6 / (inputs + outputs))


@pytest.mark.parametrize("kind", KINDS)
def test_compacter(kind):
    full = fastpetl.CompacterConfig(tasks=TASKS, bottleneck=8, sharing="multiple")
    assert_uniform(drawn(kind, full, r"sampler\.W$"), glorot(16, 4))
    assert_normal(drawn(kind, full, r"phm_rule$"), 0.01)
    assert not drawn(kind, full, r"sampler\.b$").any()
    low = fastpetl.CompacterConfig(tasks=TASKS, bottleneck=8, rank=3, factorized_rule=True, init_range=0.5)
    assert_uniform(drawn(kind, low, r"down_sampler\.W_left$"), glorot(16, 3))
    assert_uniform(drawn(kind, low, r"down_sampler\.W_right$"), glorot(3, 4))
    assert_normal(drawn(kind, low, r"phm_rule_(left|right)$"), 0.5)
    lowrank = fastpetl.LowRankConfig(tasks=TASKS, bottleneck=8, rank=3)
    assert_uniform(drawn(kind, lowrank, r"up_sampler\.W_left$"), glorot(8, 3))
    assert_uniform(drawn(kind, lowrank, r"up_sampler\.W_right$"), glorot(3, 32))
    assert not drawn(kind, lowrank, r"sampler\.b$").any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unified", [False, True])
def test_hyperformer(kind, unified):
    config = fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=8, unified=unified)
    std, ids = (0.02, 0.02) if kind == "vlbart" else (0.01, 1.0)
    for part in (r"task_embeding_generator\.\d", r"weight_generator\.0", r"bias_generator\.0"):
        assert_normal(drawn(kind, config, rf"{part}\.weight$"), std)
        assert not drawn(kind, config, rf"{part}\.bias$").any()
    assert_normal(drawn(kind, config, r"layer_id_embeddings\.weight$"), ids)
    assert_normal(drawn(kind, config, r"task_to_embeddings\."), 1.0)
    if unified:
        assert_normal(drawn(kind, config, r"adapters_block_type\.weight$"), ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharing", ["single", "multiple"])
def test_lora_and_prompts(kind, sharing):
    lora = fastpetl.LoRAConfig(tasks=TASKS, rank=5, sharing=sharing)
    assert_uniform(drawn(kind, lora, r"lora_As\."), 1 / math.sqrt(32))
    assert not drawn(kind, lora, r"lora_Bs\.").any()
    prompt = fastpetl.PromptConfig(tasks=TASKS, length=30, middle=20, sharing=sharing)
    assert_normal(drawn(kind, prompt, r"prefix_embedding\.0\.weight$"), 0.02 if kind == "vlbart" else 1.0)
    assert_linear(kind, prompt, r"prefix_embedding\.1", 32)
    assert_linear(kind, prompt, r"prefix_embedding\.3", 20)
