"""Which backend serves a call, and why not another one.

`resolve` answers for one call, `availability` lists everything for `python -m fastpetl info`, and `pick` chooses
between several serving backends by measuring them once per process and shape class (`tuned` shows what it found).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
import time
from typing import NamedTuple

import torch

from ._build import extension

__all__ = [
    "BACKENDS",
    "Choice",
    "availability",
    "candidates",
    "for_op",
    "pick",
    "resolve",
    "resolve_for",
    "serving",
    "tuned",
    "verify",
]

# Every backend an op has, and the order in which "auto" tries them on a device ("reference" serves everywhere).
BACKENDS = {
    "adapter": ("cpp", "triton", "reference"),
    "linear": ("cpp", "onednn", "torch", "reference"),
    "attention": ("cpp", "torch", "reference"),
    "residual_norm": ("cpp", "triton", "torch", "reference"),
    "phm": ("cpp", "triton", "reference"),
    "rows": ("triton", "reference"),
    "multi_adapter": ("triton", "composed", "reference"),
}
_AUTO = {
    ("adapter", "cpu"): ("cpp", "reference"),
    ("adapter", "cuda"): ("triton", "reference"),
    ("linear", "cpu"): ("cpp", "onednn", "torch"),
    ("attention", "cpu"): ("cpp", "reference", "torch"),
    ("residual_norm", "cpu"): ("cpp", "torch"),
    ("residual_norm", "cuda"): ("triton", "torch"),
    ("phm", "cpu"): ("cpp", "reference"),
    ("phm", "cuda"): ("triton", "reference"),
    ("rows", "cuda"): ("triton", "reference"),
    ("multi_adapter", "cuda"): ("triton", "composed"),
}
_ELSEWHERE = {  # devices without kernels of ours
    "adapter": "reference",
    "linear": "torch",
    "attention": "torch",
    "residual_norm": "torch",
    "phm": "reference",
    "rows": "reference",
    "multi_adapter": "composed",  # of `adapter` calls, each with a backend of its own
}
_NAMES = tuple(dict.fromkeys(name for names in BACKENDS.values() for name in names))
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
    if not hasattr(torch.ops.fastpetl, f"cpu_{op}_forward"):
        return False, f"fastpetl._C was built without cpu_{op}_forward"
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
        return candidates(op, device, dtype, head_dim)
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


def _environment(name: str) -> str | None:
    return os.environ.get(name) if _encoded(name) in os.environ._data else None


_encoded = functools.cache(os.environ.encodekey)


# Dynamo evaluates this once while tracing: the backend becomes a constant of the compiled code.
def resolve_constant(*args, **kwargs) -> Choice:
    """Semantics: `resolve_for`, a constant to Dynamo."""
    return resolve_for(*args, **kwargs)


# All that torch.compiler.assume_constant_result does, but without importing Dynamo: two seconds for who never compiles.
resolve_constant._dynamo_marked_constant = True


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


def _check_name(op: str, backend: str) -> None:
    if backend != "auto" and backend not in _NAMES:
        raise ValueError(f"{op}: backend is {backend!r}, expected auto, {', '.join(BACKENDS[op])}")


def availability() -> list[tuple[str, str, bool, str]]:
    """Semantics: rows (op, backend, available, reason): can this backend serve float32 calls on this machine at all."""
    device = {"triton": "cuda"}
    rows = []
    for op, names in BACKENDS.items():
        for name in names:
            ok, reason = verify(op, name, device.get(name, "cpu"), torch.float32)
            if ok and name == "triton" and not torch.cuda.is_available():
                ok, reason = (
                    False,
                    f"{reason}, but there is no CUDA device (its interpreter: TRITON_INTERPRET=1, backend='triton')",
                )
            rows.append((op, name, ok, reason))
    return rows


# --- choosing by measurement ------------------------------------------------------------------------------------------


class Tuned(NamedTuple):
    """What one measurement found: the winner, milliseconds of each true candidate, why the others were rejected."""

    name: str
    milliseconds: dict
    rejected: dict


_TUNED: dict[tuple, Tuned] = {}
_TUNING = threading.RLock()
_MARGIN = 1.1  # what another backend must be faster than torch's by: less is the measurement's noise
_CACHE = 32 << 20  # bytes written between two runs: more than a core's caches
_ROWS = 256  # rows compared with the baseline: a wrong or low-precision kernel is wrong in all of them


def tuned() -> dict[tuple, Tuned]:
    """Semantics: every measurement of this process, keyed by shape class; a copy."""
    return dict(_TUNED)


def forget() -> None:
    """Semantics: drop all measurements; the next call of each shape class measures again."""
    _TUNED.clear()


def picked(key: tuple) -> str | None:
    """Semantics: what `pick` found for `key`, None if nothing has been measured or measuring is turned off."""
    found = _TUNED.get(key)
    return None if found is None else found.name


def pick(key: tuple, runs: dict, baseline: str, tolerance: float) -> str:
    """Semantics: the fastest of `runs` (name -> function returning a tensor), measured once per `key` and process.

    Every candidate must agree with `runs[baseline]` to `tolerance` (relative Frobenius error over the first rows), or
    it is rejected. FASTPETL_TUNE=0: the first of `runs`, nothing measured. Data with infinities or NaN judge nobody:
    first of `runs`, not remembered. "torch", where it is among them, is taken unless another is 10 % faster: less
    than that is the measurement's noise, and torch's own calls cost least around them.
    """
    found = _TUNED.get(key)
    if found is not None:
        return found.name
    first = next(iter(runs))
    if len(runs) == 1 or os.environ.get("FASTPETL_TUNE") == "0":
        return first
    with _TUNING, torch.no_grad():
        found = _TUNED.get(key) or _measure(runs, baseline, tolerance)
        if found is None:
            return first
        _TUNED[key] = found
    return found.name


def _measure(runs, baseline, tolerance):
    want = runs[baseline]().reshape(-1)[: _ROWS * 1024].float().clone()
    norm = want.norm().item()
    if not norm < float("inf"):  # also true for NaN
        return None
    times, rejected = {}, {}
    for name in sorted(runs, key=lambda n: n != baseline):
        try:
            error = (runs[name]().reshape(-1)[: want.numel()].float() - want).norm().item()  # this run is the warm-up
        except RuntimeError as failure:
            rejected[name] = f"failed: {failure}"
            continue
        if not error <= tolerance * norm:
            rejected[name] = f"differs from {baseline} by {error / max(norm, 1e-30):.1e}, allowed {tolerance:.1e}"
            continue
        times[name] = [_once(runs[name])]
    milliseconds = _cold({name: runs[name] for name in times}, times)
    best = min(milliseconds, key=milliseconds.get)
    if milliseconds.get("torch", float("inf")) <= _MARGIN * milliseconds[best]:
        best = "torch"
    return Tuned(best, milliseconds, rejected)


def _once(run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _cold(runs, times) -> dict:
    """Semantics: name -> milliseconds, the smallest of three rounds through all candidates. Between runs the caches are
    filled with something else, as in a model, where a layer's weights were last read a whole step ago; not where the
    runs are over in less than it takes to notice. A clear loser keeps its first time.
    """
    best = min(t[0] for t in times.values())
    other = torch.ones(_CACHE // 4) if best > 0.2 else None
    close = {name: run for name, run in runs.items() if times[name][0] <= 2 * best}
    if other is not None:
        times = times | {name: [] for name in close}
    for _ in range(3 if len(close) > 1 else 0):
        for name, run in close.items():
            if other is not None:
                other.add_(1)
            times[name].append(_once(run))
    return {name: min(t or [best]) for name, t in times.items()}
