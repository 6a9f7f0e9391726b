"""Every method under torch.autocast: fused, as near to float32 as unpatched, and float32 again when it has ended."""

import copy

import pytest
import torch

import fastpetl
from methods.test_methods import CASES, CONFIGS, TASKS, attached, fell_back, inputs, pair
from skip.skip_cases import MASK, batch
from vilt_tiny import one_thread, tiny_das  # noqa: F401

BF16 = torch.bfloat16


def run(model, data, **kwargs):
    """The output, and the gradients of what trains as one vector, by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    out = model(**data, **kwargs).logits
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (out.float() * cotangent).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def cast(model, data, **kwargs):
    with torch.autocast("cpu", BF16):
        return run(model, data, **kwargs)


def assert_as_near(patched, plain, data, **kwargs):
    """Patched is no further from float32 than twice unpatched, output and all gradients together."""
    eps = torch.finfo(BF16).eps
    got, want, truth = cast(patched, data, **kwargs), cast(plain, data, **kwargs), run(plain, data, **kwargs)
    assert got[0].dtype == want[0].dtype and got[1].keys() == want[1].keys() == truth[1].keys()
    assert all(got[1][key].dtype == want[1][key].dtype for key in got[1])
    flat = [torch.cat([grads[key].flatten() for key in sorted(grads)]) for _, grads in (got, want, truth)]
    for ours, theirs, exact in ((got[0], want[0], truth[0]), flat):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + eps * exact.norm()


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("train", [False, True])
def test_methods(kind, name, train):
    patched, plain = (model.train(train) for model in pair(kind, name))
    if name == "lora multiple":  # one draw of dropout is like no other
        patched, plain = patched.eval(), plain.eval()
    data = inputs()
    assert_as_near(patched, plain, data)
    assert not fell_back(patched)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_nothing_of_it_stays(kind, name):
    """What is kept of weights, merged, generated or cast, is of each mode's own dtype; an update is seen in both."""
    model = attached(kind, name, patch=True)
    generate = {key: value for key, value in inputs().items() if key != "labels"} | {"max_new_tokens": 4}

    def look():
        with torch.inference_mode():
            return model(**inputs()).logits, model.generate(**generate)

    def look_cast():
        with torch.autocast("cpu", BF16):
            return look()

    before, low = look(), look_cast()
    assert not torch.equal(low[0].float(), before[0])
    for want, how in ((before, look), (low, look_cast), (before, look)):
        assert all(torch.equal(*two) for two in zip(how(), want, strict=True))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    fresh = copy.deepcopy(model)
    for how in (look_cast, look):
        now = how()
        assert not torch.equal(now[0], (low if how is look_cast else before)[0])
        kept, model = model, fresh
        assert torch.equal(how()[0], now[0])
        model = kept


@pytest.mark.parametrize("name", [name for name in CONFIGS if "prompt" not in name])
def test_tasks_mixed(name):
    patched, plain = pair("vlbart", name)
    if name == "lora multiple":
        patched, plain = patched.eval(), plain.eval()
    data = inputs()
    mixed = [TASKS[2], TASKS[0], TASKS[2]]
    assert_as_near(patched, plain, data, task=mixed)


@pytest.mark.parametrize("shortcut", ["adapter", "identity"])
def test_samples_skip(shortcut):
    plain = tiny_das(shortcut=shortcut)
    patched = fastpetl.patch(copy.deepcopy(plain))
    mask = MASK[:, : len(fastpetl.blocks(plain))]
    for model in (plain, patched):
        fastpetl.skip(model, mask, shortcut=shortcut)
    assert_as_near(patched, plain, batch())
    assert not fell_back(patched)
    for model in (plain, patched):
        fastpetl.skip(model, mask[0], shortcut=shortcut)
    assert_as_near(patched, plain, batch())


def test_fp16_and_unpatch():
    """Autocast's other dtype; and `unpatch` frees what was kept."""
    from fastpetl.ops import _casts

    model = attached("vlbart", "compacter", patch=True).requires_grad_(False)
    with torch.autocast("cpu", torch.float16):
        low = model(**inputs()).logits
    held = [p for p in model.parameters() if p in _casts._KEPT]
    assert len(held) > 20
    exact = model(**inputs()).logits
    assert (low.float() - exact).norm() <= 2e-2 * exact.norm()
    fastpetl.unpatch(model)
    assert not any(p in _casts._KEPT for p in held)
