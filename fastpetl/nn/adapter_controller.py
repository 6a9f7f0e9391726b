"""VL-Adapter's adapters: one bottleneck per task behind one module, in plain torch, and the fused subclass.

Source: `Adapter` and `AdapterController` of ylsung/VL_adapter (CVPR 2022); parameter names are theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastpetl.backends import for_op
from fastpetl.nn import compacter
from fastpetl.nn.adapter import ACTIVATIONS, site_spec
from fastpetl.nn.hyperformer import FusedHyperSite
from fastpetl.nn.inline import (
    Inlined,
    as_expected,
    call_reason,
    listened,
    note_fallback,
    read_dtype,
    structure,
    structure_reason,
    weight_and_bias,
)
from fastpetl.nn.tasks import in_one_launch, name_of, per_sample, stacked, task_ids

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
        children = self._modules
        return *weight_and_bias(children["down_sampler"]), *weight_and_bias(children["up_sampler"])

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
            first, *others = adapters.values()
            if not others or all(adapter is first for adapter in others):
                return first
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
        return per_sample(x, self._distinct(tasks), self.forward)

    def _distinct(self, tasks) -> tuple[str, ...]:
        """Semantics: `tasks` with one name, the controller's first, for all that share an adapter."""
        named = {task: name_of(self.adapter(task), self.adapters._modules) for task in dict.fromkeys(tasks)}
        return tuple(named[task] for task in tasks)


class FusedAdapterController(AdapterController):
    """`AdapterController` in one op: same numbers, same parameters. Made by `fastpetl.patch`, never constructed."""

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None

    def forward(self, x: torch.Tensor, task=None) -> torch.Tensor:
        if isinstance(task, tuple | list):
            return self._mixed(x, self._distinct(task))
        adapter = self.adapter(task)
        reason = call_reason(self, _norms(self), x) or _adapter_reason(self, task, x, adapter)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x, task)
        return fused_controller(self, x, task, for_op("adapter", self._fastpetl_backend), adapter)

    def _mixed(self, x, tasks):
        if len(set(tasks)) > 1 and _mixable(self, tasks, x):
            return fused_controller(self, x, tasks, for_op("adapter", self._fastpetl_backend))
        return per_sample(x, tasks, self.forward)  # which says why, should it not be fused


FusedAdapterController.__name__ = AdapterController.__name__  # accelerate and others match modules by class name

_LINEARS = structure(down_sampler=nn.Linear, up_sampler=nn.Linear)
_TASK_ADAPTER = Inlined(TaskAdapter, _LINEARS)
_NORMS = structure(pre_layer_norm=nn.LayerNorm, post_layer_norm=nn.LayerNorm)
_NO_NORMS: dict[str, Inlined] = {}
CONTROLLERS = (AdapterController, FusedAdapterController)


def controller_structure(controller: AdapterController) -> dict[str, Inlined]:
    """What a fused controller reads past its children's forward."""
    adapters = {task: _inlined(type(adapter)) for task, adapter in controller.adapters._modules.items()}
    return structure(adapters=Inlined(nn.ModuleDict, adapters)) | _norms(controller)


def _norms(controller) -> dict[str, Inlined]:
    there = controller._modules
    if len(there) == 1:  # the adapters
        return _NO_NORMS
    return {name: inlined for name, inlined in _NORMS.items() if name in there}


def _adapter_reason(controller, task, x, adapter=None) -> str | None:
    """Semantics: why the adapter of `task` must be called and not read; the others are not looked at. adapter: it, if
    known.
    """
    adapters = controller._modules["adapters"]
    if type(adapters) is not nn.ModuleDict:
        return f"adapters is a {type(adapters).__name__}, expected a ModuleDict"
    kind = type(adapter or controller.adapter(task))  # raises for a task it does not know
    name = next(iter(adapters._modules)) if task is None else task
    expected, dtype, device = _one(name, kind), read_dtype(x), x.device
    if not torch.compiler.is_compiling() and as_expected(adapters, expected, dtype, device):
        return None
    return structure_reason(adapters, expected, dtype, device, "adapters.")


@functools.lru_cache(maxsize=256)
def _one(task: str, kind: type) -> dict[str, Inlined]:
    return structure(**{task: _inlined(kind)})


def _inlined(kind: type) -> Inlined:
    """What is read of an adapter of this class; of one that is not ours, that it is not a `TaskAdapter`."""
    return compacter.INLINED.get(kind, _TASK_ADAPTER)


def _mixable(controller, tasks, x) -> bool:
    """Semantics: can these tasks' adapters be read, and run as one op?"""
    if not in_one_launch(x) or call_reason(controller, _norms(controller), x):
        return False
    names = _read(controller, tasks)
    if any(_adapter_reason(controller, name, x) for name in names):
        return False
    adapters = [controller.adapter(name) for name in names]
    return len({(type(adapter), adapter.activation, _bottleneck(adapter)) for adapter in adapters}) == 1


def _read(controller, tasks) -> tuple[str, ...]:
    """The tasks, different ones, whose weights a batch of these reads: in training those in it, for the others' get no
    gradient; else all, so that one stack serves every batch.
    """
    names = dict.fromkeys(controller._distinct(controller.tasks))
    one_batch = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return tuple(name for name in names if name in tasks) if one_batch else tuple(names)


def _bottleneck(adapter) -> int:
    down = adapter.down_sampler
    return (down.weight if type(adapter) is TaskAdapter else down.b).shape[0]


def fused_controller(controller: AdapterController, x, task, backend: str, adapter=None) -> torch.Tensor:
    """Semantics: the controller's forward from its parameters, without calling its children. task: a name, or several
    different ones, one for each sample. adapter: that of the one task, if known.
    """
    post = controller._modules.get("post_layer_norm")
    h = _adapted(controller, x, task, (x,) if post is None else (), backend, adapter)
    return (
        h
        if post is None
        else torch.nn.functional.layer_norm(h, post.normalized_shape, post.weight, post.bias, post.eps) + x
    )


def _adapted(controller, x, task, residuals, backend, adapter=None):
    """Semantics: U_t(pre(x)) + sum(residuals), one op whatever the number of tasks."""
    from fastpetl import ops

    pre = controller._modules.get("pre_layer_norm")
    options = {"residuals": residuals, "backend": backend}
    if pre is not None:
        options |= {"norm_weight": pre.weight, "norm_bias": pre.bias, "eps": pre.eps}
    if not isinstance(task, tuple):
        adapter = adapter or controller.adapter(task)
        return ops.adapter(x, *_weights(controller, adapter), activation=adapter.activation, **options)
    names = _read(controller, task)
    weights, activation = _stacks(controller, names), controller.adapter(task[0]).activation
    return ops.multi_adapter(x, *weights, task_ids(x, task, names), activation=activation, **options)


def _weights(controller, adapter) -> tuple:
    """The adapter's weights as matrices; those that have to be made first are kept while their parameters stay."""
    if type(adapter) is TaskAdapter or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return adapter.weights()
    return _cache(controller).get(id(adapter), adapter.parameters(), adapter.weights)


def _stacks(controller, names) -> tuple:
    """The adapters' weights as `_weights`, tasks in front; without autograd kept as well."""
    adapters = [controller.adapter(name) for name in names]

    def make():
        return stacked([adapter.weights() for adapter in adapters])

    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make()
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    return _cache(controller).get(tuple(map(id, adapters)), parameters, make)


def _cache(controller):
    from fastpetl.ops import WeightCache

    return controller.__dict__.setdefault("_fastpetl_weights", WeightCache())


def controller_site(controller, x, f, task, norm: nn.LayerNorm, backend: str, keep="sum") -> torch.Tensor | None:
    """Semantics: norm(x + f + U_t(f)), the controller's forward on f and what follows it, as one op, or two where the
    samples' tasks differ and one call does not serve them all (`keep` then does nothing); None where the controller has
    to be called: hooks, a norm of its own behind the adapter. For layers that have asked `call_reason`.
    """
    if type(controller) is FusedHyperSite:
        return controller.site(x, f, task, norm, backend, keep)
    if type(controller) is not FusedAdapterController:
        return None
    if "post_layer_norm" in controller._modules or listened(controller):
        return None
    if isinstance(task, tuple | list):
        task = controller._distinct(task)
        if len(set(task)) > 1:
            return _mixed_site(controller, x, f, task, norm, backend, keep) if _mixable(controller, task, f) else None
        task_ids(f, task, task[:1])  # as many as samples
        task = task[0]
    norms, adapter = _norms(controller), controller.adapter(task)
    if norms and structure_reason(controller, norms, read_dtype(f), f.device):
        return None
    if _adapter_reason(controller, task, f, adapter):
        return None
    from fastpetl import ops

    weights = _weights(controller, adapter)
    options = _site_options(controller, adapter.activation, weights, norm)
    return ops.adapter_residual_norm(x, f, *weights, **options, backend=backend, keep=keep)


def _site_options(controller, activation, weights, norm) -> dict:
    """Semantics: what `ops.adapter_residual_norm` takes beside x, f and an adapter's weights."""
    w_down, b_down, _, b_up = weights
    pre, own, norms = controller._modules.get("pre_layer_norm"), None, {}
    if pre is not None:
        own, norms = (pre.eps, pre.bias is not None), {"norm_weight": pre.weight, "norm_bias": pre.bias}
    biases = b_down is not None, b_up is not None
    sizes = w_down.shape[1], w_down.shape[0]
    spec = site_spec(*sizes, activation, 1.0, own, biases, norm.eps, "norm", "sublayer")
    weight, bias = weight_and_bias(norm)
    return {"spec": spec, "tail_weight": weight, "tail_bias": bias, **norms}


def _mixed_site(controller, x, f, tasks, norm, backend, keep):
    from fastpetl import ops

    if ops.multi_site_serves(f, backend):
        names = tuple(dict.fromkeys(tasks))
        adapters = [controller.adapter(name) for name in names]
        weights = [_weights(controller, adapter) for adapter in adapters]
        options = _site_options(controller, adapters[0].activation, weights[0], norm) | {"keep": keep}
        return ops.multi_adapter_residual_norm(x, f, weights, task_ids(f, tasks, names), **options, backend=backend)
    s = _adapted(controller, f, tasks, (f, x), backend)
    tail = {"eps": norm.eps, "emit": "norm", "backend": for_op("residual_norm", controller._fastpetl_backend)}
    return ops.residual_norm(s, None, norm.weight, norm.bias, **tail)
