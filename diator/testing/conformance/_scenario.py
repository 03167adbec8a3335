"""Scenarios are values in a registry, which is the catalogue: ids, reports and the proof of the suite come from it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import diator
from diator.brokers.capabilities import Capabilities
from diator.testing.conformance._context import Context

Level: TypeAlias = Literal["C", "X", "F", "S"]
"""For every transport; for those that promise something; with faults of the environment; a probe of chance or load."""

Run: TypeAlias = Callable[[Context], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One thing that a transport has to do. Its id is for ever: an id that is given up is not used again."""

    id: str
    title: str
    level: Level
    run: Run = field(repr=False)
    needs: Capabilities = field(default=Capabilities(), repr=False)
    """Run against transports that promise this. Of the others it is asked that they refuse."""
    facilities: frozenset[str] = frozenset()
    """What the environment has to be able to do, by the names of `Harness.facilities`."""
    timeout: float = 10.0
    """Seconds for all of it, on a machine with one core to spare; the harness may scale them."""
    since: str = ""
    """The minor release of diator with which it came, such as `1.1`; empty for those that were there from the start."""

    @property
    def group(self) -> str:
        """The part of the catalogue, such as `ACK`."""
        return self.id.partition("-")[0]

    @property
    def provisional(self) -> bool:
        """Whether it came with this minor release: its failure is told, and fails nobody's build until the next one."""
        return bool(self.since) and diator.__version__.startswith(f"{self.since}.")

    @property
    def catches(self) -> str:
        """Which defect it is there for."""
        return inspect.getdoc(self.run) or ""


SCENARIOS: dict[str, Scenario] = {}
"""Every scenario, by its id."""


def scenario(
    id_: str,
    title: str,
    *,
    level: Level | None = None,
    needs: Capabilities | None = None,
    facilities: Iterable[str] = (),
    timeout: float = 10.0,
    since: str = "",
) -> Callable[[Run], Run]:
    """Register the decorated coroutine function. Its docstring says which defect it catches."""

    def register(run: Run) -> Run:
        if id_ in SCENARIOS or not inspect.getdoc(run):
            raise ValueError(f"{id_} is registered already, or does not say which defect it catches")
        SCENARIOS[id_] = Scenario(
            id=id_,
            title=title,
            level=level or ("C" if needs is None else "X"),
            run=run,
            needs=needs or Capabilities(),
            facilities=frozenset(facilities),
            timeout=timeout,
            since=since,
        )
        return run

    return register


def select(pattern: str = "") -> list[Scenario]:
    """Give the scenarios with one of the words of *pattern* in their id or title, in the order of the catalogue."""
    words = pattern.casefold().split()
    return [
        each
        for each in sorted(SCENARIOS.values(), key=lambda each: each.id)
        if not words or any(word in f"{each.id} {each.title}".casefold() for word in words)
    ]
