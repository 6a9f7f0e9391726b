"""What a decoder keeps to in all its steps: what was decided when the batch entered the encoder."""

from __future__ import annotations

import torch

from fastpetl.skip import compaction
from fastpetl.skip.per_thread import PerThread


class Decided:
    """values: a policy (or a plan, which is not asked); last: of each thread (decided, mark): (mask, scale) of the
    batch that entered the encoder last, and the first token's state of each sample that came out, or None, by which
    the decoder knows that it is given that batch.
    """

    def __init__(self, values, n_blocks: int):
        self.values, self.n_blocks = values, n_blocks
        self.last = PerThread()

    def decide(self, x, training: bool, attention_mask):
        decided = compaction.decide(x, self.values, self.n_blocks, training, attention_mask)
        self.last.set((decided, None))
        return decided

    def came_out(self, states) -> None:
        if not torch.compiler.is_compiling():
            decided, _ = self.last.get() or (None, None)
            self.last.set((decided, states[:, 0].detach().clone()))

    def known(self, source):
        """What was decided, if `source`, the states the decoder is given, are of the batch it was decided for, beams or
        not; with a capacity, whose shapes and graphs know nothing of values, of whatever batch they are.
        """
        decided, mark = self.last.get() or (None, None)
        if torch.compiler.is_compiling() or mark is None or source is None or self.values.capacity is not None:
            return decided
        beams, left = divmod(source.shape[0], mark.shape[0])
        mark = mark.to(source.device)
        same = beams and not left and torch.equal(source[:, 0], mark.repeat_interleave(beams, 0))
        return decided if same else None

    def for_decoder(self, rows: int, source, asks: tuple):
        """Semantics: (mask, scale, capacity) for a decoder with so many rows, those of a sample's beams together;
        `asks` are the arguments of `decide`, should it have to be asked.
        """
        known = self.known(source)
        if known is None:
            known = self.decide(*asks)
            if source is not None:
                self.came_out(source)
        samples, capacity = known[0].shape[0], self.values.capacity
        if rows % samples:
            raise ValueError(
                f"skip: the decoder has a batch of {rows}, expected a multiple of the {samples} samples the encoder had"
            )
        beams = rows // samples
        mask, scale = (t if t is None else t.repeat_interleave(beams, 0) for t in known)
        return mask, scale, capacity and capacity * beams  # it counts samples
