"""The papers' models on today's torch and transformers, loading the originals' checkpoints; imported when first
used."""

from __future__ import annotations

import importlib

# public name -> module that defines it
_NAMES = {
    "MeterConfig": "fastpetl.models.meter",
    "MeterForImageAndTextRetrieval": "fastpetl.models.meter",
    "MeterForImagesAndTextClassification": "fastpetl.models.meter",
    "MeterForQuestionAnswering": "fastpetl.models.meter",
    "MeterModel": "fastpetl.models.meter",
    "VLBart": "fastpetl.models.vlbart",
    "VLBartConfig": "fastpetl.models.vlbart",
    "VLT5": "fastpetl.models.vlt5",
    "VLT5Config": "fastpetl.models.vlt5",
}

__all__ = list(_NAMES)


def __getattr__(name: str):
    if name in _NAMES:
        value = globals()[name] = getattr(importlib.import_module(_NAMES[name]), name)
        return value
    raise AttributeError(f"module 'fastpetl.models' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_NAMES})
