"""What all families answer alike, and `LayerFamily`: a family that is a table of where methods go in its layers."""

from __future__ import annotations

import sys

from torch import nn

from fastpetl.patching._turns import SkipsTurns


class Baselines:
    """Nothing is added: what of the model trains is the configuration's business."""

    def whole(self, model, host):
        """Semantics: the module in `model` that has all that is attached: the host, or the one it needs around it."""
        return host

    def attach_nothing(self, host, config) -> None:
        """Semantics: a baseline's: only what trains is chosen."""

    def detach_nothing(self, host) -> None:
        """Semantics: undoes `attach_nothing`."""


def with_lora(layer: nn.Module, names: tuple[str, ...], config) -> None:
    """Semantics: the linears of these names anywhere in the layer become LoRALinears."""
    from fastpetl.nn.lora import LoRALinear

    for name, linear in list(layer.named_modules()):
        if name.split(".")[-1] not in names:
            continue
        if type(linear) is not nn.Linear:
            kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
            raise ValueError(f"attach: {name} is {kind}, expected torch.nn.Linear")
        linear.__class__ = LoRALinear
        scale = config.alpha / config.rank
        linear.add(config.tasks, config.rank, sharing=config.sharing, scale=scale, dropout=config.dropout)


def without_lora(module: nn.Module) -> None:
    """Semantics: undoes `with_lora` in the module and all in it."""
    from fastpetl.nn.lora import LoRALinear

    for linear in module.modules():
        if isinstance(linear, LoRALinear):
            linear.remove()
            linear.__class__ = nn.Linear


class LayerTable(Baselines):
    """How VL-Adapter's methods go on layers that end each sublayer with a linear (`fastpetl.nn.adapted`).

    A subclass says which classes its layers are ("module:Class"), which of their linears end a sublayer ({path in the
    layer: is it cross-attention's}; those a layer does not have are passed over), and how queries and values are
    called.
    """

    layer_classes: tuple[str, ...]
    routes_samples = False  # with blocks skipped per sample, does a kept row know its task?
    outputs: dict[str, bool]
    queries_and_values: tuple[str, str]
    trains_norms = True

    def std(self, config) -> float:
        return getattr(config, "initializer_range", 0.02)  # the original draws adapters as BERT draws its linears

    def _classes(self) -> tuple[type, ...]:
        found = (name.partition(":") for name in self.layer_classes)
        return tuple(getattr(sys.modules[module], name) for module, _, name in found if module in sys.modules)

    def _layers(self, host):
        """(name, layer)"""
        classes = self._classes()
        return [(name, module) for name, module in host.named_modules() if isinstance(module, classes)]

    def _outputs(self, layer, cross_attention: bool = True) -> list[nn.Linear]:
        paths = [path for path, cross in self.outputs.items() if cross_attention or not cross]
        return [layer.get_submodule(path) for path in paths if path.split(".")[0] in layer._modules]

    def widest(self, host) -> int:
        """Semantics: the largest hidden size among the layers."""
        return max(
            getattr(linear, "out_features", 1) for _, layer in self._layers(host) for linear in self._outputs(layer)
        )

    def table_reason(self, host) -> str | None:
        """Semantics: why this model's layers cannot take a method, or None."""
        expected = self._classes()
        for name, layer in self._layers(host):
            if type(layer) not in expected:
                kind, classes = type(layer), ", ".join(self.layer_classes)
                return f"{name} is {kind.__module__}.{kind.__qualname__}, expected {classes}"
            for linear in self._outputs(layer):
                if type(linear) is not nn.Linear:
                    kind = type(linear)
                    return f"{name} has {kind.__module__}.{kind.__qualname__}, expected torch.nn.Linear"
        return None

    def has_table(self, host) -> bool:
        from fastpetl.nn.tasks import Told

        return any(isinstance(module, Told) for module in host.modules())

    def attach_adapter(self, host, config) -> None:
        """Semantics: what config.site makes on the output of each sublayer, before dropout and residual."""
        from fastpetl.nn.adapted import CHILD, AdaptedLinear

        for _, layer in self._layers(host):
            for linear in self._outputs(layer, config.cross_attention):
                made = {"device": linear.weight.device, "dtype": linear.weight.dtype}
                site = config.site(linear.out_features, self.std(host.config), **made)
                linear.add_module(CHILD, site.train(linear.training))
                linear.__class__ = AdaptedLinear
            self._tell(layer)

    def detach_adapter(self, host) -> None:
        from fastpetl.nn.adapted import CHILD, AdaptedLinear

        for module in host.modules():
            if isinstance(module, AdaptedLinear):
                del module._modules[CHILD]
                module.__dict__.pop("_fastpetl_current", None)
                module.__class__ = nn.Linear
        self._untell(host)

    attach_hyper, detach_hyper = attach_adapter, detach_adapter  # and what HyperformerConfig adds beside the sites
    embeds_in_stacks = False

    def stacks(self, host) -> list:
        """Semantics: the parts of the host whose layers are numbered on their own."""
        return [host]

    def hyper_sites(self, host):
        """Semantics: as `Seq2SeqFamily.hyper_sites`, a stack's layers numbered in their order."""
        from fastpetl.nn.adapted import CHILD

        for stack in self.stacks(host):
            sites, widths = [], set()
            for number, (_, layer) in enumerate(self._layers(stack)):
                for path, cross in self.outputs.items():
                    linear = layer.get_submodule(path) if path.split(".")[0] in layer._modules else None
                    if linear is not None and CHILD in linear._modules:
                        kind = "self_attention" if "att" in path.split(".")[0] else "feed_forward"
                        sites.append((number, "cross_attention" if cross else kind, linear._modules[CHILD]))
                        widths.add(linear.out_features)
            (hidden,) = widths
            yield stack, hidden, sites, {kind for _, kind, _ in sites}

    def attach_lora(self, host, config) -> None:
        """Semantics: the query and value projections of all attentions become LoRALinears."""
        for _, layer in self._layers(host):
            with_lora(layer, self.queries_and_values, config)
            self._tell(layer)

    def detach_lora(self, host) -> None:
        without_lora(host)
        self._untell(host)

    def _tell(self, layer) -> None:
        from fastpetl.nn.task_layers import routed

        layer.__class__ = routed(type(layer))

    def _untell(self, host) -> None:
        from fastpetl.nn.tasks import TellsTask

        for module in host.modules():
            if isinstance(module, TellsTask):
                module.__dict__.pop("_fastpetl_task", None)
                module.__class__ = type(module).__bases__[1]


class LayerFamily(SkipsTurns, LayerTable):
    """A family whose host is one of some classes of a module of transformers, with its layers anywhere in it."""

    module: str
    host_classes: tuple[str, ...]

    def hosts(self, module: nn.Module) -> bool:
        library = sys.modules.get(self.module)
        return library is not None and isinstance(module, tuple(getattr(library, name) for name in self.host_classes))

    def hidden(self, host) -> int:
        return self.widest(host)

    def attach_reason(self, host) -> str | None:
        return self.table_reason(host)

    def is_attached(self, host) -> bool:
        return self.has_table(host)

    def from_original(self, state: dict) -> dict:
        """Semantics: a state_dict of VL-Adapter's code, whose adapters stand beside the linear, not in it."""
        from fastpetl.nn.adapted import CHILD

        return {name.replace(".output.adapter.", f".output.dense.{CHILD}."): value for name, value in state.items()}
