"""Parameters and multiply-accumulates of a model as it stands, adapters and skip plan included; can be called."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.attention
from torch import nn

from fastpetl._callable import make_callable

__all__ = ["Count", "count", "main"]


@dataclass(frozen=True)
class Count:
    """Parameters (storage shared by several counts once) and MACs of one forward; parts: (name, total, trainable,
    macs). macs_fvcore: by the convention of fvcore's "FLOPs", which papers quote: MACs, and 5 per element of a layer
    norm (4 without weights).
    """

    total: int
    trainable: int
    macs: int
    parts: tuple[tuple[str, int, int, int], ...] = ()
    macs_fvcore: int = 0

    @property
    def trainable_percent(self) -> float:
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [*self.parts, ("total", self.total, self.trainable, self.macs)]
        lines = [("module", "parameters", "trainable", "%", "MACs")]
        for name, total, trainable, macs in rows:
            share = f"{100.0 * trainable / total:.2f}" if total else ""
            lines.append((name, f"{total:,}", f"{trainable:,}", share, f"{macs:,}"))
        if self.macs:
            lines.append(("total by fvcore's convention", "", "", "", f"{self.macs_fvcore:,}"))
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


def count(model: nn.Module, inputs=None) -> Count:
    """Semantics: parameters of `model`, and the MACs of model(**inputs) or model(*inputs), by what really runs.

    inputs: a mapping, a sequence, one tensor, or None for parameters only. The model runs once, in eval mode and
    without gradients, through its unpatched forward; matrix products and convolutions count, attention's two products
    included, elementwise work does not. A skipped block counts what its shortcut costs. The random generator is left
    as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"count: model is {type(model).__name__}, expected a torch.nn.Module")
    found = {} if inputs is None else _run(model, inputs)
    parts = []
    for name, module in _parts(model):
        parts.append((name, *_parameters(module), _macs_of(name, module, found)))
    macs, norms = found.get("", (0, 0))
    return Count(*_parameters(model), macs=macs, parts=tuple(parts), macs_fvcore=macs + norms)


def _macs_of(name: str, module: nn.Module, found: dict) -> int:
    """Of a part; a ModuleList is never called itself: what is in it is."""
    if name in found or not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return found.get(name, (0, 0))[0]
    return sum(_macs_of(f"{name}.{child}", inner, found) for child, inner in module.named_children())


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What a table names: children, with one that holds most of the parameters replaced by its own."""
    found: list[tuple[str, nn.Module]] = []
    everything = max(1, _parameters(model)[0])
    for name, child in model.named_children():
        if _parameters(child)[0] > 0.5 * everything and any(True for _ in child.children()):
            found += [(f"{name}.{inner}", module) for inner, module in child.named_children()]
            own = child.named_parameters(recurse=False)
            found += [(f"{name}.{inner}", nn.ParameterList([parameter])) for inner, parameter in own]
        else:
            found.append((name, child))
    return found


def _parameters(module: nn.Module) -> tuple[int, int]:
    """(all, trainable): elements of storage that parameters cover; one shared by several names, or a view of another,
    counts once.
    """
    spans: dict = {}
    for parameter in module.parameters():
        shared = parameter.device.type != "meta" and parameter.is_contiguous()
        key = parameter.untyped_storage()._cdata if shared else id(parameter)
        start = parameter.storage_offset() if shared else 0
        spans.setdefault(key, []).append((start, start + parameter.numel(), parameter.requires_grad))
    total = trainable = 0
    for pieces in spans.values():
        total += _union(piece[:2] for piece in pieces)
        trainable += _union(piece[:2] for piece in pieces if piece[2])
    return total, trainable


def _union(spans) -> int:
    covered, end = 0, 0
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _norm_operations(x_shape, _normalized, weight_shape, *_, **__) -> int:
    """fvcore's own number for a layer norm."""
    return math.prod(x_shape) * (4 if weight_shape is None else 5)


def _run(model: nn.Module, inputs) -> dict[str, tuple[int, int]]:
    """(MACs, what fvcore counts for layer norms) by module name ("" the whole model)."""
    from torch.utils.flop_counter import FlopCounterMode

    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    training = {module: module.training for module in model.modules()}
    # Attention as matrix products: the counter does not know torch's fused kernels for the CPU.
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), _unpatched(model), plain:
        norm = torch.ops.aten.native_layer_norm
        counter = FlopCounterMode(display=False, depth=None, custom_mapping={norm: _norm_operations})
        try:
            model.eval()
            with counter:
                if isinstance(inputs, Mapping):
                    model(**inputs)
                elif isinstance(inputs, (tuple, list)):
                    model(*inputs)
                else:
                    model(inputs)
        finally:
            for module, flag in training.items():
                module.training = flag
    root = type(model).__name__
    found = {}
    for name, flops in counter.get_flop_counts().items():
        name = "" if name in ("Global", root) else name.removeprefix(f"{root}.")
        norms = flops.get(norm, 0)
        found[name] = max(found.get(name, (0, 0)), ((sum(flops.values()) - norms) // 2, norms))
    return found


@contextlib.contextmanager
def _unpatched(model: nn.Module):
    """The model's own forwards for a while: their products are counted where they are, a fused op hides its own."""
    from fastpetl.patching import unpatch

    before = [(module, module.__class__, dict(module.__dict__)) for module in model.modules()]
    unpatch(model)
    try:
        yield
    finally:
        for module, cls, state in before:
            module.__class__ = cls
            for key in state.keys() - module.__dict__.keys():
                module.__dict__[key] = state[key]


# --- python -m fastpetl count -----------------------------------------------------------------------------------------

_PATCH = {"vilt": 32, "meter": 16}  # pixels a side
_DAS = ("vilt and meter", ("image_size", "text_tokens", "skip", "bottleneck", "skip_bottleneck", "no_adapters"))
_METHODS = ("vlbart and vlt5", ("method",))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastpetl count",
        description="Parameters and MACs (multiply-accumulates of one forward) of a model of the paper's size with "
        "random weights; nothing is downloaded.",
    )
    parser.add_argument(
        "model",
        choices=[*_PATCH, "vlbart", "vlt5"],
        help="vilt, meter: ViLT-B/32 and METER (CLIP-B/16, RoBERTa-base) for VQAv2 with DAS adapters; vlbart, vlt5: "
        "what VL-Adapter's methods train, beside the paper's numbers; parameters only",
    )
    das = parser.add_argument_group(f"for {_DAS[0]}")
    das.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        default=(384, 384),
        metavar=("H", "W"),
        help="pixels, for meter a square, default: 384 384",
    )
    das.add_argument("--text-tokens", type=int, default=40, metavar="N", help="default: 40")
    das.add_argument(
        "--skip", type=int, nargs="*", default=(), metavar="I", help="blocks to skip, the first is 0, default: none"
    )
    das.add_argument("--bottleneck", type=int, metavar="R", help="width of the adapters in the blocks, default: 96")
    das.add_argument(
        "--skip-bottleneck",
        type=int,
        metavar="R",
        help="width of the adapters that stand for skipped blocks, default: 192 for vilt, 288 for meter",
    )
    das.add_argument("--no-adapters", action="store_true", help="the plain model: a skipped block gives its input")
    methods = parser.add_argument_group(f"for {_METHODS[0]}")
    methods.add_argument(
        "--method",
        help="adapter, compacter, lowrank, hyperformer, lora, prompt or baseline (nothing added), default: all",
    )
    return parser


def _check(parser, args) -> None:
    """What says nothing about this model, or is impossible, is a usage error."""
    models, options = _METHODS if args.model in _PATCH else _DAS
    for name in options:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for {models}, not for {args.model}")
    least = _PATCH.get(args.model, 1)
    if min(args.image_size) < least:
        parser.error(f"--image-size is {' '.join(map(str, args.image_size))}, expected {least} or more")
    for name in ("text_tokens", "bottleneck", "skip_bottleneck"):
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and value < 1:
            parser.error(f"{option} is {value}, expected 1 or more")
        if args.no_adapters and value is not None and name != "text_tokens":
            parser.error(f"{option} is {value}, expected none with --no-adapters")


def main(argv: list[str] | None = None) -> int:
    """Semantics: the command line: counts a model of the paper's size with random weights."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    try:
        return (_das if args.model in _PATCH else _methods)(parser, args)
    except ImportError as error:
        print(f"count: transformers does not import ({error}): pip install transformers")
        return 1


def _das(parser, args) -> int:
    from fastpetl.methods import DASConfig, attach
    from fastpetl.skip import SkipPlan, blocks, skip

    (height, width), patch = args.image_size, _PATCH[args.model]
    if args.model == "meter" and height != width:
        parser.error(f"--image-size is {height} {width}, expected a square for meter")
    model, inputs = (_vilt if args.model == "vilt" else _meter)(height, width, args.text_tokens)
    beyond = [i for i in args.skip if not 0 <= i < len(blocks(model))]
    if beyond:
        parser.error(f"--skip has {beyond[0]}, expected blocks 0 to {len(blocks(model)) - 1}")
    if len(set(args.skip)) < len(args.skip):
        parser.error(f"--skip is {' '.join(map(str, args.skip))}, expected each block once")
    plain = count(model, inputs)
    if not args.no_adapters:
        attach(model, DASConfig(bottleneck=args.bottleneck, skip_bottleneck=args.skip_bottleneck), patch=False)
    skip(model, SkipPlan(tuple(args.skip)))
    counted = count(model, inputs)
    name = "ViLT-B/32" if args.model == "vilt" else "METER"
    tokens, visual = args.text_tokens, 1 + (height // patch) * (width // patch)
    print(f"{name}, VQAv2 head, {height}x{width} pixels, {tokens} text tokens: {tokens + visual} tokens, batch 1")
    print(f"skipped blocks: {', '.join(map(str, args.skip)) or 'none'}")
    print(counted)
    for what, got, before in (
        ("MACs", counted.macs, plain.macs),
        ("by fvcore's convention", counted.macs_fvcore, plain.macs_fvcore),
    ):
        print(f"against the plain model, {what}: {got - before:+,} ({100 * (got - before) / before:+.2f} %)")
    return 0


def _vilt(height: int, width: int, tokens: int):
    from transformers import ViltConfig, ViltForQuestionAnswering

    model = ViltForQuestionAnswering(ViltConfig(num_labels=3129, max_position_embeddings=max(40, tokens)))
    inputs = {
        "input_ids": torch.ones(1, tokens, dtype=torch.long),
        "attention_mask": torch.ones(1, tokens, dtype=torch.long),
        "pixel_values": torch.zeros(1, 3, height, width),
        "pixel_mask": torch.ones(1, height, width, dtype=torch.long),
    }
    return model, inputs


def _meter(height: int, width: int, tokens: int):
    """Without memory or arithmetic: METER's forward looks at no value. ViLT's does, it chooses patches."""
    from fastpetl.models import MeterConfig, MeterForQuestionAnswering

    with torch.device("meta"):
        config = MeterConfig(num_labels=3129, max_text_length=tokens, vision_config={"image_size": height})
        inputs = {
            "input_ids": torch.ones(1, tokens, dtype=torch.long),
            "pixel_values": torch.zeros(1, 3, height, width),
        }
        return MeterForQuestionAnswering(config), inputs


make_callable(__name__, count)


def _methods(parser, args) -> int:
    from fastpetl.methods import published

    if args.method is not None and args.method not in published.METHODS:
        parser.error(f"--method is {args.method}, expected one of {', '.join(published.METHODS)}")
    print(published.table(args.model, published.METHODS if args.method is None else (args.method,)))
    return 0
