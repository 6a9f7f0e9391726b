"""Lists of blocks that leave some out: while blocks are skipped, a list gives turns in their place, to whoever goes
through it. A turn runs its block on the samples that keep it, or not at all.

The loop over the list is the library's or anybody's: it gives a block all samples in their order, and gets them so.
"""

from __future__ import annotations

import functools

import torch

from fastpetl.nn.joined import joined
from fastpetl.skip import columns, compaction
from fastpetl.skip.per_thread import PerThread


class Calls:
    """How the blocks of a list are called. Semantics: y or (y, ...) = block(x, ...), x [B, ...] the first argument or
    `hidden_states`; other tensors of as many rows belong to the samples. form: how many values a call gives, 0 for y
    alone. What a block gives beside y is zeros for a sample that skips it, None if all do.
    """

    batch_dim = 0  # of x
    mask = "attention_mask"
    owner = kind = None  # of blocks that are copied: the family's name, and their kind

    def __init__(self, form: int = 0, mask_at: int = 1, one_copy: str | None = None):
        # mask_at: where the mask is given by position; one_copy: why a model's batch cannot be several copies
        self.form, self.mask_at, self.one_copy = form, mask_at, one_copy

    def _turned(self, t):
        return t.transpose(0, self.batch_dim) if self.batch_dim else t  # the same object, if it can be

    def check(self, setting, args, kwargs) -> None:
        """Semantics: ValueError for what a call asks for and masks per sample cannot give."""

    def padding(self, args, kwargs):
        """Semantics: the attention mask that says which tokens are padding: of the last query, if it is causal."""
        mask = args[self.mask_at] if len(args) > self.mask_at else kwargs.get(self.mask)
        return mask[:, :, -1:] if mask is not None and mask.dim() == 4 else mask

    def complete(self, block, args, kwargs) -> tuple:
        """Semantics: (args, kwargs) with what the block would make for all samples, if it ran on all."""
        return args, kwargs

    def x(self, args, kwargs):
        return self._turned(args[0] if args else kwargs["hidden_states"])

    def call(self, block, rows, take, args, kwargs):
        """Semantics: what the block gives for `rows` of x, take(t) being the same rows of t."""
        named = {name: of_each(t, take) for name, t in kwargs.items() if args or name != "hidden_states"}
        return compaction.call(block, self._turned(rows), *of_each(args[1:], take), **named)

    def state(self, out):
        """Semantics: the new x in what a block gave."""
        return self._turned(out[0] if isinstance(out, tuple | list) else out)

    def given(self, y, place: int, args, kwargs):
        """Semantics: what a block that nobody runs gives, the one at `place` in its list."""
        y = self._turned(y)
        return (y, *[None] * (self.form - 1)) if self.form else y

    def whole(self, out, y, on, args, kwargs):
        """Semantics: what a block gave, for all samples; on(t): t with zeros for those that skip it."""
        if not isinstance(out, tuple | list):
            return self._turned(y)
        return (self._turned(y), *of_each(tuple(out[1:]), on))

    def parameters(self, block):
        return block.parameters()

    def half(self, layer, half: str | None = None):
        """Semantics: the block in a layer: a half of it, or all; an Identity where it was pruned."""
        return layer

    def pruned(self, layer, half: str | None = None):
        """Semantics: what is left of a layer without this block."""
        return torch.nn.Identity()


def of_each(value, f):
    """Semantics: f of a tensor, or of those in a tuple or list (a layer's keys and values); others as they are."""
    if isinstance(value, tuple | list):
        return tuple(of_each(t, f) for t in value)
    return f(value) if isinstance(value, torch.Tensor) else value


class Setting:
    """What the lists of a host share. values: a bool per block, or a policy; order: when the turn of each block comes,
    as `columns.columns` takes it.
    """

    def __init__(self, values, shortcut: str, order: tuple[int, ...]):
        self.values, self.shortcut, self.order = values, shortcut, order
        self.groups: dict[int, set] = {}  # the streams of each
        self.under_way = PerThread()  # the Forward of each group

    @property
    def per_sample(self) -> bool:
        return not isinstance(self.values, tuple)

    def begin(self, stream: Stream, x, padding, training: bool) -> Forward:
        """Semantics: the forward that block 0 of a stream begins, or another stream of its group has begun."""
        found = self.under_way.get(stream.group)
        if found is None or stream.number in found.begun:
            if self.values.copies > 1 and stream.calls.one_copy:
                raise ValueError(f"skip: Candidates on {stream.calls.one_copy}, expected one set after the other")
            found = Forward(self.columns(stream, x, padding, training))
            self.under_way.set(found, stream.group)
        found.begun.add(stream.number)
        return found

    def columns(self, stream: Stream, x, padding, training: bool):
        policy = self.values
        mask, scale = compaction.decide(x, policy, len(self.order), training, padding)
        return columns.columns(mask, scale, self.order, x.device, policy.copies, policy.capacity)

    def end(self, stream: Stream, forward: Forward) -> None:
        """Semantics: the last block of a stream has run; the last of its group lets go of the forward."""
        forward.ended.add(stream.number)
        if forward.ended == self.groups[stream.group]:
            self.under_way.drop(stream.group)
            forward.columns.forget()


class Forward:
    """A batch on its way through the streams of a group: the set is captured, a recomputation finds it here."""

    def __init__(self, made):
        self.columns = made
        self.begun: set[int] = set()
        self.ended: set[int] = set()


class Stream:
    """The blocks of one list, or of a half of its layers, and what stands in for them. number: which stream of the
    host it is; first: the number of its first block among all; group: equal for streams of one batch.
    """

    def __init__(self, setting: Setting, calls: Calls, number: int, first: int, group: int, shortcuts=None):
        self.setting, self.calls, self.number, self.first = setting, calls, number, first
        self.group, self.shortcuts = group, shortcuts
        setting.groups.setdefault(group, set()).add(number)

    def skips(self, place: int) -> bool:
        """Semantics: does a plan for the whole batch skip this block?"""
        return self.setting.values[self.first + place]

    def shortcut(self, place: int):
        return torch.nn.Identity() if self.shortcuts is None else self.shortcuts[place]

    def run(self, turn: Turn, x, block, parameters, padding):
        """Semantics: (y, on) for all samples of x; block(rows, take) as for `Columns.run`."""
        forward, again = turn.forward_of(self, x, padding)
        i, shortcut = self.first + turn.place, self.shortcut(turn.place)
        given = parameters, shortcut.parameters()
        y = forward.columns.run(i, x, block, shortcut, *given, stream=self.number, again=again)
        if turn.last and not again:
            self.setting.end(self, forward)
        return y, lambda t: forward.columns.on(i, t)


class Turn:
    """In place of a block: a list gives new ones to each loop, so a checkpoint that calls one again in the backward
    finds the forward it belonged to.
    """

    def __init__(self, container, place: int, block):
        self.container, self.place, self.block = container, place, block
        self.streams = container.__dict__["_fastpetl_streams"]  # whatever is set when it is called again
        self.forwards: dict = {}

    def __call__(self, *args, **kwargs):
        streams = self.streams
        setting = streams[0].setting
        if self.container.__dict__.get("_is_replica", False) and (setting.per_sample or streams[0].shortcuts):
            # their threads would share what is decided, and the shortcuts of one device
            raise ValueError("skip: nn.DataParallel while samples skip blocks of their own, expected DDP")
        if len(streams) > 1:
            return streams[0].calls.run(self, streams, args, kwargs)
        (stream,), calls = streams, streams[0].calls
        x = calls.x(args, kwargs)
        if not setting.per_sample and not stream.skips(self.place):
            return compaction.call(self.block, *args, batch=len(x), **kwargs)
        args, kwargs = calls.complete(self.block, args, kwargs)
        if not setting.per_sample:
            y = compaction.call(stream.shortcut(self.place), x, batch=len(x))
            return calls.given(y, self.place, args, kwargs)
        calls.check(setting, args, kwargs)
        found = []

        def block(rows, take):
            found.append(calls.call(self.block, rows, take, args, kwargs))
            return calls.state(found[0])

        parameters = calls.parameters(self.block)
        y, on = stream.run(self, x, block, parameters, calls.padding(args, kwargs))
        return calls.whole(found[0], y, on, args, kwargs) if found else calls.given(y, self.place, args, kwargs)

    def __getattr__(self, name):
        return getattr(self.block, name)

    @property
    def last(self) -> bool:
        return self.place == len(self.container) - 1

    def forward_of(self, stream: Stream, x, padding) -> tuple[Forward, bool]:
        """Semantics: (the forward this call is of, is it computed once more in the backward?)."""
        setting, compiling = stream.setting, torch.compiler.is_compiling()
        if not compiling and stream.number in self.forwards and torch._C._current_graph_task_id() != -1:
            return self.forwards[stream.number], True
        if self.place == 0:
            found = setting.begin(stream, x, padding, self.container.training)
        else:
            found = setting.under_way.get(stream.group)
            if found is None:
                raise RuntimeError(f"skip: block {self.place} is called, expected block 0 of its list to be before it")
        if not compiling:
            self.forwards[stream.number] = found
        return found, False


class TakesTurns:
    """Mixin of a list of blocks, before the original."""

    def __iter__(self):
        return iter([Turn(self, place, block) for place, block in enumerate(self._modules.values())])

    def __getitem__(self, which):
        return list(self)[which]


@functools.cache
def taking_turns(original: type) -> type:
    """Semantics: `original`, a ModuleList or Sequential or one derived from them, that gives turns."""
    return joined(TakesTurns, original, (taking_turns,))


def original_of(cls: type) -> type:
    return cls.__bases__[1] if TakesTurns in cls.__bases__ else cls
