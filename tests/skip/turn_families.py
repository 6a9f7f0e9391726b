"""Small models of the families whose blocks stand in lists (`fastpetl.nn.turns`), and how the tests run one."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import copied_stacks
import fastpetl
import hf_tiny
from vilt_tiny import randomize

BATCH = 5


@dataclass(frozen=True)
class Family:
    """make() gives a random model in eval mode, inputs(batch) its keyword arguments, padded where it takes a mask."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict]
    kinds: str  # of its blocks, by their first letters
    pooled: str | None = None  # the output that does not change with padding
    candidates: bool = True  # can its batch be several copies?
    checkpoints: str | None = "library"  # who recomputes: "library", "loop" or nobody
    hidden: int = 32


def padded_ids(batch, tokens=12):
    given = hf_tiny.ids(batch, tokens, padded=False)
    for b in range(0, batch, 2):
        given["attention_mask"][b, tokens - 1 - b % 4 :] = 0
    given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, 1)
    return given


def drawn(*shape, seed=6):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _lxmert_inputs(batch):
    seen = torch.ones(batch, 4)
    seen[1::2, 3] = 0
    boxes = {"visual_feats": drawn(batch, 4, 12), "visual_pos": drawn(batch, 4, 4).sigmoid()}
    return {**padded_ids(batch), **boxes, "visual_attention_mask": seen}


def _clip_text_inputs(batch):
    given = padded_ids(batch)
    given["input_ids"][:, 4] = 59  # where it pools
    return given


def _hf(name, inputs, kinds, pooled, candidates=True, checkpoints="library", **config):
    return Family(lambda: hf_tiny.build(name, **config), inputs, kinds, pooled, candidates, checkpoints)


def _copied(make, kinds, mask=None, **more):
    """The copied originals, in loops like theirs; mask(rows of ones and zeros) as their blocks take it."""

    def build():
        torch.manual_seed(3)
        model = make().eval()
        randomize(model, 0.3)
        return model

    def inputs(batch):
        seen = torch.ones(batch, 16, dtype=torch.long)
        seen[::2, 12:] = 0
        made = {key: value(batch) if callable(value) else value for key, value in more.items()}
        return {"x": drawn(batch, 16, 16), **({} if mask is None else {"mask": mask(seen)}), **made}

    return Family(build, inputs, kinds, None if mask is None else "pooled", checkpoints="loop", hidden=16)


def _additive(seen):
    return (1.0 - seen[:, None, None].float()) * -1e4


def _answers(batch):
    return drawn(batch, 16, 16, seed=8)


FAMILIES = {
    "bert": _hf("bert", padded_ids, "tttt", "pooler_output", num_hidden_layers=4),
    "roberta": _hf("roberta", padded_ids, "tttt", "pooler_output", num_hidden_layers=4),
    "decoder": _hf(
        "decoder",
        lambda batch: {**padded_ids(batch), "encoder_hidden_states": drawn(batch, 5, 32), "use_cache": False},
        "tttt",
        None,
        num_hidden_layers=4,
    ),
    "clip_vision": _hf(
        "clip_vision", lambda batch: {"pixel_values": drawn(batch, 3, 32, 32)}, "iiii", None, num_hidden_layers=4
    ),
    "clip_text": _hf("clip_text", _clip_text_inputs, "tttt", "pooler_output", candidates=False, num_hidden_layers=4),
    "lxmert": _hf("lxmert", _lxmert_inputs, "tttiii", "pooled_output", checkpoints=None, x_layers=2),
    "bridgetower": _hf(
        "bridgetower",
        lambda batch: {**padded_ids(batch), "pixel_values": drawn(batch, 3, 64, 64)},
        "ttii",
        "pooler_output",
        candidates=False,
        checkpoints=None,
        image_size=64,
    ),
    "copied_vilt": _copied(lambda: copied_stacks.Vilt(), "mmmm", lambda seen: seen),
    "copied_das_vilt": _copied(lambda: copied_stacks.Vilt(das=True), "mmmm", lambda seen: seen),
    "copied_meter": _copied(lambda: copied_stacks.Meter(), "ttii", _additive, y=None),
    "copied_das_meter": _copied(lambda: copied_stacks.Meter(das=True), "ttii", _additive, y=None),
    "copied_clip": _copied(lambda: copied_stacks.Clip(), "iiii", lambda seen: seen == 0),
    "copied_clip_text": _copied(lambda: copied_stacks.Clip(text=True), "tttt"),
    "copied_bert": _copied(lambda: copied_stacks.Bert(), "tttt", _additive),
    "copied_lxmert": _copied(lambda: copied_stacks.Lxmert(), "ttttiii", _additive),
    "copied_clipvil": _copied(lambda: copied_stacks.Bert(adapters={}), "tttt", _additive, task="gqa"),
    "copied_vlbart": _copied(lambda: copied_stacks.Seq2Seq(), "eedd", _additive, y=_answers, task="gqa"),
    "copied_vlt5": _copied(lambda: copied_stacks.Seq2Seq(t5=True), "eedd", _additive, y=_answers, task="gqa"),
}
NAMES = list(FAMILIES)
LIKE_ANOTHER = ("roberta", "copied_vilt", "copied_meter", "copied_bert")  # their tests take long for what they add


def each(names):
    """Parameters of a test, those of LIKE_ANOTHER slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_ANOTHER else name for name in names]


@functools.cache
def _made(name):
    return FAMILIES[name].make()


def build(name, backend=None):
    """A model of the caller's own; backend: patched for it."""
    model = copy.deepcopy(_made(name))
    return model if backend is None else fastpetl.patch(model, backend=backend)


def inputs(name, batch=BATCH):
    return FAMILIES[name].inputs(batch)


def rows(given, which):
    return {name: value[which] if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def values(out):
    """Each sample's numbers in one row: of a tensor, or of all tensors of an output."""
    if isinstance(out, torch.Tensor):
        return out.flatten(1)
    found = out.values() if hasattr(out, "values") else out
    return torch.cat([t.flatten(1) for t in found if isinstance(t, torch.Tensor)], 1)


def output(model, given, mask=None, **options):
    with fastpetl.skip(model, mask, **options):
        return values(model(**given))


def mask_of(name, batch=BATCH, seed=0):
    n = len(FAMILIES[name].kinds)
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) < 0.5
