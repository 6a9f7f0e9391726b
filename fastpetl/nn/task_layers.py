"""Transformer layers that are told the task, for what stands inside them (LoRA, adapters on a linear): one class per
original layer, made when asked for.
"""

from __future__ import annotations

import importlib

from fastpetl.nn.tasks import HearsTask, TellsTask

# Where the originals are, for pickle: in a process that has attached nothing yet.
_HF = "transformers.models"
_LIBRARIES = {
    "BartEncoderLayer": f"{_HF}.bart.modeling_bart",
    "BartDecoderLayer": f"{_HF}.bart.modeling_bart",
    "T5Block": f"{_HF}.t5.modeling_t5",
    "BertLayer": f"{_HF}.bert.modeling_bert",
    "RobertaLayer": f"{_HF}.roberta.modeling_roberta",
    "CLIPEncoderLayer": f"{_HF}.clip.modeling_clip",
    "ViltLayer": f"{_HF}.vilt.modeling_vilt",
    "MeterCrossLayer": "fastpetl.nn.meter",
}


def routed(original: type) -> type:
    """Semantics: `original` with `TellsTask` before it, one class per original; found by pickle under its own name."""
    name = f"Task{original.__name__}"
    if name not in globals():
        body = {"__module__": __name__, "__qualname__": name, "__doc__": f"{original.__name__} that is told the task."}
        globals()[name] = type(original.__name__, (TellsTask, original), body)
    return globals()[name]


def fused_routed(module: str, mixin: type, original: type, **body) -> type:
    """Semantics: what `patch` makes of `routed(original)`; for the namespace of `module`, as FusedTask<original>."""
    doc = f"{original.__name__} that is told the task, same numbers, fewer kernels. Made by `fastpetl.patch`."
    body |= {"__module__": module, "__qualname__": f"FusedTask{original.__name__}", "__doc__": doc}
    # Same names as the originals: accelerate and others match modules by class name; pickle finds __qualname__.
    return type(original.__name__, (HearsTask, mixin, routed(original)), body)


def __getattr__(name: str):
    original = name.removeprefix("Task")
    if name.startswith("Task") and original in _LIBRARIES:
        return routed(getattr(importlib.import_module(_LIBRARIES[original]), original))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
