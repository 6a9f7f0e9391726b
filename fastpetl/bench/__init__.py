"""Patched against unpatched, interleaved in one process.  ``python -m fastpetl bench vilt | ops``."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Semantics: runs the benchmark named first in `argv` and prints its tables. Returns the exit status: 0, or 1 when
    a variant computes something else than eager does and was therefore not timed.
    """
    from .cli import main as run

    return run(argv)


__all__ = ["main"]
