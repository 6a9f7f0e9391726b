"""`attach` adds the modules of a PETL method to a model and freezes the rest; `detach` takes them away again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fastpetl.methods.adapter import AdapterConfig
from fastpetl.methods.baseline import BaselineConfig
from fastpetl.methods.compacter import CompacterConfig, LowRankConfig
from fastpetl.methods.das import DASConfig
from fastpetl.methods.hyperformer import HyperformerConfig
from fastpetl.methods.lora import LoRAConfig
from fastpetl.methods.prompt import PromptConfig
from fastpetl.patching import patch as _patch
from fastpetl.patching import registry, unpatch

CONFIGS = (
    *(DASConfig, AdapterConfig, CompacterConfig, LowRankConfig, HyperformerConfig, LoRAConfig, PromptConfig),
    BaselineConfig,
)
__all__ = [*(cls.__name__ for cls in CONFIGS), "Attached", "attach", "attached", "detach", "load_original"]
_KEY = "_fastpetl_attached"


@dataclass(frozen=True)
class Attached:
    """What `attach` did: the configuration with every size a number, and how things were before.

    requires_grad: of each parameter. patched: the modules that were patched already, None if `attach` did not patch.
    """

    config: DASConfig | AdapterConfig  # or one derived from it
    requires_grad: dict[str, bool]
    patched: frozenset[str] | None


def attached(model: nn.Module) -> Attached | None:
    """Semantics: what is attached to `model`, or None."""
    return model.__dict__.get(_KEY)


def without(model) -> str:
    """Semantics: the model's class, for an error: with nothing attached, but perhaps around one with something."""
    around = f"{type(model).__name__} with nothing attached"
    if isinstance(model, nn.Module):  # DDP, torch.compile, a LightningModule
        inside = next((name for name, module in model.named_modules() if attached(module) is not None), None)
        around += f" (but model.{inside} has)" if inside else ""
    return around


def attach(model: nn.Module, config, *, patch: bool = True) -> nn.Module:
    """Semantics: add the method's modules, freeze every parameter it does not train, then `fastpetl.patch`; in place;
    returns `model`.

    config: one of `CONFIGS`. New weights are drawn from the global random generator, in the dtype and on
    the device of the block they join. With patch=False the added modules run in plain torch. An attach that raises has
    changed nothing.
    """
    if not isinstance(config, CONFIGS):
        names = ", ".join(cls.__name__ for cls in CONFIGS)
        raise TypeError(f"attach: config is {type(config).__name__}, expected one of: {names}")
    family, host = registry.family_of(model, "attach")
    for part in config.parts:
        if not hasattr(family, f"attach_{part.attaches}"):
            takes = ", ".join(cls.__name__ for cls in CONFIGS if hasattr(family, f"attach_{cls.attaches}"))
            raise ValueError(f"attach: config is {type(part).__name__}, expected for {family.name}: {takes}")
    prompted = any("prompt_modules" in module._modules for module in model.modules())  # the host may be inside
    if attached(model) is not None or family.is_attached(host) or prompted:
        raise ValueError("attach: model has adapters attached already; fastpetl.detach(model) first")
    config = config.resolved(family, host)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names, backend = _patched(model)
    unpatch(model)  # which fused class is right depends on what is attached
    reason = family.attach_reason(host)
    if reason is not None:
        _patch_again(model, names, backend)
        raise ValueError(f"attach: {reason}")
    try:
        for part in config.parts:
            getattr(family, f"attach_{part.attaches}")(part.place(family, model, host), part)
        config.added(model, host, family)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config.trainable(name))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"attach: {config} leaves nothing to train in {family.name}, expected one that does")
        model.__dict__[_KEY] = Attached(config, flags, frozenset(names) if patch else None)
        if patch:
            _patch(model, backend=backend)
        else:
            _patch_again(model, names, backend)
    except BaseException:
        _remove(model, family, host, config, flags)
        _patch_again(model, names, backend)
        raise
    return model


def detach(model: nn.Module) -> nn.Module:
    """Semantics: remove what `attach` added and give every parameter the requires_grad it had; in place; returns
    `model`.

    Frozen weights are bit-equal to those before `attach`; what was trained besides adapters (head, pooler, token
    types) keeps what it learnt. A skip plan through shortcut adapters goes with them. Modules patched before
    `attach`, or later by hand, stay so.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"detach: model is {type(model).__name__}, expected a torch.nn.Module")
    state = attached(model)
    if state is None:
        raise ValueError(f"detach: model is {without(model)}, expected the object that fastpetl.attach returned")
    family, host = registry.family_of(model, "detach")
    names, backend = _patched(model)
    if state.patched is not None:
        names &= state.patched
    _remove(model, family, host, state.config, state.requires_grad)
    _patch_again(model, names, backend)
    return model


def load_original(model: nn.Module, state_dict: dict, *, strict: bool = True) -> nn.Module:
    """Semantics: load a checkpoint of the paper's own code (its parameter names) into `model`; in place; returns
    `model`.

    Attach adapters of the checkpoint's sizes first if it has adapters. strict: as in load_state_dict.
    """
    family, _ = registry.family_of(model, "load_original")
    model.load_state_dict(family.from_original(state_dict), strict=strict)
    return model


def _remove(model, family, host, config, flags) -> None:
    unpatch(model)
    config.removed(model, host)
    for part in reversed(config.parts):
        getattr(family, f"detach_{part.attaches}")(part.place(family, model, host))
    model.__dict__.pop(_KEY, None)
    for name, parameter in model.named_parameters():
        if name in flags:
            parameter.requires_grad_(flags[name])


def _patched(model) -> tuple[set[str], str]:
    """The names of the patched modules, and the backend they were patched for."""
    fused = {name: m for name, m in model.named_modules() if registry.patched_by(type(m)) is not None}
    backends = {getattr(module, "_fastpetl_backend", "auto") for module in fused.values()}
    return set(fused), backends.pop() if len(backends) == 1 else "auto"


def _patch_again(model, names: set[str], backend: str) -> None:
    if names & {name for name, _ in model.named_modules()}:
        _patch(model, backend=backend, filter_fn=lambda module, name: name in names)
