"""Adapters in AdapterHub's format: what it computes is written out here in plain torch, over the frozen backbone."""

import json
import re

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import fastpetl
import hf_tiny
import vilt_tiny
from adapterhub_parts import Theirs, places
from vilt_tiny import everything, one_thread, randomize, relative  # noqa: F401
from vl_tiny import SIZES

HOULSBY = {
    **{"mh_adapter": True, "output_adapter": True, "reduction_factor": 8, "non_linearity": "swish", "ln_before": False},
    **{"ln_after": False, "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True},
    **{"adapter_residual_before_ln": False, "is_parallel": False, "use_gating": False, "scaling": 1.0, "dropout": 0.0},
    **{"cross_adapter": False, "inv_adapter": None, "leave_out": [], "phm_layer": False, "architecture": None},
}
BOTTLENECK, HIDDEN = 5, 32


def build(kind):
    torch.manual_seed(3)
    if kind == "bart":
        sizes = {k: v for k, v in SIZES["vlbart"].items()}
        model = hf.BartForConditionalGeneration(hf.BartConfig(**sizes))
    elif kind == "t5":
        model = hf.T5ForConditionalGeneration(hf.T5Config(**SIZES["vlt5"], decoder_start_token_id=0))
    else:
        cls, config = {
            "bert": (hf.BertForSequenceClassification, hf.BertConfig),
            "roberta": (hf.RobertaModel, hf.RobertaConfig),
            "clip": (hf.CLIPModel, clip_config),
            "clip text": (hf.CLIPTextModel, hf.CLIPTextConfig),
            "clip vision": (hf.CLIPVisionModel, hf.CLIPVisionConfig),
        }[kind]
        sizes = {**hf_tiny.SIZES, "image_size": 32, "patch_size": 8} if kind == "clip vision" else hf_tiny.TEXT
        model = cls(config(**sizes))
    randomize(model.eval())
    return model


def clip_config(**text):
    vision = {**hf_tiny.SIZES, "image_size": 32, "patch_size": 8}
    return hf.CLIPConfig(text_config={**text, "eos_token_id": 59}, vision_config=vision, projection_dim=16)


def run(model):
    given = hf_tiny.ids()
    if isinstance(model, hf.CLIPModel):
        return model(**given, pixel_values=hf_tiny.pixels()).logits_per_text
    if isinstance(model, hf.CLIPVisionModel):
        return model(hf_tiny.pixels()).last_hidden_state
    if hasattr(model, "lm_head"):
        return model(**given, decoder_input_ids=given["input_ids"][:, :4], use_cache=False).logits
    out = model(**given)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def saved(kind, directory, safe=True, **changes):
    """(a folder in the format, what a backbone with it computes)"""
    settings, model = {**HOULSBY, **changes}, build(kind)
    torch.manual_seed(9)
    files = {}
    for place, module in places(kind, model, settings["cross_adapter"]).items():
        adapter = Theirs(HIDDEN, BOTTLENECK, settings).requires_grad_(False)
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        files |= {f"{place}.mine.{name}": value.clone() for name, value in adapter.state_dict().items()}
        module.register_forward_hook(
            lambda module, given, f, a=adapter: (a(f[0]), *f[1:]) if isinstance(f, tuple) else a(f)
        )
    directory.mkdir(exist_ok=True)
    save_file(files, directory / "adapter.safetensors") if safe else torch.save(
        files, directory / "pytorch_adapter.bin"
    )
    content = {"config": settings, "name": "mine", "version": "1.2.0", "hidden_size": HIDDEN}
    (directory / "adapter_config.json").write_text(json.dumps(content))
    with torch.no_grad():
        return run(model)


CHANGES = {
    "plain": {},
    "gelu_new, norm before": {"non_linearity": "gelu_new", "ln_before": True},
    "relu, norm after, scaled": {"non_linearity": "relu", "ln_after": True, "scaling": 4.0},
    "gelu, learned scaling": {"non_linearity": "gelu", "scaling": "learned"},
    "scaling per channel, both norms": {"scaling": "channel", "ln_before": True, "ln_after": True},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["bart", "t5", "bert", "roberta", "clip", "clip text", "clip vision"])
def test_what_it_computes(kind, change, tmp_path):
    cross = kind in ("bart", "t5") and change != "plain"
    want = saved(kind, tmp_path, safe=change != "plain", cross_adapter=cross, **CHANGES[change])
    bare = build(kind)
    with torch.no_grad():
        assert relative(run(bare), want) > 1e-2
    for patch in (False, True):
        model = fastpetl.import_adapterhub(build(kind), tmp_path, task="theirs", patch=patch)
        with torch.no_grad():
            assert relative(run(model), want) <= 2e-5, patch
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained and all("_adapter." in n for n in trained)
    fastpetl.save(model, tmp_path / "ours")
    again = fastpetl.load(build(kind), tmp_path / "ours")
    with torch.no_grad():
        assert relative(run(again), want) <= 2e-5


def test_beside_other_tasks(tmp_path):
    want = saved("bert", tmp_path)
    config = fastpetl.AdapterConfig(tasks=("own",), bottleneck=BOTTLENECK, activation="silu", sharing="multiple")
    model = fastpetl.attach(build("bert"), config)
    with pytest.raises(ValueError, match="import_adapterhub: task is 'theirs', expected one of own"):
        fastpetl.import_adapterhub(model, tmp_path, task="theirs")
    fastpetl.add_task(model, "theirs")
    own = {n: p.clone() for n, p in model.named_parameters() if ".own." in n}
    fastpetl.import_adapterhub(model, tmp_path, task="theirs")
    assert own and all(torch.equal(model.get_parameter(n), p) for n, p in own.items())
    with torch.no_grad(), fastpetl.task(model, "theirs"):
        assert relative(run(model), want) <= 2e-5


REFUSED = {
    "original_ln_before": True,
    "original_ln_after": False,
    "residual_before_ln": "post_add",
    "mh_adapter": False,
    "output_adapter": False,
    "is_parallel": True,
    "use_gating": True,
    "phm_layer": True,
    "inv_adapter": "nice",
    "leave_out": [0],
    "dropout": 0.1,
    "stochastic_depth": 0.2,
    "architecture": "lora",
    "non_linearity": "tanh",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused(name, tmp_path):
    saved("bert", tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    content["config"][name] = REFUSED[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    model = build("bert")
    before = everything(model)
    with pytest.raises(ValueError, match=re.escape(f"import_adapterhub: {name} is {REFUSED[name]!r}, expected ")):
        fastpetl.import_adapterhub(model, tmp_path)
    assert everything(model) == before


def test_a_new_norm_over_the_residual_is_refused(tmp_path):
    saved("bert", tmp_path, ln_after=True, adapter_residual_before_ln=True)
    with pytest.raises(ValueError, match="import_adapterhub: adapter_residual_before_ln is True with ln_after"):
        fastpetl.import_adapterhub(build("bert"), tmp_path)


def test_files_that_do_not_fit(tmp_path):
    saved("bert", tmp_path)
    model = build("bert")
    before = everything(model)
    for other in (vilt_tiny.tiny_vilt(), hf_tiny.build("meter")):  # which the `adapters` library does not know either
        with pytest.raises(ValueError, match="import_adapterhub: model is (ViLT|METER).*, expected one of: BART"):
            fastpetl.import_adapterhub(other, tmp_path)
    with pytest.raises(ValueError, match="import_adapterhub: the files have no encoder.layers.0.attention_adapters"):
        fastpetl.import_adapterhub(build("clip text"), tmp_path)
    saved("clip vision", tmp_path / "vision")
    for other in ("clip", "clip text"):  # of the same sizes, but another side, or both
        with pytest.raises(ValueError, match="import_adapterhub: the files have no .*encoder.layers.0"):
            fastpetl.import_adapterhub(build(other), tmp_path / "vision")
    with pytest.raises(ValueError, match="the files have no encoder.layers.0.attention_adapters.adapters.adapter_down"):
        fastpetl.import_adapterhub(build("bart"), tmp_path)
    deeper = hf.BertModel(hf.BertConfig(**{**hf_tiny.TEXT, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="the files have encoder.layer.1.*, for which this model has no place"):
        fastpetl.import_adapterhub(deeper, tmp_path)
    wider = hf.BertModel(hf.BertConfig(**{**hf_tiny.TEXT, "hidden_size": 40}))
    with pytest.raises(ValueError, match=r"has shape .5, 32., expected .5, 40. to match the model"):
        fastpetl.import_adapterhub(wider, tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter.safetensors and no pytorch_adapter.bin"):
        fastpetl.import_adapterhub(model, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        fastpetl.import_adapterhub(model, tmp_path)
    assert everything(model) == before


def test_code_in_a_pickle_is_not_run(tmp_path):
    saved("bert", tmp_path, safe=False)
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return ran.touch, ()

    torch.save({"x": Code()}, tmp_path / "pytorch_adapter.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        fastpetl.import_adapterhub(build("bert"), tmp_path)
    assert not ran.exists()
