"""Tables on a terminal: by rich where that is installed, else in plain columns.

What goes into a file or a pipe is plain, so that it reads the same everywhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

__all__ = ["columns", "show", "show_markdown"]


def show(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    if not _by_rich(head, body):
        print(columns(head, body))


def show_markdown(table: str) -> None:
    """Print a table that is written in Markdown, as it is where rich does not draw it."""
    head, _, *body = (_cells(line) for line in table.splitlines())
    if not _by_rich(head, body):
        print(table)


def columns(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Text columns; a long head is broken at its words."""
    heads = [_wrapped(cell) for cell in head]
    lines = max(map(len, heads))
    table = [[cell[i] if i < len(cell) else "" for cell in heads] for i in range(lines)]
    table += [list(row) for row in body]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in table
    ]
    text.insert(lines, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in text)


def _by_rich(head: Sequence[str], body: Sequence[Sequence[str]]) -> bool:
    """False if it was not printed: this is no terminal, or there is no rich."""
    if not sys.stdout.isatty():
        return False
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for index, cell in enumerate(head):
        numbers = all(re.match(r"[-+\d.,]*\d", row[index]) for row in body if row[index])
        table.add_column(Text(cell), justify="right" if index and numbers else "left")
    for row in body:
        table.add_row(*map(Text, row))
    Console().print(table)
    return True


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]


def _wrapped(cell: str, width: int = 14) -> list[str]:
    lines = [""]
    for word in cell.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
