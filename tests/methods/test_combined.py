"""Prompts beside another method's modules: counts, the arithmetic by another way, files, and what is refused. That
patched is plain, tasks in one batch, generation and the way back: test_methods.py, test_task_set.py.
"""

from dataclasses import replace

import pytest
import torch

import fastpetl
import hf_tiny
from fastpetl import models
from fastpetl.methods import attached
from fastpetl.methods.original import config_of
from vilt_tiny import everything, one_thread, relative  # noqa: F401
from vl_tiny import KINDS, TASKS, inputs, randomize, tiny

PROMPTS = fastpetl.PromptConfig(length=3, middle=10, sharing="multiple")
CONFIG = fastpetl.AdapterConfig(tasks=TASKS, bottleneck=4, sharing="half", prompts=PROMPTS)


def built(kind, config=CONFIG):
    model = fastpetl.attach(tiny(kind), config)
    randomize(model, 0.3)
    return model


# vl_adapter.md 7: the adapters' rows and the prompts' 1,261,088 for each set of them
ADAPTERS = {"vlbart": ((6_081_600, 145_606_464), (19_430_400, 158_955_264)), "vlt5": ((10_480_512, 233_439_360),)}


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_the_sums_of_the_papers(kind):
    for sharing, (trainable, total) in zip(("single", "multiple"), ADAPTERS[kind], strict=False):
        for prompts, sets in (("single", 1), ("multiple", 4)):
            model_class, config_class = KINDS[kind]
            with torch.device("meta"):
                config = fastpetl.AdapterConfig(sharing=sharing, prompts=fastpetl.PromptConfig(sharing=prompts))
                counted = fastpetl.count(fastpetl.attach(model_class(config_class()), config, patch=False))
            more = sets * 1_261_088
            assert (counted.trainable, counted.total) == (trainable + more, total + more), (sharing, prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_is_what_either_trains(kind):
    flags = []
    for config in (replace(CONFIG, prompts=None), replace(PROMPTS, tasks=TASKS), CONFIG):
        model = fastpetl.attach(tiny(kind), config)
        flags.append({name for name, p in model.named_parameters() if p.requires_grad})
    assert flags[0] | flags[1] == flags[2] and flags[0] - flags[1] and flags[1] - flags[0]


def test_it_is_the_adapters_model_reading_longer_input():
    """VL-BART with adapters alone, the prompts computed here and put in front of its embeddings by a hook."""
    model = built("vlbart")
    plain = fastpetl.attach(tiny("vlbart"), replace(CONFIG, prompts=None), patch=False)
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if "prompt_modules" not in n})
    given = inputs()
    table, first, _, last = model.model.encoder.prompt_modules.prompts["nlvr"].prefix_embedding
    prompts = torch.tanh(table.weight @ first.weight.T + first.bias) @ last.weight.T + last.bias
    longer = lambda module, args: (torch.cat([prompts.expand(3, -1, -1), args[0]], 1),)  # noqa: E731
    plain.model.encoder.layernorm_embedding.register_forward_pre_hook(longer)
    ones = lambda n: torch.ones(3, n, dtype=torch.long)  # noqa: E731
    want = plain(**{**given, "attention_mask": torch.cat([ones(3), given["attention_mask"], ones(9)], 1)}, task="nlvr")
    got = model(**given, task="nlvr")
    assert relative(got.logits, want.logits) <= 1e-5 and relative(got.loss, want.loss) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_zeros_leave_the_prompts(kind):
    model = built(kind, replace(CONFIG, sharing="multiple"))
    alone = fastpetl.attach(tiny(kind), replace(PROMPTS, tasks=TASKS), patch=False)
    alone.load_state_dict({n: v for n, v in model.state_dict().items() if "_adapter" not in n})
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.zero_() if ".up_sampler." in name else None
    for task in TASKS:
        assert relative(model(**inputs(), task=task).logits, alone(**inputs(), task=task).logits) <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["adapter", "compacter", "hyperformer", "lora"])
def test_found_in_a_checkpoint_of_the_originals_names(kind, method):
    config = {
        "adapter": CONFIG,
        "compacter": fastpetl.CompacterConfig(tasks=TASKS, bottleneck=4, prompts=PROMPTS),
        "hyperformer": fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6, prompts=PROMPTS),
        "lora": fastpetl.LoRAConfig(tasks=TASKS, rank=3, prompts=PROMPTS),
    }[method]
    model = built(kind, config)
    found = config_of(model.state_dict())
    assert type(found) is type(config) and found.prompts == config.prompts and found.sharing == config.sharing
    again = models.__dict__[type(model).__name__].from_original(model.state_dict(), model.config)
    assert attached(again).config.prompts == config.prompts
    if method != "lora":  # of which a checkpoint does not say alpha
        assert relative(again(**inputs(), task="gqa").logits, model(**inputs(), task="gqa").logits) <= 2e-5


def test_the_files_say_it_in_json(tmp_path):
    model = built("vlbart")
    fastpetl.save(model, tmp_path)
    again = fastpetl.load(fastpetl.detach(built("vlbart")), tmp_path)
    assert attached(again).config == attached(model).config and attached(again).config.prompts.tasks == TASKS
    state = model.state_dict()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, state[name]) for name, p in again.named_parameters() if name in trained)


def test_what_is_refused(tmp_path):
    for make, message in (
        (lambda: fastpetl.AdapterConfig(prompts=3), "AdapterConfig: prompts is 3, expected a PromptConfig or None"),
        (
            lambda: fastpetl.LoRAConfig(prompts=fastpetl.PromptConfig(train_visual=False)),
            "LoRAConfig: prompts is .*train_visual=False.*, expected only tasks, sharing, length and middle in it",
        ),
        (lambda: fastpetl.PromptConfig(prompts=PROMPTS), "PromptConfig: prompts is given, expected None"),
        (lambda: fastpetl.BaselineConfig(prompts=PROMPTS), "BaselineConfig: prompts is given, expected None"),
        (lambda: fastpetl.AdapterConfig(prompts={"length": 0}), "PromptConfig: length is 0, expected an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    model = hf_tiny.build("decoder")
    before = everything(model)
    with pytest.raises(ValueError, match="attach: the BertModel is a decoder, expected an encoder for prompts"):
        fastpetl.attach(model, CONFIG)
    assert everything(model) == before
    lora = built("vlbart", fastpetl.LoRAConfig(tasks=("vqa",), rank=2, prompts=PROMPTS))
    with pytest.raises(ValueError, match="export_peft: prompts are attached beside the LoRA, expected none"):
        fastpetl.export_peft(lora, tmp_path)
