"""What a patched model's training step keeps for its backward: at most 0.7 of the unpatched model's bytes, the same
gradients. Models of few layers whose proportions are the real ones'; `python -m fastpetl bench models` has the sizes.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

import fastpetl
from fastpetl import backends
from fastpetl.bench import models as bench
from fastpetl.bench.workloads import spread
from vilt_tiny import relative

D, HEADS, FFN, BATCH, TEXT, IMAGE = 256, 4, 1024, 2, 20, 36
STILL = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
pytestmark = pytest.mark.skipif(
    not backends.verify("linear", "cpp", "cpu", torch.float32)[0], reason="needs the C++ kernels"
)


def vlbart(dropout=0.0):
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
             (("layers", 2), ("attention_heads", HEADS), ("ffn_dim", FFN))}  # fmt: skip
    still = {"dropout": dropout, "attention_dropout": dropout, "activation_dropout": 0.0}
    config = fastpetl.models.VLBartConfig(vocab_size=100, d_model=D, feat_dim=24, n_boxes=IMAGE, **sizes, **still)
    return fastpetl.models.VLBart(config)


def vlt5(dropout=0.0):
    sizes = {"d_kv": D // HEADS, "d_ff": FFN, "num_layers": 2, "num_heads": HEADS, "initializer_factor": 0.1}
    config = fastpetl.models.VLT5Config(
        vocab_size=100, d_model=D, feat_dim=24, n_boxes=IMAGE, dropout_rate=dropout, **sizes
    )
    return fastpetl.models.VLT5(config)


def answers(model):
    return {
        "input_ids": torch.randint(3, 90, (BATCH, TEXT)),
        "attention_mask": (torch.arange(TEXT) < TEXT - torch.arange(BATCH)[:, None]).long(),
        "vis_feats": torch.randn(BATCH, IMAGE, 24),
        "labels": torch.randint(3, 90, (BATCH, 5)),
    }


def meter():
    part = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    return fastpetl.models.MeterForQuestionAnswering(
        fastpetl.models.MeterConfig(**STILL, **{**part, "num_hidden_layers": 3}, intermediate_size=FFN, num_labels=7,
            max_text_length=TEXT, text_config={**part, "vocab_size": 100, "intermediate_size": FFN, **STILL},
            vision_config={**part, "image_size": 112})
    )  # fmt: skip


def questions(model):
    size = getattr(model.config, "vision_config", model.config).image_size
    return {
        "input_ids": torch.randint(3, 90, (BATCH, TEXT)),
        "attention_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
        "pixel_values": torch.randn(BATCH, 3, size, size),
        "labels": torch.rand(BATCH, 7),
    }


def vilt():
    from transformers import ViltConfig, ViltForQuestionAnswering

    return ViltForQuestionAnswering(ViltConfig(hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=FFN, image_size=96, patch_size=16, vocab_size=100, num_labels=7, **STILL))  # fmt: skip


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(hidden_size=D, num_hidden_layers=8, num_attention_heads=HEADS,
        intermediate_size=FFN, vocab_size=100, num_labels=7, **STILL))  # fmt: skip


def words(model):
    return {"input_ids": torch.randint(3, 90, (BATCH, 48)), "labels": torch.randint(0, 7, (BATCH,))}


VLADAPTER, DAS = fastpetl.AdapterConfig(bottleneck=32), fastpetl.DASConfig(bottleneck=32)
FAMILIES = {
    "vlbart": (vlbart, answers, VLADAPTER, 0.7),
    "vlt5": (vlt5, answers, VLADAPTER, 0.65),
    "meter": (meter, questions, DAS, 0.7),
    "vilt": (vilt, questions, DAS, 0.7),
    "bert": (bert, words, VLADAPTER, 0.72),  # its head and embeddings, which are kept by both, weigh more than really
}


def pair(family, monkeypatch, **options):
    """(plain, patched, batch) of the same weights; the first backend of each op, not this machine's choice."""
    monkeypatch.setenv("FASTPETL_TUNE", "0")
    make, inputs, config, _ = FAMILIES[family]
    model = make(**options)
    fastpetl.attach(model, config, patch=False)
    spread(model, ("q_proj.weight", "k_proj.weight", "Attention.q.weight", "Attention.k.weight"))
    return model, fastpetl.patch(copy.deepcopy(model)), inputs(model)


def gradients(model, batch):
    model.train().zero_grad()
    torch.manual_seed(1)
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def saved(model, batch):
    def forward(batch):
        torch.manual_seed(1)
        return model(**batch)

    return bench.saved_bytes(SimpleNamespace(model=model, batch=batch, forward=forward))


@pytest.mark.parametrize("family", FAMILIES)
def test_at_most_seven_tenths_are_kept(family, monkeypatch):
    plain, patched, batch = pair(family, monkeypatch)
    ratio = saved(patched, batch) / saved(plain, batch)
    assert ratio <= FAMILIES[family][-1]
    want, got = gradients(plain, batch), gradients(patched, batch)
    assert want.keys() == got.keys()
    for name, g in want.items():
        assert relative(got[name], g) <= 1e-5, name


@pytest.mark.parametrize("family", ["vlbart", "vlt5"])
def test_cross_attention_drops_as_unpatched(family, monkeypatch):
    """With dropout, in the attention too: the same draws, and still no keys and values."""
    plain, patched, batch = pair(family, monkeypatch, dropout=0.2)
    want, got = gradients(plain, batch), gradients(patched, batch)
    for name, g in want.items():
        assert relative(got[name], g) <= 1e-5, name
    assert saved(patched, batch) <= 0.85 * saved(plain, batch)


def test_keys_and_values_are_made_where_somebody_wants_them(monkeypatch):
    """A trained key projection gets its gradient, a cache its keys, a hook its call."""
    plain, patched, batch = pair("vlbart", monkeypatch)
    for model in (plain, patched):
        model.model.decoder.layers[0].encoder_attn.k_proj.bias.requires_grad_()
        model.model.decoder.layers[1].encoder_attn.v_proj.weight.requires_grad_()
    want, got = gradients(plain, batch), gradients(patched, batch)
    assert want.keys() == got.keys()
    key_bias = "model.decoder.layers.0.encoder_attn.k_proj.bias"
    assert want.pop(key_bias).abs().max() < 1e-6  # softmax does not see it
    for name, g in want.items():
        assert relative(got[name], g) <= 1e-5, name
    inputs = {k: v for k, v in batch.items() if k != "labels"} | {"decoder_input_ids": batch["labels"]}
    with torch.no_grad():
        outs = [model.eval()(**inputs, use_cache=True) for model in (plain, patched)]
    caches = [out.past_key_values.cross_attention_cache.layers[1].keys for out in outs]
    assert caches[0].shape == (BATCH, HEADS, TEXT + IMAGE, D // HEADS) and relative(caches[1], caches[0]) <= 1e-5
    heard = []
    patched.model.decoder.layers[1].encoder_attn.v_proj.register_forward_hook(lambda *a: heard.append(1))
    patched(**batch)
    assert heard


def test_a_hook_may_write_to_a_layers_output(monkeypatch):
    """What a site hands out is not kept where somebody listens."""
    plain, patched, batch = pair("meter", monkeypatch)
    for model in (plain, patched):
        for layer in model.meter.cross_modal_image_layers:
            layer.attention.output.register_forward_hook(lambda module, args, out: out.mul_(1.1))
    want, got = gradients(plain, batch), gradients(patched, batch)
    for name, g in want.items():
        assert relative(got[name], g) <= 1e-5, name
