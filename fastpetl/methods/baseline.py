"""The baselines VL-Adapter compares with (CVPR 2022): nothing is added, part of the model trains."""

from __future__ import annotations

from dataclasses import dataclass

from fastpetl.methods.adapter import FROZEN, HEADS, AdapterConfig, is_norm

TRAINS = ("all", "visual", "norms", "biases")


@dataclass(frozen=True)
class BaselineConfig(AdapterConfig):
    """Semantics: what trains is "all" (full fine-tuning), the "visual" embedding alone, it and the backbone's "norms",
    or it and the "biases" (BitFit). Of AdapterConfig's fields only train_head has a meaning
    here.
    """

    train: str = "all"

    method, attaches = "baseline", "nothing"

    def __post_init__(self):
        super().__post_init__()
        if self.train not in TRAINS:
            raise ValueError(f"BaselineConfig: train is {self.train!r}, expected one of {', '.join(TRAINS)}")
        if self.prompts is not None:
            raise ValueError("BaselineConfig: prompts is given, expected None: a baseline adds nothing")

    def resolved(self, family, host):
        return self

    def trainable(self, name: str) -> bool:
        parts = name.split(".")
        if self.train == "all" or ("visual_embedding" in parts and "obj_order_embedding" not in parts):
            return True
        if FROZEN & set(parts):
            return False
        if HEADS & set(parts):
            return self.train_head
        return is_norm(parts) if self.train == "norms" else self.train == "biases" and parts[-1] == "bias"
