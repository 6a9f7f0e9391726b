"""Functional ops, each with its plain-torch reference beside it, which is the contract.

Each is also a registered op: torch.ops.fastpetl.adapter, linear and attention.
"""

from .adapter import adapter, adapter_reference
from .attention import attention, attention_reference
from .linear import PackCache, linear, linear_reference
from .residual_norm import residual_norm, residual_norm_reference
from .site import adapter_residual_norm, adapter_residual_norm_reference

from . import _registered_residual_norm  # noqa: F401  isort: skip
from . import _registered  # noqa: F401  isort: skip  (defines torch.ops.fastpetl.adapter, linear and attention)

__all__ = [
    "PackCache",
    "adapter",
    "adapter_reference",
    "adapter_residual_norm",
    "adapter_residual_norm_reference",
    "attention",
    "attention_reference",
    "linear",
    "linear_reference",
    "residual_norm",
    "residual_norm_reference",
]
