"""fastpetl: parameter-efficient transfer learning that is as cheap in time and memory as it is in parameters.

The public names are imported when first used, so `import fastpetl` needs no transformers, Triton, built extension,
compiler or GPU, and queries no device.
"""

from __future__ import annotations

import importlib

from fastpetl._version import __version__

# public name -> module that defines it
_NAMES = {
    "patch": "fastpetl.patching",
    "unpatch": "fastpetl.patching",
    "report": "fastpetl.patching",
    "Report": "fastpetl.patching",
    "attach": "fastpetl.methods",
    "detach": "fastpetl.methods",
    "DASConfig": "fastpetl.methods",
    "AdapterConfig": "fastpetl.methods",
    "CompacterConfig": "fastpetl.methods",
    "LowRankConfig": "fastpetl.methods",
    "HyperformerConfig": "fastpetl.methods",
    "BaselineConfig": "fastpetl.methods",
    "LoRAConfig": "fastpetl.methods",
    "PromptConfig": "fastpetl.methods",
    "task": "fastpetl.methods.tasks",
    "add_task": "fastpetl.methods.task_set",
    "remove_task": "fastpetl.methods.task_set",
    "rename_task": "fastpetl.methods.task_set",
    "blocks": "fastpetl.skip",
    "Block": "fastpetl.skip",
    "SkipPlan": "fastpetl.skip",
    "prune": "fastpetl.skip",
    "Count": "fastpetl.count",
    "save": "fastpetl.saving",
    "load": "fastpetl.saving",
    "export_peft": "fastpetl.peft_format",
    "import_peft": "fastpetl.peft_format",
    "import_adapterhub": "fastpetl.adapterhub_format",
}
# `skip` and `count` are modules that can be called: fastpetl.skip(model, mask), fastpetl.count(model, inputs)
_MODULES = (
    *(
        "skip",
        "das",
        "count",
        "ops",
        "nn",
        "patching",
        "methods",
        "models",
        "saving",
        "peft_format",
        "adapterhub_format",
    ),
    *("backends", "spec", "kernels", "info", "bench", "demo"),
)

__all__ = ["__version__", *_NAMES, "count", "nn", "ops", "skip"]


def __getattr__(name: str):
    if name in _NAMES:
        value = globals()[name] = getattr(importlib.import_module(_NAMES[name]), name)
        return value
    if name in _MODULES:
        return importlib.import_module(f"fastpetl.{name}")
    raise AttributeError(f"module 'fastpetl' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_NAMES, *_MODULES})
