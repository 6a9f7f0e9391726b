"""`patch` makes a model's modules fast where they stand: it swaps their class for a subclass that calls fused ops.

Parameters, buffers, names, hooks, isinstance, deepcopy and pickle are as before, for the modules are the same objects
and hold the same things. Nothing global changes: other models, and classes, stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

from torch import nn

from fastpetl.patching import registry
from fastpetl.patching._probe import probe_reason
from fastpetl.patching.registry import ChildRule, CopiedRule, Rule, class_key
from fastpetl.patching.report import Report, Row

__all__ = ["Report", "Row", "patch", "report", "unpatch"]

_NOT_PATCHED = "not patched: patch was not called, or its filter_fn left it out"
_STATE = ("_fastpetl_backend", "_fastpetl_fallback", "_fastpetl_packs", "_fastpetl_weights")


def patch(
    model: nn.Module,
    *,
    backend: str = "auto",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
) -> nn.Module:
    """Semantics: every module of `model` that a rule matches runs fused from now on; in place; returns `model`.

    backend: "auto", or a backend of `fastpetl.ops` which then must serve (RuntimeError saying why it cannot).
    filter_fn(module, name): leave out the modules for which it is false. strict: ValueError if anything that looks
    like a match is declined, or nothing matches, or filter_fn leaves out whatever does; otherwise
    `fastpetl.report(model)` says what was declined and why, and where nothing is left there is a warning. A patch that
    raises has changed nothing. Patching twice is patching once.
    """
    _check_model(model, "patch")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"patch: filter_fn is {type(filter_fn).__name__}, expected a function (module, name) -> bool")
    _check_backend(backend)
    plan, declined, found = [], [], 0
    for name, module, rule, reason in _matches(model):
        found += 1
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if reason is None:
            _backends(
                rule, module, backend
            )  # raises now if an explicit backend cannot serve, before anything is changed
            plan.append((module, rule.replacement_class(module)))
        else:
            declined.append(f"{name}: {reason}")
    if not plan and not declined:
        message = f"patch: model is {type(model).__name__}, in which nothing matches a patch rule"
        if found:
            message = f"patch: filter_fn leaves out all {found} modules that match a patch rule, expected to keep some"
        if strict:
            raise ValueError(f"{message} (strict=True)")
        warnings.warn(message, stacklevel=2)
    if strict and declined:
        raise ValueError(f"patch: {len(declined)} modules are declined (strict=True): " + "; ".join(declined))
    for module, replacement in plan:
        module.__class__ = replacement
        if backend == "auto":
            module.__dict__.pop("_fastpetl_backend", None)
        else:
            module.__dict__["_fastpetl_backend"] = backend
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Semantics: undo `patch` exactly; in place; returns `model`. What was attached or set to be skipped stays."""
    from ..ops._casts import forget

    _check_model(model, "unpatch")
    for module in model.modules():
        patched = registry.patched_by(type(module))
        if patched is not None:
            module.__class__ = patched[1]
            for key in _STATE:
                module.__dict__.pop(key, None)
    forget(model.parameters())
    return model


def report(model: nn.Module) -> Report:
    """Semantics: one row per module that is patched or looks like one that could be, as the model stands now."""
    _check_model(model, "report")
    rows = []
    for name, module, rule, reason in _matches(model):
        patched = registry.patched_by(type(module)) is not None
        status = "patched" if patched else "declined"
        fallback = getattr(module, "_fastpetl_fallback", None) if patched else None
        notes = [
            reason or ("" if patched else _NOT_PATCHED),
            f"last original forward: {fallback}" if fallback not in (None, reason) else "",
        ]
        if patched and reason is None:
            notes.insert(0, rule.note(module))
        backend = ""
        if patched:
            try:
                backend, why = _backends(rule, module, getattr(module, "_fastpetl_backend", "auto"))
                notes.append(why)
            except RuntimeError as error:  # moved or cast since it was patched for an explicit backend
                notes.append(str(error))
        rows.append(Row(name, rule.kind, status, "; ".join(note for note in notes if note), backend))
    return Report(tuple(rows))


def _matches(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rule | CopiedRule, str | None]]:
    """(name, module, rule, reason to decline) of everything that is, was before patching, derives from, or looks like
    a rule's target.
    """
    rules = registry.rules()
    about_children = [rule for rule in rules if isinstance(rule, ChildRule)]
    targets = {rule.target_class(): rule for rule in rules if type(rule) is Rule}
    targets.pop(None, None)  # of libraries nobody has imported
    copied = [rule for rule in rules if isinstance(rule, CopiedRule)]
    children = {}  # id -> rule; owners come before their children
    for name, module in model.named_modules():
        cls, child_rule = type(module), children.get(id(module))
        children |= {id(child): rule for rule in about_children if (child := rule.child_of(module)) is not None}
        rule, _ = registry.patched_by(cls) or (targets.get(cls), cls)
        if rule is None and child_rule is not None:
            if cls is not child_rule.target_class():
                yield name, module, child_rule, f"its class is {class_key(cls)}, expected {child_rule.target}"
                continue
            rule = child_rule
        if rule is not None:
            yield name, module, rule, _forward_reason(module) or rule.check(module) or probe_reason(rule, module)
            continue
        target = next((target for target in targets if isinstance(module, target)), None)
        if target is not None:
            rule = targets[target]
            expected = f"a subclass of {rule.target}, expected exactly that"
            yield name, module, rule, f"its class is {class_key(cls)}, {expected}"
            continue
        rule = next((rule for rule in copied if rule.looks(module)), None)
        if rule is not None:
            yield name, module, rule, _forward_reason(module) or rule.check(module) or probe_reason(rule, module)


def _forward_reason(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (accelerate, another patcher): a new class would not reach it"
    return None


def _backends(rule: Rule | CopiedRule, module: nn.Module, backend: str) -> tuple[str, str]:
    """The backends that serve a module where and in the dtype it is, as "op: backend, ...", and why "auto" fell back.

    "op: a|b" is the fastest of a and b, found by measurement at the first call (`fastpetl.backends.tuned()`).
    """
    if not rule.ops:
        return "", ""
    from fastpetl.backends import for_op, resolve_for, serving

    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None:
        return "", ""
    names: list[str] = []
    why: dict[str, list[str]] = {}
    for op in rule.ops:
        call = (op, for_op(op, backend), weight.device.type, weight.dtype)
        choice = resolve_for(*call)  # raises if an explicit backend cannot serve
        names.append(f"{op}: {'|'.join(serving(*call))}")
        if "fell back" in choice.reason:
            why.setdefault(choice.reason, []).append(op)
    return ", ".join(names), "; ".join(f"{', '.join(ops)}: {reason}" for reason, ops in why.items())


def _check_backend(backend) -> None:
    from fastpetl.backends import names

    if backend not in names():
        raise ValueError(f"patch: backend is {backend!r}, expected one of {', '.join(names())}")


def _check_model(model, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is {type(model).__name__}, expected a torch.nn.Module")
