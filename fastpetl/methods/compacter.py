"""VL-Adapter's Compacter and low-rank adapters (CVPR 2022): their configurations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastpetl.methods.adapter import AdapterConfig


def _at_least_one(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}: {name} is {value!r}, expected an integer >= 1")


@dataclass(frozen=True)
class CompacterConfig(AdapterConfig):
    """Semantics: `AdapterConfig` with PHM projections (`fastpetl.nn.compacter.PHMLinear`).

    The defaults are VL-Adapter's: division n = 2, each projection its own rule [n, n, n] and full W. rank: k makes W
    the product of [in, k] and [k, out] matrices (Compacter's own is 1). factorized_rule: the rule is a product too.
    shared_rule: one rule for the whole model. init_range: the standard deviation rules are drawn with.
    """

    division: int = 2
    rank: int | None = None
    factorized_rule: bool = False
    shared_rule: bool = False
    init_range: float = 0.01

    method = "compacter"

    def __post_init__(self):
        super().__post_init__()
        _at_least_one(self, "division", *(() if self.rank is None else ("rank",)))
        for name in ("factorized_rule", "shared_rule"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"CompacterConfig: {name} is {getattr(self, name)!r}, expected True or False")
        if not isinstance(self.init_range, (int, float)) or isinstance(self.init_range, bool) or self.init_range < 0:
            raise ValueError(f"CompacterConfig: init_range is {self.init_range!r}, expected a number >= 0")

    def resolved(self, family, host):
        config = super().resolved(family, host)
        for name, size in (("hidden size", family.hidden(host)), ("bottleneck", config.bottleneck)):
            if size % self.division:
                raise ValueError(
                    f"CompacterConfig: division is {self.division}, expected a divisor of the {name} {size}"
                )
        return config

    def _make(self, hidden: int):
        from fastpetl.nn.compacter import CompacterAdapter, PHMLinear

        options = {"rank": self.rank, "factorized_rule": self.factorized_rule, "init_range": self.init_range}

        def make(**made):
            down = PHMLinear(hidden, self.bottleneck, self.division, **options, **made)
            up = PHMLinear(self.bottleneck, hidden, self.division, **options, **made)
            return CompacterAdapter(down, up, self.activation)

        return make

    def added(self, model, host, family) -> None:
        """Semantics: a shared rule is a parameter of the model itself, and every projection's."""
        from fastpetl.nn.compacter import PHMLinear

        layers = [module for module in host.modules() if isinstance(module, PHMLinear)] if self.shared_rule else []
        for name in [name for name in layers[0]._parameters if name.startswith("phm_rule")] if layers else []:
            model.register_parameter(name, nn.Parameter(layers[0]._parameters[name].detach().clone()))
            for layer in layers:
                layer._parameters[name] = model._parameters[name]

    def removed(self, model, host) -> None:
        for name in [name for name in model._parameters if name.startswith("phm_rule")]:
            del model._parameters[name]

    def trainable(self, name: str) -> bool:
        return name.startswith("phm_rule") or super().trainable(name)

    @classmethod
    def fields_of(cls, adapter: dict[str, torch.Tensor]) -> dict:
        """Semantics: what the parameters of one task's adapter, by their names in it, say about the configuration."""
        rule = adapter.get("down_sampler.phm_rule", adapter.get("down_sampler.phm_rule_left"))
        left = adapter.get("down_sampler.W_left")
        return {
            "division": rule.shape[0],
            "rank": None if left is None else left.shape[2],
            "factorized_rule": "down_sampler.phm_rule_left" in adapter,
        }


@dataclass(frozen=True)
class LowRankConfig(AdapterConfig):
    """Semantics: `AdapterConfig` whose projections are products of [in, rank] and [rank, out] matrices."""

    rank: int = 1

    method = "lowrank"

    def __post_init__(self):
        super().__post_init__()
        _at_least_one(self, "rank")

    def _make(self, hidden: int):
        from fastpetl.nn.compacter import LowRankAdapter, LowRankLinear

        def make(**made):
            down = LowRankLinear(hidden, self.bottleneck, self.rank, **made)
            return LowRankAdapter(down, LowRankLinear(self.bottleneck, hidden, self.rank, **made), self.activation)

        return make

    @classmethod
    def fields_of(cls, adapter: dict[str, torch.Tensor]) -> dict:
        """Semantics: as `CompacterConfig.fields_of`."""
        return {"rank": adapter["down_sampler.W_left"].shape[1]}
