"""Which backend serves a call, and why not another one.

`resolve` answers for one call, `availability` lists everything for `python -m fastpetl info`, and `pick` chooses
between several serving backends by measuring them (`_measuring.py`; `tuned` shows what it found). On a GPU what was
measured is data: `of_size` looks it up (`_tuned.py`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import NamedTuple

import torch

from . import _tuned
from ._build import build_info, extension
from ._measuring import forget, pick, picked, tuned

__all__ = [
    "BACKENDS",
    "BY_SIZE",
    "Choice",
    "availability",
    "candidates",
    "for_op",
    "forget",
    "if_served",
    "of_size",
    "pick",
    "picked",
    "resolve",
    "resolve_for",
    "serving",
    "takes_mixed",
    "tuned",
    "verify",
]

# Every backend an op has, and the order in which "auto" tries them on a device ("reference" serves everywhere).
BACKENDS = {
    "adapter": ("cpp", "triton", "cuda", "reference"),
    "site": ("cpp", "triton", "cuda", "composed"),  # adapter and trailing norm in one launch, or in two
    "linear": ("cpp", "onednn", "torch", "reference"),
    "attention": ("cpp", "torch", "reference"),
    "residual_norm": ("cpp", "triton", "torch", "reference"),
    "dropout": ("cpp", "torch", "reference"),
    "phm": ("cpp", "triton", "reference"),
    "rows": ("triton", "cuda", "reference"),
    "multi_adapter": ("triton", "composed", "reference"),
}
_AUTO = {
    ("adapter", "cpu"): ("cpp", "reference"),
    ("adapter", "cuda"): ("triton", "reference"),
    ("site", "cpu"): ("cpp", "composed"),
    ("site", "cuda"): ("triton", "composed"),
    ("linear", "cpu"): ("cpp", "onednn", "torch"),
    ("attention", "cpu"): ("cpp", "reference", "torch"),
    ("residual_norm", "cpu"): ("cpp", "torch"),
    ("residual_norm", "cuda"): ("triton", "torch"),
    ("dropout", "cpu"): ("cpp", "torch"),
    ("phm", "cpu"): ("cpp", "reference"),
    ("phm", "cuda"): ("triton", "reference"),
    ("rows", "cuda"): ("triton", "reference"),
    ("multi_adapter", "cuda"): ("triton", "composed"),
}
_ELSEWHERE = {  # devices without kernels of ours
    "adapter": "reference",
    "site": "composed",
    "linear": "torch",
    "attention": "torch",
    "residual_norm": "torch",
    "dropout": "torch",
    "phm": "reference",
    "rows": "reference",
    "multi_adapter": "composed",  # of `adapter` calls, each with a backend of its own
}
_NAMES = tuple(dict.fromkeys(name for names in BACKENDS.values() for name in names))
BY_SIZE = "by size"  # in place of a backend's name: each call asks the table of its GPU (`of_size`)
_KERNELS = {"dropout": "activation"}  # where csrc/cpu's name is another
MAX_HEAD_DIM = 128  # csrc/cpu's attention keeps one head's row in registers


class Choice(NamedTuple):
    """The backend that serves a call and why it is this one."""

    name: str
    reason: str


# --- what can serve ---------------------------------------------------------------------------------------------------


@functools.cache
def _triton_kernels(op: str) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    try:
        importlib.import_module(f"fastpetl.kernels.{op}")
    except ImportError as error:
        return False, f"fastpetl.kernels.{op} does not import: {error}"
    return True, "triton is installed"


@functools.cache
def _cuda_image(index: int) -> tuple[bool, str]:
    """Whether the compiled module holds code for that GPU: a cubin of its major version, or PTX of an older one."""
    major, minor = torch.cuda.get_device_capability(index)
    archs = build_info()["cuda_archs"]
    for arch in filter(None, archs.replace(",", ";").replace(" ", ";").split(";")):
        number = arch.removesuffix("+PTX").removeprefix("sm_").replace(".", "")
        built = divmod(int(number.rstrip("af")), 10)
        exact = number.endswith("a")
        if built == (major, minor) or not exact and (built[0] == major and built[1] <= minor):
            return True, "the CUDA kernels are built"
        if arch.endswith("+PTX") and not exact and built < (major, minor):
            return True, "the CUDA kernels are built (as PTX)"
    return False, f"the CUDA kernels are built for {archs}, this device has {major}.{minor}"


def _verify_cuda(op, device, dtype, head_dim):
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"the CUDA kernels take float32, bfloat16 and float16, the tensors are {_short(dtype)}"
    if device != "cuda":
        return False, f"the CUDA kernels run on CUDA, the tensors are on {device}"
    module, reason = extension()
    if module is None:
        return False, reason
    if not hasattr(torch.ops.fastpetl, "cuda_gather_rows" if op == "rows" else f"cuda_{op}_forward"):
        return False, "fastpetl._C was built without the CUDA kernels (no nvcc was found, or FASTPETL_CUDA=0)"
    if not torch.cuda.is_available():
        return True, "the CUDA kernels are built"
    return _cuda_image(torch.cuda.current_device())


def _verify_cpp(op, device, dtype, head_dim):
    if device != "cpu":
        return False, f"the C++ kernels run on the CPU, the tensors are on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"the C++ kernels take float32, bfloat16 and float16, the tensors are {_short(dtype)}"
    if op == "attention" and head_dim > MAX_HEAD_DIM:
        return False, f"the C++ attention takes heads of at most {MAX_HEAD_DIM} channels, these have {head_dim}"
    module, reason = extension()
    if module is None:
        return False, reason
    kernel = f"cpu_{_KERNELS.get(op, op)}_forward"
    if not hasattr(torch.ops.fastpetl, kernel):
        return False, f"fastpetl._C was built without {kernel}"
    return True, "the C++ kernels are built"


def _verify_triton(op, device, dtype, head_dim):
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"the Triton kernels take float32, bfloat16 and float16, the tensors are {_short(dtype)}"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            False,
            "the tensors are on the CPU, where Triton kernels run only in its interpreter (TRITON_INTERPRET=1)",
        )
    if device not in ("cpu", "cuda"):
        return False, f"the Triton kernels run on CUDA, the tensors are on {device}"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return False, f"the Triton kernels need compute capability 8.0 or newer, this device has {major}.{minor}"
    return _triton_kernels(op)


def _verify_onednn(op, device, dtype, head_dim):
    if device != "cpu":
        return False, f"oneDNN runs on the CPU, the tensors are on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return False, f"the oneDNN path takes float32 and bfloat16, the tensors are {_short(dtype)}"
    if not torch.backends.mkldnn.is_available():
        return False, "this torch is built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False, "this torch has no mkldnn._linear_pointwise"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False, "oneDNN does not support bfloat16 on this CPU"
    return True, "this torch is built with oneDNN"


def _verify_torch(op, device, dtype, head_dim):
    return True, "plain torch"


_VERIFY = {
    "cpp": _verify_cpp,
    "triton": _verify_triton,
    "cuda": _verify_cuda,
    "onednn": _verify_onednn,
    "torch": _verify_torch,
    "composed": _verify_torch,
    "reference": _verify_torch,
}


def _short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def verify(op: str, name: str, device: str, dtype: torch.dtype, head_dim: int = 0) -> tuple[bool, str]:
    """Semantics: (can backend `name` serve `op` on tensors of this device type and dtype, the reason in words)."""
    if name not in BACKENDS[op]:
        return False, f"{op} has no {name} backend (it has {', '.join(BACKENDS[op])})"
    return _VERIFY[name](op, device, dtype, head_dim)


# --- which one serves -------------------------------------------------------------------------------------------------


def for_op(op: str, backend: str) -> str:
    """Semantics: `backend` if `op` has it, else "auto"; for callers that pass one name on to several ops."""
    _check_name(op, backend)
    return backend if backend in BACKENDS[op] else "auto"


@functools.lru_cache(maxsize=256)
def candidates(op: str, device: str, dtype: torch.dtype, head_dim: int = 0) -> tuple[str, ...]:
    """Semantics: the backends "auto" may use for `op` here, in their fixed order; never empty."""
    names = _AUTO.get((op, device), (_ELSEWHERE[op],))
    return tuple(name for name in names if verify(op, name, device, dtype, head_dim)[0])


def serving(op: str, backend: str, device: str, dtype: torch.dtype, head_dim: int = 0) -> tuple[str, ...]:
    """Semantics: the backends to choose from by measurement: `candidates` on "auto", else only the one asked for."""
    forced = _environment("FASTPETL_BACKEND") or "auto"
    if backend == "auto" and (forced == "auto" or forced in _NAMES and forced not in BACKENDS[op]):
        by_size = device == "cuda" and _tuned.has(op, dtype)
        return (BY_SIZE,) if by_size else candidates(op, device, dtype, head_dim)
    return (resolve_for(op, backend, device, dtype, head_dim).name,)


def resolve(op: str, backend: str, tensors, spec=None) -> Choice:
    """Semantics: the backend that serves `op` on `tensors` (the first one decides device and dtype), and why.

    `backend` "auto" takes FASTPETL_BACKEND if it is set, else the first backend that serves; an explicit name that
    cannot serve raises RuntimeError with the reason. `spec` is the head size for attention and is not used otherwise:
    shapes never matter.
    """
    first = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
    if torch._C._are_functorch_transforms_active():
        return _under_functorch(op, backend)
    return resolve_for(op, backend, first.device.type, first.dtype, spec if isinstance(spec, int) else 0)


def resolve_for(op: str, backend: str, device: str, dtype: torch.dtype, head_dim: int = 0) -> Choice:
    """Semantics: as `resolve`, before there are tensors (patch time, torch.compile)."""
    set_to = os.environ._data  # os.environ.get without its detour, a microsecond a look
    key = (op, backend, device, dtype, head_dim, set_to.get(_FORCED), set_to.get(_INTERPRET))
    found = _RESOLVED.get(key)
    if found is None:
        forced = os.environ.get("FASTPETL_BACKEND") or "auto" if backend == "auto" else "auto"
        found = _RESOLVED[key] = _resolve(op, backend, forced, device, dtype, head_dim)
    return found


_RESOLVED: dict[tuple, Choice] = {}
_FORCED, _INTERPRET = (os.environ.encodekey(name) for name in ("FASTPETL_BACKEND", "TRITON_INTERPRET"))


def if_served(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Semantics: the backend that serves `op`, None where one asked for by name does not: for a call that several other
    ops can make up, which then answer for that backend.
    """
    if torch._C._are_functorch_transforms_active():
        return None
    asked = (_environment("FASTPETL_BACKEND") or "auto") if backend == "auto" else backend
    if asked == "auto":
        return resolve_for(op, backend, device, dtype).name
    _check_name(op, backend)
    return asked if _serves(op, asked, device, dtype, _environment("TRITON_INTERPRET")) else None


def takes_mixed(op: str, backend: str, device: str) -> bool:
    """Semantics: is an eager call of `op` whose tensors are of several dtypes, as under torch.autocast, served by a
    kernel that takes them as they are: Triton's, where "auto" or who asks by name means it.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    asked = (_environment("FASTPETL_BACKEND") or "auto") if backend == "auto" else backend
    if asked == "auto":
        return candidates(op, device, torch.float32)[0] == "triton"
    return asked == "triton" and _serves(op, asked, device, torch.float32, _environment("TRITON_INTERPRET"))


def of_size(op: str, name: str, x: torch.Tensor, width: int, backward: bool = False) -> str:
    """Semantics: `name`; for BY_SIZE the backend measured fastest on the GPU of x [..., d] for its rows and that width,
    if it serves here, else what "auto" takes without a table. The backward has a table of its own: every backend takes
    what another's forward saved.
    """
    if name != BY_SIZE:
        return name
    found = _tuned.lookup(f"{op}_backward" if backward else op, x, width)
    if found is not None and _serves(op, found, x.device.type, x.dtype, _environment("TRITON_INTERPRET")):
        return found
    return candidates(op, x.device.type, x.dtype)[0]


@functools.lru_cache(maxsize=256)
def _serves(op, name, device, dtype, _interpret) -> bool:
    return verify(op, name, device, dtype)[0]


def _environment(name: str) -> str | None:
    return os.environ.get(name) if _encoded(name) in os.environ._data else None


_encoded = functools.cache(os.environ.encodekey)


# Dynamo evaluates this once while tracing: the backend becomes a constant of the compiled code.
def resolve_constant(*args, **kwargs) -> Choice:
    """Semantics: `resolve_for`, a constant to Dynamo."""
    return resolve_for(*args, **kwargs)


def if_served_constant(*args) -> str | None:
    """Semantics: `if_served`, a constant to Dynamo."""
    return if_served(*args)


# All that torch.compiler.assume_constant_result does, but without importing Dynamo: two seconds for who never compiles.
resolve_constant._dynamo_marked_constant = if_served_constant._dynamo_marked_constant = True


def _resolve(op, backend, forced, device, dtype, head_dim) -> Choice:
    _check_name(op, backend)
    if forced not in ("auto", *_NAMES):
        raise ValueError(f"{op}: FASTPETL_BACKEND is {forced!r}, expected auto, {', '.join(_NAMES)}")
    source = f"backend is {backend!r}"
    note = ""
    if forced != "auto":
        if forced in BACKENDS[op]:
            backend, source = forced, f"FASTPETL_BACKEND is {forced!r}"
        else:
            note = f"FASTPETL_BACKEND is {forced!r}, which {op} does not have; "
    if backend != "auto":
        ok, reason = verify(op, backend, device, dtype, head_dim)
        if not ok:
            raise RuntimeError(f"{op}: {source}, which cannot serve this call: {reason}")
        return Choice(backend, source)
    if device == "cuda" and _tuned.has(op, dtype):
        return Choice(BY_SIZE, note + "auto: by size, as measured on this kind of GPU (fastpetl/tuned.json)")
    refused = []
    for name in _AUTO.get((op, device), ()):
        ok, reason = verify(op, name, device, dtype, head_dim)
        if ok:
            break
        refused.append(f"{name}: {reason}")
    else:
        name = _ELSEWHERE[op]
        reason = f"no fused kernel for {device} tensors" if not refused else "plain torch"
    return Choice(name, note + "auto: " + ("; ".join(["fell back", *refused]) if refused else reason))


def _under_functorch(op: str, backend: str) -> Choice:
    _check_name(op, backend)
    reason = "torch.func transforms (vmap, grad, jvp, ...) are active, which only plain torch follows"
    if backend not in ("auto", "reference"):
        raise RuntimeError(
            f"{op}: backend is {backend!r}, which cannot serve this call: {reason}; use backend='reference'"
        )
    return Choice("reference", reason)


def names() -> tuple[str, ...]:
    """Semantics: what `backend=` may be, for one op or another."""
    return ("auto", *_NAMES)


def _check_name(op: str, backend: str) -> None:
    if backend != "auto" and backend not in _NAMES:
        raise ValueError(f"{op}: backend is {backend!r}, expected auto, {', '.join(BACKENDS[op])}")


def availability() -> list[tuple[str, str, bool, str]]:
    """Semantics: rows (op, backend, available, reason): can this backend serve float32 calls on this machine at all."""
    device = {"triton": "cuda", "cuda": "cuda"}
    rows = []
    for op, names in BACKENDS.items():
        for name in names:
            ok, reason = verify(op, name, device.get(name, "cpu"), torch.float32)
            if ok and name in device and not torch.cuda.is_available():
                hint = " (its interpreter: TRITON_INTERPRET=1, backend='triton')" if name == "triton" else ""
                ok, reason = False, f"{reason}, but there is no CUDA device{hint}"
            rows.append((op, name, ok, reason))
    return rows
