"""The demo: DAS adapters on a small ViLT and easy-VQA, unpatched and patched.  ``python -m fastpetl demo``."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run the demo with the command-line arguments ``argv``; returns the exit code."""
    from .run import main as run

    return run(argv)


__all__ = ["main"]
