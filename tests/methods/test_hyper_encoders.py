"""Hyperformer in BERT, RoBERTa, CLIP, ViLT and METER: an AdapterConfig's model whose adapters hold the weights that the
network is to make, written out here.
"""

import re

import pytest
import torch

import fastpetl
import hf_tiny
import vilt_tiny
from vilt_tiny import one_thread, randomize, relative  # noqa: F401

TASKS, FEATURES, BOTTLENECK = ("vqa", "gqa"), 5, 6
ORDER = ["feed_forward", "self_attention", "cross_attention"]
SITES = {"bert": 4, "decoder": 6, "roberta": 4, "clip_text": 4, "clip": 8, "vilt": 8, "meter": 12}


def build(backbone):
    if backbone == "vilt":
        return vilt_tiny.tiny_vilt()
    if backbone == "clip":
        return hf_tiny.clip()
    return hf_tiny.build(backbone)


def outputs(model, backbone):
    if backbone == "vilt":
        return vilt_tiny.run(model).logits
    given = {**hf_tiny.ids(), "pixel_values": hf_tiny.pixels()}
    out = model(**(given if backbone == "clip" else hf_tiny.FAMILIES[backbone][1](True)))
    return next(out[name] for name in ("logits", "logits_per_text", "last_hidden_state") if name in out)


def kind_of(name):
    if "crossattention" in name:
        return "cross_attention"
    return "self_attention" if "attention" in name or "self_attn" in name else "feed_forward"


def layer_of(name):
    """METER's image layers come after its two text layers."""
    return int(re.search(r"layers?\.(\d+)\.", name)[1]) + 2 * ("cross_modal_image" in name)


def weights(net, task, layer, kind, hidden):
    """(w_down, b_down, w_up, b_up) of the site."""
    parts = [net.embeddings.task_to_embeddings[task], net.layer_id_embeddings.weight[layer]]
    prefix = "" if net.unified else f"{kind}_"
    parts += [net.adapters_block_type.weight[ORDER.index(kind)]] if net.unified else []
    e = net.LayerNorm(net.task_hypernet.task_embeding_generator(torch.cat(parts)))
    made = []
    for side, shape in (("down", (BOTTLENECK, hidden)), ("up", (hidden, BOTTLENECK))):
        generator = getattr(net, f"{prefix}{side}_sampler_hyper_net")
        made += [generator.weight_generator(e).view(shape), generator.bias_generator(e)]
    return made


@pytest.mark.parametrize(
    ("backbone", "unified"), [*((backbone, False) for backbone in SITES), ("decoder", True), ("clip", True)]
)
def test_it_is_adapters_with_the_weights_the_network_makes(backbone, unified):
    config = {"tasks": TASKS, "bottleneck": BOTTLENECK}
    model = fastpetl.attach(
        build(backbone), fastpetl.HyperformerConfig(**config, features=FEATURES, unified=unified), patch=False
    )
    randomize(model)
    want = fastpetl.attach(build(backbone), fastpetl.AdapterConfig(**config, sharing="multiple"), patch=False)
    want.load_state_dict({n: v for n, v in model.state_dict().items() if n in want.state_dict()}, strict=False)
    nets = {n.rpartition(".")[0]: m for n, m in model.named_modules() if n.endswith("adapter_layers_hyper_net")}
    sites = [n for n, m in want.named_modules() if n.endswith("output_adapter")]
    assert len(nets) == 1 + (backbone == "clip") and len(sites) == SITES[backbone]
    with torch.no_grad():
        for name in sites:
            net = next(net for prefix, net in nets.items() if name.startswith(prefix))
            for task in TASKS:
                adapter = want.get_submodule(name).adapters[task]
                made = weights(net, task, layer_of(name), kind_of(name), adapter.down_sampler.in_features)
                for p, value in zip(adapter.weights(), made, strict=True):
                    p.copy_(value)
        found = {}
        for task in TASKS:
            for one in (want, model):
                fastpetl.task(one, task)
            found[task] = outputs(model, backbone)
            assert relative(found[task], outputs(want, backbone)) <= 2e-5
        assert relative(found["vqa"], found["gqa"]) > 1e-3


def test_how_many_train():
    """Two generators for each of BERT's two kinds of sublayer, none for the one it does not have."""
    model = hf_tiny.build("bert")
    plain = sum(p.numel() for p in model.parameters())
    fastpetl.attach(model, fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=BOTTLENECK, train_norms=False))
    added = sum(p.numel() for p in model.parameters()) - plain
    features, generator = 8, lambda outputs: (8 + 1) * outputs
    shared = 2 * 512 + 2 * 512 + (1024 + 1) * 128 + (128 + 1) * features + 2 * features
    site = generator(2 * 32 * BOTTLENECK + 32 + BOTTLENECK)
    assert added == shared + 2 * site
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == added
    assert not hasattr(model.adapter_layers_hyper_net, "cross_attention_up_sampler_hyper_net")
    alone = fastpetl.attach(hf_tiny.build("bert"), fastpetl.HyperformerConfig(tasks=("vqa",), bottleneck=BOTTLENECK))
    with torch.no_grad():
        unnamed = outputs(alone, "bert")
        fastpetl.task(alone, "vqa")
        assert torch.equal(outputs(alone, "bert"), unnamed)
    fastpetl.task(model, None)
    with pytest.raises(ValueError, match="HyperSite: task is None, expected one of vqa, gqa"):
        outputs(model, "bert")


def test_vilts_skipped_blocks_and_another_methods_prompts_beside_it():
    config = fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=BOTTLENECK, prompts={"length": 3, "middle": 10})
    model = fastpetl.attach(vilt_tiny.tiny_vilt(), config, patch=False)
    randomize(model)
    fastpetl.task(model, "gqa")
    with torch.no_grad(), fastpetl.skip(model, [False, True, False, False]):
        want = vilt_tiny.run(model).logits
        assert relative(vilt_tiny.run(fastpetl.patch(model)).logits, want) <= 1e-5
    with torch.no_grad():
        assert relative(vilt_tiny.run(model).logits, want) > 1e-3
