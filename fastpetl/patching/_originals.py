"""The originals' parameter names under the names here: what several families' `from_original` share."""

from __future__ import annotations

import re


def renamed(name: str, names: tuple[tuple[str, str], ...], family: str, example: str) -> str:
    """Semantics: `name` by the first of `names` (pattern, replacement) that matches; ValueError if none does."""
    for pattern, replacement in names:
        new, matched = re.subn(pattern, replacement, name)
        if matched:
            return new
    raise ValueError(f"from_original: {name} is no parameter of {family}, expected e.g. {example}")
