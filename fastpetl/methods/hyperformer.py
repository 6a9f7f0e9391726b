"""VL-Adapter's Hyperformer (CVPR 2022): its configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from fastpetl.methods.adapter import AdapterConfig

_KINDS = {"ff_adapter": "feed_forward", "enc_attn_adapter": "cross_attention"}


@dataclass(frozen=True)
class HyperformerConfig(AdapterConfig):
    """Semantics: adapters as `AdapterConfig`'s, their weights made by one network per stack from the task, the layer
    and the kind of sublayer.

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
        """Semantics: the task embeddings on the host and both stacks, and a HyperNet on each stack."""
        from fastpetl.nn.hyperformer import HyperNet, HyperSite, TaskEmbeddings

        like = next(host.parameters())
        made, hidden = {"device": like.device, "dtype": like.dtype}, family.hidden(host)
        embeddings = TaskEmbeddings(self.tasks, **made).train(host.training)
        children = dict(host._modules)  # first among them, as in the original: parameters are named by who comes first
        host._modules.clear()
        host._modules.update(shared_task_embed=embeddings, **children)
        for part in ("encoder", "decoder"):
            stack = getattr(host, part)
            sites = [(name, m) for name, m in stack.named_modules() if isinstance(m, HyperSite)]
            for name, site in sites:
                site.kind = _KINDS.get(name.split(".")[-1], "self_attention")
            layers = 1 + max(_layer(name) for name, _ in sites)
            kinds = {site.kind for _, site in sites}
            if part == "decoder":
                kinds.add("cross_attention")  # the original makes it, with or without adapters to use it
            sizes = (layers, kinds, hidden, self.bottleneck, self.features)
            net = HyperNet(embeddings, *sizes, unified=self.unified, std=family.std(host.config), **made)
            stack.adapter_layers_hyper_net = net.train(stack.training)
            stack.task_embed = embeddings
            for name, site in sites:
                site.place(net, _layer(name))

    def removed(self, model, host) -> None:
        host._modules.pop("shared_task_embed", None)
        for stack in (host.encoder, host.decoder):
            stack._modules.pop("adapter_layers_hyper_net", None)
            stack._modules.pop("task_embed", None)

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


def _layer(name: str) -> int:
    return int(re.search(r"\d+", name)[0])
