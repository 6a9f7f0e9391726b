"""The frozen linear on each backend: C++ kernels, oneDNN, torch's own (MKL on x86), and the measurement that chooses.

Every backend has the signature of the raw C++ ops: forward (x, weights, biases, prologue, norm weight, norm bias, eps)
-> (y, stats), backward (grad, x, stats, weights, prologue, norm weight) -> dx; all two-dimensional and dense.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from ._common import dense, wide
from ._measured import rows_class, steady

NONE, NORM, GELU = 0, 1, 2  # prologues; the ABI of csrc/cpu
CODED = 3  # GELU, its derivative kept in 20 bits an element (csrc/cpu/activation_impl.h) in place of x: run_*_coded


def codes(backend, x, prologue) -> bool:
    """Semantics: does a training forward keep the code of GELU's derivative, 5/8 of x? fp32 on the CPU, a multiple of
    32 wide; a backend of other libraries asked for by name keeps x.
    """
    if prologue != GELU or x.dtype != torch.float32 or not x.is_cpu or x.shape[-1] % 32 or x.numel() == 0:
        return False
    return "cpp" in backends.serving("linear", backend, "cpu", x.dtype)


def _serving(backend, x) -> tuple:
    names = backends.serving("linear", backend, x.device.type, x.dtype)
    return steady("linear", names, x.numel() // max(x.shape[-1], 1))


def run_forward(backend, x, weights, biases, prologue, weight, bias, eps, cache=None):
    """Semantics: (y, stats) by `backend`, on "auto" by the fastest; stats are empty unless the prologue is a norm."""
    weights, biases = [w.contiguous() for w in weights], [b.contiguous() for b in biases]
    weight, bias = dense(weight), dense(bias)
    if x.shape[0] == 0:
        n = sum(w.shape[0] for w in weights)
        return x.new_empty(0, n), x.new_empty((0, 2) if prologue == NORM else 0, dtype=wide(x))
    names = _serving(backend, x)
    args = (x, weights, biases, prologue, weight, bias, eps)

    def runs():  # a cache holds one backend's pack: each is measured with its own, as it is used
        own = {n: None if cache is None else type(cache)() for n in names}
        return {n: lambda n=n: _FORWARD[n](*args, own[n])[0] for n in names}

    name = _choose("forward", names, runs, x, weights, prologue, cache)
    return _FORWARD[name](*args, cache)


def run_forward_coded(backend, x, weights, biases):
    """Semantics: (y, code): as run_forward behind a GELU, and what run_backward takes as x with the prologue CODED."""
    weights, biases = [w.contiguous() for w in weights], [b.contiguous() for b in biases]
    names = _serving(backend, x)

    def run(name):
        if name == "cpp":
            return torch.ops.fastpetl.cpu_linear_forward_coded(x, weights, biases)
        h, code = torch.ops.fastpetl.cpu_activation_forward(x, GELU, False)
        return _FORWARD[name](h, weights, biases, NONE, None, None, 0.0, None)[0], code

    def runs():
        return {n: lambda n=n: run(n)[0] for n in names}

    return run(_choose("forward", names, runs, x, weights, CODED, None))


def _choose(direction, names, runs, x, weights, prologue, cache):
    if len(names) == 1:
        return names[0]
    key = (direction, *_shape(x, weights, prologue, cache))
    return backends.picked(key) or backends.pick(key, runs(), "torch", _tolerance(x, prologue))


def is_torch(backend, x, weights, biases, prologue, weight, bias, eps, cache, grad) -> bool:
    """Semantics: is torch's own GEMM what this call, and with `grad` its backward too, is served by?

    Measures both where need be: what a forward keeps must not depend on when a backward came by, or a checkpoint's
    recomputation would keep something else than its forward.
    """
    names = _serving(backend, x)
    if len(names) == 1 or x.numel() == 0:
        return names[0] == "torch"
    shape = _shape(x, weights, prologue, None if grad else cache)
    if backends.picked(("forward", *shape)) is None or grad and backends.picked(("backward", *shape)) is None:
        with torch.no_grad():
            x2 = x.detach().reshape(-1, x.shape[-1]).contiguous()
            y, stats = run_forward(backend, x2, weights, biases, prologue, weight, bias, eps, None if grad else cache)
            if grad:
                run_backward(backend, y, x2, stats, weights, prologue, weight)
    found = backends.picked(("forward", *shape)) == "torch"
    return found and (not grad or backends.picked(("backward", *shape)) == "torch")


def run_backward(backend, grad, x, stats, weights, prologue, weight):
    """Semantics: dx by `backend`; x and stats may be None where the prologue does not need them."""
    weights = [w.contiguous() for w in weights]
    if grad.shape[0] == 0:
        return grad.new_empty(0, weights[0].shape[1])
    names = _serving(backend, grad)
    args = (grad, x, stats, weights, prologue, dense(weight))

    def runs():
        return {n: lambda n=n: _BACKWARD[n](*args) for n in names}

    return _BACKWARD[_choose("backward", names, runs, grad, weights, prologue, None)](*args)


def _shape(x, weights, prologue, cache):
    """The shape class: rows by power of two, everything else exactly; threads too, since they move the winner."""
    return (
        rows_class(x),
        tuple([w.shape for w in weights]),
        x.dtype,
        prologue,
        cache is not None,
        torch.get_num_threads(),
    )


def _tolerance(x, prologue) -> float:
    """True fp32 differs between libraries by summation order only; tf32 and bf16 arithmetic by 5e-4 and more."""
    if x.dtype != torch.float32:
        return 2e-2  # bf16 results of the same fp32 sums, rounded once or twice
    return 1e-6 if prologue == NONE else 1e-5  # a norm magnifies its own rounding by |mean| / std


# --- prologues in plain torch, shared by torch and oneDNN -------------------------------------------------------------


def _prologue(x, prologue, weight, bias, eps):
    """(p(x), stats)."""
    if prologue == NORM:
        # CPU kernels keep statistics in fp32 only when the parameters are fp32
        w, b = (_like_stats(t, x) for t in (weight, bias))
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], w, b, eps)
        return y, torch.cat([mean, rstd], -1)
    return (F.gelu(x) if prologue == GELU else x), x.new_empty(0, dtype=wide(x))


def _prologue_backward(dp, x, stats, prologue, weight):
    if prologue == NORM:
        mean, rstd = (s.contiguous() for s in stats.split(1, -1))
        w = _like_stats(weight, x)
        mask = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(dp, x, x.shape[-1:], mean, rstd, w, None, mask)[0]
    if prologue == CODED:
        return torch.ops.fastpetl.cpu_activation_backward(dp, x, GELU, 1.0)
    return torch.ops.aten.gelu_backward(dp, x, approximate="none") if prologue == GELU else dp


def _like_stats(t, x):
    return t.to(wide(x)) if t is not None and x.device.type == "cpu" else t


# --- backends ---------------------------------------------------------------------------------------------------------


def _cpp_forward(x, weights, biases, prologue, weight, bias, eps, cache):
    ops = torch.ops.fastpetl
    pack = None if cache is None else cache.get("cpp", weights, lambda: ops.cpu_linear_pack(weights, False))
    return ops.cpu_linear_forward(x, weights, biases, prologue, weight, bias, eps, pack)


def _cpp_backward(grad, x, stats, weights, prologue, weight):
    if prologue == CODED:
        return torch.ops.fastpetl.cpu_linear_backward_coded(grad, x, weights)
    x = grad.new_empty(0, weights[0].shape[1]) if x is None else x
    return torch.ops.fastpetl.cpu_linear_backward(grad, x, stats, weights, prologue, weight, None)


def _torch_forward(x, weights, biases, prologue, weight, bias, eps, cache):
    p, stats = _prologue(x, prologue, weight, bias, eps)
    if len(weights) == 1:
        return F.linear(p, weights[0], biases[0] if biases else None), stats
    y = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))
    for i, part in enumerate(
        y.split([w.shape[0] for w in weights], 1)
    ):  # each GEMM writes its columns: nothing is concatenated
        if biases:
            torch.addmm(biases[i], p, weights[i].t(), out=part)
        else:
            torch.mm(p, weights[i].t(), out=part)
    return y, stats


def _torch_backward(grad, x, stats, weights, prologue, weight):
    parts = grad.split([w.shape[0] for w in weights], 1)
    dp = parts[0] @ weights[0]
    for part, w in zip(parts[1:], weights[1:], strict=True):
        dp.addmm_(part, w)
    return _prologue_backward(dp, x, stats, prologue, weight)


def _one(tensors):
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _onednn_linear(x, w, b):
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")


def _onednn_forward(x, weights, biases, prologue, weight, bias, eps, cache):
    p, stats = _prologue(x, prologue, weight, bias, eps)
    w = _one(weights) if cache is None else cache.get("onednn", weights, lambda: _onednn_pack(weights, x.shape[0]))
    return _onednn_linear(p, w, _one(biases) if biases else None), stats


def _onednn_pack(weights, rows):
    return torch.ops.mkldnn._reorder_linear_weight(_one(weights), rows)


def _onednn_backward(grad, x, stats, weights, prologue, weight):
    return _prologue_backward(_onednn_linear(grad, _one(weights).t(), None), x, stats, prologue, weight)


_FORWARD = {"cpp": _cpp_forward, "onednn": _onednn_forward, "torch": _torch_forward, "reference": _torch_forward}
_BACKWARD = {"cpp": _cpp_backward, "onednn": _onednn_backward, "torch": _torch_backward, "reference": _torch_backward}
