"""Launchers of the CUDA C++ kernels: what runs over the rows is one launch, the sums over all rows are cuBLAS's.

Every launcher has the signature of its op's others (`_adapter.py`, `_site.py`, `_rows.py`).
"""

from __future__ import annotations

import functools

import torch

from .._build import extension

_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
DX, DW_DOWN, DB_DOWN, DW_UP, DB_UP, DNORM_WEIGHT, DNORM_BIAS, DTAIL_WEIGHT, DTAIL_BIAS = (1 << i for i in range(9))


def adapter_forward(*args):
    """Semantics: as `_adapter.run_forward`: the site without a tail."""
    _check_fits(args[0], args[1], False)
    return torch.ops.fastpetl.cuda_adapter_forward.default(*args)


def adapter_backward(grad, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x, code, scale, needs):
    """Semantics: as `_adapter.run_backward`."""
    saved = x, z, stats, w_down, w_up, norm_weight, norm_bias
    return site_backward(grad, None, None, None, None, *saved, add_x, code, scale, 0, needs)[1:8]


def site_forward(*args):
    """Semantics: as `_site.run_forward`."""
    _check_fits(args[0], args[1], False)
    return torch.ops.fastpetl.cuda_site_forward.default(*args)


def site_backward(g_s, g_n, s, tail_stats, tail_weight, x, z, stats, w_down, w_up, norm_weight, norm_bias, add_x, code,
                  scale, tail, needs):  # fmt: skip
    """Semantics: as `_site.run_backward`; sums in fp32, no atomics."""
    _check_fits(x, w_down, True)
    want_tail = bool(needs & (DTAIL_WEIGHT | DTAIL_BIAS))
    g, dx, dz, h, partial = _over_rows(
        g_s, g_n, s, tail_stats, tail_weight, x, z, stats if norm_weight is not None else None, w_down, w_up,
        norm_weight, add_x, code, scale, tail, bool(needs & DX), bool(needs & DW_UP), want_tail,
    )  # fmt: skip
    g = g_s if g_n is None else g
    grads = _weight_gradients(g, x, stats, dz, h, w_down, norm_weight, norm_bias, scale, needs)
    # Two tensors, not two rows of one: an op's results share no memory.
    dweight, dbias = (t.to(x.dtype, copy=True) for t in partial.sum(0)) if want_tail else (None, None)
    grads += dweight if needs & DTAIL_WEIGHT else None, dbias if needs & DTAIL_BIAS else None
    return g, dx, *(x.new_empty(0) if t is None else t.to(x.dtype) for t in grads)


def _check_fits(x, w_down, backward: bool) -> None:
    if x.is_cuda and not _fits(w_down.shape[0], _CODES[x.dtype], backward, x.get_device()):
        way = "backward" if backward else "forward"
        raise RuntimeError(
            f"adapter: backend is 'cuda', w_down has a bottleneck of {w_down.shape[0]}, which is too wide for this "
            f"device's shared memory ({way}); expected a narrower one, or backend='triton'"
        )


@functools.cache
def _fits(r: int, code: int, backward: bool, device: int) -> bool:
    return extension()[0].cuda_site_fits(r, code, backward, device)


def _over_rows(*args):
    """Semantics: (g, dx, dz, h, tail_partial), see csrc/cuda/fastpetl_cuda.h."""
    return torch.ops.fastpetl.cuda_site_backward.default(*args)


def _weight_gradients(g, x, stats, dz, h, w_down, norm_weight, norm_bias, scale, needs):
    """(dw_down, db_down, dw_up, db_up, dnorm_weight, dnorm_bias) in fp32, None where not asked for.

    dw_down = dz^T own(x); the norm's own from the same product: dnorm_weight = sum_r (dz^T xhat) * w_down and
    dnorm_bias = w_down^T (column sums of dz), never from a sum of d-wide rows.
    """
    from fastpetl.kernels.products import product

    norm = norm_weight is not None
    sums = moved = dw_down = None
    if needs & (DB_DOWN | DNORM_BIAS) or norm_bias is not None and needs & DW_DOWN:
        sums = dz.sum(0, dtype=torch.float32)
    if needs & (DW_DOWN | DNORM_WEIGHT):
        moved = _by_normalised(product, dz, x, stats) if norm else product(dz, x)
    if needs & DW_DOWN:
        dw_down = moved * norm_weight if norm else moved
        dw_down = dw_down if norm_bias is None else torch.addcmul(dw_down, sums[:, None], norm_bias.float())
    return (
        dw_down,
        sums if needs & DB_DOWN else None,
        scale * product(g, h) if needs & DW_UP else None,
        scale * g.sum(0, dtype=torch.float32) if needs & DB_UP else None,
        (moved * w_down).sum(0) if needs & DNORM_WEIGHT else None,
        sums @ w_down.float() if needs & DNORM_BIAS else None,
    )


def _by_normalised(product, dz, x, stats):
    """dz^T xhat. bf16: q = rstd * dz meets the raw x, and the mean is taken off afterwards (fp32 holds the products
    exactly), so that nothing d-wide is written. fp32 would lose digits to that difference, fp16 could overflow in q.
    """
    mean, rstd = stats[:, :1], stats[:, 1:]
    if x.dtype == torch.bfloat16:
        q = (dz * rstd).to(x.dtype)
        return product(q, x) - (q * mean).sum(0)[:, None]
    return product(dz, ((x - mean) * rstd).to(x.dtype))


# --- rows of compaction -----------------------------------------------------------------------------------------------


def gather(x, index, count):
    """Semantics: y[i] = x[index[i]] for i < count, 0 behind."""
    return torch.ops.fastpetl.cuda_gather_rows.default(x, index, _one(count))


def gather_backward(grad, index, count, n):
    """Semantics: dx[j] = sum of grad[i] over i < count with index[i] = j; sums in fp32, in i's order."""
    return torch.ops.fastpetl.cuda_add_rows.default(grad, index, _one(count), n).to(grad.dtype)


def scatter(base, rows, index, count):
    """Semantics: y = base, but y[index[i]] = rows[i] for i < count; rows None: 0 there."""
    return torch.ops.fastpetl.cuda_scatter_rows.default(base, rows, index, _one(count))


def _one(count):
    return None if count is None else count.reshape(1)
