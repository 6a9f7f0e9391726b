"""Patch rules for the adapters of `fastpetl.nn`, wherever they stand."""

from __future__ import annotations

from fastpetl.patching.registry import Rule


def _check(adapter) -> str | None:
    from fastpetl.nn.adapter import adapter_structure
    from fastpetl.nn.inline import structure_reason

    return structure_reason(adapter, adapter_structure(adapter))


def _check_controller(controller) -> str | None:
    from fastpetl.nn.adapter_controller import controller_structure
    from fastpetl.nn.inline import structure_reason

    return structure_reason(controller, controller_structure(controller))


RULES = (
    Rule(
        kind="adapter",
        target="fastpetl.nn.adapter:BottleneckAdapter",
        replacement="fastpetl.nn.adapter:FusedBottleneckAdapter",
        check=_check,
        ops=("adapter",),
    ),
    Rule(
        kind="adapter_controller",
        target="fastpetl.nn.adapter_controller:AdapterController",
        replacement="fastpetl.nn.adapter_controller:FusedAdapterController",
        check=_check_controller,
        ops=("adapter",),
    ),
    Rule(
        kind="lora_linear",
        target="fastpetl.nn.lora:LoRALinear",
        replacement="fastpetl.nn.lora:FusedLoRALinear",
        check=lambda linear: None,
        ops=("linear", "adapter"),
    ),
    Rule(
        kind="hyper_adapter",
        target="fastpetl.nn.hyperformer:HyperSite",
        replacement="fastpetl.nn.hyperformer:FusedHyperSite",
        check=lambda site: None,
        ops=("adapter",),
    ),
)
