"""LoRA per task: frozen linears with a trained low-rank update, in plain torch, and the fused subclass.

Source: `LoRALinearController` of ylsung/VL_adapter (CVPR 2022), after loralib; parameter names are theirs.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastpetl.nn.inline import call_reason, listened, note_fallback, read_dtype, weight_and_bias
from fastpetl.nn.tasks import Told, in_one_launch, name_of, only_name, per_sample, stacked, task_ids


class LoRALinear(Told, nn.Linear):
    """Semantics: y = x W^T + b + scale * (drop(x) A_t^T) B_t^T for the task t; A_t [rank, in], B_t [out, rank].

    An nn.Linear with two more children, `lora_As` and `lora_Bs`, one entry per task; "single" is the same parameters
    under all tasks' names. The task is that of the layer it is in (`TellsTask`).
    """

    def add(self, tasks, rank: int, *, sharing: str, scale: float, dropout: float) -> None:
        """Semantics: turns into one what was an nn.Linear: A as torch draws a Linear's weight, B zeros."""
        self.lora_As, self.lora_Bs = nn.ParameterDict(), nn.ParameterDict()
        self.scale, self.dropout, first = scale, dropout, None
        for task in tasks:
            if first is None or sharing == "multiple":
                a, b = self.weight.new_empty(rank, self.in_features), self.weight.new_zeros(self.out_features, rank)
                nn.init.kaiming_uniform_(a, a=5**0.5)
                first = nn.Parameter(a), nn.Parameter(b)
            self.lora_As[task], self.lora_Bs[task] = first

    def remove(self) -> None:
        for name in ("lora_As", "lora_Bs"):
            self._modules.pop(name, None)
        for name in ("scale", "dropout", "_fastpetl_current", "_fastpetl_weights"):
            self.__dict__.pop(name, None)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.lora_As.keys())

    def update(self, task) -> tuple:
        """(A, B) of the task."""
        downs, ups = (self._modules[name]._parameters for name in ("lora_As", "lora_Bs"))
        if len(downs) < len(self._modules["lora_As"]):  # a DataParallel replica's are its attributes
            downs, ups = self.lora_As, self.lora_Bs
        if task is None:
            task = only_name(downs)
        if task not in downs:
            raise ValueError(
                f"LoRALinear: task is {task!r}, expected one of {', '.join(self.tasks)}: fastpetl.task(model, name), "
                "or model(..., task=name)"
            )
        return downs[task], ups[task]

    def task(self, x):
        """Semantics: the task this call on x is for, a tuple where the samples' differ: one name for all that share an
        update.
        """
        tasks = self.__dict__.get("_fastpetl_current")
        if not isinstance(tasks, tuple | list):
            return tasks
        downs = {name: self.lora_As[name] for name in self.tasks}
        named = {task: name_of(self.update(task)[0], downs) for task in dict.fromkeys(tasks)}
        tasks = tuple(named[task] for task in tasks)
        task_ids(x, tasks, self.tasks)  # raises if they are not as many as the samples
        return tasks if len(set(tasks)) > 1 else tasks[0]

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self._low_rank(self._dropped(x), self.task(x))

    def _low_rank(self, u, task):
        if isinstance(task, tuple):
            return per_sample(u, task, self._low_rank)
        a, b = self.update(task)
        return F.linear(F.linear(u, a), b) * self.scale

    def _dropped(self, x):
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={next(iter(self.lora_As.values())).shape[0]}, scale={self.scale}"


class FusedLoRALinear(LoRALinear):
    """`LoRALinear` with the update added where its kernel writes; in inference merged into the weight, which is kept
    while W, A and B stay as they are. Made by `fastpetl.patch`, never constructed.
    """

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None

    def forward(self, x):
        reason = call_reason(self, {}, x)
        if reason is None and read_dtype(x) not in (None, self.weight.dtype):
            reason = f"weight has dtype {self.weight.dtype}, the input {x.dtype}"
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x)
        from fastpetl import ops
        from fastpetl.backends import for_op

        biases = None if self.bias is None else (self.bias,)
        linear = for_op("linear", self._fastpetl_backend)
        if self.merges(x):
            return ops.linear(x, (self.merged(x),), biases, backend=linear)
        base = ops.linear(x, (self.weight,), biases, backend=linear)
        return self._updated(base, self._dropped(x), self.task(x), for_op("adapter", self._fastpetl_backend))

    def _updated(self, base, u, task, backend):
        """Semantics: base + scale * (u A_t^T) B_t^T, one op whatever the number of tasks."""
        from fastpetl import ops

        mixed = isinstance(task, tuple)
        if self.in_features != self.out_features or (mixed and not in_one_launch(u)):
            return base + self._low_rank(u, task)
        options = {"activation": "identity", "scale": self.scale, "residuals": (base,), "backend": backend}
        if mixed:
            names, (a, b) = self._stacks(task)
            return ops.multi_adapter(u, a, None, b, None, task_ids(u, task, names), **options)
        a, b = self.update(task)
        return ops.adapter(u, a, None, b, None, **options)

    def _stacks(self, tasks) -> tuple:
        """(names, (A, B) of these in stacks): in training of the tasks in the batch, for the others' get no gradient;
        else of all, kept while they stay.
        """
        one_batch = torch.is_grad_enabled() or torch.compiler.is_compiling()
        names = tuple(name for name in self.tasks if not one_batch or name in tasks)
        pairs = [self.update(name) for name in names]
        if one_batch:
            return names, stacked(pairs)
        return names, self._cache().get(names, [t for pair in pairs for t in pair], lambda: stacked(pairs))

    def merges(self, x) -> bool:
        """Semantics: can the update of this call stand in the weight? In inference, of one task, nobody listening."""
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            return False
        dtype = read_dtype(x)
        if dtype is not None and weight_and_bias(self)[0].dtype is not dtype:
            return False
        return not isinstance(self.task(x), tuple) and not listened(self)

    def merged(self, x) -> torch.Tensor:
        """Semantics: W + scale * B A of the task of this call on x, kept while W, A and B stay as they are."""
        return merged_weights((self,), x)[0]

    def in_weight(self, x) -> torch.Tensor | None:
        """Semantics: W + scale * B A of this call on x, in training with A's and B's gradients; None where the update
        cannot stand in the weight: dropout before it, tasks mixed, hooks, a weight that is trained as well.
        """
        if self.merges(x):
            return self.merged(x)
        if listened(self) or call_reason(self, {}, x):
            return None
        if self.weight.requires_grad or self.weight.dtype != x.dtype or (self.training and self.dropout > 0):
            return None
        task = self.task(x)
        if isinstance(task, tuple):
            return None
        from fastpetl import ops
        from fastpetl.backends import for_op

        a, b = self.update(task)
        return ops.lora_weight(self.weight, a, b, scale=self.scale, backend=for_op("linear", self._fastpetl_backend))

    def _cache(self):
        from fastpetl.ops import WeightCache

        return self.__dict__.setdefault("_fastpetl_weights", WeightCache())


def beside_others(linears, x) -> bool:
    """Semantics: can all these projections be taken side by side, those with an update merged?"""
    return all(type(linear) is FusedLoRALinear and linear.merges(x) for linear in linears)


def merged_weights(linears, x) -> tuple[torch.Tensor, ...]:
    """Semantics: the weights of these projections, those with an update merged for this call on x: W + scale * B A of
    its task, kept together while all their W, A and B stay as they are.
    """
    lora = [linear for linear in linears if type(linear) is FusedLoRALinear]
    if not lora:
        return tuple(linear.weight for linear in linears)
    updates = [linear.update(linear.task(x)) for linear in lora]
    sources = [t for linear, update in zip(lora, updates, strict=True) for t in (linear.weight, *update)]

    def make():
        pairs = zip(lora, updates, strict=True)
        return tuple(torch.addmm(linear.weight, b, a, alpha=linear.scale) for linear, (a, b) in pairs)

    made = iter(lora[0]._cache().get(tuple(id(a) for a, _ in updates), sources, make))
    return tuple(next(made) if type(linear) is FusedLoRALinear else linear.weight for linear in linears)


FusedLoRALinear.__name__ = LoRALinear.__name__  # accelerate and others match modules by class name
