"""What `fastpetl.patch` did to each module, and why not more."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One module: its qualified name, the rule's kind, "patched" or "declined", why, and the backends that serve it."""

    name: str
    kind: str
    status: str
    reason: str
    backend: str


@dataclass(frozen=True)
class Report:
    """Semantics: rows in the order of named_modules(); str() is a table in which like modules share a line."""

    rows: tuple[Row, ...]

    @property
    def patched(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "patched")

    @property
    def declined(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == "declined")

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "fastpetl: nothing in this model matches a patch rule"
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            groups.setdefault((_pattern(row.name), row.kind, row.status, row.backend, row.reason), []).append(row)
        lines = [("module", "kind", "status", "backend", "reason")]
        lines += [(_names(pattern, rows), *shared) for (pattern, *shared), rows in groups.items()]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        text = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]]).rstrip()
            for line in lines
        ]
        text.append(f"{len(self.patched)} patched, {len(self.declined)} declined")
        return "\n".join(text)


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name, count=1)


def _names(pattern: str, rows: list[Row]) -> str:
    """layer.*.adapter0 with the numbers there are: layer.[0-2,5].adapter0."""
    if len(rows) == 1:
        return rows[0].name
    runs: list[list[int]] = []
    for number in (int(_NUMBER.search(row.name)[0]) for row in rows):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return pattern.replace("*", "[" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "]", 1)
