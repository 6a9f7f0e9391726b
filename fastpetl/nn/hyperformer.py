"""VL-Adapter's Hyperformer: adapters whose weights a small network makes from the task, the layer and the sublayer.

Source: `AdapterLayersHyperNetController` (one generator per kind of sublayer) and `AdapterLayersOneHyperNetController`
(one for all) of ylsung/VL_adapter (CVPR 2022), after Hyperformer (ACL 2021); parameter names, misspelt ones too, are
theirs.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpetl.nn.adapter import site_spec
from fastpetl.nn.generated import can_be_shared, shared_weights
from fastpetl.nn.inline import HOOKS, call_reason, note_fallback, read_dtype
from fastpetl.nn.tasks import in_one_launch, per_sample, task_ids

KINDS = ("feed_forward", "self_attention", "cross_attention")  # the order of the rows of adapters_block_type
TASK_SIZE, HIDDEN = 512, 128  # the original's defaults: of a task's, layer's and kind's embedding, of the network


class TaskEmbeddings(nn.Module):
    """One trained vector [512] per task, N(0, 1)."""

    def __init__(self, tasks, **made):
        super().__init__()
        self.task_to_embeddings = nn.ParameterDict()
        for task in tasks:  # one by one: given a dict, it would sort them
            self.task_to_embeddings[task] = nn.Parameter(torch.randn(TASK_SIZE, **made))


class _Generator(nn.Module):
    """Semantics: weight = (W e + c) read row by row, bias = V e + u."""

    def __init__(self, features: int, weight: int, bias: int, std: float, **made):
        super().__init__()
        self.weight_generator = nn.Sequential(_linear(features, weight, std, **made))
        self.bias_generator = nn.Sequential(_linear(features, bias, std, **made))

    def pairs(self) -> tuple:
        return tuple((g[0].weight, g[0].bias) for g in (self.weight_generator, self.bias_generator))


class _TaskNet(nn.Module):
    def __init__(self, inputs: int, features: int, std: float, **made):
        super().__init__()
        self.task_embeding_generator = nn.Sequential(  # the original's spelling: a name in its checkpoints
            _linear(inputs, HIDDEN, std, **made), nn.ReLU(), _linear(HIDDEN, features, std, **made)
        )


def _linear(inputs, outputs, std, **made) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, **made)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear


class HyperNet(nn.Module):
    """Semantics: the adapter of task t, layer l and kind k: generators of e = LN(net([task_t, layer_l (, kind_k)])).

    One for the encoder, one for the decoder. unified: one pair of generators for all kinds, which are an input.
    std: of the drawn linears (0.02 where BART's initialiser draws them again; 0.01 and layer ids N(0, 1) for T5).
    """

    def __init__(self, embeddings, layers, kinds, hidden, bottleneck, features, *, unified, std, **made):
        super().__init__()
        self.__dict__["embeddings"] = embeddings  # registered elsewhere
        self.unified = unified
        draw = 0.01 if std is None else std
        self.layer_id_embeddings = nn.Embedding(layers, TASK_SIZE, **made)
        if unified:
            self.adapters_block_type = nn.Embedding(len(KINDS), TASK_SIZE, **made)
        if std is not None:
            for embedding in (m for m in self.children()):
                nn.init.normal_(embedding.weight, std=std)
        self.task_hypernet = _TaskNet(TASK_SIZE * (3 if unified else 2), features, draw, **made)
        self.LayerNorm = nn.LayerNorm(features, eps=1e-6, **made)
        for kind in ("",) if unified else [f"{kind}_" for kind in KINDS if kind in kinds]:
            up, down = (features, hidden * bottleneck, hidden), (features, hidden * bottleneck, bottleneck)
            self.add_module(f"{kind}up_sampler_hyper_net", _Generator(*up, draw, **made))
            self.add_module(f"{kind}down_sampler_hyper_net", _Generator(*down, draw, **made))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.embeddings.task_to_embeddings)

    def sources(self, task, kind: str) -> list:
        """Semantics: the parameters that the weights of a site of this kind are made of; task as in `weights`."""
        tasks, net = self.embeddings.task_to_embeddings, self.task_hypernet.task_embeding_generator
        found = [tasks[name] for name in (task if isinstance(task, tuple) else (task,))]
        found += [self.adapters_block_type.weight] if self.unified else []
        found += [self.layer_id_embeddings.weight, *(t for i in (0, 2) for t in (net[i].weight, net[i].bias))]
        pairs = [pair for generators in self._generators(kind) for pair in generators]
        return [*found, self.LayerNorm.weight, self.LayerNorm.bias, *(t for pair in pairs for t in pair)]

    def _generators(self, kind: str) -> list:
        prefix = "" if self.unified else f"{kind}_"
        return [self._modules[f"{prefix}{side}_sampler_hyper_net"].pairs() for side in ("down", "up")]

    def weights(self, task, layer: int, kind: str) -> tuple:
        """Semantics: (w_down, b_down, w_up, b_up, None, None) of one site; with a tuple of tasks, these in front."""
        return self.weights_from(task, layer, kind, layer + 1)[0][0]

    def weights_from(self, task, first: int, kind: str, end: int | None = None) -> tuple:
        """Semantics: (the `ops.HyperWeights` of the sites of this kind in the layers first, first + 1, ... before end,
        the embedding they are made of).
        """
        from fastpetl.ops import hyper_embedding, hyper_weights

        net, embeddings = self.task_hypernet.task_embeding_generator, self.embeddings.task_to_embeddings
        kinds = None
        if self.unified:
            row = KINDS.index(kind)
            kinds = self.adapters_block_type.weight[row : row + 1]
        e = hyper_embedding(
            torch.stack([embeddings[name] for name in task]) if isinstance(task, tuple) else embeddings[task],
            self.layer_id_embeddings.weight[first:end],
            net[0].weight,
            net[0].bias,
            net[2].weight,
            net[2].bias,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            kinds=kinds,
            eps=self.LayerNorm.eps,
        )
        e = e if kinds is None else e.squeeze(1)
        return hyper_weights(e, *self._generators(kind)), e


class HyperSite(nn.Module):
    """Semantics: y = x + U(x), U the adapter that the stack's `HyperNet` makes for this place; has no parameters.

    In inference what was made is kept while the parameters it was made of stay as they are.
    """

    def __init__(self, kind: str, activation: str):
        super().__init__()
        self.kind, self.activation = kind, activation

    def place(self, net: HyperNet, layer: int) -> None:
        self.__dict__.update(net=net, layer=layer)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.net.tasks

    def forward(self, x: torch.Tensor, task: str | None = None) -> torch.Tensor:
        from fastpetl.ops import hyper_adapter_reference

        if isinstance(task, tuple | list):
            return per_sample(x, task, self.forward)
        return hyper_adapter_reference(x, self._weights(self._task(task)), activation=self.activation, residuals=(x,))

    def _task(self, task):
        if task is None and len(self.tasks) == 1:
            return self.tasks[0]
        if task not in self.tasks:
            raise ValueError(
                f"HyperSite: task is {task!r}, expected one of {', '.join(self.tasks)}: fastpetl.task(model, name), or "
                "model(..., task=name)"
            )
        return task

    def _weights(self, task):
        make = lambda: self.net.weights(task, self.layer, self.kind)  # noqa: E731
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        from fastpetl.ops import WeightCache

        cache = self.__dict__.setdefault("_fastpetl_weights", WeightCache())
        return cache.get(task, self.net.sources(task, self.kind), make)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, activation={self.activation}"


class FusedHyperSite(HyperSite):
    """`HyperSite` in one op, in training with weights made for all layers at once. Made by `fastpetl.patch`, never
    constructed.
    """

    _fastpetl_backend = "auto"
    _fastpetl_fallback = None

    def _weights(self, task):
        return shared_weights(self.net, task, self.layer, self.kind) if can_be_shared() else super()._weights(task)

    def site(self, x, f, task, norm: nn.LayerNorm, backend: str, keep="sum") -> torch.Tensor | None:
        """Semantics: norm(x + f + U(f)), what `forward` makes of f and what follows it, as one op; None where forward
        has to be called. keep: see `ops.adapter_residual_norm`.
        """
        state = self.__dict__
        if isinstance(task, tuple | list) or "forward" in state or any(state[hooks] for hooks in HOOKS):
            return None
        if call_reason(self, {}, f) or read_dtype(f) not in (None, self.net.LayerNorm.weight.dtype):
            return None
        from fastpetl import ops

        weights = self._weights(self._task(task))[:4]
        sizes = weights[0].shape[1], weights[0].shape[0]
        spec = site_spec(*sizes, self.activation, 1.0, None, (True, True), norm.eps, "norm", "sublayer")
        tail = {"tail_weight": norm.weight, "tail_bias": norm.bias}
        return ops.adapter_residual_norm(x, f, *weights, spec=spec, **tail, backend=backend, keep=keep)

    def forward(self, x: torch.Tensor, task: str | None = None) -> torch.Tensor:
        from fastpetl import ops
        from fastpetl.backends import for_op

        if isinstance(task, tuple | list):
            return self._mixed(x, task)
        weights = self._weights(self._task(task))
        reason = call_reason(self, {}, x) or _made_reason(weights, x)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x, task)
        return ops.hyper_adapter(
            x, weights, activation=self.activation, residuals=(x,), backend=for_op("adapter", self._fastpetl_backend)
        )

    def _mixed(self, x, tasks):
        """Semantics: the tasks' adapters as one op: in training of those in the batch, else of all, which are kept."""
        from fastpetl import ops
        from fastpetl.backends import for_op

        for task in tasks:
            self._task(task)
        if len(set(tasks)) > 1 and in_one_launch(x) and call_reason(self, {}, x) is None:
            one_batch = torch.is_grad_enabled() or torch.compiler.is_compiling()
            names = tuple(name for name in self.tasks if not one_batch or name in tasks)
            weights = self._weights(names)
            if _made_reason(weights, x) is None:
                options = {"activation": self.activation, "backend": for_op("adapter", self._fastpetl_backend)}
                return ops.multi_adapter(x, *weights[:4], task_ids(x, tasks, names), residuals=(x,), **options)
        return per_sample(x, tasks, self.forward)  # which says why, should it not be fused


def _made_reason(weights, x) -> str | None:
    made, wanted = weights[0].dtype, read_dtype(x)
    return None if wanted in (None, made) else f"the generated weights are {made}, the input {wanted}"


FusedHyperSite.__name__ = HyperSite.__name__  # accelerate and others match modules by class name
