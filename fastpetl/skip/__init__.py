"""Leaving blocks out: `fastpetl.skip(model, mask)` sets which (this module can be called), `fastpetl.blocks(model)`
lists them.
"""

from __future__ import annotations

from torch import nn

from fastpetl._callable import make_callable
from fastpetl.patching import registry
from fastpetl.skip.plan import Block, SkipPlan, check_shortcut, mask_values

__all__ = ["Block", "SkipPlan", "blocks", "current", "skip"]


def blocks(model: nn.Module) -> list[Block]:
    """Semantics: the blocks of `model` that can be skipped, in gate order: a mask's element i is about
    blocks(model)[i].
    """
    family, host = registry.family_of(model, "blocks")
    return family.blocks(model, host)


def current(model: nn.Module) -> SkipPlan | None:
    """Semantics: the plan that is set, or None."""
    family, host = registry.family_of(model, "skip")
    return _plan(family.get_skip(host))


class _Setting:
    """What `skip` returns: the setting is made; leaving it as a context restores the one before."""

    def __init__(self, family, host, before, plan: SkipPlan | None):
        self._family, self._host, self._before = family, host, before
        self.plan = plan

    def __enter__(self) -> SkipPlan | None:
        return self.plan

    def __exit__(self, *_) -> None:
        self._family.set_skip(self._host, *self._before)

    def __repr__(self) -> str:
        return f"fastpetl.skip({self.plan})"


def skip(model: nn.Module, mask_or_plan, *, shortcut: str | None = None) -> _Setting:
    """Semantics: from now on block i is not run where mask[i] is True; every sample gets the shortcut instead.

    mask_or_plan: n_blocks bools (list, tuple, tensor or array; True = skip), a SkipPlan, or None for keeping all. As
    a context manager it restores on leaving what was set before. shortcut: "adapter" (x + A_skip(x)) or "identity"
    (x); not given, it is the plan's, else that of the attached configuration, else "identity", the only one a model
    without shortcut adapters has. A forward reads the set once when it starts, so its backward, recomputed layers
    included, is of the layers that ran.
    """
    family, host = registry.family_of(model, "skip")
    check_shortcut(shortcut, "skip")
    if mask_or_plan is None:
        values = None
    elif isinstance(mask_or_plan, SkipPlan):
        values, shortcut = mask_or_plan.mask(family.n_blocks(host)), shortcut or mask_or_plan.shortcut
    else:
        values = mask_values(mask_or_plan, family.n_blocks(host), "skip")
    adapters = family.has_shortcut_adapters(host)
    if shortcut == "adapter" and not adapters:
        raise ValueError(
            "skip: shortcut is 'adapter', but the model has no shortcut adapters: attach them with "
            "fastpetl.attach(model, fastpetl.DASConfig(...)), or use shortcut='identity'"
        )
    shortcut = shortcut or ("adapter" if adapters else "identity")
    before = family.get_skip(host)
    family.set_skip(host, values, shortcut)
    return _Setting(family, host, before, _plan((values, shortcut)))


def _plan(setting) -> SkipPlan | None:
    values, shortcut = setting
    return None if values is None else SkipPlan.from_mask(values, shortcut)


make_callable(__name__, skip)
