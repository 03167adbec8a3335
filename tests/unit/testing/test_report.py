"""Tests of the report: success, partial or failure, and the client library."""

from dataclasses import replace

import pytest

from diator.testing.conformance import SCENARIOS, Report, Result, select
from tests.integration.harnesses import MemoryHarness


def report(*, available=True, **changed):
    """Return a report in which every scenario passed, except for *changed*."""
    results = [
        replace(Result(scenario=each, outcome="PASS"), **changed.get(each.id.replace("-", "_"), {}))
        for each in select()
    ]
    return Report.of(MemoryHarness(), results, available=available, capabilities=None)


@pytest.mark.parametrize(
    ("changed", "result"),
    [
        ({}, "success"),
        ({"PUB_01": {"outcome": "UNSUPPORTED"}, "PUB_07": {"outcome": "PROVISIONAL"}}, "success"),
        ({"PUB_01": {"outcome": "NOT_RUN", "applicable": False}, "FLT_01": {"outcome": "NOT_RUN"}}, "success"),
        ({"FLT_01": {"outcome": "DEVIATION"}}, "success"),
        ({"PUB_01": {"outcome": "NOT_RUN"}}, "partial"),
        ({"PUB_01": {"outcome": "DEVIATION"}}, "partial"),
        ({"ACK_01": {"outcome": "DEVIATION"}}, "partial"),
        ({"FLW_12": {"outcome": "FAIL"}}, "failure"),
        ({"available": False}, "failure"),
    ],
)
def test_the_result(changed, result):
    assert report(**changed).result() == result


def test_the_result_of_a_part_of_the_catalogue_is_partial():
    results = [Result(scenario=each, outcome="PASS") for each in select("ACK")]
    assert Report.of(MemoryHarness(), results, available=True, capabilities=None).result() == "partial"


def test_the_report_names_the_driver_if_there_is_one():
    class Driven(MemoryHarness):
        def driver(self):
            return "client 1.0"

    results = [Result(scenario=SCENARIOS["PUB-01"], outcome="PASS")]
    reports = [Report.of(each(), results, available=True, capabilities=None) for each in (Driven, MemoryHarness)]
    assert [each.as_dict()["driver"] for each in reports] == ["client 1.0", None]
