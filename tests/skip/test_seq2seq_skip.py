"""Skipping blocks of encoder-decoders: static plans, masks per sample, generation with and without cache and beams."""

import copy
import pickle

import pytest
import torch
import transformers as hf

import fastpetl
from fastpetl import skip
from fastpetl.patching import registry
from fastpetl.skip import policies
from vilt_tiny import everything, one_thread, relative  # noqa: F401
from vl_tiny import inputs, randomize, tiny, tiny_adapters

KINDS = ("bart", "t5", "vlbart", "vlt5")
MASK = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()  # two encoder layers, two decoder layers
TEXT = {"vocab_size": 60, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}


def build(kind, patch=False):
    if kind in ("vlbart", "vlt5"):
        model = tiny(kind)
    elif kind == "bart":
        sizes = {f"{p}_{name}": n for p in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))}
        heads = {f"{p}_attention_heads": 4 for p in ("encoder", "decoder")}
        config = hf.BartConfig(**TEXT, **sizes, **heads, max_position_embeddings=40, dropout=0.0, forced_eos_token_id=2)
        model = hf.BartForConditionalGeneration(config)
        model.generation_config.forced_eos_token_id = None
    else:
        config = hf.T5Config(**TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
        model = hf.T5ForConditionalGeneration(config)
    if kind in ("bart", "t5"):
        randomize(model)
    return fastpetl.patch(model.eval()) if patch else model.eval()


def given(kind, rows=slice(None), labels=True):
    data = inputs()
    if not kind.startswith("vl"):
        data.pop("vis_feats")
    if not labels:
        data.pop("labels")
    return {name: value[rows] for name, value in data.items()}


def logits(model, kind, mask=None, rows=slice(None), **options):
    with skip.skip(model, mask, **options):
        return model(**given(kind, rows), **({"use_cache": False} if options else {})).logits


@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_runs_its_own_blocks(kind, patch):
    model = build(kind, patch)
    before, want = everything(model), model(**given(kind)).logits
    for keep_all in ([False] * 4, [[False] * 4] * 3):
        assert torch.equal(logits(model, kind, keep_all), want)
    for b in range(3):
        full = logits(model, kind, MASK[b])
        assert not torch.allclose(full, want)
        assert torch.equal(logits(model, kind, MASK[b].expand(3, 4)), full)  # a uniform mask is the static plan
        assert relative(logits(model, kind, MASK)[b], full[b]) <= 1e-5
        assert relative(logits(model, kind, MASK, capacity=3)[b], full[b]) <= 1e-5
    assert everything(model) == before
    flipped = torch.cat([MASK[:1], ~MASK[1:]])
    got, other = logits(model, kind, MASK), logits(model, kind, flipped)
    assert relative(other[0], got[0]) <= 1e-6 and not torch.allclose(got[1:], other[1:])
    none = logits(model, kind, [True] * 4)
    assert torch.equal(logits(model, kind, [[True] * 4] * 3), none)


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_plan_is_the_model_without_the_layers(kind):
    """The library's own loop over fewer layers."""
    model = build(kind)
    shorter = copy.deepcopy(model)
    host = registry.family_of(shorter, "test")[1]
    for stack in (host.encoder, host.decoder):
        name = "block" if kind.endswith("t5") else "layers"
        setattr(stack, name, torch.nn.ModuleList([stack._modules[name][0]]))
    assert torch.equal(logits(model, kind, [False, True, False, True]), shorter(**given(kind)).logits)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_of_each_sample_alone(kind, beams, cache):
    model = build(kind, patch=beams == 1)
    options = {"num_beams": beams, "use_cache": cache, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    with skip.skip(model, MASK):
        got = model.generate(**given(kind, labels=False), **options)
    plain = model.generate(**given(kind, labels=False), **options)
    assert not torch.allclose(plain.scores[0], got.scores[0])
    for b in range(3):
        with skip.skip(model, MASK[b]):
            want = model.generate(**given(kind, slice(b, b + 1), labels=False), **options)
        assert torch.equal(got.sequences[b], want.sequences[0])
        for step, other in zip(got.scores, want.scores, strict=True):
            assert relative(step.view(3, -1)[b].clamp(min=-99), other.flatten().clamp(min=-99)) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache(kind):
    model = build(kind)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for mask in (MASK, [True, False, True, False]):
        with skip.skip(model, mask):
            want = model.generate(**given(kind, labels=False), **options)
            got = model.generate(
                **given(kind, labels=False), cache_implementation="static", disable_compile=True, **options
            )
        assert torch.equal(got, want)


def gradients(model, kind, mask, rows=slice(None)):
    model.zero_grad(set_to_none=True)
    with skip.skip(model, mask):
        out = model(**given(kind, rows)).logits
    (out * torch.randn(3, *out.shape[1:], generator=torch.Generator().manual_seed(2))[rows]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "recomputed", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_sum_of_the_samples(kind, reentrant):
    model = build(kind, patch=kind.startswith("vl")).train()
    alone = [gradients(model, kind, MASK[b], slice(b, b + 1)) for b in range(3)]
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, kind, MASK)  # the mask is gone when backward recomputes
    scale = max(g.norm() for g in got.values())
    for name, grad in got.items():
        want = sum(g[name] for g in alone if name in g)
        assert (grad - want).norm() <= 1e-4 * grad.norm() + 1e-5 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_runs_has_zero_gradients(kind):
    model = build(kind).train()
    every = {name for name, _ in model.named_parameters()} - {
        name for name, _ in model.named_parameters() if name not in gradients(model, kind, None)
    }
    got = gradients(model, kind, torch.tensor([[1, 0, 1, 0]] * 3).bool())
    assert got.keys() == every
    blocks = fastpetl.blocks(model)
    for i in (0, 2):
        own = [g for name, g in got.items() if name.startswith(f"{blocks[i].name}.") and "relative" not in name]
        assert own and not any(g.any() for g in own)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_pruning(kind, tmp_path):
    model = build(kind)
    blocks = fastpetl.blocks(model)
    assert [b.kind for b in blocks] == ["encoder"] * 2 + ["decoder"] * 2
    assert all(type(model.get_submodule(b.name)).__name__.endswith(("Layer", "Block")) for b in blocks)
    assert blocks[0].macs == blocks[1].macs < blocks[2].macs == blocks[3].macs
    for plan in ((0, 3), (0, 1, 2, 3)):
        pruned = build(kind)
        with skip.skip(pruned, fastpetl.SkipPlan(plan)):
            want = pruned(**given(kind)).logits
            tokens = pruned.generate(**given(kind, labels=False), num_beams=2, max_new_tokens=5)
        keys = pruned.state_dict().keys()
        fastpetl.prune(pruned, fastpetl.SkipPlan(plan))
        assert torch.equal(pruned(**given(kind)).logits, want)
        assert torch.equal(pruned.generate(**given(kind, labels=False), num_beams=2, max_new_tokens=5), tokens)
        left = pruned.state_dict().keys()
        assert left < keys and not any(blocks[plan[-1]].name in name and "relative" not in name for name in left)
        assert [b.macs == 0 for b in fastpetl.blocks(pruned)] == [i in plan for i in range(4)]
        again = pickle.loads(pickle.dumps(copy.deepcopy(pruned)))
        assert torch.equal(again(**given(kind)).logits, want)
        assert torch.equal(fastpetl.patch(again)(**given(kind)).logits.argmax(-1), want.argmax(-1))


def test_policies_decide_once_for_all_steps():
    model, asked = build("vlbart"), []

    def by_length(x, n_blocks):
        asked.append(tuple(x.shape))
        return MASK

    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    with skip.skip(model, by_length):
        got = model.generate(**given("vlbart", labels=False), **options)
    with skip.skip(model, MASK):
        assert torch.equal(got, model.generate(**given("vlbart", labels=False), **options))
    assert asked == [(3, 16, 32)]
    router = policies.Router(32, 4)
    torch.nn.init.normal_(router.gate.weight)
    with skip.skip(model, router):
        (model(**given("vlbart")).loss + router.penalty).backward()
    assert router.gate.weight.grad.any()


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_decoder_that_is_given_another_batch_than_the_encoder_had(kind):
    """What was decided is of a batch: it does not pass for that of another one, of whatever size."""
    model, asked = build(kind), []
    data = given(kind)
    encoded = {name: value for name, value in data.items() if name != "input_ids"}

    def first_keeps_all(x, n_blocks):
        asked.append(x)
        return (torch.arange(len(x)) % 2 == 1)[:, None].expand(-1, n_blocks)

    with torch.no_grad(), skip.skip(model, first_keeps_all):
        encode = model.get_encoder()
        want = model(**data).logits
        assert len(asked) == 1
        ours = encode(input_ids=data["input_ids"], attention_mask=data["attention_mask"])
        assert torch.equal(model(encoder_outputs=ours, **encoded).logits, want) and len(asked) == 2
        for others in (data["input_ids"][:1], data["input_ids"].flip(0), data["input_ids"].repeat(2, 1)):
            encode(input_ids=others)
            asked.clear()
            for _ in range(2):  # the second time it is known
                assert torch.equal(model(encoder_outputs=ours, **encoded).logits, want)
            assert len(asked) == 1 and torch.equal(asked[0], ours[0])
    with skip.skip(model, MASK):
        replica = model.get_encoder()._replicate_for_data_parallel()
        with pytest.raises(ValueError, match="skip: nn.DataParallel while samples skip blocks of their own, expected"):
            replica(input_ids=data["input_ids"])


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_router_does_not_see_padding(kind):
    model, router = build(kind), policies.Router(32, 4)
    torch.nn.init.normal_(router.gate.weight, std=2.0)
    data = given(kind, slice(2, 3))  # three of its tokens are padding
    short = {**data, "input_ids": data["input_ids"][:, :4], "attention_mask": data["attention_mask"][:, :4]}
    with skip.skip(model, router):
        assert relative(model(**given(kind)).logits[2:], model(**short).logits) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_in_one_pass(kind):
    model, sets = build(kind), torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    data = {**given(kind, labels=False), "decoder_input_ids": inputs()["labels"].clamp(min=3)}
    with skip.skip(model, policies.Candidates(sets)):
        got = model(**data, use_cache=False).logits.chunk(3)
    for row, part in zip(sets, got, strict=True):
        with skip.skip(model, row):
            assert relative(part, model(**data).logits) <= 1e-5
    with skip.skip(model, policies.Candidates(sets)), pytest.raises(ValueError, match="skip: Candidates with past_key"):
        model(**data, use_cache=True)


@pytest.mark.parametrize("kind", ["vlbart", "vlt5"])
@pytest.mark.parametrize("patch", [False, True])
def test_with_adapters_and_a_task_per_sample(kind, patch):
    model = tiny_adapters(kind, patch=patch)
    names = ["vqa", "nlvr", "gqa"]
    fastpetl.task(model, names)
    got = logits(model, kind, MASK)
    for b, name in enumerate(names):
        fastpetl.task(model, name)
        assert relative(got[b], logits(model, kind, MASK[b])[b]) <= 1e-5


def test_what_cannot_be():
    model = build("vlbart")
    with pytest.raises(ValueError, match="skip: shortcut is 'adapter', but the model has no shortcut adapters"):
        skip.skip(model, MASK, shortcut="adapter")
    with skip.skip(model, MASK), pytest.raises(ValueError, match="skip: output_hidden_states is True while samples"):
        model(**given("vlbart"), output_hidden_states=True)
    with skip.skip(model, MASK[:2]), pytest.raises(ValueError, match="skip: mask is .* expected a bool tensor"):
        model(**given("vlbart"))
    model.model.encoder.layerdrop = 0.1
    with skip.skip(model, MASK), pytest.raises(ValueError, match="skip: layerdrop is 0.1, expected 0"):
        model.train()(**given("vlbart"))
