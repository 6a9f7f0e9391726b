"""The paper's integers: parameters and MACs of ViLT and DAS-ViLT, and the command that prints them."""

import pytest
import torch
from torch import nn
from transformers import ViltConfig, ViltForQuestionAnswering

import fastpetl
from fastpetl.count import main
from vilt_tiny import everything, inputs, one_thread, tiny_das  # noqa: F401

CONV, POOLER, HEAD = 3 * 32 * 32 * 768, 768 * 768, 768 * 1536 + 1536 * 3129


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        model = ViltForQuestionAnswering(ViltConfig(num_labels=3129))
        return fastpetl.attach(model, fastpetl.DASConfig(), patch=False).eval()


def full_size_macs(model, patches):
    """On the meta device nothing is computed, so the image comes embedded: the block part is what is counted."""
    embeds = torch.empty(1, 40 + 1 + patches, 768, device="meta")
    return fastpetl.count(model.vilt.encoder, (embeds,)).macs


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


def test_published_differences():
    """das.md 5.2: what skipping k blocks saves over plain ViLT, in GMAC to the digits printed there."""
    for tokens, saved in ((185, (-0.707, -2.069, -3.431, -4.793)), (281, (-1.116, -3.226, -5.336, -7.446))):
        block = 12 * 768**2 * tokens + 2 * 768 * tokens**2
        adapter = 2 * 768 * 192 * tokens
        for k, want in enumerate(saved, 1):
            assert round((12 * adapter - k * block) / 1e9, 3) == want


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


def test_aliases_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert fastpetl.count(nn.Sequential(first, second)).total == 16
    view = nn.Linear(4, 3, bias=False)
    view.weight = nn.Parameter(first.weight.detach()[1:])  # IRTR's rank_output is a view of the ITM head
    first.weight.requires_grad_(False)
    counted = fastpetl.count(nn.Sequential(first, view))
    assert (counted.total, counted.trainable) == (16, 12)


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


def test_command_line_of_the_methods(capsys):
    assert fastpetl.count.main(["vlbart", "--method", "compacter"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["compacter", "single", "143,395,104", "3,870,240", "2.70", "2.70"]
    assert printed[3].split() == ["compacter", "multiple", "150,109,824", "10,584,960", "7.05", "-"]
    assert fastpetl.count.main(["vlt5", "--method", "prompt"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[2:] == ["225,801,248", "2,842,400", "1.26", "-"]
    with pytest.raises(SystemExit):
        fastpetl.count.main(["vlbart", "--method", "x"])
    assert "--method is x, expected one of adapter, compacter" in capsys.readouterr().err


TABLE = {  # (trainable, total) at the paper's sizes; the originals' classes, counted
    ("vlbart", "adapter", "single"): (6_081_600, 145_606_464),
    ("vlbart", "adapter", "half"): (12_725_760, 152_250_624),
    ("vlbart", "adapter", "multiple"): (19_430_400, 158_955_264),
    ("vlbart", "hyperformer", "single"): (8_579_088, 148_103_952),
    ("vlbart", "hyperformer", "unified"): (4_708_592, 144_233_456),
    ("vlbart", "compacter", "single"): (3_870_240, 143_395_104),
    ("vlbart", "compacter", "multiple"): (10_584_960, 150_109_824),
    ("vlbart", "lora", "single"): (8_786_688, 148_234_752),
    ("vlbart", "lora", "multiple"): (30_020_352, 169_468_416),
    ("vlbart", "prompt", "single"): (2_843_936, 142_417_952),
    ("vlbart", "prompt", "multiple"): (6_627_200, 146_201_216),
    ("vlbart", "baseline", "all"): (141_156_864, 141_156_864),
    ("vlbart", "baseline", "visual"): (1_582_848, 141_156_864),
    ("vlbart", "baseline", "norms"): (1_632_000, 141_156_864),
    ("vlbart", "baseline", "biases"): (1_708_800, 141_156_864),
    ("vlbart", "video adapter", "single"): (4_901_952, 144_426_816),
    ("vlbart", "video lora", "single"): (7_607_040, 147_055_104),
    ("vlbart", "video prompt", "single"): (1_664_288, 141_238_304),
    ("vlt5", "adapter", "single"): (10_480_512, 233_439_360),
    ("vlt5", "adapter", "half"): (23_768_832, 246_727_680),
    ("vlt5", "adapter", "multiple"): (37_178_112, 260_136_960),
    ("vlt5", "hyperformer", "single"): (8_534_544, 231_493_392),
    ("vlt5", "compacter", "single"): (6_057_792, 229_016_640),
    ("vlt5", "compacter", "multiple"): (19_487_232, 242_446_080),
    ("vlt5", "prompt", "single"): (2_842_400, 225_801_248),
    ("vlt5", "prompt", "multiple"): (6_625_664, 229_584_512),
    ("vlt5", "baseline", "all"): (224_540_160, 224_540_160),
    ("vlt5", "baseline", "visual"): (1_581_312, 224_540_160),
}


@pytest.mark.parametrize("model", ["vlbart", "vlt5"])
def test_every_row_of_the_papers_table(model, capsys):
    """The command line prints each of them to the digit."""
    assert fastpetl.count.main([model]) == 0
    lines = [line.replace("video ", "video_").split() for line in capsys.readouterr().out.splitlines()[1:]]
    printed = {(model, line[0].replace("_", " "), line[1]): (line[3], line[2]) for line in lines}
    for row, (trainable, total) in TABLE.items():
        assert row[0] != model or printed[row] == (f"{trainable:,}", f"{total:,}"), row
    assert len(printed) == len(lines)
