"""The contract that a suite proves. Its rules are quoted from the docstrings that specify them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import diator


@dataclass(frozen=True, kw_only=True)
class Rule:
    """
    One rule of the contract.

    Attributes:
        text: The rule, as the docstring says it.
        place: The object with the docstring, its file and line.
        guide: The section of the documentation that explains it.
    """

    text: str
    place: str
    guide: str


class Contract:
    """
    The rules of a contract.

    *places* are where it stands: by a name, the object with the docstring, and the section of the guide that explains
    it. *rules* are the rules, each by its place and its first words (without them: the first paragraph), with the ids
    of their scenarios.
    """

    def __init__(self, places: Mapping[str, tuple[Any, str]], rules: Mapping[str, str]) -> None:
        self._places = places
        self._of = {id_: name for name, ids in rules.items() for id_ in ids.split()}

    def rule_of(self, scenario_id: str) -> Rule:
        """Return the rule that the scenario *scenario_id* proves."""
        return self.rule(self._of[scenario_id])

    def rule(self, name: str) -> Rule:
        """Return the rule *name*. Raise `LookupError` if its docstring has no such paragraph."""
        place, _, beginning = name.partition(": ")
        documented, guide = self._places[place]
        lines = (inspect.getdoc(documented) or "").splitlines()
        first = next((each for each in lines if each.strip().removeprefix("- ").startswith(beginning)), None)
        if first is None:
            raise LookupError(f"the docstring of {place} has no paragraph that begins with {beginning!r}")
        source, begin = inspect.getsourcelines(documented)
        line = max(begin, 1) + next(number for number, each in enumerate(source) if first.strip() in each)
        path = Path(inspect.getfile(documented)).relative_to(Path(diator.__file__).parent.parent)
        called = documented.__name__ if isinstance(documented, ModuleType) else documented.__qualname__
        return Rule(
            text=_paragraph(lines, lines.index(first)), place=f"{called}, {path.as_posix()}:{line}", guide=guide
        )


def _paragraph(lines: list[str], start: int) -> str:
    """Return the paragraph, or the item of a list, that begins at the line *start*."""
    first = lines[start]
    indent = len(first) - len(first.lstrip())
    item = indent > 0 or first.startswith("- ")
    text = [first.strip().removeprefix("- ")]
    for each in lines[start + 1 :]:
        if not each.strip() or (item and len(each) - len(each.lstrip()) <= indent):
            break
        text.append(each.strip())
    return " ".join(text)
