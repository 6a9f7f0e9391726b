"""Which backend serves an eager call of an op whose backward depends on its forward: measured, both together."""

from __future__ import annotations

import contextlib
import threading

import torch

from .. import backends

_part = threading.local()  # .of: (samples here, samples of the batch, hooks on saved tensors), else there is no part

# Rows a thread from which a library's product of matrices gives a row the same bits whatever the number of rows: MKL's
# takes other kernels below 4, and below 6 for what one thread is left with; oneDNN's for a single row.
STEADY = 8
_UNSTEADY = {"linear": ("torch", "onednn"), "adapter": ("reference",)}


@contextlib.contextmanager
def part_of(samples: int, batch: int):
    """Semantics: in here a choice by the number of rows is the one for the whole batch, of which `samples` are
    computed, and of a kernel whose rows do not depend on their number: what a sample gets does not depend on how many
    others are computed with it.
    """
    before, _part.of = getattr(_part, "of", None), (samples, batch, _hooks())
    try:
        yield
    finally:
        _part.of = before


def part() -> tuple[int, int] | None:
    """Semantics: the arguments of the `part_of` around this call."""
    of = _known()
    return None if of is None else of[:2]


def as_part(function):
    """Semantics: `function`, computed as a part of the batch that this call is a part of, whenever that is: what a
    checkpoint computes again in the backward chooses as its forward did.
    """
    of = part()
    if of is None:
        return function

    def again(*args, **kwargs):
        with part_of(*of):
            return function(*args, **kwargs)

    return again


def _hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _known():
    """The part; None if a checkpoint was entered since that `as_part` does not know of: what it computes again, in the
    backward, does not know of the batch, and has to choose as its forward did.
    """
    of = getattr(_part, "of", None)
    return of if of is not None and of[2] == _hooks() else None


def of_the_batch(count: int) -> int:
    """Semantics: a number of rows (or samples), as it were for the whole batch."""
    of = _known()
    return count if of is None or count % of[0] else count // of[0] * of[1]


def steady(op: str, names: tuple, rows: int) -> tuple:
    """Semantics: `names`, in a part of a batch whose samples have few rows each without the backends of `op` that give
    a row other bits where there are few rows: a sample may be the only one that is left.
    """
    of = None if len(names) == 1 else _known()
    if of is None or rows % of[0] or rows // of[0] >= STEADY * torch.get_num_threads():
        return names
    return tuple([name for name in names if name not in _UNSTEADY[op]]) or names


def choose(op: str, name: str, names, key: tuple, one, tensors, grad: bool, baseline: str, tolerance: float) -> str:
    """Semantics: the fastest of `names` for one(name, tensors), once per process and `key`; `name` where there is
    nothing to choose or torch.func is at work.

    tensors: the call's arguments, None among them; `one` returns a tensor or a tuple with None in it. Where a gradient
    is wanted, forward and backward are measured together: what a backend keeps decides what its backward costs. The
    measurement is none of the caller's business: its saved-tensor hooks (a checkpoint's, say) do not see it.
    """
    if len(names) == 1 or torch._C._are_functorch_transforms_active():
        return name
    key = (f"{op}+backward" if grad else op, *key, torch.get_num_threads())
    found = backends.picked(key)
    if found is not None:
        return found

    def run(name):
        if not grad:
            return _outputs(one(name, tensors))[0]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
            outs = _outputs(one(name, leaves))
            wanted = [t for t in leaves if t is not None and t.requires_grad]
            return torch.autograd.grad(outs, wanted, [_cotangent(y) for y in outs])[0]

    return backends.pick(key, {n: lambda n=n: run(n) for n in names}, baseline, tolerance)


def _cotangent(y):
    """Not y itself: through a norm its gradient is nothing but rounding."""
    return torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device).square().expand_as(y).contiguous()


def _same(t):
    return t


def rows_class(x) -> int:
    """The number of rows of x [..., d], or of the batch that x is a part of, rounded up to a power of two."""
    return 1 << (of_the_batch(x.numel() // max(x.shape[-1], 1)) - 1).bit_length()


def _outputs(out) -> list:
    return [t for t in out if t is not None] if isinstance(out, tuple) else [out]
