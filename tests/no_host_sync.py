"""A mode in which torch calls that wait for the device raise: what a CUDA graph cannot capture, found without a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSynchronisation(TorchDispatchMode):
    """Refuses what waits for the device: reading a value, and results whose shape depends on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "item", "bincount", "unique", "is_nonzero", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.seen.add(name)
        assert not name.startswith(self.REFUSED), f"{name} waits for the device"
        assert not (name == "_to_copy" and "device" in (kwargs or {})), "a copy to or from the host"
        assert not (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])), "boolean index"
        return func(*args, **(kwargs or {}))
