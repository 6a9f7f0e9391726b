"""How prompts get among the words or patches of encoder-only models (`fastpetl.nn.prompted`)."""

from __future__ import annotations

import sys

from torch import nn


class TakesPrompts:
    """Mixin of a family: its models take PromptConfig.

    A subclass says which models in its host take prompts, by class, and what becomes of these and of parts of theirs:
    {(module, class): {path in the model: (class there now, mixin of `fastpetl.nn.prompted`)}}.
    """

    name: str
    prompted: dict[tuple[str, str], dict[str, tuple[str, str]]]

    def attach_prompt(self, host, config) -> None:
        """Semantics: the prompts' module on the embeddings of each of these models, and its parts told of it."""
        from fastpetl.nn import prompted
        from fastpetl.nn.prompt import with_prompts

        found = list(self._takers(host))
        if not found:
            expected = " or ".join(name for _, name in self.prompted)
            raise ValueError(f"attach: the {type(host).__name__} is alone, expected it in a {expected} for prompts")
        for library, model, parts in found:
            _check(library, model, parts)
        for library, model, parts in found:
            for path, (name, mixin) in parts.items():
                part = model.get_submodule(path)
                part.__class__ = with_prompts(getattr(library, name), getattr(prompted, mixin))
                if mixin == "PromptedEmbeddings":
                    like = next(part.parameters())
                    made = {"device": like.device, "dtype": like.dtype}
                    prompts = config.controller(model.config.hidden_size, self.std(model.config), **made)
                    part.prompt_modules = prompts.train(part.training)
                elif mixin == "PromptedEncoder":
                    part.__dict__["_fastpetl_prompts"] = config.length

    def detach_prompt(self, host) -> None:
        from fastpetl.nn.prompted import Prompted, PromptedEmbeddings, PromptedEncoder

        for module in host.modules():
            if isinstance(module, Prompted | PromptedEmbeddings | PromptedEncoder):
                module._modules.pop("prompt_modules", None)
                for key in ("_fastpetl_current", "_fastpetl_prompts"):
                    module.__dict__.pop(key, None)
                module.__class__ = type(module).__bases__[1]

    def _takers(self, host):
        """(library, model, parts) of each model in the host that takes prompts."""
        for (where, name), parts in self.prompted.items():
            library = sys.modules.get(where)
            kind = getattr(library, name, None)
            if kind is not None:
                yield from ((library, module, parts) for module in host.modules() if isinstance(module, kind))


def _check(library, model: nn.Module, parts: dict[str, tuple[str, str]]) -> None:
    if getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"attach: the {type(model).__name__} is a decoder, expected an encoder for prompts: with a cache it would "
            "have them anew in each step"
        )
    for path, (name, _) in parts.items():
        kind = type(model.get_submodule(path))
        if kind is not getattr(library, name):
            got, expected = f"{kind.__module__}.{kind.__qualname__}", f"{library.__name__}.{name}"
            raise ValueError(f"attach: {path or 'the model'} is {got}, expected {expected} for prompts")
