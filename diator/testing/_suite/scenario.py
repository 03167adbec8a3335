"""The registry of scenarios: the catalogue of a suite. Ids, titles and reports come from it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import diator
from diator.brokers.capabilities import Capabilities

Level: TypeAlias = Literal["C", "X", "F", "S"]
"""A key of the levels of a suite."""

Run: TypeAlias = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """
    One promise of the contract, as a test. The id of a retired scenario is never used again.

    Attributes:
        id: The id, such as `ACK-01`.
        title: The promise, as a short sentence.
        level: The kind of scenario.
        run: The coroutine function that proves the promise.
        needs: The capabilities that a transport needs to be tested. A transport without them has to refuse them.
        facilities: The facilities that the harness needs, by the names of `Harness.facilities`.
        timeout: The timeout of the whole scenario in seconds; the harness scales it. Only a hanging scenario takes that
            long, so it is generous: what is to happen in time has a limit of its own.
        since: The minor release of diator in which the scenario is new, such as `1.1`; empty for the first scenarios.
    """

    id: str
    title: str
    level: Level
    run: Run = field(repr=False)
    needs: Capabilities = field(default=Capabilities(), repr=False)
    facilities: frozenset[str] = frozenset()
    timeout: float = 30.0
    since: str = ""

    @property
    def group(self) -> str:
        """The part of the catalogue, such as `ACK`."""
        return self.id.rpartition("-")[0]

    @property
    def provisional(self) -> bool:
        """Whether it is new in this minor release. Until the next one, its failure is only reported."""
        return bool(self.since) and diator.__version__.startswith(f"{self.since}.")

    @property
    def catches(self) -> str:
        """The defect that the scenario catches."""
        return inspect.getdoc(self.run) or ""


class Select(Protocol):
    """As `Catalogue.select`."""

    def __call__(self, pattern: str = "", levels: Collection[str] = "") -> list[Scenario]: ...


class Catalogue(dict[str, Scenario]):
    """Every scenario of a suite, by its id."""

    def scenario(
        self,
        id_: str,
        title: str,
        *,
        level: Level | None = None,
        needs: Capabilities | None = None,
        facilities: Iterable[str] = (),
        timeout: float = 30.0,
        since: str = "",
    ) -> Callable[[Run], Run]:
        """Register the decorated coroutine function. Its docstring names the defect that it catches."""

        def register(run: Run) -> Run:
            if id_ in self or not inspect.getdoc(run):
                raise ValueError(f"{id_} is registered already, or has no docstring that names the defect it catches")
            self[id_] = Scenario(
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

    def select(self, pattern: str = "", levels: Collection[str] = "") -> list[Scenario]:
        """
        Return the scenarios whose id or title contains one of the words of *pattern*, sorted by id.

        *levels* are the levels to select, such as `CX`; all if it is empty.
        """
        words = pattern.casefold().split()
        return [
            each
            for each in sorted(self.values(), key=lambda each: each.id)
            if (not words or any(word in f"{each.id} {each.title}".casefold() for word in words))
            and (not levels or each.level in levels)
        ]
