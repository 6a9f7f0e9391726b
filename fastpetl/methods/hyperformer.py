"""VL-Adapter's Hyperformer (CVPR 2022): its configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from fastpetl.methods.adapter import AdapterConfig


@dataclass(frozen=True)
class HyperformerConfig(AdapterConfig):
    """Semantics: adapters as `AdapterConfig`'s, their weights made by one network per stack from the task, the layer
    and the kind of sublayer. A stack is an encoder, a decoder, a side of CLIP; METER's text and image layers are one.

    features: the size of what the network makes the weights from (the paper's 8). unified: one generator for all kinds
    of sublayer (Hyperformer++), else one for each. Sharing between tasks is the network's: `sharing` stays "single",
    and the adapters have no norms.
    """

    features: int = 8
    unified: bool = False

    method, attaches = "hyperformer", "hyper"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.features, int) or isinstance(self.features, bool) or self.features < 1:
            raise ValueError(f"HyperformerConfig: features is {self.features!r}, expected an integer >= 1")
        if not isinstance(self.unified, bool):
            raise ValueError(f"HyperformerConfig: unified is {self.unified!r}, expected True or False")
        if self.sharing != "single" or self.norm_before or self.norm_after:
            raise ValueError(
                f"HyperformerConfig: sharing is {self.sharing!r}, norm_before {self.norm_before}, norm_after "
                f"{self.norm_after}, expected 'single', False and False"
            )

    def site(self, hidden: int, std, **made):
        from fastpetl.nn.hyperformer import HyperSite

        return HyperSite("", self.activation)

    def added(self, model, host, family) -> None:
        """Semantics: the task embeddings on the host (in encoder-decoders on both stacks as well), and a HyperNet on
        each stack.
        """
        from fastpetl.nn.hyperformer import HyperNet, TaskEmbeddings

        like = next(host.parameters())
        made = {"device": like.device, "dtype": like.dtype}
        embeddings = TaskEmbeddings(self.tasks, **made).train(host.training)
        children = dict(host._modules)  # first among them, as in the original: parameters are named by who comes first
        host._modules.clear()
        host._modules.update(shared_task_embed=embeddings, **children)
        for stack, hidden, sites, kinds in family.hyper_sites(host):
            sizes = (1 + max(layer for layer, _, _ in sites), kinds, hidden, self.bottleneck, self.features)
            net = HyperNet(embeddings, *sizes, unified=self.unified, std=family.std(host.config), **made)
            stack.adapter_layers_hyper_net = net.train(stack.training)
            if family.embeds_in_stacks:
                stack.task_embed = embeddings
            for layer, kind, site in sites:
                site.kind = kind
                site.place(net, layer)

    def removed(self, model, host) -> None:
        for module in list(host.modules()):
            for name in ("shared_task_embed", "adapter_layers_hyper_net", "task_embed"):
                module._modules.pop(name, None)

    def trainable(self, name: str) -> bool:
        parts = name.split(".")
        return "adapter_layers_hyper_net" in parts or "task_to_embeddings" in parts or super().trainable(name)

    @classmethod
    def fields_of(cls, state: dict[str, torch.Tensor]) -> dict:
        """Semantics: what a state_dict with the original's names says about the configuration."""

        def find(pattern: str):
            return next((value for name, value in state.items() if re.search(pattern, name)), None)

        tasks = [n.split(".")[-1] for n in state if re.search(r"shared_task_embed\.task_to_embeddings\.", n)]
        return {
            "tasks": tuple(tasks),
            "bottleneck": find(r"down_sampler_hyper_net\.bias_generator\.0\.bias$").shape[0],
            "features": find(r"adapter_layers_hyper_net\.LayerNorm\.weight$").shape[0],
            "unified": find(r"adapters_block_type\.weight$") is not None,
        }
