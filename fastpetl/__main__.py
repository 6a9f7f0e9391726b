"""The command line: python -m fastpetl info | demo | count | search | bench."""

from __future__ import annotations

import importlib
import sys

# command -> (module with main(argv) -> exit status or None, what it does)
COMMANDS = {
    "info": ("fastpetl.info", "what was built, what works on this machine and why not"),
    "demo": (
        "fastpetl.demo",
        "train and evaluate a small ViLT on easy-VQA: full fine-tuning, DAS, DAS patched, DAS patched with skipping",
    ),
    "count": ("fastpetl.count", "parameters and MACs of a model"),
    "search": ("fastpetl.demo.search", "DAS's search on easy-VQA: which blocks of the demo's ViLT can be skipped"),
    "bench": ("fastpetl.bench", "patched against unpatched, interleaved in one process"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:<6} {what}" for name, (_, what) in COMMANDS.items())
    return (
        "usage: python -m fastpetl COMMAND [options]\n\nParameter-efficient transfer learning, made fast.\n\n"
        f"commands:\n{rows}\n\noptions:\n  -h, --help  show this message; after a command: its options\n"
        "  --version   show the version"
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from fastpetl import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(
            f"fastpetl: unknown command {argv[0]!r}, expected one of {', '.join(COMMANDS)}\n\n{usage()}",
            file=sys.stderr,
        )
        return 2
    module = importlib.import_module(COMMANDS[argv[0]][0])
    return module.main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
