"""The catalogue of this suite. Its modules register the scenarios."""

from __future__ import annotations

from diator.testing._suite.scenario import Catalogue, Level, Scenario, Select

__all__ = ["LEVELS", "SCENARIOS", "Level", "Scenario", "scenario", "select"]

LEVELS: dict[Level, str] = {
    "C": "core: every transport",
    "X": "extra: transports that promise a capability",
    "F": "faults: a service or a link that fails, or several processes",
    "S": "stress: random, or under load",
}
"""The kinds of scenarios. C and X prove the promises while nothing fails, F while something fails, S by chance."""

SCENARIOS = Catalogue()
"""Every scenario, by its id."""

scenario = SCENARIOS.scenario
select: Select = SCENARIOS.select
