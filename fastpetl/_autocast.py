"""What torch.autocast does with a call. Traceable by Dynamo."""

from __future__ import annotations

import torch


def autocast_dtype(x):
    """The dtype autocast would cast matrix products of x to, or None where it would leave x alone."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():  # in a third of the time
        return None
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)
