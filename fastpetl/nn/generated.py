"""Hyperformer's weights of all layers in one product per generator, handed out to the layers' sites one by one.

What is made in one forward serves that forward only: its graph is gone after the backward. Sites ask in the layers'
order, each once; whoever asks otherwise begins anew.
"""

from __future__ import annotations

import threading
import weakref

import torch

from fastpetl.ops._pack import state

_local = threading.local()  # .held: HyperNet -> {(task, kind): _Sheet}; a sheet belongs to the thread that made it


def can_be_shared() -> bool:
    """Semantics: may what one site makes serve others? Not where autograd's saved tensors are packed (a checkpoint's
    forward), within a backward (its recomputation), under torch.func or torch.compile.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    plain = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    return plain and torch._C._current_graph_task_id() == -1


def shared_weights(net, task, layer: int, kind: str) -> tuple:
    """Semantics: `net.weights(task, layer, kind)`, made with those of all later layers where none are at hand."""
    if net.LayerNorm.weight.is_inference():  # nothing would say when it changes
        return net.weights(task, layer, kind)
    sheets = _sheets(net)
    sheet = sheets.get((task, kind))
    if sheet is None or not sheet.serves(net, task, layer, kind):
        sheet = sheets[task, kind] = _Sheet(net, task, layer, kind)
    found = sheet.take()
    if not sheet.left:
        del sheets[task, kind]
    return found


def _sheets(net) -> dict:
    if not hasattr(_local, "held"):
        _local.held = weakref.WeakKeyDictionary()
    return _local.held.setdefault(net, {})


class _Sheet:
    """The weights of the sites of one kind, from `first` on; those handed out are let go of."""

    def __init__(self, net, task, first: int, kind: str):
        made, embedding = net.weights_from(task, first, kind)
        self.next, self.left = first, [made[i] for i in reversed(range(len(made)))]
        self._made_of, self._spent = state(net.sources(task, kind)), []
        if embedding.requires_grad:
            embedding.register_hook(lambda grad, spent=self._spent: spent.append(True))

    def serves(self, net, task, layer: int, kind: str) -> bool:
        """Semantics: is the next one asked for, of parameters as they were, its graph still there?"""
        return layer == self.next and not self._spent and self._made_of == state(net.sources(task, kind))

    def take(self) -> tuple:
        self.next += 1
        return self.left.pop()
