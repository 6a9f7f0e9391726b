"""VL-BART and VL-T5 compute what the original code did: logits, loss, gradients, trainable sets and aliases."""

import pytest
import torch

import fastpetl
from fastpetl.nn.lora import LoRALinear
from vl_tiny import (
    GOLDEN,
    KINDS,
    METHODS,
    golden,
    golden_inputs,
    golden_model,
    inputs,
    original_state,
    part,
    run,
    tiny,
    tiny_adapters,
)

FUSED = {
    "vlbart": {"bart.attention", "bart.encoder_layer", "bart.decoder_layer", "head"},
    "vlt5": {"t5.attention", "t5.norm", "t5.feed_forward", "head"},
}
CASES = [(kind, method) for kind in KINDS for method in METHODS if (kind, method[-4:]) != ("vlt5", "lora")]


def test_every_recorded_run_is_held_to():
    assert {file.stem for file in GOLDEN.glob("vl*.safetensors")} == {f"{kind}_{method}" for kind, method in CASES}


@pytest.mark.parametrize("patch", [False, True], ids=["eager", "patched"])
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_logits_loss_and_gradients(kind, method, patch):
    tensors, meta = golden(kind, method)
    model = golden_model(kind, method)
    if patch:
        fastpetl.patch(model, strict=True)
        found = {row.kind for row in fastpetl.report(model).rows if row.status == "patched"}
        own = {"none": set(), "hyperformer": {"hyper_adapter"}, "lora": {"lora_linear"}, "prompt": set()}
        assert found == FUSED[kind] | own.get(method.removeprefix("multiple_"), {"adapter_controller"})
    tasks = [task for task in meta["tasks"] if f"{task}/output/logits" in tensors]
    assert len(tasks) >= 2
    for task in tasks:
        model.zero_grad(set_to_none=True)
        if method == "none":
            out = model(**golden_inputs(tensors, task))
        elif task == "vqa":
            out = model(**golden_inputs(tensors, task), task=task)
        else:
            with fastpetl.task(model, task):
                out = model(**golden_inputs(tensors, task))
        torch.testing.assert_close(out.logits, tensors[f"{task}/output/logits"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.loss, tensors[f"{task}/output/loss"], rtol=1e-5, atol=1e-5)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        want = part(tensors, f"{task}/grad/")
        if method == "hyperformer" and task != "vqa":  # a megabyte of gradients, kept for one task
            assert not want and len(tasks) > 1
            continue
        assert gradients.keys() == want.keys()
        scale = max(g.norm().item() for g in want.values())
        for name, grad in want.items():
            error = (gradients[name] - grad).norm().item()
            assert error <= 1e-4 * grad.norm().item() + 1e-7 * scale, f"{task} {name}: {error:.1e}"


@pytest.mark.parametrize("patch", [False, True], ids=["eager", "patched"])
def test_lora_drops_what_its_update_reads(patch):
    """In training the original's line, else no dropout. (Recorded runs are at 0: what a seed draws is torch's own.)"""
    model = golden_model("vlbart", "lora")
    if patch:
        fastpetl.patch(model, strict=True)
    linears = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert len(linears) == 12
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(5))
    for train in (True, False):
        model.train(train)
        for linear in linears:
            torch.manual_seed(0)
            got = linear(x)
            torch.manual_seed(0)
            read = torch.nn.functional.dropout(x, 0.1, training=train)
            update = (read @ linear.lora_As["vqa"].T @ linear.lora_Bs["vqa"].T) * (32 / 8)
            want = torch.nn.functional.linear(x, linear.weight, linear.bias) + update
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_names_aliases_and_trainable_sets_are_the_originals(kind, method):
    _, meta = golden(kind, method)
    model = golden_model(kind, method)
    state = model.state_dict()
    saved = original_state(kind, method)
    assert state.keys() == saved.keys() and all(torch.equal(value, saved[name]) for name, value in state.items())
    for alias, name in meta["aliases"].items():
        assert state[alias].data_ptr() == state[name].data_ptr(), alias
    pointers = {value.data_ptr() for value in state.values()}
    assert len(pointers) == len(state) - len(meta["aliases"])
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == sorted(meta["trainable"])
    counted = fastpetl.count(model)
    assert (counted.total, counted.trainable) == (meta["total_params"], meta["trainable_params"])


COUNTS = {  # vl_adapter.md 7: (kind, sharing, shared) -> (trainable, total)
    ("vlbart", "single", "up"): (6_081_600, 145_606_464),
    ("vlbart", "half", "up"): (12_725_760, 152_250_624),
    ("vlbart", "half", "down"): (12_786_240, 152_311_104),
    ("vlbart", "multiple", "up"): (19_430_400, 158_955_264),
    ("vlt5", "single", "up"): (10_480_512, 233_439_360),
    ("vlt5", "half", "up"): (23_768_832, 246_727_680),
    ("vlt5", "multiple", "up"): (37_178_112, 260_136_960),
}


@pytest.mark.parametrize(("kind", "sharing", "shared"), COUNTS)
def test_the_papers_counts(kind, sharing, shared):
    model_class, config_class = KINDS[kind]
    with torch.device("meta"):
        model = model_class(config_class())
        fastpetl.attach(model, fastpetl.AdapterConfig(sharing=sharing, shared=shared), patch=False)
    counted = fastpetl.count(model)
    assert (counted.trainable, counted.total) == COUNTS[kind, sharing, shared]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharing", ["single", "half", "multiple"])
@pytest.mark.parametrize("norms", [False, True])
def test_patched_is_unpatched(kind, sharing, norms):
    """Logits, and the gradient of every trainable parameter, fused and in plain torch; unpatch is exact."""
    made = {"sharing": sharing, "norm_before": norms, "norm_after": norms}
    model, found = tiny_adapters(kind, **made), []
    for patched in (False, True):
        if patched:
            fastpetl.patch(model, strict=True)
        model.zero_grad(set_to_none=True)
        out = run(model)
        out.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((out.logits.detach(), gradients))
    (want, want_grads), (logits, grads) = found
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    for name, grad in want_grads.items():
        if grad is None:  # another task's
            assert grads[name] is None
            continue
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name
    fastpetl.unpatch(model)
    assert torch.equal(run(model).logits, want)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_cache_is_generation_without(kind):
    model = tiny_adapters(kind)
    given = inputs()
    given.pop("labels")
    options = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(**given, **options, use_cache=False)
    assert torch.equal(model.generate(**given, **options, use_cache=True), want)
    fastpetl.patch(model)
    assert torch.equal(model.generate(**given, **options), want)
    beams = model.generate(**given, **options, num_beams=3)
    fastpetl.unpatch(model)
    assert torch.equal(model.generate(**given, **options, num_beams=3), beams)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model = tiny_adapters(kind)
    fastpetl.save(model, tmp_path / "petl")
    again = tiny(kind)
    fastpetl.load(again, tmp_path / "petl")
    fastpetl.task(again, "gqa")
    state = model.state_dict()
    again.load_state_dict({k: v for k, v in state.items() if "_adapter" not in k}, strict=False)
    torch.testing.assert_close(run(again).logits, run(model).logits)


def test_tasks_are_named():
    model = tiny_adapters("vlbart")
    with pytest.raises(ValueError, match="name is 'flickr', expected one of vqa, gqa, nlvr"):
        fastpetl.task(model, "flickr")
    one = run(model).logits
    with fastpetl.task(model, "vqa"):
        other = run(model).logits
    assert not torch.allclose(one, other) and torch.equal(run(model).logits, one)
    torch.testing.assert_close(run(model, task="vqa").logits, other)


def test_images_that_do_not_divide_the_features():
    model = tiny("vlbart")
    ids = torch.tensor([[0, 1, 2]]).expand(3, 3)
    with pytest.raises(ValueError, match="VisualEmbedding: vis_feats has 16 features, expected a multiple of the 3"):
        run(model, img_order_ids=ids)


@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_and_from_pretrained(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(run(again).logits, run(model).logits)
