"""The catalogue of this suite. Its modules register the scenarios."""

from __future__ import annotations

from diator.testing._suite.scenario import Catalogue, Level, Select

LEVELS: dict[Level, str] = {
    "C": "core: every store",
    "X": "extra: databases that can do something, such as two writers at a time",
    "F": "faults: lost connections, killed processes, and several processes",
    "S": "stress: random, or under load",
}
"""The kinds of scenarios."""

SCENARIOS = Catalogue()
"""Every scenario, by its id."""

scenario = SCENARIOS.scenario
select: Select = SCENARIOS.select
