"""VL-Adapter's prompts: trained vectors in front of the text, per task, re-parameterised by a small network.

Source: `InputPrompts` and `PromptController` of ylsung/VL_adapter (CVPR 2022), after prefix tuning; parameter names are
theirs.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from fastpetl.nn.joined import joined
from fastpetl.nn.tasks import TaskRouted, only_name, per_sample


class InputPrompts(nn.Module):
    """Semantics: prompts [length, hidden] = Linear(tanh(Linear(Embedding))); the original runs the network once for
    each sample of the batch, here it runs once.
    """

    def __init__(self, length: int, hidden: int, middle: int, std: float | None, **made):
        super().__init__()
        first, last = nn.Linear(hidden, middle, **made), nn.Linear(middle, hidden, **made)
        self.prefix_embedding = nn.Sequential(nn.Embedding(length, hidden, **made), first, nn.Tanh(), last)
        if std is not None:
            nn.init.normal_(self.prefix_embedding[0].weight, std=std)
            for linear in (first, last):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def forward(self) -> torch.Tensor:
        table, *network = self.prefix_embedding
        x = table.weight
        for module in network:
            x = module(x)
        return x


class PromptController(TaskRouted, nn.Module):
    """Semantics: the task's prompts for a batch, [batch, length, hidden]; one InputPrompts under all tasks' names
    ("single") or one per task ("multiple").
    """

    def __init__(self, tasks, length, hidden, middle, *, sharing: str, std: float | None, **made):
        super().__init__()
        self.length, self.hidden = length, hidden
        self.prompts, first = nn.ModuleDict(), None
        for task in tasks:
            if first is None or sharing == "multiple":
                first = InputPrompts(length, hidden, middle, std, **made)
            self.prompts[task] = first

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.prompts)

    def forward(self, batch: int, task: str | None = None) -> torch.Tensor:
        if isinstance(task, tuple | list):
            rows = torch.arange(batch)
            return per_sample(rows, task, lambda rows, name: self.forward(len(rows), name))
        prompts = self.prompts._modules
        if task is None:
            task = only_name(prompts)
        if task not in prompts:
            raise ValueError(
                f"PromptController: task is {task!r}, expected one of {', '.join(prompts)}: "
                "fastpetl.task(model, name), or model(..., task=name)"
            )
        return prompts[task]().expand(batch, -1, -1)


def prompted(encoder, x, task):
    """Semantics: ([prompts; x], how many prompts): those of `fastpetl.PromptConfig`, if the encoder has any."""
    module = encoder._modules.get("prompt_modules")
    if module is None:
        return x, 0
    return torch.cat([module(x.shape[0], task=task).to(x.dtype), x], 1), module.length


def prompt_length(encoder) -> int:
    module = encoder._modules.get("prompt_modules")
    return 0 if module is None else module.length


def seen_in_front(mask, length: int):
    """Semantics: a mask over the text [batch, T] with ones in front, [batch, length]; any other as it is."""
    if mask is None or mask.dim() != 2 or mask.shape[1] >= length:
        return mask
    return F.pad(mask, (length - mask.shape[1], 0), value=1)


@functools.cache
def with_prompts(original: type, mixin: type) -> type:
    """Semantics: `original` with `mixin`, which has or sees prompts, before it."""
    return joined(mixin, original, (with_prompts, mixin))


class SeesPrompts:
    """Mixin of a decoder, before the original: what the encoder's prompts became is seen by all."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        *args,
        **kwargs,
    ):
        if encoder_hidden_states is not None:
            encoder_attention_mask = seen_in_front(encoder_attention_mask, encoder_hidden_states.shape[1])
        masks = attention_mask, encoder_hidden_states, encoder_attention_mask
        return super().forward(input_ids, *masks, *args, **kwargs)
