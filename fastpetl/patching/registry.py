"""The table of what can be patched, and the families of models the methods know. One file of this package per family.

A family file defines RULES (a tuple of Rule) and, if adapters can be attached to its models or blocks skipped,
FAMILY. Both are found by looking through the package: a new family touches no other file, and is imported without the
libraries it is about.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Rule:
    """Semantics: a module whose class is exactly `target` becomes `replacement`, unless `check(module)` gives a
    reason not to.

    target and replacement are "module:Class"; target is looked up among the imported modules and replacement, its
    subclass, is imported with the first match. `ops` names the ops the replacement calls. `note(module)` says what it
    will not accelerate.
    """

    kind: str
    target: str
    replacement: str
    check: Callable[[nn.Module], str | None]
    ops: tuple[str, ...] = ()
    note: Callable[[nn.Module], str] = field(default=lambda module: "")

    def target_class(self) -> type | None:
        """The class, or None while nobody has imported its module (then no model has such a layer)."""
        module, _, name = self.target.partition(":")
        return getattr(sys.modules.get(module), name, None)

    def replacement_class(self) -> type:
        module, _, name = self.replacement.partition(":")
        return getattr(importlib.import_module(module), name)


@functools.cache
def _files() -> tuple:
    package = importlib.import_module(__package__)
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    files = (importlib.import_module(f"{__package__}.{name}") for name in names if not name.startswith("_"))
    return tuple(file for file in files if hasattr(file, "RULES"))


def rules() -> tuple[Rule, ...]:
    return tuple(rule for file in _files() for rule in file.RULES)


def families() -> tuple:
    """The FAMILY of every family file (see patching/vilt.py for what one answers)."""
    return tuple(file.FAMILY for file in _files() if hasattr(file, "FAMILY"))


def family_of(model: nn.Module, function: str):
    """Semantics: (family, host) of the one stack of blocks found in `model`; ValueError in the name of `function`
    otherwise.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is {type(model).__name__}, expected a torch.nn.Module")
    found = [
        (family, name, module)
        for family in families()
        for name, module in model.named_modules()
        if family.hosts(module)
    ]
    if not found:
        known = ", ".join(family.name for family in families())
        raise ValueError(
            f"{function}: model is {type(model).__name__} with no blocks known here, expected one of: {known}"
        )
    if len(found) > 1:
        names = ", ".join(name for _, name, _ in found)
        raise ValueError(f"{function}: model has {len(found)} stacks of blocks ({names}), expected one")
    return found[0][0], found[0][2]
