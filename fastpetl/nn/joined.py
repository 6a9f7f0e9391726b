"""Classes made of a mixin and somebody else's class, under that class's own names.

transformers finds what a model gives beside its output (hidden states, attention maps) by the module and name of its
class: under another name they would silently be missing.
"""

from __future__ import annotations


def joined(mixin: type, original: type, recipe: tuple, **body) -> type:
    """Semantics: `original` with `mixin` before it, called as `original` is. recipe: (function, argument, ...), with
    which pickle makes it anew: function(original, argument, ...) gives this class, the same each time.
    """
    function, *arguments = recipe
    found = (function, _recipe(original), *arguments)

    def reduce(self, protocol):  # the class has no name of its own to be found by
        return _rebuild, (found,), *object.__reduce_ex__(self, protocol)[2:]

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__reduce_ex__": reduce}
    return type(original.__name__, (mixin, original), {**body, **names, "_fastpetl_recipe": found})


def _recipe(cls: type):
    return cls.__dict__.get("_fastpetl_recipe", cls)


def _made(recipe) -> type:
    if isinstance(recipe, type):
        return recipe
    function, original, *arguments = recipe
    return function(_made(original), *arguments)


def _rebuild(recipe):
    cls = _made(recipe)
    return cls.__new__(cls)
