"""Modules that can be called: `fastpetl.skip` is a package and, as the public API has it, also a function."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable


class CallableModule(types.ModuleType):
    """A module whose call is one of its functions (importing a submodule would otherwise hide the function of that
    name).
    """

    def __call__(self, *args, **kwargs):
        return self.__dict__["__entry__"](*args, **kwargs)


def make_callable(module_name: str, entry: Callable) -> None:
    """Semantics: sys.modules[module_name](...) == entry(...)."""
    module = sys.modules[module_name]
    module.__class__ = CallableModule
    module.__entry__ = entry
    module.__signature__ = inspect.signature(entry)
