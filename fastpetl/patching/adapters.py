"""Patch rule for `fastpetl.nn.BottleneckAdapter`, wherever it stands."""

from __future__ import annotations

from fastpetl.patching.registry import Rule


def _check(adapter) -> str | None:
    from fastpetl.nn.adapter import adapter_structure
    from fastpetl.nn.inline import structure_reason

    return structure_reason(adapter, adapter_structure(adapter))


RULES = (
    Rule(
        kind="adapter",
        target="fastpetl.nn.adapter:BottleneckAdapter",
        replacement="fastpetl.nn.adapter:FusedBottleneckAdapter",
        check=_check,
        ops=("adapter",),
    ),
)
