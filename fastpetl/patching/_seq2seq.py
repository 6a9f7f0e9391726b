"""What the encoder-decoder families, BART and T5, answer alike: where VL-Adapter's adapters go."""

from __future__ import annotations

import inspect
import re
import sys

from torch import nn

from fastpetl.patching._seq2seq_skip import SkipsSeq2Seq
from fastpetl.patching._sites import Baselines, with_lora, without_lora


def original_signature(module: str, name: str, expected: dict) -> str | None:
    """Semantics: why the installed transformers' class is not the one a fused class was written for, or None."""
    found = getattr(sys.modules[module], name)
    got = [p for p in inspect.signature(found.forward).parameters if p != "self"]
    if got == expected[name]:
        return None
    version = sys.modules["transformers"].__version__
    return f"transformers {version} has a {name} with forward({', '.join(got)}), expected ({', '.join(expected[name])})"


def attention_check(attention, projections) -> str | None:
    """Semantics: why the projections of an attention cannot be taken side by side, or None."""
    from fastpetl.nn.inline import structure_reason

    reason = structure_reason(attention, projections)
    if reason is None and len({getattr(attention, name).bias is None for name in list(projections)[:3]}) > 1:
        return "query, key and value differ in having a bias"
    return reason


def attention_note(attention) -> str:
    dropout = getattr(attention.dropout, "p", attention.dropout)  # a module, or the probability
    if dropout > 0:
        return f"attention dropout {dropout}: attention runs in torch while training"
    return ""


_KINDS = {"ff_adapter": "feed_forward", "enc_attn_adapter": "cross_attention"}  # of Hyperformer's sites


class Seq2SeqFamily(SkipsSeq2Seq, Baselines):
    """A family whose host is a model with an `encoder` and a `decoder`.

    A subclass names its transformers module, the classes of its hosts and, in order, of the layers that get adapters
    with their plain adapter classes and the new children: {class: (adapter class, {child: is cross-attention's})}.
    """

    routes_samples = True  # with blocks skipped per sample, a kept row knows its task
    name: str
    module: str
    host_classes: tuple[str, ...]
    trains_norms: bool  # does the paper's training train the backbone's norms?

    def hosts(self, module: nn.Module) -> bool:
        library = sys.modules.get(self.module)
        return library is not None and isinstance(module, tuple(getattr(library, name) for name in self.host_classes))

    def hidden(self, host) -> int:
        return host.config.d_model

    # --- adapters

    def sites(self) -> dict:
        raise NotImplementedError

    def std(self, config) -> float | None:
        """The standard deviation new adapter weights are drawn with; None: as torch draws a Linear's."""
        raise NotImplementedError

    def _layers(self, host):
        """(name, layer) of the layers that get adapters or the task."""
        kinds = tuple(self.sites())
        for part in ("encoder", "decoder"):
            for name, module in getattr(host, part).named_modules(prefix=part):
                if isinstance(module, kinds):
                    yield name, module

    def attach_reason(self, host) -> str | None:
        """Semantics: why adapters cannot be attached to this model, or None."""
        expected = tuple(self.sites())
        for name, layer in self._layers(host):
            if type(layer) not in expected:
                kind = type(layer)
                return f"{name} is {kind.__module__}.{kind.__qualname__}, expected a layer of {self.module}"
        return None

    def is_attached(self, host) -> bool:
        adapters = any(child.endswith("_adapter") for _, layer in self._layers(host) for child in layer._modules)
        lora = any(hasattr(module, "lora_As") for module in host.modules())
        return adapters or lora or "prompt_modules" in host.encoder._modules

    def attach_adapter(self, host, config) -> None:
        """Semantics: what config.site makes after each sublayer, before dropout and residual; vl_adapter.md 2 of the
        original has the places.
        """
        sites = self.sites()
        for _, layer in list(self._layers(host)):
            adapter_class, children = sites[type(layer)]
            like = next(layer.parameters())
            for child, cross in children.items():
                if cross and not config.cross_attention:
                    continue
                made = {"device": like.device, "dtype": like.dtype}
                site = config.site(self.hidden(host), self.std(host.config), **made)
                layer.add_module(child, site.train(layer.training))
            layer.__class__ = adapter_class

    queries_and_values: tuple[str, str]  # the projections' names in an attention
    lora_layers: tuple[str, ...]  # the classes of the layers attentions are in

    def attach_lora(self, host, config) -> None:
        """Semantics: the query and value projections of all attentions become LoRALinears, their layers are told the
        task.
        """
        from fastpetl.nn.task_layers import routed

        library = sys.modules[self.module]
        kinds = {getattr(library, name): routed(getattr(library, name)) for name in self.lora_layers}
        for part in (host.encoder, host.decoder):
            for layer in [module for module in part.modules() if type(module) in kinds]:
                with_lora(layer, self.queries_and_values, config)
                layer.__class__ = kinds[type(layer)]

    def detach_lora(self, host) -> None:
        from fastpetl.nn.tasks import TellsTask

        for part in (host.encoder, host.decoder):
            without_lora(part)
            for module in part.modules():
                if isinstance(module, TellsTask):
                    module.__dict__.pop("_fastpetl_task", None)
                    module.__class__ = type(module).__bases__[1]

    def prompted(self) -> dict:
        """The library's encoder and decoder, each with the mixin that has or sees prompts: {child: (class, mixin)}."""
        raise NotImplementedError

    def attach_prompt(self, host, config) -> None:
        """Semantics: the prompts' module on the encoder, which is one that asks for them (VL-BART's, VL-T5's) or
        becomes one.
        """
        from fastpetl.nn.prompt import with_prompts
        from fastpetl.nn.seq2seq_skip import original_of

        if not any("fastpetl.models" in cls.__module__ for cls in type(host.encoder).__mro__):
            for child, (original, _) in self.prompted().items():
                kind = original_of(type(getattr(host, child)))
                if kind is not original:
                    got, expected = f"{kind.__module__}.{kind.__qualname__}", f"{self.module}.{original.__name__}"
                    raise ValueError(f"attach: the {child} is {got}, expected {expected} for prompts")
            for child, (original, mixin) in self.prompted().items():
                self._become(getattr(host, child), with_prompts(original, mixin))
        like = next(host.parameters())
        made = {"device": like.device, "dtype": like.dtype}
        prompts = config.controller(self.hidden(host), self.std(host.config), **made)
        host.encoder.prompt_modules = prompts.train(host.encoder.training)

    def _become(self, stack, cls) -> None:
        """Its skipped blocks stay skipped."""
        from fastpetl.nn.seq2seq_skip import original_of, skipping

        skips = original_of(type(stack)) is not type(stack)
        stack.__class__ = skipping(cls, self.layers) if skips else cls

    def detach_prompt(self, host) -> None:
        from fastpetl.nn.prompt import with_prompts
        from fastpetl.nn.seq2seq_skip import original_of

        host.encoder._modules.pop("prompt_modules", None)
        for child, (original, mixin) in self.prompted().items():
            if original_of(type(getattr(host, child))) is with_prompts(original, mixin):
                self._become(getattr(host, child), original)

    def detach_adapter(self, host) -> None:
        originals = {adapter_class: cls for cls, (adapter_class, _) in self.sites().items()}
        for _, layer in list(self._layers(host)):
            for child in [name for name in layer._modules if name.endswith("_adapter")]:
                del layer._modules[child]
            layer.__dict__.pop("_fastpetl_task", None)
            layer.__class__ = originals.get(type(layer), type(layer))

    attach_hyper, detach_hyper = attach_adapter, detach_adapter  # and what HyperformerConfig adds beside the sites
    embeds_in_stacks = True  # the original has the task embeddings on the stacks too

    def hyper_sites(self, host):
        """Semantics: (stack, hidden size, [(layer, kind, site)], kinds of sites it has a generator for), for a
        `HyperNet` each.
        """
        from fastpetl.nn.hyperformer import HyperSite

        for part in ("encoder", "decoder"):
            named = [(n, m) for n, m in getattr(host, part).named_modules() if isinstance(m, HyperSite)]
            sites = [
                (int(re.search(r"\d+", name)[0]), _KINDS.get(name.split(".")[-1], "self_attention"), site)
                for name, site in named
            ]
            kinds = {kind for _, kind, _ in sites}
            if part == "decoder":
                kinds.add("cross_attention")  # the original makes it, with or without adapters to use it
            yield getattr(host, part), self.hidden(host), sites, kinds

    # --- the originals' checkpoints

    ignored: tuple[str, ...] = ()

    def from_original(self, state: dict) -> dict:
        """Semantics: a state_dict of VL-T5's or VL-Adapter's code under the names here, which are the same."""
        return {name: value for name, value in state.items() if not name.endswith(self.ignored)}
