"""The attached Hugging Face ViLT computes what the paper's own code did: logits and gradients of three skip sets."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import ViltConfig, ViltForQuestionAnswering

import fastpetl
from fastpetl.methods import load_original

GOLDEN = Path(__file__).parents[1] / "golden"


def read(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["meta"])


def model_with_original_weights():
    tensors, meta = read("das_vilt_weights")
    sizes = meta["config"]
    config = ViltConfig(
        hidden_size=sizes["hidden_size"],
        num_attention_heads=sizes["num_heads"],
        num_hidden_layers=12,
        intermediate_size=4 * sizes["hidden_size"],
        vocab_size=120,
        max_position_embeddings=12,
        image_size=64,
        patch_size=16,
        num_labels=17,
        layer_norm_eps=1e-6,
    )
    model = ViltForQuestionAnswering(config).eval()
    model.vilt.embeddings.text_embeddings.LayerNorm.eps = 1e-12  # the original has two eps, Hugging Face one
    das = fastpetl.DASConfig(bottleneck=sizes["adapter_bottleneck"], skip_bottleneck=sizes["skip_bottleneck"])
    fastpetl.attach(model, das, patch=False)
    weights = {name.removeprefix("param/"): value for name, value in tensors.items() if name.startswith("param/")}
    return load_original(model, weights)


@pytest.mark.parametrize("patch", [False, True], ids=["eager", "patched"])
@pytest.mark.parametrize("case", [0, 1, 2], ids=["keep_all", "skip_2_9", "skip_all"])
def test_logits_and_gradients(case, patch):
    tensors, meta = read(f"das_vilt_case{case}")
    model = model_with_original_weights()
    if patch:
        fastpetl.patch(model, strict=True)
    fastpetl.skip(model, fastpetl.SkipPlan(tuple(meta["skip"])))
    before_norm = []
    model.vilt.encoder.register_forward_hook(lambda module, args, output: before_norm.append(output.last_hidden_state))
    logits = model(
        input_ids=tensors["input/text_ids"],
        attention_mask=tensors["input/text_masks"],
        image_embeds=tensors["input/image_embeds"],
        pixel_mask=tensors["input/image_masks"],
    ).logits
    # a padded position's own state depends on the mask's minus infinity, which the two codes write differently
    valid = torch.cat([tensors["input/text_masks"], tensors["input/image_masks"]], 1).bool()
    want = tensors["output/before_final_norm"][valid]
    torch.testing.assert_close(before_norm[0][valid], want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    torch.testing.assert_close(logits, tensors["output/logits"], rtol=1e-4, atol=1e-5)

    (logits * tensors["cotangent/logits"]).sum().backward()
    golden = {name.removeprefix("grad/"): value for name, value in tensors.items() if name.startswith("grad/")}
    golden = model_family().from_original(golden)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == golden.keys()
    for name, want in golden.items():
        error = (gradients[name] - want).norm()
        assert error <= 1e-4 * want.norm() + 1e-6, f"{name}: {error:.2e} of {want.norm():.2e}"


def model_family():
    from fastpetl.patching.vilt import FAMILY

    return FAMILY


def test_trainable_names_are_the_papers():
    _, meta = read("das_vilt_weights")
    tensors, _ = read("das_vilt_case0")
    model = model_with_original_weights()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with_gradient = {name.removeprefix("grad/"): t for name, t in tensors.items() if name.startswith("grad/")}
    skipped_only = {name for name in trainable if "adapter_list" in name}
    assert trainable - skipped_only == set(model_family().from_original(with_gradient))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="from_original: transformer.blocks.0.gamma is no parameter of DAS-ViLT"):
        model_family().from_original({"transformer.blocks.0.gamma": torch.zeros(1)})
