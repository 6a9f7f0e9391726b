"""Loads the compiled module fastpetl._C, or says why it cannot be had. Nothing else imports it directly."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType


@functools.cache
def extension() -> tuple[ModuleType | None, str]:
    """Semantics: (fastpetl._C, "") if it loads, else (None, reason). Loading it registers torch.ops.fastpetl.*; it is
    tried once per process and queries no device.
    """
    if importlib.util.find_spec("fastpetl._C") is None:
        return None, "fastpetl._C is not built: install where there is a C++ compiler (in a checkout: make build)"
    import torch  # libtorch must be in the process before the module that links to it

    try:
        return importlib.import_module("fastpetl._C"), ""
    except (ImportError, OSError) as error:
        return None, f"fastpetl._C does not load with torch {torch.__version__}: {error}"


def build_info() -> dict:
    """Semantics: what fastpetl._C was built with: cuda (bool), cuda_archs, nvcc, compiler, torch_headers, x86. Empty
    when there is no fastpetl._C.
    """
    module, _ = extension()
    return module.build_info() if module else {}
