"""The ops compute what the DAS authors' code computed: a whole DAS-ViLT forward and backward on recorded tensors."""

import contextlib
import pathlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastpetl import ops
from ops.op_cases import ADAPTER_BACKENDS, ATTENTION_BACKENDS, DEVICE, using

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
HEADS, BLOCKS = 4, 12


def tensors(name):
    return load_file(GOLDEN / f"das_vilt_{name}.safetensors", device=DEVICE)


def adapter(w, prefix, x, *others, backend):
    leaves = ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")
    norm_weight, norm_bias = (w[f"{prefix}.adapter_layer_norm_before.{leaf}"] for leaf in ("weight", "bias"))
    options = dict(norm_weight=norm_weight, norm_bias=norm_bias, residuals=(x, *others), backend=backend)
    return ops.adapter(x, *(w[f"{prefix}.{leaf}"] for leaf in leaves), **options)


def block(w, p, x, mask, names):
    """x + Attn(norm1(x)) + A0(x), then x + MLP(norm2(x)) + A1(x); every GEMM through fastpetl.ops."""
    norms = [(w[f"{p}.norm{i}.weight"], w[f"{p}.norm{i}.bias"], 1e-6) for i in (1, 2)]

    def linear(x, name, **prologue):
        return ops.linear(x, w[f"{p}.{name}.weight"], w[f"{p}.{name}.bias"], backend=names["linear"], **prologue)

    a = ops.attention(linear(x, "attn.qkv", norm=norms[0]), HEADS, key_mask=mask, backend=names["attention"])
    x = adapter(w, f"{p}.adapter0", x, linear(a, "attn.proj"), backend=names["adapter"])
    m = linear(linear(x, "mlp.fc1", norm=norms[1]), "mlp.fc2", activation="gelu")
    return adapter(w, f"{p}.adapter1", x, m, backend=names["adapter"])


def das_vilt(w, case, skip, names):
    modality = w["token_type_embeddings.weight"]
    x = torch.cat([case["input/text_embeds"] + modality[0], case["input/image_embeds"] + modality[1]], 1)
    keep = torch.cat([case["input/text_masks"], case["input/image_masks"]], 1)
    mask = torch.zeros(keep.shape).masked_fill(keep == 0, float("-inf"))
    for i in range(BLOCKS):
        if i in skip:
            x = adapter(w, f"adapter_list.{i}.0", x, backend=names(i)["adapter"])
        else:
            x = block(w, f"transformer.blocks.{i}", x, mask, names(i))
    cls = F.layer_norm(x, x.shape[-1:], w["transformer.norm.weight"], w["transformer.norm.bias"], 1e-6)[:, 0]
    pooled = torch.tanh(F.linear(cls, w["pooler.dense.weight"], w["pooler.dense.bias"]))
    h = F.linear(pooled, w["vqa_classifier.0.weight"], w["vqa_classifier.0.bias"])
    h = F.gelu(F.layer_norm(h, h.shape[-1:], w["vqa_classifier.1.weight"], w["vqa_classifier.1.bias"]))
    return x, F.linear(h, w["vqa_classifier.3.weight"], w["vqa_classifier.3.bias"])


# Every instruction set sees one case; the interpreter (50 ms a launch) serves one kept and one skipped block.
CASES = [(label, "case1", (2, 9)) for label in ADAPTER_BACKENDS] + [("reference", "case0", ()), ("auto", "case0", ())]


@pytest.mark.parametrize("label, case_name, skip", CASES)
def test_das_vilt(label, case_name, skip):
    case = tensors(case_name)
    w = {k.removeprefix("param/"): t for k, t in tensors("weights").items()}
    expected = {k.removeprefix("grad/"): t for k, t in case.items() if k.startswith("grad/")}
    expected.pop("text_embeddings.token_type_embeddings.weight")  # lies before the recorded embeddings
    assert len(expected) > 100
    for k in expected:
        w[k].requires_grad_()
    with contextlib.nullcontext("auto") if label == "auto" else using("adapter", label) as name:
        shared = name if label in ATTENTION_BACKENDS else "auto"
        names = dict(adapter=name, linear=shared, attention=shared)
        few = (8, 9) if label == "triton" else range(BLOCKS)
        x, logits = das_vilt(w, case, skip, lambda i: names if i in few else dict.fromkeys(names, "auto"))
        (logits * case["cotangent/logits"]).sum().backward()
    torch.testing.assert_close(x, case["output/before_final_norm"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, case["output/logits"], rtol=1e-5, atol=1e-5)
    for k, g in expected.items():
        atol = 1e-5 * g.abs().max().item() + 1e-7
        torch.testing.assert_close(w[k].grad, g, rtol=1e-4, atol=atol, msg=lambda m, k=k: f"{k}: {m}")
