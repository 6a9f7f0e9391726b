"""Functional ops, each with its plain-torch reference beside it, which is the contract.

adapter, its site with a norm, linear, attention, residual_norm, phm_weights, multi_adapter and the rows are registered
ops (torch.ops.fastpetl); the others are composed of them.
"""

from ._cache import WeightCache
from .activated_linear import activated_linear, activated_linear_reference
from .adapter import adapter, adapter_reference
from .attention import attention, attention_reference
from .cross_attention import cross_attention, cross_attention_reference, cross_attention_saves
from .dropout import dropout, dropout_reference, relu_dropout, relu_dropout_reference
from .feed_forward import feed_forward, feed_forward_reference
from .hyper import HyperWeights, hyper_adapter, hyper_adapter_reference, hyper_embedding, hyper_weights
from .linear import PackCache, linear, linear_reference
from .lora import lora_linear, lora_linear_reference, lora_weight, merge_lora
from .multi_adapter import multi_adapter, multi_adapter_reference
from .multi_site import (
    multi_adapter_residual_norm,
    multi_adapter_residual_norm_reference,
    multi_site_serves,
)
from .phm import phm_adapter, phm_adapter_reference, phm_weight, phm_weights, phm_weights_reference
from .residual_norm import residual_norm, residual_norm_reference
from .rows import gather_rows, scatter_rows
from .site import adapter_residual_norm, adapter_residual_norm_reference

from . import _registered_residual_norm  # noqa: F401  isort: skip
from . import _registered  # noqa: F401  isort: skip  (defines torch.ops.fastpetl.adapter, linear and attention)
from . import _registered_phm, _registered_site  # noqa: F401  isort: skip
from . import _registered_multi_adapter  # noqa: F401  isort: skip

__all__ = [
    "HyperWeights",
    "PackCache",
    "WeightCache",
    "activated_linear",
    "activated_linear_reference",
    "adapter",
    "adapter_reference",
    "adapter_residual_norm",
    "adapter_residual_norm_reference",
    "attention",
    "attention_reference",
    "cross_attention",
    "cross_attention_reference",
    "cross_attention_saves",
    "dropout",
    "dropout_reference",
    "feed_forward",
    "feed_forward_reference",
    "hyper_adapter",
    "hyper_adapter_reference",
    "hyper_embedding",
    "hyper_weights",
    "gather_rows",
    "linear",
    "linear_reference",
    "lora_linear",
    "lora_linear_reference",
    "lora_weight",
    "merge_lora",
    "multi_adapter",
    "multi_adapter_reference",
    "multi_adapter_residual_norm",
    "multi_adapter_residual_norm_reference",
    "multi_site_serves",
    "relu_dropout",
    "relu_dropout_reference",
    "scatter_rows",
    "residual_norm",
    "residual_norm_reference",
    "phm_adapter",
    "phm_adapter_reference",
    "phm_weight",
    "phm_weights",
    "phm_weights_reference",
]
