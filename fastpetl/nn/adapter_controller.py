"""VL-Adapter's adapters: one bottleneck per task behind one module, in plain torch, and the fused subclass.

Source: `Adapter` and `AdapterController` of ylsung/VL_adapter (CVPR 2022); parameter names are theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastpetl.nn import compacter
from fastpetl.nn.adapter import ACTIVATIONS, site_spec
from fastpetl.nn.inline import HOOKS, Inlined, call_reason, note_fallback, structure, structure_reason
from fastpetl.nn.tasks import per_sample

SHARINGS = ("single", "half", "multiple")


class TaskAdapter(nn.Module):
    """Semantics: U(x) = act(x W_down^T + b_down) W_up^T + b_up, one task's part of an `AdapterController`."""

    def __init__(self, hidden: int, bottleneck: int, activation: str = "gelu_tanh", device=None, dtype=None):
        super().__init__()
        self.activation = activation
        self.down_sampler = nn.Linear(hidden, bottleneck, device=device, dtype=dtype)
        self.up_sampler = nn.Linear(bottleneck, hidden, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up_sampler(ACTIVATIONS[self.activation](self.down_sampler(x)))

    def weights(self) -> tuple:
        """(w_down, b_down, w_up, b_up)."""
        down, up = self.down_sampler, self.up_sampler
        return down.weight, down.bias, up.weight, up.bias

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class AdapterController(nn.Module):
    """Semantics: y = x + post(U_task(pre(x))); pre and post are LayerNorms (eps 1e-5) or nothing, x [..., hidden].

    sharing "single": one adapter under every task's name; "multiple": one per task; "half": one per task whose
    `shared` half ("up" or "down") is the first task's. Weights are drawn as torch draws a Linear's, or with `std` from
    N(0, std) with zero biases. make(device=, dtype=): an adapter of another kind than `TaskAdapter`
    (`fastpetl.nn.compacter`). `task` names whose adapter runs, for all samples or a
    list of names for each; None is right only where there is but one.
    """

    def __init__(
        self,
        hidden: int,
        bottleneck: int,
        tasks: Sequence[str],
        *,
        make: Callable[..., nn.Module] | None = None,
        sharing: str = "single",
        shared: str = "up",
        activation: str = "gelu_tanh",
        norm_before: bool = False,
        norm_after: bool = False,
        std: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.hidden, first = hidden, None
        self.adapters = nn.ModuleDict()
        for task in tasks:
            if first is not None and sharing == "single":
                self.adapters[task] = first
                continue
            adapter = TaskAdapter(hidden, bottleneck, activation, **made) if make is None else make(**made)
            if first is not None and sharing == "half":
                setattr(adapter, f"{shared}_sampler", getattr(first, f"{shared}_sampler"))
            self.adapters[task] = adapter
            first = first or adapter
        if norm_before:
            self.pre_layer_norm = nn.LayerNorm(hidden, **made)
        if norm_after:
            self.post_layer_norm = nn.LayerNorm(hidden, **made)
        if std is not None:
            for linear in (module for module in self.adapters.modules() if isinstance(module, nn.Linear)):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def adapter(self, task: str | None) -> TaskAdapter:
        """Semantics: the adapter of `task`; ValueError if there is none of that name, or several and none is named."""
        adapters = self.adapters._modules
        if task is None:
            if len({id(adapter) for adapter in adapters.values()}) == 1:
                return next(iter(adapters.values()))
            raise ValueError(
                f"AdapterController: task is None, expected one of {', '.join(adapters)}: "
                "fastpetl.task(model, name), or model(..., task=name)"
            )
        if task not in adapters:
            raise ValueError(f"AdapterController: task is {task!r}, expected one of {', '.join(adapters)}")
        return adapters[task]

    def forward(self, x: torch.Tensor, task=None) -> torch.Tensor:
        if isinstance(task, tuple | list):
            return self._per_sample(x, task)
        pre, post = self._modules.get("pre_layer_norm"), self._modules.get("post_layer_norm")
        h = self.adapter(task)(x if pre is None else pre(x))
        return (h if post is None else post(h)) + x

    def _per_sample(self, x, tasks):
        # Tasks that share their adapter are one.
        named = {task: self.adapter(task) for task in dict.fromkeys(tasks)}
        first = {id(adapter): task for task, adapter in reversed(named.items())}
        return per_sample(x, [first[id(named[task])] for task in tasks], self.forward)


class FusedAdapterController(AdapterController):
    """`AdapterController` in one op: same numbers, same parameters. Made by `fastpetl.patch`, never constructed."""

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None

    def forward(self, x: torch.Tensor, task=None) -> torch.Tensor:
        if isinstance(task, tuple | list):
            return self._per_sample(x, task)
        reason = call_reason(self, _norms(self), x) or _adapter_reason(self, task, x)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x, task)
        from fastpetl.backends import for_op

        return fused_controller(self, x, task, for_op("adapter", self._fastpetl_backend))


FusedAdapterController.__name__ = AdapterController.__name__  # accelerate and others match modules by class name

_LINEARS = structure(down_sampler=nn.Linear, up_sampler=nn.Linear)
_TASK_ADAPTER = Inlined(TaskAdapter, _LINEARS)
_NORMS = structure(pre_layer_norm=nn.LayerNorm, post_layer_norm=nn.LayerNorm)
CONTROLLERS = (AdapterController, FusedAdapterController)


def controller_structure(controller: AdapterController) -> dict[str, Inlined]:
    """What a fused controller reads past its children's forward."""
    adapters = {task: _inlined(type(adapter)) for task, adapter in controller.adapters._modules.items()}
    return structure(adapters=Inlined(nn.ModuleDict, adapters)) | _norms(controller)


def _norms(controller) -> dict[str, Inlined]:
    there = controller._modules
    return {name: inlined for name, inlined in _NORMS.items() if name in there}


def _adapter_reason(controller, task, x) -> str | None:
    """Semantics: why the adapter of `task` must be called and not read; the others are not looked at."""
    adapters = controller._modules["adapters"]
    if type(adapters) is not nn.ModuleDict:
        return f"adapters is a {type(adapters).__name__}, expected a ModuleDict"
    kind = type(controller.adapter(task))  # raises for a task it does not know
    name = next(iter(adapters._modules)) if task is None else task
    return structure_reason(adapters, _one(name, kind), x.dtype, x.device, "adapters.")


@functools.lru_cache(maxsize=256)
def _one(task: str, kind: type) -> dict[str, Inlined]:
    return structure(**{task: _inlined(kind)})


def _inlined(kind: type) -> Inlined:
    """What is read of an adapter of this class; of one that is not ours, that it is not a `TaskAdapter`."""
    return compacter.INLINED.get(kind, _TASK_ADAPTER)


def fused_controller(controller: AdapterController, x: torch.Tensor, task: str | None, backend: str) -> torch.Tensor:
    """Semantics: the controller's forward from its parameters, without calling its children."""
    from fastpetl import ops

    adapter = controller.adapter(task)
    pre, post = controller._modules.get("pre_layer_norm"), controller._modules.get("post_layer_norm")
    h = ops.adapter(
        x,
        *_weights(controller, adapter),
        norm_weight=None if pre is None else pre.weight,
        norm_bias=None if pre is None else pre.bias,
        eps=1e-5 if pre is None else pre.eps,
        activation=adapter.activation,
        residuals=(x,) if post is None else (),
        backend=backend,
    )
    return (
        h
        if post is None
        else torch.nn.functional.layer_norm(h, post.normalized_shape, post.weight, post.bias, post.eps) + x
    )


def _weights(controller, adapter) -> tuple:
    """The adapter's weights as matrices; those that have to be made first are kept while their parameters stay."""
    if type(adapter) is TaskAdapter or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return adapter.weights()
    from fastpetl.ops import WeightCache

    cache = controller.__dict__.setdefault("_fastpetl_weights", WeightCache())
    return cache.get(id(adapter), adapter.parameters(), adapter.weights)


def controller_site(controller, x, f, task, norm: nn.LayerNorm, backend: str, keep="sum") -> torch.Tensor | None:
    """Semantics: norm(x + f + U_t(f)), the controller's forward on f and what follows it, as one op; None where the
    controller has to be called: hooks, tasks per sample, a norm of its own behind the adapter.
    """
    if type(controller) is not FusedAdapterController or isinstance(task, tuple | list):
        return None
    state = controller.__dict__
    if "post_layer_norm" in controller._modules or "forward" in state or any(state[hooks] for hooks in HOOKS):
        return None
    if call_reason(controller, _norms(controller), f) or _adapter_reason(controller, task, f):
        return None
    from fastpetl import ops

    adapter, pre = controller.adapter(task), controller._modules.get("pre_layer_norm")
    w_down, b_down, w_up, b_up = _weights(controller, adapter)
    own, norms = None, {}
    if pre is not None:
        own, norms = (pre.eps, pre.bias is not None), {"norm_weight": pre.weight, "norm_bias": pre.bias}
    biases = b_down is not None, b_up is not None
    sizes = w_down.shape[1], w_down.shape[0]
    spec = site_spec(*sizes, adapter.activation, 1.0, own, biases, norm.eps, "norm", "sublayer")
    tail = {"tail_weight": norm.weight, "tail_bias": norm.bias}
    return ops.adapter_residual_norm(
        x, f, w_down, b_down, w_up, b_up, spec=spec, **norms, **tail, backend=backend, keep=keep
    )  # fmt: skip
