"""Every family's patched model gives the numbers of the unpatched one: outputs and every gradient, in every mode."""

import copy
import functools

import pytest
import torch

import fastpetl
from patching.contract_cases import (
    CASES,
    NAMES,
    assert_close,
    block_call,
    both,
    cast,
    checkpointed,
    fell_back,
    flat,
    forget_fallbacks,
    numbers,
    plain,
    run,
)
from vilt_tiny import relative

AT_ONCE = ("vilt", "bert", "vlt5", "copied_bart")  # compiling takes longest: the others when slow tests run
COMPILED = [pytest.param(name, marks=() if name in AT_ONCE else pytest.mark.slow) for name in NAMES]
pair = functools.cache(both)  # for tests that only run them
MODES = {"eval": (False, 0.0), "train": (True, 0.0), "dropout": (True, 0.3)}
MASKED = [(name, padded) for name in NAMES for padded in (False, True) if CASES[name].masked or not padded]


def prepared(name, mode, trains="all"):
    """(patched, plain) in a mode of MODES. trains: all of it, or "few", norms and adapters, as PETL leaves it."""
    train, dropout = MODES[mode]
    models = pair(name, dropout)
    for model in models:
        forget_fallbacks(model.train(train))
        for key, p in model.named_parameters():
            p.requires_grad_(trains == "all" or any(part in key for part in ("adapter", "orm", "ln_")))
    return models


def expected_fallbacks(name, mode, padded):
    original = CASES[name].original
    return {original.get("mask") if padded else None, original.get("dropout") if mode == "dropout" else None} - {None}


def assert_only(reasons, expected):
    """Nothing ran the original forward, but for what the table of cases says."""
    assert bool(reasons) == bool(expected)
    assert all(any(why in reason for why in expected) for reason in reasons), reasons


@pytest.mark.parametrize("name", NAMES)
def test_what_is_fused(name):
    patched, _ = pair(name)
    rows = fastpetl.report(patched).rows
    assert {row.kind for row in rows} == CASES[name].kinds
    assert {row.status for row in rows} == {"patched"}


@pytest.mark.parametrize(("name", "padded"), MASKED)
def test_inference(name, padded):
    """Twice: the second time with packed weights."""
    patched, model = prepared(name, "eval")
    with torch.no_grad():
        want = run(name, model, padded)
        for _ in range(2):
            assert_close((run(name, patched, padded), {}), (want, {}))
    assert_only(fell_back(patched), expected_fallbacks(name, "eval", padded))


@pytest.mark.parametrize(("name", "padded"), MASKED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trains", ["all", "few"])
def test_outputs_and_gradients(name, padded, mode, trains):
    """With dropout too: torch's own draws in torch's own order, so that a seed means what it means unpatched."""
    patched, model = prepared(name, mode, trains)
    want = numbers(name, model, padded)
    assert any(not key.startswith("input") for key in want[1])
    assert_close(numbers(name, patched, padded), want)
    assert_only(fell_back(patched), expected_fallbacks(name, mode, padded))


@pytest.mark.parametrize("name", NAMES)
def test_dropout_drops(name):
    patched, _ = prepared(name, "dropout")
    with torch.no_grad():
        one, two = run(name, patched, seed=1), run(name, patched, seed=2)
        assert any(relative(a, b) > 1e-3 for a, b in zip(one, two, strict=True))


# --- other dtypes -----------------------------------------------------------------------------------------------------


def errors(found, truth):
    """(distance of the outputs from the truth, of each gradient)."""
    outs = [(a.double() - b).norm() for a, b in zip(found[0], truth[0], strict=True)]
    assert found[1].keys() == truth[1].keys()
    return torch.stack(outs).norm(), {key: (grad.double() - truth[1][key]).norm() for key, grad in found[1].items()}


def moved(models, generator):
    """Both models' weights a little elsewhere, by the same draws."""
    with torch.no_grad():
        for ps in zip(*(model.parameters() for model in models), strict=True):
            step = 0.02 * ps[0].std(correction=0) * torch.randn(ps[0].shape, generator=generator)
            for p in ps:
                p.add_(step)


@pytest.mark.parametrize(("name", "padded"), MASKED)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_bfloat16_by_the_rule_of_two(name, padded, mode):
    """A pre-activation of a ReLU that rounds to the other side of zero moves gradients by more than all other rounding
    does, in either model. So each gradient is held to the rule in the best of some draws of the weights (a wrong kernel
    is wrong in all of them), the outputs in every one.
    """
    models, generator = [copy.deepcopy(model) for model in prepared(name, mode)], torch.Generator().manual_seed(0)
    left = None
    for _ in range(8):
        truth = numbers(name, cast(name, models[1], CASES[name].exact), padded)
        got, want = ((numbers(name, low, padded), low) for low in (cast(name, m, torch.bfloat16) for m in models))
        assert [t.dtype for t in got[0][0]] == [t.dtype for t in want[0][0]]
        assert_only(fell_back(got[1]), expected_fallbacks(name, mode, padded))
        ours, theirs = errors(got[0], truth), errors(want[0], truth)
        assert ours[0] <= 2 * theirs[0] + 1e-6
        eps, scale = torch.finfo(torch.bfloat16).eps, max(g.norm() for g in truth[1].values())
        wrong = {k for k, e in ours[1].items() if e > 2 * theirs[1][k] + eps / 2 * (truth[1][k].norm() + scale)}
        left = wrong if left is None else left & wrong
        if not left:
            return
        moved(models, generator)
    raise AssertionError(f"further than twice as far from float64 as torch in all draws: {sorted(left)}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_half_and_double(name, dtype):
    models = [cast(name, model, dtype) for model in prepared(name, "eval")]
    with torch.no_grad():
        got, want = (run(name, model) for model in models)
        truth = run(name, cast(name, prepared(name, "eval")[1], CASES[name].exact))
    assert [t.dtype for t in got] == [t.dtype for t in want]
    ours, theirs = (torch.stack([(a.double() - b).norm() for a, b in zip(x, truth, strict=True)]) for x in (got, want))
    eps = torch.finfo(dtype).eps if dtype == torch.float16 else 1e-7  # RMS norms compute in fp32 whatever they get
    assert (ours <= 2 * theirs + 4 * eps * torch.stack([t.norm() for t in truth])).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [False, True])
def test_autocast(name, train):
    """Fused as ever: the same dtypes come out, and they are as near to fp32 as unpatched."""
    models = prepared(name, "train" if train else "eval")
    truth = numbers(name, models[1])
    autocast = lambda model: torch.autocast("cpu", torch.bfloat16)(model.forward)  # noqa: E731
    got, want = (numbers(name, model, call=autocast(model)) for model in models)
    assert [t.dtype for t in got[0]] == [t.dtype for t in want[0]]
    assert_only(fell_back(models[0]), expected_fallbacks(name, "train", None))
    eps = torch.finfo(torch.bfloat16).eps
    for a, b, c in zip(got[0], want[0], truth[0], strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + eps * c.norm()
    assert got[1].keys() == want[1].keys()
    flat = lambda grads: torch.cat([grads[key].flatten() for key in sorted(truth[1])])  # noqa: E731
    exact = flat(truth[1])
    assert (flat(got[1]) - exact).norm() <= 2 * (flat(want[1]) - exact).norm() + eps * exact.norm()


# --- other ways to run it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    """The recomputed forward is the first one, dropout included."""
    patched, model = both(name, 0.3)
    for one in (patched, model):
        checkpointed(name, one.train(), reentrant)
        if reentrant and hasattr(one, "enable_input_require_grads"):
            one.enable_input_require_grads()
    fastpetl.backends.forget()  # measured inside a checkpoint: what is found must hold for the recomputation
    got, want = numbers(name, patched), numbers(name, model)
    assert_close(got, want)
    if not reentrant:
        want = numbers(name, plain(name, 0.3).train())
        assert_close((got[0], dict(zip(want[1], got[1].values(), strict=True))), want)  # layers have other names


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].maps])
def test_maps_and_states_that_are_asked_for(name):
    patched, model = both(name)
    for one in (patched, model):
        one.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    got, want, less = run(name, patched, **asked), run(name, model, **asked), run(name, model)
    assert len(want) >= 6 and len(want) >= len(less)
    assert_close((got, {}), (want, {}))
    assert_close((run(name, patched), {}), (less, {}))


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile(name):
    """A block in one graph, forward and backward."""
    patched, model = both(name)
    args, kwargs = block_call(name, model)
    block, compiled = (m.get_submodule(CASES[name].block) for m in (model, patched))
    compiled = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    found = []
    for call, one in ((compiled, patched), (block, model)):
        leaves = [a.detach().clone().requires_grad_() if is_leaf(a) else a for a in args]
        out = flat(call(*leaves, **kwargs))[:1]
        out[0].square().sum().backward()
        found.append((out, {n: p.grad for n, p in one.named_parameters() if p.grad is not None}))
    torch._dynamo.reset()
    assert_close(*found)


def is_leaf(a):
    return isinstance(a, torch.Tensor) and a.is_floating_point() and a.dim() == 3
