"""METER and DAS-METER compute what the original code did, load its checkpoints, and answer what a family is asked."""

import copy

import pytest
import torch

import fastpetl
from fastpetl import models, skip
from fastpetl.models._meter import resize_positions
from fastpetl.patching.meter import FAMILY
from meter_tiny import SKIPS, config, golden, golden_model, inputs, original_state, part, tiny

CASES = [("meter", 0), *(("das_meter", case) for case in SKIPS)]


@pytest.mark.parametrize("patch", [False, True], ids=["eager", "patched"])
@pytest.mark.parametrize(("kind", "case"), CASES)
def test_logits_and_gradients_are_the_originals(kind, case, patch):
    tensors, meta = golden(f"{kind}_case{case}")
    assert tuple(meta["skip"]) == SKIPS[case]
    model = golden_model(kind)
    want = FAMILY.from_original(part(tensors, "grad/"))
    if kind == "meter":  # recorded for these alone
        for name, p in model.named_parameters():
            p.requires_grad_(name in want)
    else:
        fastpetl.skip(model, fastpetl.SkipPlan(tuple(meta["skip"])))
    if patch:
        fastpetl.patch(model)
    logits = model(tensors["input/text_ids"], tensors["input/image"], tensors["input/text_masks"]).logits
    torch.testing.assert_close(logits, tensors["output/logits"], rtol=1e-5, atol=1e-5)
    (logits * tensors["cotangent/logits"]).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    scale = max(g.norm().item() for g in want.values())
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7 * scale, name


def test_gradients_of_a_text_that_is_padding_alone():
    """As by softmax, of which SDPA's backward loses how many keys there are where all are at the lowest number."""
    found = []
    for how in ("sdpa", "eager"):
        model = tiny(False)
        for module in model.meter.cross_modal_text_layers.modules():
            if hasattr(module, "config"):
                module.config = copy.deepcopy(module.config)
                module.config._attn_implementation = how
        given = inputs()
        given["attention_mask"][0] = 0
        model(**given).logits.square().sum().backward()
        found.append(model.meter.cross_modal_text_layers[0].attention.self.query.weight.grad)
    assert (found[0] - found[1]).norm() <= 1e-3 * found[1].norm()


def test_names_and_trainable_sets_are_the_originals():
    model = golden_model("das_meter")
    state = original_state("das_meter")
    assert model.state_dict().keys() == FAMILY.from_original(state).keys()
    trained = {
        name
        for name in state
        if any(p in name for p in ("classifier", "pooler", "token_type_embeddings", "rank_output", "adapter"))
        and not name.startswith(("text_transformer", "vit_model"))
    }
    want = FAMILY.from_original({name: state[name] for name in trained}).keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == want
    assert "meter.token4classifier" in want and "meter.token_type_embeddings.weight" in want


def test_parameters_of_the_papers_sizes():
    """das.md 3: METER with the VQA head at 384 pixels, less what is never used; DAS's trainable set."""
    unused = 768 * 768 + 768 + 77 * 512 + 2 * 512  # RoBERTa's pooler, CLIP's text side
    with torch.device("meta"):
        big = models.MeterConfig(num_labels=3129, vision_config={"image_size": 384})
        model = models.MeterForQuestionAnswering(big)
    assert fastpetl.count(model).total == 326_647_865 - unused
    fastpetl.attach(model, fastpetl.DASConfig(), patch=False)
    counted = fastpetl.count(model)
    assert (counted.trainable, counted.total) == (19_091_001, 337_382_969 - unused)


def test_macs_of_the_papers_sizes():
    """das.md 5.2: a text and an image layer at 384 pixels and 40 tokens; skipping 2 + 2 of DAS-METER saves 11.177 G."""
    with torch.device("meta"):
        model = models.MeterModel(models.MeterConfig(max_text_length=40, vision_config={"image_size": 384}))
    blocks = fastpetl.blocks(model)
    assert [b.kind for b in blocks] == ["text"] * 6 + ["image"] * 6
    assert [b.name for b in blocks[5:7]] == ["cross_modal_text_layers.5", "cross_modal_image_layers.0"]
    assert round(blocks[0].macs / 1e9, 4) == 1.0489 and round(blocks[6].macs / 1e9, 4) == 5.3586
    plain = sum(b.macs for b in blocks)
    fastpetl.attach(model, fastpetl.DASConfig(), patch=False)
    blocks = fastpetl.blocks(model)
    assert round((sum(b.macs for b in blocks) - plain) / 1e9, 3) == 1.638
    skipped = sum(b.shortcut_macs if b.index in (0, 1, 6, 7) else b.macs for b in blocks)
    assert round((skipped - plain) / 1e9, 3) == -11.177


def test_macs_are_those_of_a_forward():
    model = tiny()
    given = {**inputs(1), "attention_mask": None}
    everything = fastpetl.count(model, given).macs
    for block in fastpetl.blocks(model):
        with skip.skip(model, fastpetl.SkipPlan((block.index,))):
            saved = everything - fastpetl.count(model, given).macs
        assert saved == block.macs - block.shortcut_macs, block.name


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_from_original_reads_sizes_files_and_wrappers(tmp_path):
    state = original_state("das_meter")
    torch.save({"state_dict": {**state, "das_gate": torch.zeros(12), "skip_num": torch.ones(1)}}, tmp_path / "m.ckpt")
    model = models.MeterForQuestionAnswering.from_original(tmp_path / "m.ckpt")
    sizes = model.config
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.num_labels, sizes.intermediate_size) == (32, 6, 17, 128)
    assert (sizes.text_config.vocab_size, sizes.text_config.num_hidden_layers) == (60, 2)
    assert (sizes.vision_config.image_size, sizes.vision_config.num_hidden_layers) == (64, 2)
    assert fastpetl.methods.attached(model).config.skip_bottleneck == 20
    bare = models.MeterModel.from_original(state, config())
    given = inputs()
    want = golden_model("das_meter").meter(**given).pooler_output
    torch.testing.assert_close(bare(**given).pooler_output, want)


def test_from_original_without_extras():
    state = {n: v for n, v in original_state("das_meter").items() if "token4" not in n and "adapter_list" not in n}
    model = models.MeterModel.from_original(state, config())
    found = fastpetl.methods.attached(model).config
    assert (found.classifier_token, found.shortcut) == (False, "identity")
    assert "token4classifier" not in model._parameters


def test_another_image_size_resizes_the_positions():
    state = original_state("meter")
    positions = state["vit_model.visual.positional_embedding"]
    big = config()
    big.vision_config.image_size = 96
    model = models.MeterForQuestionAnswering.from_original(state, big)
    found = model.meter.vit_model.embeddings.position_embedding.weight
    image = positions[1:].T.reshape(1, 64, 4, 4)
    want = torch.nn.functional.interpolate(image, size=(6, 6), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(found, torch.cat([positions[:1], want]))
    assert resize_positions(positions, 4) is positions
    assert model(**{**inputs(), "pixel_values": torch.randn(2, 3, 96, 96)}).logits.shape == (2, 17)


def test_a_pretrained_checkpoint_gets_a_new_head():
    state = {n: v for n, v in original_state("meter").items() if "vqa" not in n}
    weight, bias = torch.randn(2, 64), torch.randn(2)
    state |= {"itm_score.fc.weight": weight, "itm_score.fc.bias": bias, "mlm_score.bias": torch.zeros(60)}
    assert models.MeterForQuestionAnswering.from_original(state, config()).classifier[3].out_features == 17
    ranking = models.MeterForImageAndTextRetrieval.from_original(state, config())
    torch.testing.assert_close(ranking.rank_output.weight, weight[1:])
    torch.testing.assert_close(ranking.rank_output.bias, bias[1:])


def test_from_original_refuses_others():
    with pytest.raises(
        ValueError, match=r"from_original: the state_dict has no vit_model\.visual\.positional_embedding"
    ):
        models.MeterModel.from_original({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"from_original: lm_head.weight is no parameter of METER, expected e\.g\."):
        FAMILY.from_original({"lm_head.weight": torch.zeros(1)})


def test_save_pretrained_round_trip(tmp_path):
    model = tiny(das=False)
    model.save_pretrained(tmp_path)
    again = models.MeterForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)
    assert again.config.vision_config.image_size == 64 and again.config.layer_norm_eps == 1e-12


def test_save_and_load_what_das_trained(tmp_path):
    model = tiny()
    fastpetl.skip(model, fastpetl.SkipPlan((2, 9)))
    want = model(**inputs()).logits
    fastpetl.save(model, tmp_path)
    backbone = golden_model("das_meter")
    fastpetl.detach(backbone)
    other = models.MeterForQuestionAnswering(config()).eval()
    frozen = {n: p for n, p in model.state_dict().items() if n in dict(other.named_parameters())}
    other.load_state_dict(frozen)
    fastpetl.load(other, tmp_path)
    torch.testing.assert_close(other(**inputs()).logits, want)


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_losses():
    model, given = tiny(das=False), inputs(4)
    soft = torch.rand(4, 17)
    out = model(**given, labels=soft)
    want = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, soft, reduction="sum") / 4
    torch.testing.assert_close(out.loss, want)
    out = model(**given, labels=torch.tensor([1, 2, 3, 16]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([1, 2, 3, 16])))
    ranking = models.MeterForImageAndTextRetrieval(config()).eval()
    out = ranking(**given, labels=torch.tensor([0, 1]))
    want = torch.nn.functional.cross_entropy(out.logits.view(2, 2), torch.tensor([0, 1]))
    torch.testing.assert_close(out.loss, want)


def test_two_images_have_their_own_modality():
    model = models.MeterForImagesAndTextClassification(config(type_vocab_size=3, num_labels=2)).eval()
    given = inputs()
    images = torch.randn(2, 2, 3, 64, 64)
    logits = model(**{**given, "pixel_values": images}, labels=torch.tensor([0, 1])).logits
    text = {n: v for n, v in given.items() if n != "pixel_values"}
    pooled = [model.meter(**text, pixel_values=images[:, i], image_token_type_idx=i + 1).pooler_output for i in (0, 1)]
    torch.testing.assert_close(logits, model.classifier(torch.cat(pooled, -1)))
    assert (model.meter(**text, pixel_values=images[:, 1]).pooler_output - pooled[1]).abs().max() > 1e-4


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="MeterModel: image_token_type_idx is 2, expected one of 1 .. 1"):
        tiny(das=False).meter(**inputs(), image_token_type_idx=2)
    with pytest.raises(ValueError, match="MeterForImagesAndTextClassification: type_vocab_size is 2, expected 3"):
        models.MeterForImagesAndTextClassification(config())
    pair = models.MeterForImagesAndTextClassification(config(type_vocab_size=3))
    with pytest.raises(ValueError, match=r"pixel_values has shape \(2, 3, 64, 64\), expected \(batch, 2, channels"):
        pair(**inputs())
    ranking = models.MeterForImageAndTextRetrieval(config())
    with pytest.raises(ValueError, match=r"labels has shape \(3,\) for 4 pairs, expected one per group"):
        ranking(**inputs(4), labels=torch.zeros(3, dtype=torch.long))
    narrow = config()
    narrow.text_config.hidden_size = 16
    model = models.MeterModel(narrow)
    with pytest.raises(ValueError, match=r"attach: the text encoder is 16 wide .* 32, expected the same, or DASConfig"):
        fastpetl.attach(model, fastpetl.DASConfig())
    assert fastpetl.methods.attached(model) is None and not FAMILY.is_attached(model)
    fastpetl.attach(model, fastpetl.DASConfig(classifier_token=False))
    fastpetl.detach(model)
    model.cross_modal_text_layers[3] = torch.nn.Identity()
    with pytest.raises(
        ValueError, match="attach: text layer 3 is torch.nn.modules.linear.Identity, expected fastpetl.nn"
    ):
        fastpetl.attach(model, fastpetl.DASConfig(classifier_token=False))


# --- skipping ---------------------------------------------------------------------------------------------------------


def masks(batch=5, seed=3):
    return torch.rand(batch, 12, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize("shortcut", ["adapter", "identity"])
def test_a_mask_per_sample_is_each_sample_alone(shortcut, capacity):
    model, given, mask = tiny(), inputs(5), masks()
    with fastpetl.skip(model, mask, shortcut=shortcut, capacity=capacity):
        got = model(**given).logits
    for b in range(5):
        alone = {name: value[b : b + 1] for name, value in given.items()}
        with fastpetl.skip(model, mask[b].tolist(), shortcut=shortcut):
            torch.testing.assert_close(got[b : b + 1], model(**alone).logits, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_mask_per_sample_are_the_sum_of_the_samples():
    model, given, mask = tiny(), inputs(4), masks(4)
    mask[:, 2], mask[:, 8] = True, False
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with fastpetl.skip(model, mask):
        model(**given).logits.square().sum().backward()
    got = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad(set_to_none=True)
    for b in range(4):
        with fastpetl.skip(model, mask[b].tolist()):
            model(**{n: v[b : b + 1] for n, v in given.items()}).logits.square().sum().backward()
    for name, p in trained.items():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5, msg=name)


def test_candidates_in_one_pass():
    model, given = tiny(), inputs(2)
    plans = [(0, 7), (1, 2, 10), (0, 6)]
    with fastpetl.skip(model, skip.policies.Candidates(torch.tensor([fastpetl.SkipPlan(p).mask(12) for p in plans]))):
        got = model(**given).logits
    for i, plan in enumerate(plans):
        with fastpetl.skip(model, fastpetl.SkipPlan(plan)):
            torch.testing.assert_close(got[2 * i : 2 * i + 2], model(**given).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", [False, True], ids=["eager", "patched"])
def test_candidates_share_what_they_have_in_common(patch):
    """Each distinct beginning once: a layer is run again only where an earlier choice, of either stream, differs."""
    model = fastpetl.patch(tiny()) if patch else tiny()
    plans = [(2, 9), (2, 10), (2, 10, 5), (8, 3)]
    sets = torch.tensor([fastpetl.SkipPlan(plan).mask(12) for plan in plans])
    seen = {}
    blocks = fastpetl.blocks(model)
    for block in blocks:
        layer = model.get_submodule(block.name)
        layer.register_forward_pre_hook(lambda m, args, i=block.index: seen.__setitem__(i, len(args[0])))
    given = inputs(3)
    with skip.skip(model, skip.policies.Candidates(sets)):
        logits = model(**given).logits
    want = {}
    for i in range(12):
        depth = i % 6
        beginnings = {(tuple(row[:depth].tolist()), tuple(row[6 : 6 + depth].tolist())) for row in sets if not row[i]}
        want[i] = 3 * len(beginnings)
    assert seen == want and sum(want.values()) < 3 * int((~sets).sum())
    for row, got in zip(sets, logits.chunk(4), strict=True):
        with skip.skip(model, row):
            torch.testing.assert_close(got, model(**given).logits, rtol=1e-5, atol=1e-5)


def test_policies():
    model = tiny().train()
    given = inputs(3)
    gates = torch.linspace(-1, 1, 12, dtype=torch.float64)
    router = skip.policies.Router(32, 12)
    with torch.no_grad():
        router.gate.weight.normal_(std=2.0)
    for policy in (
        skip.policies.RandomSkip(0.5),
        skip.policies.Bandit(gates, 5),
        router,
        lambda x, n: x.sum((1, 2))[:, None].expand(-1, n) > 0,
    ):
        with skip.skip(model, policy):
            model.zero_grad(set_to_none=True)
            model(**given).logits.square().sum().backward()
        adapters = [p for n, p in model.named_parameters() if "adapter" in n]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters)
    assert router.gate.weight.grad.any()
    model.eval()
    with skip.skip(model, skip.policies.Bandit(gates, 5)):
        got = model(**given).logits
    with skip.skip(model, fastpetl.SkipPlan((7, 8, 9, 10, 11))):
        torch.testing.assert_close(got, model(**given).logits)
    alone = {name: value[:1] for name, value in given.items()}  # its last four text tokens are padding
    short = {**alone, "input_ids": alone["input_ids"][:, :8], "attention_mask": alone["attention_mask"][:, :8]}
    with skip.skip(model, router):
        want = model(**short).logits
        torch.testing.assert_close(model(**given).logits[:1], want, rtol=1e-4, atol=1e-4)


def test_prune_drops_what_never_runs(tmp_path):
    model, given = tiny(), inputs()
    plan = fastpetl.SkipPlan((1, 4, 7))
    with fastpetl.skip(model, plan):
        want = model(**given).logits
    before = fastpetl.count(model).total
    fastpetl.prune(model, plan)
    torch.testing.assert_close(model(**given).logits, want)
    assert fastpetl.count(model).total < before and skip.pruned(model)
    assert isinstance(model.meter.cross_modal_image_layers[1], torch.nn.Identity)
    assert [b.macs == 0 for b in fastpetl.blocks(model)] == list(plan.mask(12))
    with pytest.raises(ValueError, match="detach: the model is pruned"):
        fastpetl.detach(model)


def test_detach_gives_the_backbone_back():
    model = tiny(das=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    fastpetl.attach(model, fastpetl.DASConfig())
    fastpetl.skip(model, fastpetl.SkipPlan((0,)))
    fastpetl.detach(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.state_dict().keys() == state.keys() and skip.current(model) is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
