"""For tests of `bench adapterhub` where AdapterHub's `adapters` is not installed: what the benchmark calls of it, for
T5 and BART, on any transformers. Found only by a process whose path leads here.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))
from adapterhub_parts import Theirs, places  # noqa: E402

__version__ = "stand-in"
print("libraries may print")


def init(model):
    kind = model.config.model_type

    def add_adapter(name, config):
        hidden = model.config.d_model
        for place, module in places(kind, model, config["cross_adapter"]).items():
            adapter = Theirs(hidden, hidden // config["reduction_factor"], config)
            for p in adapter.parameters():
                nn.init.normal_(p, std=0.02)
            owner, _, leaf = place.removesuffix(".adapters").rpartition(".")
            owner = model.get_submodule(owner)
            if kind == "bart":
                setattr(owner, leaf, nn.Module())
            model.get_submodule(place.removesuffix(".adapters")).adapters = nn.ModuleDict({name: adapter})
            module.register_forward_hook(
                lambda module, given, f, a=adapter: (a(f[0]), *f[1:]) if isinstance(f, tuple) else a(f)
            )
        model.their_config = config

    def train_adapter(name):
        for n, p in model.named_parameters():
            p.requires_grad_(f".{name}." in n)

    def save_adapter(folder, name):
        Path(folder).mkdir()
        content = {"config": model.their_config, "name": name, "version": "1.3.0", "hidden_size": model.config.d_model}
        (Path(folder) / "adapter_config.json").write_text(json.dumps(content))
        weights = {n: p.detach() for n, p in model.named_parameters() if f".{name}." in n}
        torch.save(weights, Path(folder) / "pytorch_adapter.bin")

    model.add_adapter, model.train_adapter, model.save_adapter = add_adapter, train_adapter, save_adapter


def DoubleSeqBnConfig(**changes):  # noqa: N802
    return {
        **{"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "ln_before": False, "ln_after": False},
        **{"original_ln_before": False, "original_ln_after": True, "scaling": 1.0, **changes},
    }
