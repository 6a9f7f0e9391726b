"""Running each block on the samples that keep it: who they are is found once per forward and shared by all blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn


def samples(x: torch.Tensor, policy, n_blocks: int, training: bool, attention_mask=None) -> Samples | StaticSamples:
    """Semantics: x [B, ...], split as `policy` says, ready for `run(0)`, `run(1)`, ... and `whole()`.

    A block is called with the rows it runs on and a function that takes the same rows of another tensor. Eager code
    sees how many samples keep each block and runs exactly these. Under torch.compile, or with policy.capacity, shapes
    do not depend on the mask: see `StaticSamples`.
    """
    return stream(x, *decide(x, policy, n_blocks, training, attention_mask), policy.capacity, policy.copies)


def stream(x, mask, scale=None, capacity: int | None = None, copies: int = 1) -> Samples | StaticSamples:
    """Semantics: `samples` of a mask and scale that were decided before."""
    if torch.compiler.is_compiling() or capacity is not None:
        return StaticSamples(x, mask.to(x.device), scale, capacity, copies)
    return Samples(x, mask, scale, copies)


def streams(xs: tuple, policy, n_blocks: int, training: bool, *tensors) -> tuple:
    """Semantics: (one `samples` for each of xs, with its equal share of the blocks in order; *tensors), for streams
    that read each other: block i of one sees the others' `before()`, what they held after block i - 1. The first of xs,
    and of tensors, its attention mask, is what the policy sees. Where shapes must not depend on the mask, `tensors`
    [B, ...] or None are repeated with xs.
    """
    mask, scale = decide(xs[0], policy, n_blocks, training, *tensors[:1])
    share, copies = n_blocks // len(xs), policy.copies
    columns = [slice(k * share, (k + 1) * share) for k in range(len(xs))]
    owns = [(mask[:, own], None if scale is None else scale[:, own]) for own in columns]
    if torch.compiler.is_compiling() or policy.capacity is not None:
        made = [stream(repeated(x, copies), *own, policy.capacity) for x, own in zip(xs, owns, strict=True)]
        return made, *(t if t is None else repeated(t, copies) for t in tensors)
    seen = [own[0] for own in owns]
    return [Samples(x, *own, copies, seen) for x, own in zip(xs, owns, strict=True)], *tensors


def decide(x, policy, n_blocks: int, training: bool, attention_mask=None):
    """Semantics: the policy's (mask, scale) for what enters the first block, checked. attention_mask: the blocks' own,
    by which a policy that pools over tokens leaves out padding.
    """
    told = {"real": _real(attention_mask)} if policy.pools else {}
    mask, scale = policy.masks(x, n_blocks, training, **told)
    copies = policy.copies
    expected = (x.shape[0] * copies, n_blocks)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != expected:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"skip: mask is {got}, expected a bool tensor of shape (batch={expected[0]}, n_blocks={n_blocks})"
        )
    if scale is None:
        return mask, None
    if not isinstance(scale, torch.Tensor) or not scale.is_floating_point() or tuple(scale.shape) != expected:
        got = f"{scale.dtype} {tuple(scale.shape)}" if isinstance(scale, torch.Tensor) else type(scale).__name__
        raise ValueError(
            f"skip: scale is {got}, expected floats of shape (batch={expected[0]}, n_blocks={n_blocks}) or None"
        )
    return mask, scale.to(x.device)


def _real(mask):
    """[B or 1, T], True at tokens that are seen, of an attention mask in any of its forms; None: all are."""
    if mask is None:
        return None
    row = mask[:, 0, 0] if mask.dim() == 4 else mask  # it depends on the key alone
    if row.dim() != 2:
        raise ValueError(f"skip: attention_mask has shape {tuple(mask.shape)}, expected [B, T] or [B, 1, Q, T]")
    return row > -1 if row.is_floating_point() and mask.dim() == 4 else row.bool()  # additive, or what to keep


def call(layer, *args, batch: int | None = None, **kwargs):
    """Semantics: layer(*args, **kwargs); what a gradient checkpoint of it computes again is the same part of the
    batch. batch: where the rows are all there are, as many: the choices then are those made with masks per sample.
    """
    if torch.compiler.is_compiling():
        return layer(*args, **kwargs)
    from fastpetl.ops._measured import as_part, part_of

    checkpoint = layer.__dict__.get("_gradient_checkpointing_func")
    try:
        if checkpoint is not None:  # transformers' layers call it themselves
            layer._gradient_checkpointing_func = lambda function, *a, **k: checkpoint(as_part(function), *a, **k)
        with contextlib.nullcontext() if batch is None else part_of(batch, batch):
            return layer(*args, **kwargs)
    finally:
        if checkpoint is not None:
            layer._gradient_checkpointing_func = checkpoint


class Samples:
    """Semantics: y[b] = shortcut(x)[b] if mask[b, i] else block(x)[b], for block i = 0, 1, ... in turn.

    Between blocks the samples lie in two parts, kept and skipped; they move only where the kept set changes, and
    not at all while all or none are kept. With `copies` of the batch, the copies of a sample are one row until a block
    on which they disagree: a tree, each distinct prefix of decisions computed once. scale [B, n_blocks]: x + scale *
    (block(x) - x) in place of block(x). seen: the masks of all streams a block's input depends on, if not this one's
    alone. A block nobody runs, or a shortcut nobody takes, gives its parameters zero gradients, not None (DDP waits
    for them).
    """

    def __init__(self, x, mask, scale=None, copies: int = 1, seen=None):
        self._parts, self._scale, self._at, self._taken = [x, x[:0]], scale, -1, {}
        self._batch, shared = x.shape[0], copies > 1 and scale is None
        self._steps, self._restore = _schedule(mask, seen or [mask], x.shape[0], shared, x.device)

    def run(self, i: int, block, shortcut, parameters: Iterable = (), shortcut_parameters: Iterable = ()) -> None:
        """Semantics: block i. block(rows, take) and shortcut(rows) give the new rows; `parameters` are what each
        trains.
        """
        step = self._steps[i]
        if step.move is not None:
            rows = self._rows()
            self._parts = [_select(rows, index) for index in step.move]
        scale = None if self._scale is None else _select(self._scale[:, i], step.rows)
        ran = block, lambda t: self.take(t, i), scale, shortcut, parameters, shortcut_parameters
        self._parts, self._at = list(run_parts(*self._parts, *ran, self._batch)), i

    def whole(self) -> torch.Tensor:
        """Semantics: all samples in their order, [B * copies, ...]."""
        return _select(self._rows(), self._restore[self._at + 1])

    def before(self) -> Rows:
        """Semantics: what is held now, to be `take`n by other streams' blocks."""
        return Rows(self._rows(), self._restore[self._at + 1])

    def take(self, t: torch.Tensor | Rows | None, i: int) -> torch.Tensor | None:
        """Semantics: the rows of t [B, ...], or of another stream, that belong to the samples keeping block i; once per
        set and tensor.
        """
        step = self._steps[i]
        if isinstance(t, Rows):
            return t.take(step.rows)
        if t is None or t.shape[0] == 1:
            return t  # the same for every sample
        key = (id(t), step.keep if isinstance(step.keep, tuple) else id(step.keep))
        if key not in self._taken:
            self._taken[key] = t, _mask_rows(t, step.keep)
        return self._taken[key][1]

    def on(self, i: int, values: torch.Tensor) -> torch.Tensor:
        """Semantics: values [kept, ...] of the samples that keep block i in the order of all, zeros for the others."""
        skipped = self._steps[i].skipped
        if skipped:
            values = torch.cat([values, values.new_zeros(skipped, *values.shape[1:])])
        return _select(values, self._restore[i + 1])

    def kept(self, i: int) -> torch.Tensor | None:
        """Semantics: the samples that keep block i, None if all do, each once."""
        step = self._steps[i]
        if not step.skipped and isinstance(step.keep, tuple):
            return None
        return torch.arange(*step.keep, device=self._parts[0].device) if isinstance(step.keep, tuple) else step.keep

    def _rows(self):
        kept, skipped = self._parts
        return torch.cat(self._parts) if len(kept) and len(skipped) else (kept if len(kept) else skipped)


def run_parts(kept, skipped, block, take, scale, shortcut, parameters, shortcut_parameters, batch: int) -> tuple:
    """Semantics: (block(kept, take), shortcut(skipped)), scaled; zero gradients for what has no rows. batch: the number
    of samples that backends are chosen for.
    """
    from fastpetl.ops._measured import part_of

    if len(kept):
        with part_of(len(kept), batch):
            y = block(kept, take)
        kept = _scaled(kept, y, scale)
    else:
        skipped = with_zero_gradients(skipped, parameters)
    if len(skipped):
        with part_of(len(skipped), batch):
            skipped = shortcut(skipped)
    else:
        kept = with_zero_gradients(kept, shortcut_parameters)
    return kept, skipped


class Rows:
    """What a stream held before a block, and where each sample lies in it."""

    def __init__(self, rows: torch.Tensor, at):
        self._held, self._at = rows, at

    def take(self, samples) -> torch.Tensor:
        if isinstance(self._at, tuple):  # sample s is row s
            return _select(self._held, samples)
        return self._held.index_select(0, _select(self._at, samples))


class _Step(NamedTuple):
    """Before a block: `move` is None, the parts stay, or where (kept, skipped) lie among the rows so far. Of the kept
    ones `keep` are the samples and `rows` their rows of the mask; skipped: how many are. Indices are (start, stop),
    consecutive ones, or an int64 tensor.
    """

    move: tuple | None
    keep: tuple | torch.Tensor
    rows: tuple | torch.Tensor
    skipped: int


def _schedule(mask, seen, batch: int, shared: bool, device):
    """(a _Step per block, where each row of the mask lies before the first block and after each).

    Rows of one sample are one while all that was decided before, in every mask of `seen`, is the same. All indices are
    views of one tensor: one transfer to the device.
    """
    columns, n = mask.t().tolist(), mask.shape[0]
    decided = list(zip(*(one.t().tolist() for one in seen), strict=True)) if shared else []
    indices = Indices()
    index = indices.add
    at = [row % batch for row in range(n)]
    state, before = list(at), None
    steps, restore = [], [index(at)]
    for i, column in enumerate(columns):
        own, first = _numbered(zip(state, column, strict=True)) if shared else (range(n), range(n))
        if before == (own, column):
            steps.append(_Step(None, *steps[-1][1:]))
            restore.append(restore[-1])
        else:
            keep, skip = ([e for e, row in enumerate(first) if column[row] == left] for left in (False, True))
            move = tuple(index([at[first[e]] for e in part]) for part in (keep, skip))
            kept = [first[e] for e in keep]
            samples = index([row % batch for row in kept])
            steps.append(_Step(move, samples, index(kept) if n > batch else samples, len(skip)))
            place = {e: k for k, e in enumerate(keep + skip)}
            at = [place[e] for e in own]
            restore.append(index(at))
        before = own, column
        if shared:
            state, _ = _numbered(zip(state, *decided[i], strict=True))
    view = indices.on(device)
    steps = [
        _Step(None if s.move is None else tuple(map(view, s.move)), view(s.keep), view(s.rows), s.skipped)
        for s in steps
    ]
    return steps, [view(part) for part in restore]


class Indices:
    """Lists of indices: (start, stop) of consecutive ones, views of one tensor of the others; one transfer for all."""

    def __init__(self):
        self._flat: list[int] = []

    def add(self, values: list[int]):
        """Semantics: what stands for `values` until `on` says where they are."""
        if values == list(range(values[0], values[0] + len(values))) if values else True:
            return (values[0], values[-1] + 1) if values else (0, 0)
        self._flat.extend(values)
        return slice(len(self._flat) - len(values), len(self._flat))

    def on(self, device):
        """Semantics: a function from what `add` gave to an index on the device; the same view for the same."""
        tensor, views = torch.tensor(self._flat, dtype=torch.long).to(device), {}

        def view(part):
            if isinstance(part, slice):
                part = views.setdefault(part.start, tensor[part])
            return part

        return view


def _numbered(keys) -> tuple[list[int], list[int]]:
    """(for each key the number of its kind, for each kind the first place it has)."""
    numbers: dict = {}
    first: list[int] = []
    own = []
    for place, key in enumerate(keys):
        number = numbers.setdefault(key, len(first))
        if number == len(first):
            first.append(place)
        own.append(number)
    return own, first


def _select(rows, index):
    if isinstance(index, tuple):
        start, stop = index
        return rows if stop - start == rows.shape[0] else rows[start:stop]
    return rows.index_select(0, index)


def repeated(t: torch.Tensor, copies: int) -> torch.Tensor:
    """Semantics: copy after copy of the whole batch."""
    return t if copies == 1 else _repeat(t, copies)


def _repeat(rows, copies):
    return rows.repeat(copies, *(1,) * (rows.dim() - 1))


def _mask_rows(t, index):
    if t.dim() == 4 and t.stride(2) == 0 and t.shape[2] > 1:  # one row of a mask for all queries stays one row
        return _select(t[:, :, :1], index).expand(-1, -1, t.shape[2], -1)
    return _select(t, index)


def _scaled(x, y, scale):
    if scale is None:
        return y
    # y + (s - 1) (y - x), not x + s (y - x): where s is 1 it is y to the bit, in bf16 too
    return y + (scale - 1).to(y.dtype).view(-1, *(1,) * (y.dim() - 1)) * (y - x)


class StaticSamples:
    """`Samples` whose shapes do not depend on the mask, for torch.compile and CUDA graphs.

    Semantics: as `Samples`. Without capacity every block runs on all samples and the mask chooses between the results:
    right, recompiled for no mask, but nothing is saved. With capacity each block runs on that many samples: those
    that keep it, and only the first `capacity` of them in the order of the batch; the others get the shortcut. If fewer
    keep it, its last rows are samples that skip it, and what comes of them goes nowhere.
    """

    def __init__(self, x, mask, scale, capacity: int | None, copies: int = 1):
        self._x, self._mask, self._scale = _repeat(x, copies) if copies > 1 else x, mask, scale
        self._capacity = None if capacity is None or capacity >= mask.shape[0] else capacity
        self._copies = copies

    def _all(self, t: torch.Tensor | None) -> torch.Tensor | None:
        return t if t is None or t.shape[0] == 1 or self._copies == 1 else _repeat(t, self._copies)

    def run(self, i: int, block, shortcut, parameters: Iterable = (), shortcut_parameters: Iterable = ()) -> None:
        x, skipped = self._x, self._mask[:, i]
        scale = None if self._scale is None else self._scale[:, i]
        if self._capacity is None:
            y = _scaled(x, block(x, self._all), scale)
            self._x = torch.where(skipped.view(-1, *(1,) * (x.dim() - 1)), shortcut(x), y)
            return
        from fastpetl import ops

        index = self.kept(i)
        count = (~skipped).sum().clamp(max=self._capacity)
        rows = ops.gather_rows(x, index, count)
        y = block(rows, lambda t: t if t is None or t.shape[0] == 1 else _mask_rows(self._all(t), index))
        y = _scaled(rows, y, None if scale is None else scale.index_select(0, index))
        self._x = ops.scatter_rows(shortcut(x), y, index, count)

    def on(self, i: int, values: torch.Tensor) -> torch.Tensor:
        raise ValueError(
            "skip: output_attentions of a block that part of the samples run, expected eager code and no capacity"
        )

    def before(self) -> torch.Tensor:
        return self._x

    def kept(self, i: int) -> torch.Tensor | None:
        """Semantics: the samples whose rows block i is given, None if all are."""
        if self._capacity is None:
            return None
        return torch.argsort(self._mask[:, i].long(), stable=True)[: self._capacity]

    def whole(self) -> torch.Tensor:
        return self._x


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return grad, *(torch.zeros_like(p) if needs else None for p, needs in wanted)


def with_zero_gradients(x: torch.Tensor, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Semantics: x; in backward each of `parameters` that trains gets a gradient of zeros."""
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    return _ZeroGradients.apply(x, *trained) if trained else x
