"""What a decoder keeps to in all its steps: what was decided when the batch entered the encoder."""

from __future__ import annotations

import torch

from fastpetl.skip import compaction


class Decided:
    """values: a policy (or a plan, which is not asked); decided: (mask, scale) of the batch that entered the encoder
    last; mark: the first token's state of each sample that came out, by which the decoder knows that it is given that
    batch.
    """

    def __init__(self, values, n_blocks: int):
        self.values, self.n_blocks = values, n_blocks
        self.decided = self.mark = None

    def __getstate__(self):  # a scale may be of a forward's graph, which can neither be copied nor pickled
        mask, scale = self.decided or (None, None)
        decided = None if mask is None else (mask, None if scale is None else scale.detach())
        return {**self.__dict__, "decided": decided}

    def decide(self, x, training: bool, attention_mask):
        self.decided, self.mark = compaction.decide(x, self.values, self.n_blocks, training, attention_mask), None
        return self.decided

    def came_out(self, states) -> None:
        if not torch.compiler.is_compiling():
            self.mark = states[:, 0].detach().clone()

    def known(self, source):
        """`decided`, if `source`, the states the decoder is given, are of the batch it was decided for, beams or not;
        with a capacity, whose shapes and graphs know nothing of values, of whatever batch they are.
        """
        if torch.compiler.is_compiling() or self.mark is None or source is None or self.values.capacity is not None:
            return self.decided
        beams, left = divmod(source.shape[0], self.mark.shape[0])
        mark = self.mark.to(source.device)
        same = beams and not left and torch.equal(source[:, 0], mark.repeat_interleave(beams, 0))
        return self.decided if same else None

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
