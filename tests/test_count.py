"""The papers' integers: parameters and MACs of ViLT, METER and DAS on both, and the command that prints them."""

import copy

import pytest
import torch
from torch import nn
from transformers import ViltConfig, ViltForQuestionAnswering

import fastpetl
import vl_tiny
from fastpetl.count import main
from fastpetl.models import MeterConfig, MeterForQuestionAnswering
from vilt_tiny import everything, inputs, one_thread, tiny_das  # noqa: F401

CONV, POOLER, HEAD = 3 * 32 * 32 * 768, 768 * 768, 768 * 1536 + 1536 * 3129


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        model = ViltForQuestionAnswering(ViltConfig(num_labels=3129))
        return fastpetl.attach(model, fastpetl.DASConfig(), patch=False).eval()


def full_size_macs(model, patches):
    """On the meta device nothing is computed, so the image comes embedded: the block part is what is counted."""
    return fastpetl.count(model.vilt.encoder, (torch.empty(1, 40 + 1 + patches, 768, device="meta"),)).macs


def test_parameters(full_size):
    counted = fastpetl.count(full_size)
    assert (counted.total, counted.trainable, counted.macs) == (124_753_977, 13_752_633, 0)
    assert abs(counted.trainable_percent - 11.0238) < 1e-3
    detached = fastpetl.count(fastpetl.detach(full_size))
    fastpetl.attach(full_size, fastpetl.DASConfig(), patch=False)
    assert (detached.total, detached.trainable) == (117_588_537, 117_588_537)


@pytest.mark.parametrize(("patches", "tokens"), [(144, 185), (240, 281)])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 12])
def test_macs_of_the_blocks(full_size, patches, tokens, k):
    block = 12 * 768**2 * tokens + 2 * 768 * tokens**2
    adapters = 2 * 2 * 768 * 96 * tokens  # two of r=96 in a kept block cost what one of r=192 costs, twice over
    shortcut = 2 * 768 * 192 * tokens
    with fastpetl.skip(full_size, fastpetl.SkipPlan(tuple(range(k)))):
        macs = full_size_macs(full_size, patches)
        blocks = fastpetl.blocks(full_size)
    assert macs == (12 - k) * (block + adapters) + k * shortcut
    if tokens == 185:
        published = {0: 16_998_451_200, 1: 15_636_472_320, 4: 11_550_535_680}
        assert macs == published.get(k, macs)
        assert macs == sum(b.shortcut_macs if b.index < k else b.macs for b in blocks)


VILT = {  # side x side: (patches, G without adapters, adapters alone, skipping 1 .. 4 of DAS-ViLT, the same in percent)
    (384, 384): (144, 16.684, 0.655, (-0.707, -2.069, -3.431, -4.793), (-4.24, -12.40, -20.57, -28.73)),
    (384, 640): (240, 25.889, 0.994, (-1.116, -3.226, -5.336, -7.446), None),
}


@pytest.mark.parametrize("size", VILT)
def test_published_differences_of_vilt(full_size, size):
    """What skipping saves over plain ViLT, in GMAC to the digits published; the VQA head is not in the total."""
    patches, total, adapters, saved, percent = VILT[size]
    image = torch.empty(1, 3, *size, device="meta")
    embeddings = fastpetl.count(full_size.vilt.embeddings.patch_embeddings, (image,)).macs
    pooler = fastpetl.count(full_size.vilt.pooler, (torch.empty(1, 41 + patches, 768, device="meta"),)).macs
    assert (embeddings, pooler) == (patches * CONV, POOLER)
    bare = fastpetl.detach(full_size)
    plain = full_size_macs(bare, patches)
    fastpetl.attach(full_size, fastpetl.DASConfig(), patch=False)
    whole = plain + embeddings + pooler
    assert round(whole / 1e9, 3) == total
    for k in range(5):
        with fastpetl.skip(full_size, fastpetl.SkipPlan(tuple(range(k)))):
            difference = full_size_macs(full_size, patches) - plain
        assert round(difference / 1e9, 3) == (saved[k - 1] if k else adapters)
        if k and percent:
            assert round(100 * difference / whole, 2) == percent[k - 1]


def in_use(model, plan) -> int:
    """Parameters of the adapters that are left when what `plan` never runs is dropped."""
    fastpetl.prune(model, fastpetl.SkipPlan(plan))
    return sum(p.numel() for name, p in model.named_parameters() if "adapter" in name)


def adapters(model, part, norms=True) -> int:
    named = [(name, p) for name, p in model.named_parameters() if "adapter" in name and part in name]
    return sum(p.numel() for name, p in named if norms or "norm" not in name)


@pytest.mark.parametrize("k", range(13))
def test_adapters_in_use_of_vilt(full_size, k):
    assert adapters(full_size, "adapter_list") == 3_568_896
    assert adapters(full_size, ".layer.") == 12 * 299_712
    assert adapters(full_size, ".layer.", norms=False) == 3_559_680  # the paper's 3.56 M
    left = in_use(copy.deepcopy(full_size), tuple(range(k)))
    assert left == (12 - k) * 299_712 + k * 297_408
    assert left == {1: 3_594_240, 4: 3_587_328}.get(k, left)


# --- METER ------------------------------------------------------------------------------------------------------------


def full_size_meter(size, das=True):
    with torch.device("meta"):
        config = MeterConfig(num_labels=3129, max_text_length=40, vision_config={"image_size": size})
        model = MeterForQuestionAnswering(config).eval()
    return fastpetl.attach(model, fastpetl.DASConfig(), patch=False) if das else model


def run_meter(model) -> tuple[int, int]:
    """(MACs, by fvcore's convention) without the head, for one text of 40 tokens; the published numbers start at
    embedded text, whose layer norm is the only thing before it that either counts.
    """
    size = model.config.vision_config.image_size
    inputs = {"input_ids": torch.ones(1, 40, dtype=torch.long), "pixel_values": torch.empty(1, 3, size, size)}
    counted = fastpetl.count(model.meter, {name: value.to("meta") for name, value in inputs.items()})
    return counted.macs, counted.macs_fvcore - 5 * 40 * 768


@pytest.fixture(scope="module")
def meter_384():
    """DAS-METER at 384 pixels, and what it costs without adapters."""
    plain = run_meter(full_size_meter(384, das=False))
    return full_size_meter(384), plain


def test_macs_of_meter(meter_384):
    model, plain = meter_384
    assert plain == (93_125_125_632, 93_224_639_232)  # 93.125 G, 93.2246 G
    # fvcore saw 87.5700 G of it: the attentions of both towers are fused, which hid their products from it
    hidden = 11 * 2 * 577**2 * 768 + 12 * 2 * 40**2 * 768
    assert (round(hidden / 1e9, 4), round((plain[1] - hidden) / 1e9, 4)) == (5.6547, 87.5700)
    counted = fastpetl.count(
        model,
        {
            "input_ids": torch.ones(1, 40, dtype=torch.long, device="meta"),
            "pixel_values": torch.empty(1, 3, 384, 384, device="meta"),
        },
    )
    parts = {name: macs for name, _, _, macs in counted.parts}
    assert round(parts["meter.text_transformer"] / 1e9, 4) == 3.4269
    assert round((parts["meter.vit_model"] - 576 * 3 * 16 * 16 * 768) / 1e9, 4) == 50.5485
    assert sum(parts.values()) == counted.macs and sum(n for _, n, _, _ in counted.parts) == counted.total
    assert counted.macs == run_meter(model)[0] + 1536 * 1536 + 1536 * 3129


METER = {  # (text, image) layers skipped: (GMAC, by fvcore's convention, in percent of it)
    (0, 0): (1.638, 1.680, 1.80),
    (1, 1): (-4.770, -4.739, -5.08),
    (2, 2): (-11.177, -11.158, -11.97),
    (4, 0): (-2.558, -2.518, -2.70),
    (0, 4): (-19.797, -19.798, -21.24),
    (3, 1): (-6.868, -6.838, -7.34),
    (1, 3): (-15.487, -15.478, -16.60),
    (3, 3): (-17.585, -17.578, -18.86),
    (4, 4): (-23.992, -23.997, -25.74),
    (5, 5): (-30.400, -30.416, -32.63),
}


def differences(model, plain, text, image) -> tuple[float, float, float]:
    plan = fastpetl.SkipPlan((*range(text), *range(6, 6 + image)))
    with fastpetl.skip(model, plan):
        macs, fvcore = run_meter(model)
    difference = fvcore - plain[1]
    return round((macs - plain[0]) / 1e9, 3), round(difference / 1e9, 3), round(100 * difference / plain[1], 2)


@pytest.mark.parametrize(("text", "image"), METER)
def test_published_differences_of_meter(meter_384, text, image):
    """The paper's headline, -11.16 G or -11.97 % of METER, is two text and two image layers."""
    assert differences(*meter_384, text, image) == METER[text, image]


@pytest.mark.parametrize(("size", "saved", "percent"), [(288, -6.318, -11.95), (576, -27.137, -11.97)])
def test_the_headline_at_other_sizes(size, saved, percent):
    plain = run_meter(full_size_meter(size, das=False))
    assert differences(full_size_meter(size), plain, 2, 2)[1:] == (saved, percent)


@pytest.mark.parametrize("k", [0, 4, 12])
def test_adapters_in_use_of_meter(meter_384, k):
    model, _ = meter_384
    shortcuts, layers = adapters(model, "adapter_list"), adapters(model, "layers")
    assert (shortcuts, layers + shortcuts) == (5_339_520, 10_734_336)
    assert adapters(model, "layers", norms=False) == 5_339_520  # the paper's 5.34 M, twice the same number
    left = in_use(copy.deepcopy(model), tuple(range(k)))
    assert left == (12 - k) * 449_568 + k * 444_960 and (k != 4 or left == 5_376_384)


# --- any model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [False, True])
def test_a_whole_model_counts_the_same_patched(patch):
    model = tiny_das(patch=patch).train()
    fastpetl.skip(model, [False, True, False, False])
    before, state = everything(model), torch.get_rng_state()
    counted = fastpetl.count(model, inputs(batch=3))
    assert everything(model) == before and torch.equal(torch.get_rng_state(), state) and model.training
    blocks = fastpetl.blocks(model)
    stack = sum(b.shortcut_macs if b.index == 1 else b.macs for b in blocks)
    rest = 16 * (3 * 16 * 16) * 32 + 32 * 32 + 32 * 64 + 64 * 5
    assert counted.macs == 3 * (stack + rest)
    parts = {name: macs for name, _, _, macs in counted.parts}
    assert parts["vilt.encoder"] == 3 * stack and parts["classifier"] == 3 * (32 * 64 + 64 * 5)
    assert sum(parts.values()) == counted.macs
    assert sum(total for _, total, _, _ in counted.parts) == counted.total
    text = str(counted)
    assert "trainable" in text and f"{counted.total:,}" in text and len({len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("kind", ["vlbart", "vlt5"])
def test_macs_of_an_encoder_decoder(kind, patch):
    """What a skipped block saves is what it counts for, adapters included; by hand for a block of the encoder."""
    model = vl_tiny.tiny_adapters(kind, patch=patch)
    model.config.max_position_embeddings = target = 7  # the texts' length; nine boxes of one image beside it
    model.config.n_images = 1
    blocks, source = fastpetl.blocks(model), target + model.config.n_boxes
    given = {
        "input_ids": torch.ones(1, target, dtype=torch.long),
        "vis_feats": torch.zeros(1, 16, vl_tiny.FEATURES["feat_dim"]),
        "decoder_input_ids": torch.ones(1, target, dtype=torch.long),
        "use_cache": False,
    }
    whole = fastpetl.count(model, given)
    for block in blocks:
        with fastpetl.skip(model, fastpetl.SkipPlan((block.index,))):
            assert whole.macs - fastpetl.count(model, given).macs == block.macs, block.name
    adapter = 2 * 32 * 6
    assert blocks[0].macs == source * (4 * 32 * 32 + 2 * 32 * 64 + 2 * adapter) + 2 * 32 * source**2
    assert whole.macs_fvcore > whole.macs or kind == "vlt5"  # T5's norms are none of fvcore's


def test_aliases_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert fastpetl.count(nn.Sequential(first, second)).total == 16
    view = nn.Linear(4, 3, bias=False)
    view.weight = nn.Parameter(first.weight.detach()[1:])  # IRTR's rank_output is a view of the ITM head
    first.weight.requires_grad_(False)
    counted = fastpetl.count(nn.Sequential(first, view))
    assert (counted.total, counted.trainable) == (16, 12)


def test_fvcores_convention():
    """Its layer norms: 5 per element, 4 without weights; all else as it is."""
    norms = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False), nn.ReLU())
    counted = fastpetl.count(norms, torch.zeros(3, 7, 6))
    assert (counted.macs, counted.macs_fvcore) == (21 * 48, 21 * 48 + 9 * 21 * 8)
    assert f"{counted.macs_fvcore:,}" in str(counted).splitlines()[-1]
    assert fastpetl.count(norms).macs_fvcore == 0 and "fvcore" not in str(fastpetl.count(norms))


def test_inputs_and_errors():
    model = nn.Linear(3, 5)
    for given in (torch.zeros(2, 3), (torch.zeros(2, 3),), {"input": torch.zeros(2, 3)}):
        assert fastpetl.count(model, given).macs == 30
    with pytest.raises(TypeError, match="count: model is list, expected a torch.nn.Module"):
        fastpetl.count([])


def test_command_line(capsys, monkeypatch):
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    monkeypatch.setattr(transformers, "ViltConfig", lambda **kwargs: ViltConfig(**small, vocab_size=60, **kwargs))
    assert main(["vilt", "--image-size", "64", "96", "--skip", "1", "2", "--bottleneck", "8"]) == 0
    out = capsys.readouterr().out
    assert "64x96 pixels, 40 text tokens: 47 tokens" in out and "skipped blocks: 1, 2" in out and "classifier.3" in out
    with pytest.raises(SystemExit):
        main(["bert"])
    capsys.readouterr()


def test_command_line_for_meter(capsys):
    assert main(["meter", "--skip", "0", "1", "6", "7"]) == 0
    out = capsys.readouterr().out
    assert "METER, VQAv2 head, 384x384 pixels, 40 text tokens: 617 tokens" in out
    assert "skipped blocks: 0, 1, 6, 7" in out
    assert "against the plain model, MACs: -11,177,315,328 (-12.00 %)" in out
    assert "against the plain model, by fvcore's convention: -11,158,361,088 (-11.97 %)" in out
    for wrong, message in (
        (["--image-size", "384", "640"], "--image-size is 384 640, expected a square for meter"),
        (["--skip", "3", "12"], "--skip has 12, expected blocks 0 to 11"),
        (["--skip", "3", "3"], "--skip is 3 3, expected each block once"),
    ):
        with pytest.raises(SystemExit):
            main(["meter", *wrong])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("vilt --image-size 31 384", "--image-size is 31 384, expected 32 or more"),
        ("meter --text-tokens 0", "--text-tokens is 0, expected 1 or more"),
        ("vilt --bottleneck 0", "--bottleneck is 0, expected 1 or more"),
        ("meter --skip-bottleneck 0", "--skip-bottleneck is 0, expected 1 or more"),
        ("vilt --no-adapters --bottleneck 8", "--bottleneck is 8, expected none with --no-adapters"),
        ("vilt --method lora", "--method is for vlbart and vlt5, not for vilt"),
        ("vlbart --skip 0", "--skip is for vilt and meter, not for vlbart"),
        ("vlt5 --no-adapters", "--no-adapters is for vilt and meter, not for vlt5"),
    ],
)
def test_impossible_requests(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err
