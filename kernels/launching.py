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


_COMPILED: dict = {}  # what has been launched before: signature -> the compiled kernel's parts, its constants' values
RUNTIME = triton.knobs.runtime
_WORD = 1 << 31
_TENSOR, _PARAMETER = torch.Tensor, torch.nn.Parameter


def launch(kernel, grid, *args, **options):
    """Every launch goes through here: `kernel`, its run-time arguments in order, its constants and options by name.

    A kernel that was launched before with arguments of the same kinds is called directly: Triton's own front door takes
    longer to find it than a small kernel runs. All that a compiled kernel may depend on is in the key: dtypes, which
    arguments are None, what Triton specialises integers on; tensors that do not lie at 16 bytes take the front door.
    Triton's launcher then gets addresses: of a tensor it would ask the address once more, and the driver whose it is.
    Nobody listens where Triton's hooks are chains without a link (they are never None).
    """
    if INTERPRETED:
        kernel[grid](*args, **options)
        return
    key, low, values = [id(kernel), torch.cuda.current_device(), *options.values()], 0, []
    append, give = key.append, values.append
    for a in args:
        kind = type(a)
        if kind is _TENSOR or kind is _PARAMETER:  # what most are
            append(a.dtype)
            give(address := a.data_ptr())
            low |= address
        elif a is None or kind is float:
            append(kind)
            give(a)
        elif kind is int:
            append((a == 1, a % 16 == 0, -_WORD <= a < _WORD))
            give(a)
        elif kind is tuple:  # tensors of tensors: rare, and of any depth
            low = 1
        else:
            append(a.dtype)
            give(address := a.data_ptr())
            low |= address
    key = tuple(key)
    found = _COMPILED.get(key)
    if found is not None and not low & 15:
        compiled, run, function, packed, constants = found
        grid = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
            compiled[grid](*args, *constants)
        else:
            stream = torch._C._cuda_getCurrentRawStream(key[1])
            run(*grid, stream, function, packed, None, None, None, *values, *constants)
        return
    compiled = kernel[grid](*args, **options)
    if compiled is not None and not low & 15:
        constants = [options[name] for name in kernel.arg_names[len(args) :]]
        _COMPILED[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, constants


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own is a kernel function too, which costs microseconds."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def on_device(x: torch.Tensor):
    """A context in which x's device is the current one: Triton launches there."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device_of(x)
    return _NOWHERE


_NOWHERE = contextlib.nullcontext()


def check_matrix(function: str, name: str, x) -> None:
    """x must be a dense floating-point [rows, d] that the kernels take."""
    if x.dim() != 2:
        raise ValueError(f"{function}: {name} has shape {tuple(x.shape)}, expected two dimensions")
    if x.dtype not in FLOATS:
        raise ValueError(f"{function}: {name} has dtype {x.dtype}, expected float32, bfloat16 or float16")
    if not x.is_contiguous():
        raise ValueError(f"{function}: {name} has strides {x.stride()}, expected a contiguous tensor")


def widest(*tensors, dtype: torch.dtype | None = None) -> torch.dtype:
    """Semantics: the dtype of a sum of these and one of `dtype`, as torch promotes: two different ones of those that
    the kernels take make float32. None adds nothing.
    """
    for t in tensors:
        if t is not None and t.dtype is not dtype:
            dtype = t.dtype if dtype is None else torch.float32
    return dtype


def check_tensor(function: str, name: str, t, shape, dtype, device, why: str = "x") -> None:
    """A kernel trusts its pointers: what does not match would be read out of bounds. dtype None: any that they take."""
    if dtype is None:
        dtype = t.dtype if t.dtype in FLOATS else torch.float32
    if t.shape == shape and t.dtype is dtype and t.device == device and t.is_contiguous():
        return
    if t.shape != shape:
        raise ValueError(f"{function}: {name} has shape {tuple(t.shape)}, expected {shape} to match {why}")
    if t.dtype != dtype:
        raise ValueError(f"{function}: {name} has dtype {t.dtype}, expected {dtype}")
    if t.device != device:
        raise ValueError(f"{function}: {name} is on {t.device}, expected {device} like x")
    raise ValueError(f"{function}: {name} has strides {t.stride()}, expected a contiguous tensor")
