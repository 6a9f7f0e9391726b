"""BART's and T5's layers with LoRA in their attentions: the layer hears the task, its linears are told."""

from __future__ import annotations

from fastpetl.nn.lora import LoRATask


def routed(original: type) -> type:
    """Semantics: `original` with `LoRATask` before it, one class per original; found by pickle under its own name."""
    name = f"LoRA{original.__name__}"
    if name not in globals():
        body = {"__module__": __name__, "__qualname__": name, "__doc__": f"{original.__name__} that is told the task."}
        globals()[name] = type(original.__name__, (LoRATask, original), body)
    return globals()[name]


def __getattr__(name: str):
    """For pickle, in a process that has attached nothing yet."""
    from transformers.models.bart import modeling_bart
    from transformers.models.t5 import modeling_t5

    for library in (modeling_bart, modeling_t5):
        original = getattr(library, name.removeprefix("LoRA"), None)
        if name.startswith("LoRA") and isinstance(original, type):
            return routed(original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
