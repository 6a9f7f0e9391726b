"""Encoder-decoders with shapes that do not depend on the mask, compiled and not; and pruned ones on disk."""

import pytest
import torch
import torch._dynamo.testing

import fastpetl
from fastpetl import skip
from fastpetl.skip import policies
from skip.test_seq2seq_skip import KINDS, MASK, build, given, gradients, logits
from vilt_tiny import one_thread, relative  # noqa: F401
from vl_tiny import TASKS, inputs, randomize, tiny, tiny_adapters

MASKS = (MASK, ~MASK, torch.zeros(3, 4).bool(), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 1, 1]]).bool())
STEPS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def first(mask, capacity):
    """The mask of those that run a block: the first `capacity` samples that keep it."""
    mask = mask.clone()
    for i in range(mask.shape[1]):
        mask[torch.nonzero(~mask[:, i])[capacity:, 0], i] = True
    return mask


@pytest.mark.parametrize("capacity", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_capacity_counts_samples(kind, capacity):
    """In the forward and in all steps of generation, a sample's beams with it, with and without cache."""
    model, want = build(kind, patch=capacity == 1), first(MASK, capacity)
    assert relative(logits(model, kind, MASK, capacity=capacity), logits(model, kind, want)) <= 1e-5
    data = given(kind, labels=False)
    for options in ({}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}):
        options = {**STEPS, **options, "disable_compile": True}
        with skip.skip(model, MASK, capacity=capacity):
            got = model.generate(**data, **options)
        with skip.skip(model, want):
            assert torch.equal(got, model.generate(**data, **options)), options


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_run_on_as_many_samples_as_the_capacity(kind):
    model, seen = build(kind), []
    for block in fastpetl.blocks(model):
        model.get_submodule(block.name).register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    logits(model, kind, MASK, capacity=1)
    assert seen == [1] * 4


@pytest.mark.parametrize("kind", ["vlbart", "vlt5"])
def test_capacity_with_a_task_per_sample(kind):
    model, names = tiny_adapters(kind), ["vqa", "nlvr", "gqa"]
    fastpetl.task(model, names)
    got = logits(model, kind, MASK, capacity=2)
    for b, name in enumerate(names):
        fastpetl.task(model, name)
        assert relative(got[b], logits(model, kind, first(MASK, 2)[b])[b]) <= 1e-5


FAST = (("vlbart", True, 2),)  # without a capacity: test_meter_skip.py
CASES = [(kind, patch, capacity) for kind in KINDS for patch in (False, True) for capacity in (None, 2)]


@pytest.mark.slow  # in make test: capacity in eager; compiled: test_meter_skip.py
@pytest.mark.parametrize(
    ("kind", "patch", "capacity"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_compiled_once_for_all_masks(kind, patch, capacity):
    """One graph, forward and backward, encoder and decoder, whatever the masks."""
    model = build(kind, patch).train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for mask in MASKS[:3]:
        set_to = policies.Masks(mask, capacity=capacity)
        want, got = gradients(model, kind, set_to), gradients(compiled, kind, set_to)
        got = {name.removeprefix("_orig_mod."): grad for name, grad in got.items()}
        scale = max(g.norm() for g in want.values())
        for name, grad in want.items():
            assert (got[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-5 * scale, name
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_compiled_steps_of_generation(kind):
    """Over a static cache: a graph for the first step and one for the others, whatever the masks."""
    model = build(kind)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    options = {**STEPS, "cache_implementation": "static", "disable_compile": True}
    compiled = torch.compile(model.forward, backend=counter)
    for mask in MASKS:
        with skip.skip(model, mask, capacity=2):
            want = model.generate(**given(kind, labels=False), **options)
            model.forward = compiled
            got = model.generate(**given(kind, labels=False), **options)
            del model.forward
        assert torch.equal(got, want)
    assert counter.frame_count == 2
    torch._dynamo.reset()


# --- pruned -----------------------------------------------------------------------------------------------------------

METHODS = {
    "adapter": fastpetl.AdapterConfig(tasks=TASKS, sharing="multiple", bottleneck=6),
    "compacter": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4),
    "hyperformer": fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6),
    "lora": fastpetl.LoRAConfig(tasks=TASKS, rank=3, alpha=3, dropout=0.0),
    "prompt": fastpetl.PromptConfig(tasks=TASKS, length=3, middle=10),
}


@pytest.mark.parametrize(
    ("kind", "method"), [("vlbart", name) for name in METHODS] + [("vlt5", name) for name in METHODS if name != "lora"]
)
def test_pruned_saved_and_loaded(kind, method, tmp_path):
    model, backbone = tiny(kind), tiny(kind)
    fastpetl.attach(model, METHODS[method])
    randomize(model, 0.2)
    fastpetl.task(model, "gqa")
    own = backbone.state_dict().keys()
    backbone.load_state_dict({name: value for name, value in model.state_dict().items() if name in own}, strict=False)
    plan = fastpetl.SkipPlan((0, 3))  # of T5 the first block's position bias stays
    with skip.skip(model, plan):
        want = model(**inputs()).logits
    keys = model.state_dict().keys()
    fastpetl.prune(model, plan)
    fastpetl.save(model, tmp_path)
    other = fastpetl.load(backbone, tmp_path)
    fastpetl.task(other, "gqa")
    assert skip.pruned(other) and skip.current(other) == fastpetl.SkipPlan((0, 3), "identity")
    assert other.state_dict().keys() == model.state_dict().keys() < keys
    assert relative(other(**inputs()).logits, want) <= 1e-5
    data = {name: value for name, value in inputs().items() if name != "labels"}
    assert torch.equal(other.generate(**data, **STEPS), model.generate(**data, **STEPS))
    gone = [name for name in other.state_dict() if "encoder.layers.0." in name or "encoder.block.0." in name]
    assert all("relative_attention_bias" in name for name in gone)
    again = fastpetl.load(other, tmp_path)  # into one that is pruned already
    assert relative(again(**inputs()).logits, want) <= 1e-5


def test_one_task_of_a_pruned_model(tmp_path):
    model = tiny_adapters("vlbart")
    whole = tiny_adapters("vlbart")
    fastpetl.prune(model, fastpetl.SkipPlan((1,)))
    fastpetl.save(model, tmp_path, task="gqa")
    alone = fastpetl.detach(tiny_adapters("vlbart"))
    fastpetl.task(fastpetl.load(alone, tmp_path), "gqa")
    assert skip.pruned(alone) and relative(alone(**inputs()).logits, model(**inputs()).logits) <= 1e-5
    with pytest.raises(ValueError, match="load: the files do not have .*layers.1"):
        fastpetl.load(whole, tmp_path, common="replace")
