"""LoRA as VL-Adapter compares it (CVPR 2022): its configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from fastpetl.methods.adapter import FROZEN, HEADS, AdapterConfig


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """Semantics: query and value projections q of all attentions become q(x) + alpha / rank * B_t A_t drop(x).

    The defaults are VL-Adapter's: rank 128, alpha 32, dropout 0.1, and all biases of the model trained (train_biases),
    of what its own flag freezes none.
    sharing "single" or "multiple". Of AdapterConfig's other fields tasks, train_norms (None: False), train_visual
    and train_head have a meaning here.
    """

    rank: int = 128
    alpha: float = 32.0
    dropout: float = 0.1
    train_biases: bool = True

    method = attaches = "lora"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"LoRAConfig: rank is {self.rank!r}, expected an integer >= 1")
        for name, ok, expected in (
            ("alpha", lambda v: True, "a number"),
            ("dropout", lambda v: 0 <= v < 1, "a number in [0, 1)"),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not ok(value):
                raise ValueError(f"LoRAConfig: {name} is {value!r}, expected {expected}")
        if not isinstance(self.train_biases, bool):
            raise ValueError(f"LoRAConfig: train_biases is {self.train_biases!r}, expected True or False")
        if self.sharing == "half":
            raise ValueError("LoRAConfig: sharing is 'half', expected 'single' or 'multiple'")

    def resolved(self, family, host):
        return replace(self, train_norms=bool(self.train_norms))

    def trainable(self, name: str) -> bool:
        parts = name.split(".")
        if {"lora_As", "lora_Bs"} & set(parts):
            return True
        if (HEADS | FROZEN | {"visual_embedding"}) & set(parts):
            return super().trainable(name)
        return (self.train_biases and "bias" in name and parts[-1] != "final_logits_bias") or super().trainable(name)

    @classmethod
    def fields_of(cls, state: dict[str, torch.Tensor]) -> dict:
        """Semantics: what a state_dict with the original's names says about the configuration."""
        found = {}
        at = None
        for name, value in state.items():
            match = re.fullmatch(r"(.*)\.lora_As\.([^.]+)", name)
            if match and at in (None, match[1]):
                at = match[1]
                found[match[2]] = value
        first = next(iter(found.values()))
        single = all(torch.equal(value, first) for value in found.values())
        return {"tasks": tuple(found), "sharing": "single" if single else "multiple", "rank": first.shape[0]}
