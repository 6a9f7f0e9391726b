"""What the Triton launchers share: the launch itself, the current device, the checks that keep a kernel in bounds."""

from __future__ import annotations

import contextlib

import torch
import triton


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.runtime.JITFunction)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def launch(kernel, grid, *args, **options):
    """Every launch goes through here: the ahead-of-time check replaces it."""
    kernel[grid](*args, **options)


def on_device(x: torch.Tensor):
    """A context in which x's device is the current one: Triton launches there."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def check_matrix(function: str, name: str, x) -> None:
    """x must be a dense floating-point [rows, d] that the kernels take."""
    if x.dim() != 2:
        raise ValueError(f"{function}: {name} has shape {tuple(x.shape)}, expected two dimensions")
    if x.dtype not in FLOATS:
        raise ValueError(f"{function}: {name} has dtype {x.dtype}, expected float32, bfloat16 or float16")
    if not x.is_contiguous():
        raise ValueError(f"{function}: {name} has strides {x.stride()}, expected a contiguous tensor")


def check_tensor(function: str, name: str, t, shape, dtype, device, why: str = "x") -> None:
    """A kernel trusts its pointers: what does not match would be read out of bounds."""
    if t.shape != shape:
        raise ValueError(f"{function}: {name} has shape {tuple(t.shape)}, expected {shape} to match {why}")
    if t.dtype != dtype:
        raise ValueError(f"{function}: {name} has dtype {t.dtype}, expected {dtype}")
    if t.device != device:
        raise ValueError(f"{function}: {name} is on {t.device}, expected {device} like x")
    if not t.is_contiguous():
        raise ValueError(f"{function}: {name} has strides {t.stride()}, expected a contiguous tensor")
