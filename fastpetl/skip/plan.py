"""Skippable blocks and plans: which of them a model leaves out, and what a skipped sample gets instead."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

SHORTCUTS = ("adapter", "identity")


@dataclass(frozen=True)
class Block:
    """One block that can be skipped, in gate order.

    macs: multiply-accumulates of one sample through the block as it stands, in-block adapters included, at the
    longest sequence the configuration has; shortcut_macs: of what a skipped sample gets instead, with the shortcut
    now set (or the default one).
    """

    index: int
    name: str
    macs: int
    kind: str
    shortcut_macs: int = 0


@dataclass(frozen=True)
class SkipPlan:
    """Semantics: the indices of the blocks to skip, in `fastpetl.blocks` order, for the whole batch, and the shortcut
    they get.

    shortcut "adapter" (x + A_skip(x)), "identity" (x), or None: that of the attached configuration.
    """

    blocks: tuple[int, ...]
    shortcut: str | None = None

    def __post_init__(self):
        if isinstance(self.blocks, str) or not isinstance(self.blocks, Iterable):
            raise TypeError(f"SkipPlan: blocks is {self.blocks!r}, expected block indices")
        indices = tuple(self.blocks)
        for index in indices:
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise ValueError(
                    f"SkipPlan: blocks has {index!r}, expected block indices >= 0 (a mask goes to SkipPlan.from_mask)"
                )
        if len(set(indices)) != len(indices):
            raise ValueError(f"SkipPlan: blocks is {indices}, expected each index once")
        check_shortcut(self.shortcut, "SkipPlan")
        object.__setattr__(self, "blocks", tuple(sorted(indices)))

    @classmethod
    def from_mask(cls, mask, shortcut: str | None = None) -> SkipPlan:
        """Semantics: the plan that skips block i where mask[i]; mask: n_blocks bools (list, tuple, tensor or array)."""
        return cls(
            tuple(i for i, skipped in enumerate(mask_values(mask, None, "SkipPlan.from_mask")) if skipped), shortcut
        )

    def mask(self, n_blocks: int) -> tuple[bool, ...]:
        """Semantics: n_blocks bools, True = skip."""
        if self.blocks and self.blocks[-1] >= n_blocks:
            raise ValueError(f"skip: plan skips block {self.blocks[-1]}, expected indices below n_blocks={n_blocks}")
        return tuple(i in self.blocks for i in range(n_blocks))

    def save(self, path) -> Path:
        """Semantics: write it as JSON; returns the path."""
        path = Path(path)
        path.write_text(json.dumps({"kind": f"fastpetl.{type(self).__name__}", **asdict(self)}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path) -> SkipPlan:
        """Semantics: what `save` wrote: `SkipPlan.load` takes a search's plan too, and gives it as one."""
        content = json.loads(Path(path).read_text())
        kind = content.pop("kind", None) if isinstance(content, dict) else None
        if cls is SkipPlan and kind == "fastpetl.SearchedPlan":
            from fastpetl.das.plan import SearchedPlan as cls
        if kind != f"fastpetl.{cls.__name__}":
            raise ValueError(f"{cls.__name__}.load: {path} was not written by {cls.__name__}.save")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})


def check_shortcut(shortcut: str | None, function: str) -> None:
    if shortcut is not None and shortcut not in SHORTCUTS:
        raise ValueError(f"{function}: shortcut is {shortcut!r}, expected one of {', '.join(SHORTCUTS)}")


def mask_values(mask, n_blocks: int | None, function: str) -> tuple[bool, ...]:
    """Semantics: a whole-batch mask as a tuple of n_blocks bools (None: any number); errors say what it is instead."""
    expected = "(n_blocks,)" if n_blocks is None else f"(n_blocks={n_blocks},)"
    if n_blocks is not None:
        expected += f" or (batch, n_blocks={n_blocks})"
    bools = "expected bools (True = skip); block indices go in a SkipPlan"
    shape = getattr(mask, "shape", None)
    if shape is not None:  # a tensor or an array
        if len(shape) != 1:
            raise ValueError(f"{function}: mask has shape {tuple(shape)}, expected {expected}")
        if str(mask.dtype).removeprefix("torch.") != "bool":
            raise ValueError(f"{function}: mask has dtype {mask.dtype}, {bools}")
        values = mask.tolist()
    elif isinstance(mask, (list, tuple)):
        values = list(mask)
        wrong = next((value for value in values if not isinstance(value, bool)), None)
        if wrong is not None:
            raise ValueError(f"{function}: mask has the element {wrong!r}, {bools}")
    else:
        raise TypeError(
            f"{function}: mask is {type(mask).__name__}, expected a SkipPlan or a bool mask of shape {expected}"
        )
    if n_blocks is not None and len(values) != n_blocks:
        raise ValueError(f"{function}: mask has shape ({len(values)},), expected {expected}")
    return tuple(values)


def sample_mask(mask, n_blocks: int):
    """Semantics: a mask per sample, [batch, n_blocks] bools (tensor, array, list of lists), as a tensor; None if it has
    not two dimensions.
    """
    import torch

    shape = getattr(mask, "shape", None)
    if isinstance(mask, (list, tuple)) and mask and all(isinstance(row, (list, tuple)) for row in mask):
        rows = [mask_values(row, n_blocks, "skip") for row in mask]
        return torch.tensor(rows, dtype=torch.bool).view(len(rows), n_blocks)
    if shape is None or len(shape) != 2:
        return None
    if shape[1] != n_blocks:
        raise ValueError(f"skip: mask has shape {tuple(shape)}, expected (batch, n_blocks={n_blocks})")
    if str(mask.dtype).removeprefix("torch.") != "bool":
        raise ValueError(f"skip: mask has dtype {mask.dtype}, expected bools (True = skip)")
    return torch.as_tensor(mask)
