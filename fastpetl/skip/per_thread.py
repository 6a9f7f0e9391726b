"""What a forward leaves for its later parts, each thread's apart: one model may serve several threads at once."""

from __future__ import annotations

import threading

import torch

_MOST = 256  # of threads that have ended nobody says so


class PerThread:
    """Semantics: get(name) is what this thread set last under that name, or None. Compiled code does not tell threads
    apart: it has a place of its own, which code around it that has set nothing sees, and sees what that has set.
    """

    def __init__(self):
        self.held: dict = {}

    def __getstate__(self):  # of forwards under way, whose graphs can neither be copied nor pickled
        return {"held": {}}

    def get(self, name=None):
        if torch.compiler.is_compiling():
            found = self.held.get((0, name))
            if found is None:
                found = next((value for (_, other), value in self.held.items() if other == name), None)
            return found
        found = self.held.get((threading.get_ident(), name))
        return self.held.get((0, name)) if found is None else found

    def set(self, value, name=None) -> None:
        self.drop(name)
        if torch.compiler.is_compiling():
            self.held[0, name] = value
            return
        if len(self.held) >= _MOST:
            self.held.pop(next(iter(tuple(self.held)), None), None)
        self.held[threading.get_ident(), name] = value

    def drop(self, name=None) -> None:
        self.held.pop((0, name), None)
        if not torch.compiler.is_compiling():
            self.held.pop((threading.get_ident(), name), None)
