"""Compacter, low-rank adapters, Hyperformer, LoRA and prompts: their counts, and patched against plain in all modes."""

import collections
import copy
import pickle

import pytest
import torch
from transformers import BartConfig, BartModel

import fastpetl
from fastpetl import models
from fastpetl.methods.task_set import task_of
from fastpetl.nn.lora import LoRALinear
from vilt_tiny import everything, one_thread, relative  # noqa: F401
from vl_tiny import KINDS, TASKS, inputs, randomize, tiny

CONFIGS = {
    "compacter": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4),
    "compacter multiple": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4, sharing="multiple", norm_before=True),
    "compacter half": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4, sharing="half", division=4),
    "compacter shared": fastpetl.CompacterConfig(
        tasks=TASKS, bottleneck=4, rank=1, shared_rule=True, factorized_rule=True
    ),
    "lowrank": fastpetl.LowRankConfig(tasks=TASKS, bottleneck=6, rank=2, sharing="multiple", norm_after=True),
    "hyperformer": fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6),
    "hyperformer unified": fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6, unified=True, cross_attention=False),
    "lora": fastpetl.LoRAConfig(tasks=TASKS, rank=3, alpha=3, dropout=0.0),
    "lora multiple": fastpetl.LoRAConfig(tasks=TASKS, rank=3, alpha=3, sharing="multiple", dropout=0.2),
    "prompt": fastpetl.PromptConfig(tasks=TASKS, length=3, middle=10),
    "prompt multiple": fastpetl.PromptConfig(tasks=TASKS, length=3, middle=10, sharing="multiple"),
    "adapter, prompts multiple": fastpetl.AdapterConfig(
        tasks=TASKS, bottleneck=4, prompts=fastpetl.PromptConfig(length=3, middle=10, sharing="multiple")
    ),
    "hyperformer, prompt": fastpetl.HyperformerConfig(
        tasks=TASKS, bottleneck=6, prompts=fastpetl.PromptConfig(length=2, middle=10)
    ),
    "lora multiple, prompt": fastpetl.LoRAConfig(
        tasks=TASKS, rank=3, alpha=3, sharing="multiple", dropout=0.0, prompts={"length": 2, "middle": 10}
    ),
}
CASES = [(kind, name) for kind in KINDS for name in CONFIGS]
PRIVATE = ("multiple", "hyperformer", "lowrank")  # of these every task has its own


def attached(kind, name, patch=False):
    model = tiny(kind)
    fastpetl.attach(model, CONFIGS[name], patch=False)
    randomize(model, 0.3)
    fastpetl.task(model, "gqa")
    return fastpetl.patch(model) if patch else model


def pair(kind, name):
    plain = attached(kind, name)
    return fastpetl.patch(copy.deepcopy(plain), strict=True), plain


def numbers(model, train=False, seed=1, **kwargs):
    model.train(train).zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(**inputs(dtype=model.dtype), **kwargs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    assert relative(got[0].logits, want[0].logits) <= 1e-5
    assert got[1].keys() == want[1].keys()
    scale = max(g.norm() for g in want[1].values())
    for name, grad in got[1].items():
        assert (grad - want[1][name]).norm() <= 1e-4 * want[1][name].norm() + 1e-6 * scale, name


def fell_back(model):
    return [row.name for row in fastpetl.report(model).rows if "last original forward" in row.reason]


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("train", [False, True])
def test_patched_is_plain(kind, name, train):
    patched, plain = pair(kind, name)
    assert_same(numbers(patched, train), numbers(plain, train))
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double().eval()(**inputs(dtype=torch.float64)).logits
        error = relative(plain.eval()(**inputs()).logits, exact)
        for _ in range(2):  # the second time from what was kept
            assert relative(patched.eval()(**inputs()).logits, exact) <= 2 * error + 5e-6
    assert not fell_back(patched)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_task_chooses(kind, name):
    model = attached(kind, name, patch=True)
    by_name = {task: model(**inputs(), task=task).logits for task in TASKS}
    for task in TASKS:
        with fastpetl.task(model, task):
            assert torch.equal(model(**inputs()).logits, by_name[task])
    private = any(word in name for word in PRIVATE) or name == "compacter half"
    assert (relative(by_name["vqa"], by_name["gqa"]) > 1e-4) == private
    with pytest.raises(ValueError, match="task: name is 'other', expected one of vqa, gqa, nlvr"):
        fastpetl.task(model, "other")
    fastpetl.task(model, None)
    if private:
        with pytest.raises(
            ValueError, match=r"task is None, expected one of vqa, gqa, nlvr: fastpetl.task\(model, name\)"
        ):
            model(**inputs())


def alone(model, mixed):
    """The loss's gradients where each sample is a batch by itself; and the samples' logits."""
    model.zero_grad(set_to_none=True)
    logits = []
    for b, task in enumerate(mixed):
        out = model(**{key: value[b : b + 1] for key, value in inputs(dtype=model.dtype).items()}, task=task)
        (out.loss / len(mixed)).backward()
        logits.append(out.logits)
    return torch.cat(logits), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("patch", [False, True])
def test_tasks_mixed_in_a_batch_are_each_by_itself(kind, name, patch):
    model, mixed = attached(kind, name, patch), ["nlvr", "vqa", "nlvr"]
    with fastpetl.task(model, mixed) as setting:
        assert setting == tuple(mixed) == fastpetl.methods.tasks.current_task(model)
        got, grads = numbers(model)
        beams = model.generate(**{k: v for k, v in inputs().items() if k != "labels"}, num_beams=2, max_new_tokens=4)
        with torch.inference_mode():
            kept = model(**inputs()).logits
    logits, want = alone(model, mixed)
    exact_logits, exact = alone(attached(kind, name).double(), mixed)
    for ours in (got.logits, kept):
        assert relative(ours, exact_logits) <= 2 * relative(logits, exact_logits) + 5e-6
    for b, task in enumerate(mixed):
        with fastpetl.task(model, task):
            one = {k: v[b : b + 1] for k, v in inputs().items() if k != "labels"}
            text = model.generate(**one, num_beams=2, max_new_tokens=4)[0]
        assert torch.equal(beams[b][: len(text)], text)
    assert grads.keys() == want.keys()  # gqa's own have none
    scale = max(g.norm() for g in exact.values())
    for key, grad in exact.items():
        error = (want[key] - grad).norm()
        assert (grads[key] - grad).norm() <= 2 * error + 1e-4 * grad.norm() + 1e-6 * scale, key
    assert not patch or not fell_back(model)


def test_mixed_tasks_must_fit():
    model = attached("vlbart", "compacter multiple")
    with pytest.raises(ValueError, match="task: name is 'x', expected one of vqa, gqa, nlvr"):
        fastpetl.task(model, ["vqa", "x"])
    with pytest.raises(ValueError, match="task: 2 names are set for a batch of 3, expected one for each sample"):
        model(**inputs(), task=["vqa", "gqa"])


BASELINES = {
    "all": 141_156_864,
    "visual": 1_582_848,
    "norms": 1_632_000,
    "biases": 1_582_848 - 768 * 4 + 125_952 + 3072,
}


@pytest.mark.parametrize("train", BASELINES)
def test_baselines(train):
    with torch.device("meta"):
        model = models.VLBart(models.VLBartConfig())
        fastpetl.attach(model, fastpetl.BaselineConfig(train=train))
    counted = fastpetl.count(model)
    assert (counted.trainable, counted.total) == (BASELINES[train], 141_156_864)
    fastpetl.detach(model)
    assert fastpetl.count(model).trainable == 141_156_864
    with pytest.raises(ValueError, match="BaselineConfig: train is 'half', expected one of all, visual, norms, biases"):
        fastpetl.BaselineConfig(train="half")


@pytest.mark.parametrize("name", [name for name in CONFIGS if "multiple" in name])
def test_other_tasks_get_no_gradient(name):
    model = attached("vlbart", name, patch=True)
    _, grads = numbers(model)
    every = list(model.named_parameters(remove_duplicate=False))
    names = collections.Counter(id(p) for _, p in every)
    own = {key: task_of(key) for key, p in every if task_of(key) is not None and names[id(p)] == 1}
    assert set(own.values()) == set(TASKS)
    assert {task for key, task in own.items() if key in grads} == {"gqa"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["compacter multiple", "hyperformer", "lora multiple", "prompt multiple"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_forwards_task(kind, name, reentrant):
    patched, plain = pair(kind, name)
    want = numbers(plain, True)
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        patched.enable_input_require_grads()
    patched.train().zero_grad(set_to_none=True)
    torch.manual_seed(1)
    out = patched(**inputs())
    with fastpetl.task(patched, "vqa"):
        out.loss.backward()
    got = {key: p.grad for key, p in patched.named_parameters() if p.grad is not None}
    if reentrant and name == "hyperformer":  # a reentrant checkpoint has no gradients for what is not its argument
        want = want[0], {key: want[1][key] for key in got}
    assert_same((out, got), want)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_generation(kind, name):
    patched, plain = pair(kind, name)
    given = {key: value for key, value in inputs().items() if key != "labels"}
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        options = {"max_new_tokens": 5, "do_sample": False, **options}
        assert torch.equal(patched.generate(**given, **options), plain.generate(**given, **options)), options


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_attach_and_detach_leave_the_backbone(kind, name):
    model = tiny(kind)
    before, state = everything(model), {k: v.clone() for k, v in model.state_dict().items()}
    fastpetl.attach(model, CONFIGS[name])
    with pytest.raises(ValueError, match="attach: model has adapters attached already"):
        fastpetl.attach(model, CONFIGS[name])
    other = pickle.loads(pickle.dumps(model))
    with fastpetl.task(model, "vqa"), fastpetl.task(other, "vqa"):
        assert relative(other(**inputs()).logits, model(**inputs()).logits) <= 1e-6
    fastpetl.detach(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert everything(model) == before


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_save_and_load(kind, name, tmp_path):
    model = attached(kind, name, patch=True)
    fastpetl.save(model, tmp_path)
    other = tiny(kind)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    own = other.state_dict()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    fastpetl.load(other, tmp_path)
    fastpetl.task(other, "gqa")
    assert {key for key, p in other.named_parameters() if p.requires_grad} == trained
    assert relative(other(**inputs()).logits, model(**inputs()).logits) <= 1e-6


# --- LoRA, by another way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch", [False, True])
def test_lora_is_the_merged_model_and_its_gradients_are_the_weights(kind, patch):
    """W + scale B A in a model without LoRA; dA = scale B^T dW, dB = scale dW A^T."""
    model = attached(kind, "lora multiple")
    merged = tiny(kind)
    own = merged.state_dict()
    merged.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    linears = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert len(linears) == 12 and all(m.scale == 1 for m in linears.values())
    with torch.no_grad():
        for name, linear in linears.items():
            merged.get_submodule(name).weight.add_(linear.lora_Bs["gqa"] @ linear.lora_As["gqa"], alpha=linear.scale)
    want, grads = numbers(merged)
    got, found = numbers(fastpetl.patch(model) if patch else model)
    assert relative(got.logits, want.logits) <= 1e-5
    for name, linear in linears.items():
        dw, a, b = grads[f"{name}.weight"], linear.lora_As["gqa"], linear.lora_Bs["gqa"]
        assert relative(found[f"{name}.lora_As.gqa"], linear.scale * b.t() @ dw) <= 1e-4, name
        assert relative(found[f"{name}.lora_Bs.gqa"], linear.scale * dw @ a.t()) <= 1e-4, name


def test_lora_starts_as_the_backbone():
    model = tiny("vlbart")
    want = model(**inputs()).logits
    fastpetl.attach(model, fastpetl.LoRAConfig(tasks=TASKS, rank=4))
    assert relative(model(**inputs()).logits, want) <= 1e-6
    assert all("bias" in n or "lora" in n or "visual" in n for n, p in model.named_parameters() if p.requires_grad)


# --- counts -----------------------------------------------------------------------------------------------------------

COUNTS = {  # vl_adapter.md 7: (trainable, total) at the papers' sizes
    ("vlbart", "compacter"): (fastpetl.CompacterConfig(), 3_870_240, 143_395_104),
    ("vlbart", "compacter multiple"): (fastpetl.CompacterConfig(sharing="multiple"), 10_584_960, 150_109_824),
    ("vlbart", "compacter defaults"): (
        fastpetl.CompacterConfig(division=4, reduction_factor=16, rank=1, shared_rule=True),
        1_705_504,
        141_230_368,
    ),
    ("vlbart", "hyperformer"): (fastpetl.HyperformerConfig(), 8_579_088, 148_103_952),
    ("vlbart", "hyperformer unified"): (fastpetl.HyperformerConfig(unified=True), 4_708_592, 144_233_456),
    ("vlbart", "lora"): (fastpetl.LoRAConfig(), 8_786_688, 148_234_752),
    ("vlbart", "lora multiple"): (fastpetl.LoRAConfig(sharing="multiple"), 30_020_352, 169_468_416),
    ("vlbart", "prompt"): (fastpetl.PromptConfig(), 2_843_936, 142_417_952),
    ("vlbart", "prompt multiple"): (fastpetl.PromptConfig(sharing="multiple"), 6_627_200, 146_201_216),
    ("vlt5", "compacter"): (fastpetl.CompacterConfig(), 6_057_792, 229_016_640),
    ("vlt5", "compacter multiple"): (fastpetl.CompacterConfig(sharing="multiple"), 19_487_232, 242_446_080),
    ("vlt5", "hyperformer"): (fastpetl.HyperformerConfig(), 8_534_544, 231_493_392),
    ("vlt5", "prompt"): (fastpetl.PromptConfig(), 2_842_400, 225_801_248),
    ("vlt5", "prompt multiple"): (fastpetl.PromptConfig(sharing="multiple"), 6_625_664, 229_584_512),
}


@pytest.mark.parametrize("case", COUNTS, ids="-".join)
def test_counts_are_the_papers(case):
    config, trainable, total = COUNTS[case]
    model_class, config_class = KINDS[case[0]]
    with torch.device("meta"):
        model = model_class(config_class())
        fastpetl.attach(model, config, patch=False)
    counted = fastpetl.count(model)
    assert (counted.trainable, counted.total) == (trainable, total)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: fastpetl.CompacterConfig(division=0), "CompacterConfig: division is 0, expected an integer >= 1"),
        (lambda: fastpetl.CompacterConfig(rank=True), "CompacterConfig: rank is True, expected an integer >= 1"),
        (lambda: fastpetl.CompacterConfig(shared_rule=1), "CompacterConfig: shared_rule is 1, expected True or False"),
        (lambda: fastpetl.CompacterConfig(init_range=-1), "CompacterConfig: init_range is -1, expected a number >= 0"),
        (lambda: fastpetl.LowRankConfig(rank=0), "LowRankConfig: rank is 0, expected an integer >= 1"),
        (lambda: fastpetl.HyperformerConfig(features=0), "HyperformerConfig: features is 0, expected an integer >= 1"),
        (lambda: fastpetl.HyperformerConfig(unified=2), "HyperformerConfig: unified is 2, expected True or False"),
        (lambda: fastpetl.HyperformerConfig(norm_after=True), "norm_after True, expected 'single', False and False"),
        (lambda: fastpetl.LoRAConfig(rank=0), "LoRAConfig: rank is 0, expected an integer >= 1"),
        (lambda: fastpetl.LoRAConfig(alpha="x"), "LoRAConfig: alpha is 'x', expected a number"),
        (lambda: fastpetl.LoRAConfig(dropout=1), r"LoRAConfig: dropout is 1, expected a number in \[0, 1\)"),
        (lambda: fastpetl.LoRAConfig(train_biases=None), "LoRAConfig: train_biases is None, expected True or False"),
        (lambda: fastpetl.LoRAConfig(sharing="half"), "LoRAConfig: sharing is 'half', expected 'single' or 'multiple'"),
        (lambda: fastpetl.PromptConfig(length=0), "PromptConfig: length is 0, expected an integer >= 1"),
        (lambda: fastpetl.PromptConfig(middle=1.5), "PromptConfig: middle is 1.5, expected an integer >= 1"),
        (lambda: fastpetl.PromptConfig(sharing="half"), "PromptConfig: sharing is 'half', expected 'single' or"),
        (
            lambda: fastpetl.attach(tiny("vlbart"), fastpetl.CompacterConfig(division=3)),
            "CompacterConfig: division is 3, expected a divisor of the hidden size 32",
        ),
        (
            lambda: fastpetl.attach(tiny("vlbart"), fastpetl.CompacterConfig(division=4, bottleneck=6)),
            "CompacterConfig: division is 4, expected a divisor of the bottleneck 6",
        ),
    ],
)
def test_errors(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_one_method_at_a_time():
    model = BartModel(
        BartConfig(
            vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64
        )
    )
    fastpetl.attach(model, fastpetl.LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="attach: model has adapters attached already"):
        fastpetl.attach(model, fastpetl.CompacterConfig())


def test_from_original_says_what_it_found():
    model = models.VLBart.from_original(attached("vlbart", "compacter shared").state_dict(), tiny("vlbart").config)
    found = fastpetl.methods.attached(model).config
    assert (found.rank, found.shared_rule, found.factorized_rule, found.division) == (1, True, True, 2)
