"""Tasks mixed in a batch on patched models: one launch for all of them, forward and backward; what is kept is fresh."""

import copy

import pytest
import torch

import fastpetl
from fastpetl import ops
from fastpetl.methods.task_set import task_of
from methods import test_stale as stale
from vilt_tiny import one_thread, relative  # noqa: F401
from vl_tiny import TASKS, inputs, randomize, tiny, tiny_adapters

MIXED = ["nlvr", "vqa", "vqa"]
SITE = "multi_adapter_residual_norm"
SITES = {"vlbart": 10, "vlt5": 10}  # two encoder and two decoder layers, two and three each


@pytest.fixture
def launches(monkeypatch):
    """The calls of ops that adapt: (name, how many tasks each stack has, or all have)."""
    seen = []

    def counted(name):
        real = getattr(ops, name)

        def call(x, *args, **kwargs):
            tasks = [t.shape[0] for t in args[:4] if t is not None] if name == "multi_adapter" else []
            seen.append((name, *([len(args[1])] if name == SITE else tasks)))
            return real(x, *args, **kwargs)

        monkeypatch.setattr(ops, name, call)

    for name in ("adapter", "multi_adapter", "adapter_residual_norm", SITE, "hyper_adapter"):
        counted(name)
    return seen


def attached(kind, config):
    model = tiny(kind)
    fastpetl.attach(model, config, patch=False)
    randomize(model)
    return fastpetl.patch(model, strict=True)


CASES = {
    "multiple": (fastpetl.AdapterConfig(tasks=TASKS, sharing="multiple", bottleneck=6), [2, 2, 2, 2], [3, 3, 3, 3]),
    "half": (
        fastpetl.AdapterConfig(tasks=TASKS, sharing="half", bottleneck=6, norm_before=True, norm_after=True),
        [2, 2, 1, 1],
        [3, 3, 1, 1],
    ),
    "half down": (
        fastpetl.AdapterConfig(tasks=TASKS, sharing="half", shared="down", bottleneck=6),
        [1, 1, 2, 2],
        [1, 1, 3, 3],
    ),
    "compacter": (fastpetl.CompacterConfig(tasks=TASKS, sharing="multiple", bottleneck=4), [2] * 4, [3] * 4),
    "hyperformer": (fastpetl.HyperformerConfig(tasks=TASKS, bottleneck=6), [2] * 4, [3] * 4),
    "lora": (fastpetl.LoRAConfig(tasks=TASKS, rank=3, sharing="multiple", dropout=0.2), [2, 2], [3, 3]),
}


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("name", CASES)
def test_one_launch_for_all_tasks(kind, name, launches):
    """In training of the tasks that are in the batch, so that the others' get no gradient; else of all. Where a norm
    follows the adapter at once it is in the launch, of which nothing is kept: always of the tasks in the batch.
    """
    config, trained, kept = CASES[name]
    model = attached(kind, config)
    sites = 12 if name == "lora" else SITES[kind]
    whole = kind == "vlbart" and name in ("multiple", "half down", "compacter")
    model(**inputs(), task=MIXED).loss.backward()
    assert launches == [(SITE, 2) if whole else ("multi_adapter", *trained)] * sites
    names = dict(model.named_parameters(remove_duplicate=False))
    tasks = {}
    for key, p in names.items():
        tasks.setdefault(id(p), set()).add(task_of(key))
    own = {task for p in names.values() if p.grad is not None and len(tasks[id(p)]) == 1 for task in tasks[id(p)]}
    assert own - {None} == set(MIXED)
    launches.clear()
    with torch.no_grad():
        model(**inputs(), task=MIXED)
    assert launches == [(SITE, 2) if whole else ("multi_adapter", *kept)] * sites


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("name", CASES)
def test_training_is_plain_trainings(kind, name):
    """What LoRA drops included."""
    patched = attached(kind, CASES[name][0])
    plain, found = fastpetl.unpatch(copy.deepcopy(patched)), []
    for model in (plain, patched):
        torch.manual_seed(2)
        out = model.train()(**inputs(), task=MIXED)
        out.loss.backward()
        found.append((out.logits, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    (want, grads), (got, ours) = found
    assert relative(got, want) <= 2e-5 and grads.keys() == ours.keys()
    scale = max(g.norm() for g in grads.values())
    for key, grad in grads.items():
        assert (ours[key] - grad).norm() <= 2e-4 * grad.norm() + 1e-6 * scale, key


@pytest.mark.parametrize("config", [
    fastpetl.AdapterConfig(tasks=TASKS, bottleneck=6),
    fastpetl.LoRAConfig(tasks=TASKS, rank=3, dropout=0.0),
])  # fmt: skip
def test_tasks_that_share_everything_are_one(config, launches):
    model = attached("vlbart", config)
    want = model(**inputs(), task="vqa").logits
    alone = list(launches)
    launches.clear()
    assert torch.equal(model(**inputs(), task=MIXED).logits, want)
    assert launches == alone and not {"multi_adapter", SITE} & {name for name, *_ in launches}
    with pytest.raises(ValueError, match="task: 2 names are set for a batch of 3, expected one for each sample"):
        model(**inputs(), task=["vqa", "nlvr"])


def test_a_batch_of_one_task_is_that_task(launches):
    model = tiny_adapters("vlbart", patch=True)
    want = model(**inputs(), task="vqa").logits
    alone = list(launches)
    launches.clear()
    assert torch.equal(model(**inputs(), task=["vqa"] * 3).logits, want)
    assert launches == alone


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_backend_by_name(backend):
    plain = tiny_adapters("vlbart", sharing="half")
    patched = fastpetl.patch(copy.deepcopy(plain), backend=backend)
    want, got = (model(**inputs(), task=MIXED) for model in (plain, patched))
    assert relative(got.logits, want.logits) <= 1e-5
    for out in (want, got):
        out.loss.backward()
    ours = dict(patched.named_parameters())
    scale = max(p.grad.norm() for p in plain.parameters() if p.grad is not None)
    for key, p in plain.named_parameters():
        assert (p.grad is None) == (ours[key].grad is None), key
        if p.grad is not None:
            assert (ours[key].grad - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6 * scale, key


def test_an_adapter_that_must_be_called_is(launches):
    """The tasks then go one by one, the others' adapters fused."""
    model = tiny_adapters("vlbart", patch=True)
    controller, seen = model.model.encoder.layers[0].ff_adapter, []
    want = model(**inputs(), task=MIXED).logits
    launches.clear()
    controller.adapters["vqa"].register_forward_hook(lambda *_: seen.append(1))
    assert relative(model(**inputs(), task=MIXED).logits, want) <= 1e-5
    assert len(seen) == 1 and [name for name, *_ in launches].count(SITE) == SITES["vlbart"] - 1
    assert [name for name, *_ in launches].count("adapter") == 1
    assert any("adapters.vqa has forward hooks" in row.reason for row in fastpetl.report(model).rows)


def test_adapters_of_different_widths():
    model = tiny_adapters("vlbart", patch=True)
    controller = model.model.encoder.layers[0].ff_adapter
    controller.adapters["vqa"] = type(controller.adapters["vqa"])(32, 9)
    plain = fastpetl.unpatch(copy.deepcopy(model))
    assert relative(model(**inputs(), task=MIXED).logits, plain(**inputs(), task=MIXED).logits) <= 1e-5


@pytest.mark.slow  # in make test: the same in eager, and each op compiled
@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize("name", ["half", "compacter", "hyperformer", "lora"])
def test_compiled(name, one_launch, monkeypatch):
    """one_launch: what a GPU's graph is made of."""
    model = attached("vlbart", CASES[name][0]).eval()
    layer, x = model.model.encoder.layers[0], torch.randn(3, 5, 32)
    if one_launch:
        for module in ("adapter_controller", "hyperformer", "lora"):
            monkeypatch.setattr(f"fastpetl.nn.{module}.in_one_launch", lambda x: True)
    torch._dynamo.reset()
    compiled, found = torch.compile(layer, backend="aot_eager", fullgraph=True), []
    for run in (layer, compiled):
        model.zero_grad(set_to_none=True)
        y = run(x, task=tuple(MIXED))
        y.square().sum().backward()
        found.append((y, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    (want, grads), (got, ours) = found
    assert relative(got, want) <= 1e-5 and grads.keys() == ours.keys()
    scale = max(g.norm() for g in grads.values())
    for key, grad in grads.items():
        assert (ours[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, key


@pytest.mark.parametrize(("backbone", "name"), [
    *(("vlbart", name) for name in ("adapter", *stale.MADE)), ("vlt5", "adapter"), ("bert", "compacter"),
])  # fmt: skip
def test_never_stale(backbone, name):
    model = stale.built(backbone, name)
    mix = lambda: fastpetl.task(model, [*(tasks := fastpetl.methods.tasks.tasks(model)), tasks[0]])  # noqa: E731
    mix()
    before = stale.check(model, backbone)
    for way, change in stale.WAYS.items():
        stale.output(model, backbone)
        held = any(type(cache) is ops.WeightCache and len(cache) for cache in stale.caches(model))
        assert held != ((backbone, name) == ("vlbart", "adapter"))  # whose site reads the parameters themselves
        fastpetl.task(model, "gqa")
        change(model, backbone)
        mix()
        after = stale.check(model, backbone)
        assert relative(after, before) > (1e-5 if way == ".to() and back" else 1e-3), way
        before = after
    assert relative(before, stale.output(fastpetl.unpatch(model), backbone)) <= 5e-3
