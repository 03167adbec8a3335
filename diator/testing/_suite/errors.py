"""What a scenario raises."""

from __future__ import annotations


class Nonconformance(AssertionError):
    """
    What is tested violates its contract.

    Attributes:
        rule: The rule that is broken, as a key of `RULES`; empty for the rule that the scenario proves.
    """

    def __init__(self, text: str, *, rule: str = "") -> None:
        super().__init__(text)
        self.rule = rule


class NotApplicable(Exception):
    """The scenario has nothing to prove for what is tested."""
