"""How a launcher becomes a registered op, for torch.compile, torch.export and fake tensors.

Eager code does not come through here: the dispatcher and register_autograd cost more than a hand-written
autograd.Function. The schemas are defined in Python so that the ops exist on machines where fastpetl._C is not built;
`backend` is a constant of compiled code.
"""

from __future__ import annotations

import torch

_LIB = torch.library.Library("fastpetl", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def register(schema, kernel, fake) -> None:
    """Semantics: fastpetl::<name of the schema> runs `kernel`; `fake` gives the outputs' shapes and dtypes."""
    name = schema.split("(", 1)[0]
    _LIB.define(schema, tags=_TAGS)
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpetl::{name}", fake, lib=_LIB)


def apart(tensors) -> tuple:
    """Semantics: the tensors, those without elements each made anew: no two of an op's results are the same tensor,
    which a launcher's without elements may be.
    """
    return tuple(t if t.numel() else t.new_empty(t.shape) for t in tensors)


def autograd(name, setup_context, backward) -> None:
    """Semantics: `backward` is fastpetl::<name>'s gradient."""
    torch.library.register_autograd(f"fastpetl::{name}", backward, setup_context=setup_context, lib=_LIB)


def not_twice(name) -> None:
    """Semantics: a gradient through the backward op fastpetl::<name> raises."""
    op = name.removesuffix("_backward")

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op}: the fused backends cannot be differentiated twice, use backend='reference'")

    autograd(name, None, refuse)
