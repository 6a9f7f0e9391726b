"""`compaction` for loops that are not ours: between two blocks anybody may look at the samples, all in their order."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpetl.skip.compaction import Indices, StaticSamples, _mask_rows, _select, repeated, run_parts


def columns(mask, scale, order: tuple[int, ...], device, copies: int, capacity: int | None) -> Columns | StaticColumns:
    """Semantics: what runs block i of `mask` [B * copies, n_blocks] on the samples that keep it.

    order: when each block's turn comes; blocks of streams that read each other have the same number.
    """
    if torch.compiler.is_compiling() or capacity is not None:
        return StaticColumns(mask.to(device), scale, capacity, copies)
    return Columns(mask, scale, copies, order, device)


class Columns:
    """Semantics: run(i, x) = y, y[b] = shortcut(x)[b] if mask[b, i] else block(x)[b]; x and y all samples in order.

    Blocks that follow each other with the same kept samples do not gather them again, and none are moved where all or
    none are kept. With `copies` of the batch, all is computed once up to the first turn at which two copies differ.
    """

    def __init__(self, mask, scale, copies: int, order: tuple[int, ...], device):
        n, self._scale, self._given, self._taken = mask.shape[0], scale, {}, {}
        self._batch = n // copies
        lists = mask.t().tolist()
        apart = [turn for turn, column in zip(order, lists, strict=True) if column != column[: self._batch] * copies]
        first = -1 if copies > 1 and scale is not None else min(apart, default=max(order) + 1)
        indices, places = Indices(), {}
        for turn, column in zip(order, lists, strict=True):
            rows = n if turn >= first else self._batch
            places.setdefault((rows, *column[:rows]), _place(rows, column, indices))
        view = indices.on(device)
        places = {key: _Place(*map(view, place[:3]), *place[3:]) for key, place in places.items()}
        ends = [n if turn >= first else self._batch for turn in order]
        self._places = [places[(rows, *column[:rows])] for rows, column in zip(ends, lists, strict=True)]

    def run(self, i: int, x, block, shortcut, parameters=(), shortcut_parameters=(), stream=0, again=False):
        """Semantics: block(rows, take) gives the new rows of those that keep block i, shortcut(rows) of the others;
        `parameters` are what each trains. stream: whose x it is; again: a recomputation in the backward, which neither
        reads nor leaves anything.
        """
        place = self._places[i]
        before, last, parts = self._given.get(stream, (None, None, None))
        if again or before is not place or last is not x:
            x = self._repeated(x, place.rows)
            parts = [_select(x, index) for index in (place.keep, place.skip)]
        scale = None if self._scale is None else _select(self._scale[:, i], place.keep)
        ran = block, lambda t: self._take(t, place), scale, shortcut, parameters, shortcut_parameters
        kept, skipped = run_parts(*parts, *ran, self._batch)
        y = torch.cat([kept, skipped]) if len(kept) and len(skipped) else (kept if len(kept) else skipped)
        y = _select(y, place.restore)
        if not again:
            self._given[stream] = place, y, (kept, skipped)
        return y

    def _repeated(self, t, rows: int):
        return t if t.shape[0] == rows else repeated(t, rows // self._batch)

    def _take(self, t, place: _Place):
        if t is None or t.dim() == 0 or t.shape[0] == 1 or t.shape[0] not in (self._batch, place.rows):
            return t  # the same for every sample
        if t.dim() == 3:  # another stream, of this turn alone
            return _select(self._repeated(t, place.rows), place.keep)
        key = id(t), id(place)
        if key not in self._taken:
            self._taken[key] = t, _mask_rows(self._repeated(t, place.rows), place.keep)
        return self._taken[key][1]

    def on(self, i: int, values: torch.Tensor) -> torch.Tensor:
        """Semantics: values [kept, ...] of the samples that keep block i in the order of all, zeros for the others."""
        place = self._places[i]
        missing = place.rows - values.shape[0]
        if missing:
            values = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
        return _select(values, place.restore)

    def forget(self) -> None:
        """Semantics: lets go of what the next block might have asked for."""
        self._given, self._taken = {}, {}


class _Place(NamedTuple):
    """Where the samples that keep a block, and the others, lie among `rows`, and each of these in (kept, skipped)."""

    keep: tuple | torch.Tensor
    skip: tuple | torch.Tensor
    restore: tuple | torch.Tensor
    rows: int


def _place(rows: int, column: list[bool], indices: Indices) -> _Place:
    keep, skip = ([row for row in range(rows) if column[row] == left] for left in (False, True))
    where = {row: k for k, row in enumerate(keep + skip)}
    return _Place(indices.add(keep), indices.add(skip), indices.add([where[row] for row in range(rows)]), rows)


class StaticColumns(StaticSamples):
    """`Columns` whose shapes do not depend on the mask: see `StaticSamples`. All copies run all blocks."""

    def __init__(self, mask, scale, capacity: int | None, copies: int):
        super().__init__(mask, mask, scale, capacity)
        self._copies = copies

    def _all(self, t):
        rows = self._mask.shape[0]
        return t if t is None or t.dim() == 0 or t.shape[0] in (1, rows) else repeated(t, self._copies)

    def run(self, i: int, x, block, shortcut, parameters=(), shortcut_parameters=(), stream=0, again=False):
        self._x = x if x.shape[0] == self._mask.shape[0] else repeated(x, self._copies)
        super().run(i, block, shortcut, parameters, shortcut_parameters)
        return self._x

    def on(self, i: int, values: torch.Tensor) -> torch.Tensor:
        skipped = self._mask[:, i]
        if self._capacity is not None:
            values = values.new_zeros(len(skipped), *values.shape[1:]).index_copy(0, self.kept(i), values)
        return values.masked_fill(skipped.view(-1, *[1] * (values.dim() - 1)), 0)

    def forget(self) -> None:
        self._x = None
