"""Leaving blocks out: `fastpetl.skip(model, mask)` sets which (this module can be called), `fastpetl.blocks(model)`
lists them.
"""

from __future__ import annotations

from torch import nn

from fastpetl._callable import make_callable
from fastpetl.nn.tasks import mixed
from fastpetl.patching import registry
from fastpetl.skip import policies
from fastpetl.skip.plan import Block, SkipPlan, check_shortcut, mask_values, sample_mask
from fastpetl.skip.policies import Policy

__all__ = ["Block", "Policy", "SkipPlan", "blocks", "current", "policies", "prune", "pruned", "skip"]


def blocks(model: nn.Module) -> list[Block]:
    """Semantics: the blocks of `model` that can be skipped, in gate order: a mask's element i is about
    blocks(model)[i].
    """
    family, host = registry.family_of(model, "blocks")
    return family.blocks(model, host)


def confuses_tasks(model: nn.Module) -> bool:
    """Semantics: are blocks of `model` skipped per sample, and would a block's kept rows not know which of the samples'
    tasks is their own?
    """
    try:
        family, host = registry.family_of(model, "skip")
    except ValueError:
        return False
    return not family.routes_samples and isinstance(family.get_skip(host)[0], Policy)


def current(model: nn.Module) -> SkipPlan | Policy | None:
    """Semantics: the plan or policy that is set, or None."""
    family, host = registry.family_of(model, "skip")
    return _plan(family.get_skip(host))


class _Setting:
    """What `skip` returns: the setting is made; leaving it as a context restores the one before."""

    def __init__(self, family, host, before, plan: SkipPlan | Policy | None):
        self._family, self._host, self._before = family, host, before
        self.plan = plan

    def __enter__(self) -> SkipPlan | Policy | None:
        return self.plan

    def __exit__(self, *_) -> None:
        if self._family.is_pruned(self._host):  # meanwhile: there is no way back
            return
        self._family.set_skip(self._host, *self._before)

    def __repr__(self) -> str:
        return f"fastpetl.skip({self.plan})"


def skip(model: nn.Module, mask_or_plan, *, shortcut: str | None = None, capacity: int | None = None) -> _Setting:
    """Semantics: from now on sample b does not run block i where mask[b, i] is True, and gets the shortcut instead.

    mask_or_plan: bools, True = skip, for each sample of the next batches [batch, n_blocks], or for all samples
    [n_blocks] (list, tuple, tensor or array); a SkipPlan; a policy of `fastpetl.skip.policies` or a function (x,
    n_blocks) -> mask [batch, n_blocks], asked anew in each forward; or None for keeping all. As a context manager it
    restores on leaving what was set before. shortcut: "adapter" (x + A_skip(x)) or "identity" (x); not given, it is the
    plan's, else that of the attached configuration, else "identity", the only one a model without shortcut adapters
    has. capacity: see `policies.Policy`. A forward reads the set once when it starts, so its backward, recomputed
    layers included, is of the layers that ran. With a mask per sample all parameters of skippable blocks get gradients,
    zeros if nobody ran them. On a CPU a sample's result does not depend on its neighbours: to the bit with
    backend="cpp" and with "auto", which chooses for the whole batch; unpatched as far as torch's matrix products do not
    depend on the number of rows: MKL's do below four rows a thread, in a step of generation, and in attention of one
    short sample, which BridgeTower, whose maps are always made, leaves to torch with any backend.
    """
    family, host = registry.family_of(model, "skip")
    check_shortcut(shortcut, "skip")
    values = None
    if mask_or_plan is not None:
        n_blocks = family.n_blocks(host)
        values = _policy(mask_or_plan, n_blocks, capacity)
    if isinstance(mask_or_plan, SkipPlan):
        values, shortcut = mask_or_plan.mask(n_blocks), shortcut or mask_or_plan.shortcut
    elif mask_or_plan is not None and values is None:
        values = mask_values(mask_or_plan, n_blocks, "skip")
    if isinstance(values, Policy) and mixed(model) and not family.routes_samples:
        raise ValueError("skip: a task for each sample is set, expected one task beside masks per sample")
    adapters = family.has_shortcut_adapters(host)
    if shortcut == "adapter" and not adapters:
        raise ValueError(
            "skip: shortcut is 'adapter', but the model has no shortcut adapters: attach them with "
            "fastpetl.attach(model, fastpetl.DASConfig(...)) (ViLT and METER), or use shortcut='identity'"
        )
    shortcut = shortcut or ("adapter" if adapters else "identity")
    before = family.get_skip(host)
    if family.is_pruned(host) and (values, shortcut) != before:
        raise ValueError(f"skip: the model is pruned: expected the plan it was pruned by, {_plan(before)}")
    family.set_skip(host, values, shortcut)
    return _Setting(family, host, before, _plan((values, shortcut)))


def pruned(model: nn.Module) -> bool:
    """Semantics: has `prune` dropped blocks of the model?"""
    family, host = registry.family_of(model, "pruned")
    return family.is_pruned(host)


def prune(model: nn.Module, plan=None, *, shortcut: str | None = None) -> nn.Module:
    """Semantics: skip `plan` for good: what it never runs is dropped, the skipped blocks' weights and the kept blocks'
    shortcut adapters; in place; returns `model`, whose outputs are those of skip(model, plan).

    plan: a SkipPlan or [n_blocks] bools; the plan that is set if not given. The names of what is left stay. A pruned
    model skips nothing else and cannot be detached; `fastpetl.save` and `load` know it. An optimizer made before holds
    on to the dropped parameters.
    """
    family, host = registry.family_of(model, "prune")
    if family.is_pruned(host):
        raise ValueError("prune: the model is pruned already")
    setting = None if plan is None else skip(model, plan, shortcut=shortcut)
    plan = current(model)
    if not isinstance(plan, SkipPlan):
        if setting is not None:
            setting.__exit__()
        got = "nothing is skipped" if plan is None else f"{type(plan).__name__} is set"
        raise ValueError(f"prune: {got}, expected a SkipPlan or one mask for the whole batch")
    family.prune(host)
    return model


def _policy(given, n_blocks: int, capacity: int | None) -> Policy | None:
    """The policy that `given` is or stands for; None if it is not per sample."""
    if isinstance(given, Policy):
        if capacity is not None:
            raise ValueError(f"skip: capacity is {capacity} beside a policy, expected it in the policy's own arguments")
        return given
    mask = sample_mask(given, n_blocks)
    if mask is not None:
        return policies.Masks(mask, capacity=capacity)
    if callable(given):
        return policies.Callback(given, capacity=capacity)
    if capacity is not None:
        raise ValueError(f"skip: capacity is {capacity} without masks per sample, expected a mask [batch, n_blocks]")
    return None


def _plan(setting) -> SkipPlan | Policy | None:
    values, shortcut = setting
    return values if values is None or isinstance(values, Policy) else SkipPlan.from_mask(values, shortcut)


make_callable(__name__, skip)
