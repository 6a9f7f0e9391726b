"""Launchers of the Triton kernels of the PHM weights; same arguments and results as the C++ ops cpu_phm_*.

    H_l[c out' + q, a in' + k] = sum_i rule_l[i, a, c] W_l[i, k, q], all l in one launch

The tensors of a list lie anywhere: a table of their addresses and sizes goes to the device, once for as long as they
stay where they are. The kernels are in phm_kernels.py.
"""

from __future__ import annotations

import torch

from . import launching
from . import phm_kernels as K

RULES, WEIGHTS = 1, 2  # bits of needs
# columns of in' x columns of out' per program, warps; columns of the rule and partial sums per step of its last sum.
# Compiled for each architecture by tests/kernels/test_aot.py; speeds have not been measured.
TILE = (32, 32, 4)
SUM_TILE = (64, 32)


def phm_forward(rules, weights):
    """Semantics: H_l[c out' + q, a in' + k] = sum_i rule_l[i, a, c] W_l[i, k, q], one H behind the other in a flat
    tensor.

    rules: [n, n, n] for each of weights, or one that all share; weights: [n, in', out']. Dense, of one dtype. Sums in
    fp32, rounded once.
    """
    _check("phm_forward", rules, weights)
    flat = weights[0].new_empty(sum(w.numel() * w.shape[0] for w in weights))
    with launching.on_device(flat):
        layers, most = _layers(rules, weights)
        bk, bq, warps = TILE
        launching.launch(K.forward, (most, len(weights)), layers, weights[0], flat, BK=bk, BQ=bq, num_warps=warps)
    return flat


def phm_backward(grad, rules, weights, needs):
    """Semantics: (gradients of the rules, of the weights), each flat, no elements where `needs` does not ask for them.

    grad: of phm_forward's result. Sums in fp32 in a fixed order, no atomics; a shared rule's over all its layers.
    """
    _check("phm_backward", rules, weights)
    size = sum(w.numel() * w.shape[0] for w in weights)
    launching.check_tensor("phm_backward", "grad", grad, (size,), weights[0].dtype, grad.device, "rules and weights")
    drules = grad.new_empty(sum(r.numel() for r in rules) if needs & RULES else 0)
    dweights = grad.new_empty(sum(w.numel() for w in weights) if needs & WEIGHTS else 0)
    if not needs & (RULES | WEIGHTS):
        return drules, dweights
    part = None
    with launching.on_device(grad):
        layers, most = _layers(rules, weights)
        sums, parts = _sums(rules, weights, grad.device)
        if needs & RULES:
            part = grad.new_empty(parts, dtype=torch.float32)
        bk, bq, warps = TILE
        launching.launch(K.backward, (most, len(weights)), layers, weights[0], grad, part,
                         dweights if needs & WEIGHTS else None, BK=bk, BQ=bq, num_warps=warps)  # fmt: skip
        if part is not None:
            widest, (bt, bc) = max(r.numel() for r in rules), SUM_TILE
            grid = launching.cdiv(widest, bc), len(rules)
            launching.launch(K.sum_parts, grid, sums, part, drules, BT=bt, BC=bc, num_warps=4)
    return drules, dweights


def _tiles(shape) -> int:
    return launching.cdiv(shape[1], TILE[0]) * launching.cdiv(shape[2], TILE[1])


def _layers(rules, weights):
    """(the kernels' table, the most tiles of a layer)."""
    shared = len(rules) == 1
    where = tuple((rules[0 if shared else i].data_ptr(), w.data_ptr(), tuple(w.shape)) for i, w in enumerate(weights))
    return _table(_layer_rows, where, weights[0].device), max(_tiles(shape) for *_, shape in where)


def _layer_rows(where):
    """One row a layer: addresses of rule and weight, n, in', out', where its H, its weight's gradient and its partial
    sums start. See phm_kernels.FIELDS."""
    rows, h, w, part = [], 0, 0, 0
    for rule, weight, (n, k, q) in where:
        rows.append((rule, weight, n, k, q, h, w, part))
        h, w, part = h + n * n * k * q, w + n * k * q, part + n**3 * _tiles((n, k, q))
    return rows


def _sum_rows(groups):
    """One row a rule: where its partial sums start, how many, of how many columns, where its gradient starts."""
    rows, part, out = [], 0, 0
    for n, count in groups:
        rows.append((part, count, n**3, out))
        part, out = part + count * n**3, out + n**3
    return rows


def _sums(rules, weights, device):
    """(the table of `sum_parts`, the number of partial sums)."""
    counts = [_tiles(w.shape) for w in weights]
    counts = [sum(counts)] if len(rules) == 1 else counts
    groups = tuple((r.shape[0], count) for r, count in zip(rules, counts, strict=True))
    return _table(_sum_rows, groups, device), sum(n**3 * count for n, count in groups)


_TABLES = {}  # what is on a device already; the oldest goes
_MOST = 64
_CAPTURED = []  # what a captured graph reads each time it is replayed, kept for good


def _table(rows, key, device):
    """rows(key) as an int64 tensor on the device. A CUDA graph that has to copy one keeps it to itself."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _TABLES.get((rows, key, TILE, device))
    if found is None:
        host = torch.tensor(rows(key), dtype=torch.int64)
        if capturing:
            host = host.pin_memory()
            _CAPTURED.append(host)
            return host.to(device, non_blocking=True)
        found = host.to(device)  # waits: another stream may read it next
        if len(_TABLES) >= _MOST:
            del _TABLES[next(iter(_TABLES))]
        _TABLES[rows, key, TILE, device] = found
    if capturing:
        _CAPTURED.append(found)
    return found


def _check(name, rules, weights):
    first = weights[0]
    if first.dtype not in launching.FLOATS:
        raise ValueError(f"{name}: weights[0] has dtype {first.dtype}, expected float32, bfloat16 or float16")
    if len(rules) not in (1, len(weights)):
        raise ValueError(f"{name}: rules has {len(rules)} entries, expected 1 or {len(weights)} to match weights")
    for i, w in enumerate(weights):
        if w.dim() != 3 or w.numel() == 0:
            raise ValueError(f"{name}: weights[{i}] has shape {tuple(w.shape)}, expected (n, in / n, out / n)")
        launching.check_tensor(name, f"weights[{i}]", w, w.shape, first.dtype, first.device)
        n, j = w.shape[0], min(i, len(rules) - 1)
        launching.check_tensor(name, f"rules[{j}]", rules[j], (n,) * 3, first.dtype, first.device, f"weights[{i}]")
