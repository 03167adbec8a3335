"""Tests of the published reports against the suite, and of the tables made of reports."""

import json
from dataclasses import fields
from typing import get_args

import pytest

from diator.brokers import capabilities as levels
from diator.brokers.capabilities import _LEVELS, Capabilities
from diator.testing._suite.report import Outcome
from diator.testing.conformance import SCENARIOS, SUITE_VERSION, select
from diator.testing.conformance.matrix import SIGNS, TABLES, WORDS, filled, main
from tests.integration.publish import PAGE, REPORTS, TRANSPORTS, publishable, reports

AGAIN = "run `nox -s conformance`, or `python -m tests.integration.publish` in an environment that has everything"


def example_report(**changes):
    scenario = {"id": "PUB-01", "title": "a | b", "level": "C", "outcome": "PASS", "reason": "", "seconds": 0.4}
    report = {
        "suite_version": "1",
        "diator_version": "2",
        "transport": "nats",
        "broker": "NATS 2.12",
        "capabilities": {"guarantee": "at_least_once", "redelivery": ["close", "retry"], "redelivery_bound": 2.5},
        "facilities": [],
        "totals": {"PASS": 1},
    }
    return {
        **report,
        **changes,
        "scenarios": [{**scenario, "seed": 7, **each} for each in changes.get("scenarios", [{}])],
    }


# -- what is published -------------------------------------------------------------------------------------------


def test_each_transport_has_a_report_and_there_is_no_other():
    assert {path.stem for path in REPORTS.iterdir()} == {*TRANSPORTS}, AGAIN


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_report_has_exactly_the_scenarios_of_the_catalogue(name):
    report = json.loads((REPORTS / f"{name}.json").read_text())

    found = [(each["id"], each["title"], each["level"]) for each in report["scenarios"]]
    assert found == [(each.id, each.title, each.level) for each in select()], AGAIN
    assert report["suite_version"] == SUITE_VERSION, AGAIN


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_report_reached_its_service_and_has_no_failure(name):
    report = json.loads((REPORTS / f"{name}.json").read_text())

    outcomes = [each["outcome"] for each in report["scenarios"]]
    assert report["totals"] == {outcome: outcomes.count(outcome) for outcome in get_args(Outcome)}
    assert report["totals"]["FAIL"] == 0
    assert report["broker"]
    assert not any(each["reason"].startswith("no service") for each in report["scenarios"])
    assert {*report["capabilities"]} == {field.name for field in fields(Capabilities)}, AGAIN


def test_the_page_has_the_tables_of_the_reports():
    page = filled(PAGE.read_text(), [json.loads(path.read_text()) for path in reports()])

    assert PAGE.read_text() == page, AGAIN


def test_published_reports_have_coarse_times():
    one, two = (example_report(scenarios=[{"seconds": seconds}, {"seconds": 0}]) for seconds in (0.1, 0.9))

    assert publishable(one) == publishable(two)
    assert json.loads(publishable(one))["scenarios"] == [{**one["scenarios"][0], "seconds": 3}, one["scenarios"][1]]


# -- the tables --------------------------------------------------------------------------------------------------


def test_every_capability_and_level_has_words():
    assert [*WORDS] == [field.name for field in fields(Capabilities)]
    for name, names in _LEVELS.items():
        assert [*WORDS[name][1]] == [*names]
    for name in ("Redelivery", "Distribution"):
        (literal,) = get_args(getattr(levels, name))
        assert {*WORDS[name.lower()][1]} == {"", *get_args(literal)}


def test_every_outcome_has_a_sign():
    assert {*SIGNS} >= {*get_args(Outcome)}
    assert len({*SIGNS.values()}) == len(SIGNS)


def test_capabilities_are_shown_in_words():
    lines = TABLES["capabilities"](
        [example_report(), example_report(transport="absent", capabilities=None)]
    ).splitlines()

    assert lines[0] == "|  | nats |"
    assert "| a message is delivered | at least once: it may be redelivered |" in lines
    assert "| an unacknowledged message is redelivered | when it is requeued; when its consumer closes |" in lines
    assert any(line.endswith("| 2.5 s |") for line in lines)


def test_the_totals_name_the_service_and_the_driver():
    old, new = example_report(), example_report(driver="nats-py 2", result="success", totals={"PASS": 3, "FAIL": 1})

    assert TABLES["totals"]([old, new]).splitlines()[2:] == [
        "| nats | NATS 2.12 | 1 |  | 1 | 0 | 0 | 0 | 0 | 0 |",
        "| nats | NATS 2.12, by nats-py 2 | 1 | success | 3 | 1 | 0 | 0 | 0 | 0 |",
    ]


def test_each_scenario_has_a_row_and_each_report_a_column():
    other = example_report(
        transport="other", broker=None, scenarios=[{"id": "PUB-02", "title": "new", "outcome": "FAIL"}]
    )

    assert TABLES["scenarios"]([example_report(), other]).splitlines() == [
        "### PUB: sending",
        "",
        "|  |  | nats, NATS 2.12 | other |",
        "| --- | --- | --- | --- |",
        "| PUB-01 | a \\| b | ✓ |  |",
        "| PUB-02 | new |  | ✗ |",
    ]


def test_a_scenario_of_another_suite_has_a_row():
    assert "### XYZ\n" in TABLES["scenarios"]([example_report(scenarios=[{"id": "XYZ-01"}])])


@pytest.mark.parametrize("group", sorted({each.group for each in SCENARIOS.values()}))
def test_every_part_of_the_catalogue_has_a_heading(group):
    heading = TABLES["scenarios"]([example_report(scenarios=[{"id": f"{group}-01"}])]).splitlines()[0]

    assert len(heading) > len(f"### {group}: ")


def test_scenarios_that_are_not_proved_are_listed_with_their_reasons():
    outcomes = [("PUB-01", "PASS", ""), ("PUB-02", "NOT_RUN", "no proxy"), ("PUB-03", "NOT_RUN", "no proxy")]
    outcomes += [("PUB-04", "FAIL", "lost\n2"), ("PUB-05", "DEVIATION", "known"), ("PUB-06", "UNSUPPORTED", "no")]
    report = example_report(
        scenarios=[{"id": id_, "outcome": outcome, "reason": why} for id_, outcome, why in outcomes]
    )

    assert sorted(TABLES["reasons"]([report]).splitlines()) == sorted(
        ["- nats, ✗ PUB-04: lost 2", "- nats, · PUB-02, PUB-03: no proxy", "- nats, △ PUB-05: known"]
    )


# -- the program -------------------------------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "nats.json"
    path.write_text(json.dumps(example_report()))
    return str(path)


def test_the_tables_are_written_to_standard_output(report, capsys):
    assert main([report]) == 0
    assert capsys.readouterr().out.startswith("| transport | service |")


def test_the_tables_are_written_between_the_marks_of_a_page(report, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in TABLES) + "below\n")

    assert main([report, "--into", str(page)]) == 0
    once = page.read_text()
    assert main([report, "--into", str(page)]) == 0

    assert page.read_text() == once
    assert once.startswith("above\n<!-- totals -->\n\n| transport |")
    assert once.endswith("\n<!-- /reasons -->\nbelow\n")
    assert "\nold\n" not in once


def test_a_page_without_a_mark_is_not_changed(report, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")

    assert main([report, "--into", str(page)]) == 2
    assert page.read_text() == "nothing\n"
    assert "the page has no <!-- totals -->" in capsys.readouterr().err
