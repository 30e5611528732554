"""Where a command writes: people read tables, programs read one JSON document on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mlsys_engine.tracking import json_files

_FILE_WIDTH = 160  # columns where no terminal sets a limit


class Output:
    """A command's voice. With `as_json` everything for people goes to stderr, and stdout holds JSON alone."""

    def __init__(self, *, as_json: bool = False, silent: bool = False) -> None:
        self.as_json = as_json
        self._silent = silent
        self._console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console.width = _FILE_WIDTH

    def say(self, text: str = "") -> None:
        """A line for people."""
        if not self._silent:
            self._console.print(text, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table for people; the first column is text, numbers in the others are aligned."""
        if self._silent:
            return
        table = Table(
            title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0)
        )
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def pairs(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Names and values, one pair a line."""
        pairs = list(pairs)
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            self.say(f"{name:<{width}}  {value}")

    def json(self, value: Any) -> None:
        """The one JSON document of a command that was asked for JSON."""
        if self.as_json and not self._silent:
            sys.stdout.write(json_files.dumps(value, indent=2) + "\n")
            sys.stdout.flush()


def figure(value: Any) -> str:
    """A value for a table: counts with separators, fractions with four digits, a dash for nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    number = json_files.number(value)
    if number is None:
        return "-" if value is None else str(value)
    if abs(number) >= 1e3:
        return f"{number:,.0f}"
    return f"{number:.4f}" if abs(number) >= 1e-3 or number == 0 else f"{number:.3g}"
