"""AdapterHub's bottleneck adapters written out in plain torch: where they are in a backbone, and what each computes."""

import torch
from torch import nn


def places(kind, model, cross):
    """{place in the format: the module of the backbone whose output its adapter reads}"""
    found = {}
    for name, module in model.named_modules():
        if kind in ("bert", "roberta"):
            if name.endswith(("attention.output.dense", "output.dense")) and ".layer." in name:
                found[name.removesuffix(".dense") + ".adapters"] = module
        elif kind == "t5":
            if name.endswith(("SelfAttention", "DenseReluDense")) or (cross and name.endswith("EncDecAttention")):
                found[name.rpartition(".")[0] + ".adapters"] = module
        elif name.endswith((".self_attn", ".fc2")) or (cross and name.endswith(".encoder_attn")):
            layer, _, last = name.rpartition(".")
            at = {"self_attn": "attention", "fc2": "output", "encoder_attn": "cross_attention"}[last]
            prefix = {"clip text": "text_model.", "clip vision": "vision_model."}.get(kind, "")
            found[f"{prefix}{layer.removesuffix('.mlp')}.{at}_adapters.adapters"] = module
    return found


class Theirs(nn.Module):
    """One adapter of the format: its parameters' names are the files'."""

    def __init__(self, hidden, bottleneck, settings):
        super().__init__()
        norm = [nn.LayerNorm(hidden)] if settings["ln_before"] else []
        if norm:
            self.adapter_norm_before = norm[0]
        self.adapter_down = nn.Sequential(*norm, nn.Linear(hidden, bottleneck))
        self.adapter_up = nn.Linear(bottleneck, hidden)
        if settings["ln_after"]:
            self.adapter_norm_after = nn.LayerNorm(hidden)
        size = {"learned": 1, "channel": hidden}.get(settings["scaling"])
        self.scaling = nn.Parameter(torch.ones(size)) if size else settings["scaling"]
        self.act = {
            **{"swish": nn.SiLU(), "relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_new": nn.GELU(approximate="tanh")}
        }[settings["non_linearity"]]

    def forward(self, f):
        u = self.adapter_up(self.act(self.adapter_down(f))) * self.scaling
        return f + (self.adapter_norm_after(u) if hasattr(self, "adapter_norm_after") else u)
