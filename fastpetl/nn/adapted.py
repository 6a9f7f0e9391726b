"""A linear whose output is adapted: how VL-Adapter's adapters stand in any layer that ends its sublayers with one."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from fastpetl.nn.inline import Inlined
from fastpetl.nn.lora import FusedLoRALinear, LoRALinear
from fastpetl.nn.tasks import Told

CHILD = "output_adapter"


class AdaptedLinear(Told, nn.Linear):
    """Semantics: y = A_t(x W^T + b) for the task t; A the child `output_adapter`, an `AdapterController`: f + U_t(f).

    On the last linear of a sublayer that is an adapter on the sublayer's output, before dropout, residual and norm. The
    task is that of the layer it is in (`TellsTask`).
    """

    def forward(self, x):
        return self.adapted(F.linear(x, self.weight, self.bias))

    def adapted(self, f):
        """Semantics: A_t(f)."""
        return self._modules[CHILD](f, self._fastpetl_current)


# What a fused block may read: the linear alone; the adapter is called.
OUTPUT_LINEAR = Inlined((nn.Linear, AdaptedLinear), called=(CHILD,))
# A query or value projection, with or without LoRA: read where it is plain or merged, else called.
LORA_LINEAR = Inlined((nn.Linear, LoRALinear, FusedLoRALinear), called=("lora_As", "lora_Bs"))
