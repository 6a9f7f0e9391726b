"""The table of what can be patched, and the families of models the methods know. One file of this package per family.

A family file defines RULES (Rule and CopiedRule) and, if adapters can be attached to its models or blocks skipped,
FAMILY. Both are found by looking through the package: a new family touches no other file, and is imported without the
libraries it is about.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
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
        return imported(self.target)

    def replacement_class(self, module: nn.Module) -> type:
        return load(self.replacement)


@dataclass(frozen=True)
class ChildRule(Rule):
    """Semantics: a `Rule` for the children called `child` of modules of a class in `owners` ("module:Class"), or of one
    derived from it: a target that is everywhere, such as nn.Linear, is only there what the replacement is about.
    """

    owners: tuple[str, ...] = ()
    child: str = ""

    def child_of(self, module: nn.Module) -> nn.Module | None:
        """Semantics: the child of `module` that this rule is about, or None."""
        owners = tuple(cls for cls in map(imported, self.owners) if cls is not None)
        return module._modules.get(self.child) if isinstance(module, owners) else None


@dataclass(frozen=True)
class CopiedRule:
    """Semantics: a module of any class for which `looks(module)` becomes an instance of `replacement` before its own
    class, if `check(module)` has no reason against it and its forward gives the numbers of the original's.

    For research code that is copied from project to project: the class is known by its children and proven by
    `patching/_probe.py` with the calls `probe(module)` yields as (args, kwargs). replacement is "module:Class", a mixin
    whose super().forward is the original. `omits` are the positions of a tuple output that the mixin leaves None.
    """

    kind: str
    replacement: str
    looks: Callable[[nn.Module], bool]
    check: Callable[[nn.Module], str | None]
    probe: Callable[[nn.Module], Iterable[tuple[tuple, dict]]]
    ops: tuple[str, ...] = ()
    note: Callable[[nn.Module], str] = field(default=lambda module: "")
    omits: tuple[int, ...] = ()

    def replacement_class(self, module: nn.Module) -> type:
        patched = patched_by(type(module))
        return _derived(self, type(module)) if patched is None else type(module)


@functools.cache
def _derived(rule: CopiedRule, original: type) -> type:
    from fastpetl.nn.joined import joined

    return joined(load(rule.replacement), original, (_derived_again, rule.replacement), _fastpetl_rule=rule)


def _derived_again(original: type, replacement: str) -> type:
    return _derived(next(rule for rule in rules() if rule.replacement == replacement), original)


def patched_by(cls: type) -> tuple[Rule | CopiedRule, type] | None:
    """Semantics: (rule, original class) of a class that `patch` swaps in, None of any other."""
    rule = cls.__dict__.get("_fastpetl_rule")
    if rule is not None:
        return rule, cls.__bases__[1]
    rule = _replacements().get(class_key(cls))
    return None if rule is None else (rule, rule.target_class())


def class_key(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def imported(name: str) -> type | None:
    """Semantics: the class called `module:name`, None while nobody has imported its module."""
    module, _, name = name.partition(":")
    return getattr(sys.modules.get(module), "__dict__", {}).get(name)  # past a module that would import it now


def load(name: str) -> type:
    """Semantics: the class called `module:name`, imported if need be."""
    module, _, name = name.partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def _replacements() -> dict[str, Rule]:
    return {rule.replacement: rule for rule in rules() if isinstance(rule, Rule)}


@functools.cache
def _files() -> tuple:
    package = importlib.import_module(__package__)
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    files = (importlib.import_module(f"{__package__}.{name}") for name in names if not name.startswith("_"))
    return tuple(file for file in files if hasattr(file, "RULES"))


@functools.cache
def rules() -> tuple[Rule | CopiedRule, ...]:
    return tuple(rule for file in _files() for rule in file.RULES)


def families() -> tuple:
    """The FAMILY of every family file (see patching/vilt.py for what one answers)."""
    return tuple(file.FAMILY for file in _files() if hasattr(file, "FAMILY"))


_SKIPPING = ("blocks", "skip", "prune", "pruned")


def family_of(model: nn.Module, function: str):
    """Semantics: (family, host) of the one stack of blocks found in `model`; ValueError in the name of `function`
    otherwise. Families that nothing is attached to answer about skipping alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is {type(model).__name__}, expected a torch.nn.Module")
    known = [f for f in families() if function in _SKIPPING or hasattr(f, "attach_reason")]
    modules = list(model.named_modules())  # once: walking costs more than asking
    found = [(family, name, module) for family in known for name, module in modules if family.hosts(module)]
    # What is in another host (METER's two towers) is that one's.
    inside = {id(m) for *_, host in found for m in host.modules() if m is not host}
    found = [entry for entry in found if id(entry[2]) not in inside]
    if not found:
        names = ", ".join(family.name for family in known)
        raise ValueError(
            f"{function}: model is {type(model).__name__} with no blocks known here, expected one of: {names}"
        )
    if len(found) > 1:
        names = ", ".join(name for _, name, _ in found)
        raise ValueError(f"{function}: model has {len(found)} stacks of blocks ({names}), expected one")
    return found[0][0], found[0][2]
