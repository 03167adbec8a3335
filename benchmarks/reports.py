"""Tables and JSON files of results."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError:
    Console = None

MET, MISSED = "✓", "✗"


def marked(text: str, *, target: str, met: bool) -> str:
    """Add a mark to a cell that shows whether its target is met, and the target if not."""
    return f"{text} {MET}" if met else f"{text} {MISSED} {target}"


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, in colour if rich is there."""
    if Console is None:
        _show_plain(title, head, rows)
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for position, name in enumerate(head):
        table.add_column(name, justify="right" if position else "left")
    for row in rows:
        styles = ("red" if MISSED in cell else "green" if MET in cell else "" for cell in row)
        table.add_row(*(Text(cell, style) for cell, style in zip(row, styles, strict=True)))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _show_plain(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print(f"\n{title}\n")
    for first, *others in [head, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def keep(file: Path, results: dict[str, Any]) -> None:
    """Write *results* and a description of the machine, without its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    measured_on = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "versions": _versions(),
    }
    file.write_text(json.dumps({"measured_on": measured_on, **results}, indent=2) + "\n")
    print(f"kept in {os.path.relpath(file)}")


def _versions() -> dict[str, str]:
    """Return the versions in the running environment; the other libraries are pinned."""
    versions = {}
    for name in ("diator", "msgspec", "orjson", "redis", "hiredis", "rodi"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
