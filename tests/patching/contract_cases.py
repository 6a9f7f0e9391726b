"""One small model of every family `patch` knows, and how the tests of the contract run and compare it."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import copied_bart
import copied_bert
import copied_clipvil
import copied_t5
import copied_vilt
import fastpetl
import hf_tiny
import vilt_tiny
import vl_tiny
from vilt_tiny import randomize, relative

LOW = -1e4  # what hides a key in the originals' masks


@dataclass(frozen=True)
class Case:
    """A family: make(dropout) gives a random model in eval mode, inputs(padded) its keyword arguments."""

    make: Callable[[float], nn.Module]
    inputs: Callable[[bool], dict]
    kinds: frozenset  # the rules that find something in it
    block: str  # a module that is patched
    linear: str  # a linear within the block that the fused forward reads and never calls
    layers: tuple[str, ...] = ()  # what is checkpointed where the model cannot do so itself
    masked: bool = True  # does it take a mask?
    exact: torch.dtype = torch.float64  # the widest its code runs in
    maps: bool = False  # does it give attention maps and hidden states when asked?
    original: dict = field(default_factory=dict)  # {"dropout" or "mask": why its block then runs the original forward}


def _kinds(family: str, *names: str) -> frozenset:
    return frozenset(f"{family}.{name}" for name in names)


# --- models of transformers and of ours -------------------------------------------------------------------------------


def _vilt(make, layer: str, *more: str) -> Case:
    def build(dropout):
        return make(num_hidden_layers=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)

    kinds = _kinds("vilt", "patches", "encoder", layer) | set(more)
    given = lambda padded: vilt_tiny.inputs(padded=padded)  # noqa: E731
    return Case(build, given, kinds, "vilt.encoder.layer.1", "intermediate.dense", maps=True)


def _hf(name: str, block: str, linear: str, **more) -> Case:
    _, inputs, kinds = hf_tiny.FAMILIES[name]
    return Case(lambda dropout: hf_tiny.build(name, dropout), inputs, frozenset(kinds), block, linear, **more)


def _seq2seq(name: str) -> Case:
    bart, ours = name.endswith("bart"), name.startswith("vl")
    drops = ("dropout", "attention_dropout", "activation_dropout") if bart else ("dropout_rate",)

    def build(dropout):
        config = dict.fromkeys(drops, dropout)
        return vl_tiny.tiny_adapters(name, config=config) if ours else vl_tiny.text_model(name, **config)

    def inputs(padded):
        given = vl_tiny.inputs(padded=padded)
        return given if ours else {key: value for key, value in given.items() if key != "vis_feats"}

    names = ("encoder_layer", "decoder_layer", "attention") if bart else ("attention", "norm", "feed_forward")
    block = ("model.decoder.layers.1", "fc1") if bart else ("decoder.block.1.layer.2.DenseReluDense", "wi")
    kinds = _kinds("bart" if bart else "t5", *names) | {"head"} | ({"adapter_controller"} if ours else set())
    return Case(build, inputs, kinds, *block, maps=True)


# --- research code that people copy -----------------------------------------------------------------------------------


class Blocks(nn.ModuleList):
    """OpenAI's CLIP blocks, one after the other; mask: the keys that are hidden."""

    def forward(self, x, mask=None):
        for block in self:
            x = block(x, mask)
        return x


class Layers(nn.ModuleList):
    """CLIP-ViL's layers, one after the other."""

    def forward(self, x, y, mask=None, task=None):
        for layer in self:
            x = layer(x, y, mask, task)
        return x


def _copied(make, mask=None, streams=(6, 4), **same) -> dict:
    """The first two arguments of a Case. make(dropout): a module in any state; streams: x, y by their lengths."""

    def build(dropout):
        torch.manual_seed(3)
        model = make(dropout).eval()
        randomize(model, 0.3)
        for module in model.modules():
            if isinstance(module, copied_t5.Norm):
                module.later = True  # transformers' of later years, which stays in bf16
                nn.init.normal_(module.weight, 1, 0.3)
        return model

    def inputs(padded):
        generator = torch.Generator().manual_seed(2)
        given = {name: torch.randn(2, n, 16, generator=generator) for name, n in zip("xy", streams, strict=False)}
        return {**given, "mask": mask if padded else None, **same}

    return {"make": build, "inputs": inputs}


def _additive(queries: int, keys: int) -> torch.Tensor:
    mask = torch.zeros(2, 1, queries, keys)
    mask[0, ..., keys - 2 :] = LOW
    return mask


KEEP = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])  # ViLT's own masks are integers
HIDE = KEEP == 0  # the CLIP block's are bool
CAUSAL = torch.full((4, 4), LOW).triu(1).expand(2, 1, 4, 4)
TOLD = {"causal": CAUSAL, "task": "gqa"}
INTERMEDIATE = "bert.copied_intermediate"
METER = _kinds("meter", "copied_attention", "copied_output") | {INTERMEDIATE}


def _das(dropout):
    return copied_vilt.Stack(layers=2, drop=dropout, attn_drop=dropout)


def _clip(dropout):
    return Blocks(copied_clipvil.ResidualAttentionBlock(drop=dropout, batch_first=True) for _ in range(2))


def _clip_vil(dropout):
    return Layers(copied_clipvil.Layer(drop=dropout, adapters={}) for _ in range(2))


COPIED = {
    "copied_vilt": Case(
        **_copied(_das, KEEP, streams=(6,)),
        kinds=frozenset({"vilt.block", "das.adapter"}),
        block="blocks.1",
        linear="mlp.fc1",
        layers=("blocks.0", "blocks.1"),
    ),
    "copied_meter": Case(
        **_copied(lambda dropout: copied_bert.Pair(drop=dropout), _additive(1, 6)),
        kinds=METER | {"das.adapter"},
        block="text.output",
        linear="dense",
        layers=("text", "image"),
    ),
    "copied_intermediate": Case(
        **_copied(lambda dropout: copied_bert.Pair(drop=dropout, das=False, act=copied_clipvil.gelu), _additive(1, 6)),
        kinds=METER,
        block="image.intermediate",
        linear="dense",
        layers=("text", "image"),
    ),
    "copied_bart": Case(
        **_copied(lambda dropout: copied_bart.Net(dropout, {}), _additive(6, 6), **TOLD),
        kinds=_kinds("vlbart", *(f"copied_{n}" for n in ("attention", "encoder_layer", "decoder_layer", "controller"))),
        block="decoder",
        linear="fc1",
        layers=("encoder", "decoder"),
    ),
    "copied_t5": Case(
        **_copied(lambda dropout: copied_t5.Net(drop=dropout, adapters={}), _additive(6, 6), **TOLD),
        kinds=_kinds("vlt5", *(f"copied_{name}" for name in ("attention", "norm", "feed_forward", "block")))
        | {"vlbart.copied_controller"},
        block="encoder.1.layer.1.DenseReluDense",
        linear="wi",
        layers=("encoder.0", "encoder.1", "decoder.0", "decoder.1"),
    ),
    "copied_clipvil": Case(
        **_copied(_clip_vil, _additive(1, 6), task="gqa"),
        kinds=_kinds("lxmert", "copied_attention", "copied_output") | {INTERMEDIATE, "vlbart.copied_controller"},
        block="1.output",
        linear="dense",
        layers=("0", "1"),
    ),
    "copied_clip": Case(
        **_copied(_clip, HIDE, streams=(6,)),
        kinds=frozenset({"clip.copied_block"}),
        block="1",
        linear="mlp.c_fc",
        layers=("0", "1"),
        exact=torch.float32,  # its norms compute in that and stay in it
        original={"mask": "a mask is given", "dropout": "attn drops 0.3 while training"},
    ),
}

_LAYER = "encoder.layer.1"
CASES = {
    "vilt": _vilt(vilt_tiny.tiny_vilt, "layer"),
    "das_vilt": _vilt(vilt_tiny.tiny_das, "das_layer", "adapter"),
    "bert": _hf("bert", _LAYER, "output.dense", maps=True),
    "decoder": _hf("decoder", _LAYER, "output.dense"),
    "roberta": _hf("roberta", _LAYER, "output.dense", maps=True),
    "clip_vision": _hf("clip_vision", "encoder.layers.1.mlp", "fc1", masked=False, maps=True),
    "clip_text": _hf("clip_text", "encoder.layers.1.mlp", "fc1", maps=True),
    "bridgetower": _hf(
        "bridgetower",
        "cross_modal_text_layers.1",
        "output.dense",
        layers=("cross_modal_text_layers.0", "cross_modal_image_layers.0", "cross_modal_text_layers.1"),
        maps=True,
    ),
    "lxmert": _hf(
        "lxmert", "encoder.x_layers.0.lang_output", "dense", layers=("encoder.layer.0", "encoder.x_layers.0")
    ),
    "meter": _hf("meter", "meter.cross_modal_text_layers.1", "output.dense"),
    "das_meter": _hf("das_meter", "meter.cross_modal_text_layers.1", "output.dense"),
    **{name: _seq2seq(name) for name in ("bart", "t5", "vlbart", "vlt5")},
    **COPIED,
}
NAMES = list(CASES)


# --- running one ------------------------------------------------------------------------------------------------------


@functools.cache
def _made(name: str, dropout: float) -> nn.Module:
    return CASES[name].make(dropout)


def plain(name: str, dropout: float = 0.0) -> nn.Module:
    """A model of the family's own, not patched, all of which trains."""
    return copy.deepcopy(_made(name, dropout)).requires_grad_()


def both(name: str, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """(patched, plain), equal otherwise."""
    model = plain(name, dropout)
    return fastpetl.patch(copy.deepcopy(model), strict=True), model


def cast(name: str, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype; OpenAI's code leaves its norms in fp32."""
    stays = copied_clipvil.LayerNorm if CASES[name].exact == torch.float32 else ()
    model = copy.deepcopy(model)
    for module in model.modules():
        if not isinstance(module, stays):
            module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
    return model


def arguments(name: str, model: nn.Module, padded: bool | None = None) -> dict:
    """The family's inputs in the model's dtype. padded None: with a mask, if such a call is fused."""
    padded = "mask" not in CASES[name].original if padded is None else padded
    dtype = next(model.parameters()).dtype
    given = CASES[name].inputs(padded)
    floating = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return given | {key: value.detach().to(dtype) for key, value in floating.items()}


def flat(out) -> list[torch.Tensor]:
    """Every floating-point tensor of an output, tuples within tuples one after the other."""
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    if hasattr(out, "to_tuple"):
        out = out.to_tuple()
    return [t for part in out for t in flat(part)] if isinstance(out, tuple | list) else []


def run(name: str, model: nn.Module, padded: bool | None = None, seed: int = 1, **asked) -> list[torch.Tensor]:
    """One forward in the model's mode. ViLT orders its patches by the global generator, also in eval: seeded."""
    torch.manual_seed(seed)
    return flat(model(**arguments(name, model, padded), **asked))


def numbers(name: str, model: nn.Module, padded: bool | None = None, call=None) -> tuple[list, dict]:
    """Outputs, and for a fixed cotangent the gradients of the inputs that are no masks and of what trains."""
    model.zero_grad(set_to_none=True)
    given = arguments(name, model, padded)
    leaves = {k: v for k, v in given.items() if "mask" not in k and k != "causal" and isinstance(v, torch.Tensor)}
    leaves = {k: v.requires_grad_() for k, v in leaves.items() if v.is_floating_point()}
    torch.manual_seed(1)
    found = flat((call or model)(**given))
    generator = torch.Generator().manual_seed(5)
    sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in found if t.requires_grad).backward()
    grads = {f"input {key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return [t.detach() for t in found], grads | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got, want, tolerance: float = 1e-5) -> None:
    """(outputs, gradients) agree to a relative tolerance, and the same have one."""
    assert len(got[0]) == len(want[0]) > 0
    for a, b in zip(got[0], want[0], strict=True):
        assert relative(a, b) <= tolerance
    assert got[1].keys() == want[1].keys()
    # A key's bias moves all scores of a query alike: its gradient is noise around 0, judged by the largest one.
    scale = max((g.norm() for g in want[1].values()), default=0)
    for key, grad in got[1].items():
        assert (grad - want[1][key]).norm() <= tolerance * want[1][key].norm() + 1e-6 * scale, key


def fell_back(model: nn.Module) -> set[str]:
    """Why modules took their original forward."""
    return {m.__dict__["_fastpetl_fallback"] for m in model.modules() if m.__dict__.get("_fastpetl_fallback")}


def rows(model: nn.Module) -> dict:
    return {row.name: row for row in fastpetl.report(model).rows}


def forget_fallbacks(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop("_fastpetl_fallback", None)


# --- what is done to one ----------------------------------------------------------------------------------------------


def block_call(name: str, model: nn.Module) -> tuple[tuple, dict]:
    """(args, kwargs) that the family's block gets in a forward."""
    seen = []
    block = model.get_submodule(CASES[name].block)
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        run(name, model)
    handle.remove()
    return seen[0]


class Checkpointed(nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, *args, **kwargs):
        # Reentrant checkpoints detach what they are given by position only.
        n, names = len(args), tuple(kwargs)
        call = lambda *given: self.layer(*given[:n], **dict(zip(names, given[n:], strict=True)))  # noqa: E731
        return checkpoint(call, *args, *kwargs.values(), use_reentrant=self.reentrant)


def checkpointed(name: str, model: nn.Module, reentrant: bool) -> nn.Module:
    """The model with its layers' activations recomputed in the backward, by its own means where it has them."""
    if not CASES[name].layers:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model
    for layer in CASES[name].layers:
        replace(model, layer, lambda child: Checkpointed(child, reentrant))
    return model


def replace(model: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    """Put make(child) in the place of the child."""
    parent, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent)
    parent._modules[leaf] = make(parent._modules[leaf])


def replica_of(model: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes it, without its GPUs: a copy whose parameters are plain attributes."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for key, child in module._modules.items():
            replica._modules[key] = copies.get(child)
        for key, p in module._parameters.items():
            setattr(replica, key, None if p is None else p * 2 - p.detach())
    assert not list(copies[model].parameters())
    return copies[model]
