"""VL-Adapter's prompt tuning (CVPR 2022): its configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from fastpetl.methods.adapter import AdapterConfig


@dataclass(frozen=True)
class PromptConfig(AdapterConfig):
    """Semantics: `length` trained vectors in front of the encoder's text, made by a network `middle` wide.

    sharing "single": one set of prompts for all tasks, "multiple": one each. In BERT, RoBERTa, CLIP and ViLT they stand
    behind the first token, in METER behind its text encoder's; what these give is without them. Of AdapterConfig's
    fields tasks, sharing, train_norms (None: False, the paper's) and train_visual have a meaning here.
    """

    length: int = 40
    middle: int = 800

    method = attaches = "prompt"

    def __post_init__(self):
        super().__post_init__()
        for name in ("length", "middle"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"PromptConfig: {name} is {value!r}, expected an integer >= 1")
        if self.sharing == "half":
            raise ValueError("PromptConfig: sharing is 'half', expected 'single' or 'multiple'")
        if self.prompts is not None:
            raise ValueError("PromptConfig: prompts is given, expected None: this is the prompts' configuration")

    def resolved(self, family, host):
        return replace(self, train_norms=bool(self.train_norms))

    def place(self, family, model, host):
        return family.whole(model, host)

    def controller(self, hidden: int, std, **made):
        """Semantics: the module that gives the encoder its prompts."""
        from fastpetl.nn.prompt import PromptController

        sizes = (self.tasks, self.length, hidden, self.middle)
        return PromptController(*sizes, sharing=self.sharing, std=std, **made)

    @classmethod
    def fields_of(cls, state: dict[str, torch.Tensor]) -> dict:
        """Semantics: what a state_dict with the original's names says about the configuration."""
        found = {m[1]: v for n, v in state.items() if (m := re.search(r"\.prompts\.([^.]+)\.prefix_embedding\.0\.", n))}
        middle = next(v for n, v in state.items() if n.endswith("prefix_embedding.1.bias")).shape[0]
        first = next(iter(found.values()))
        single = all(torch.equal(value, first) for value in found.values())
        return {
            "tasks": tuple(found),
            "sharing": "single" if single else "multiple",
            "length": first.shape[0],
            "middle": middle,
        }
