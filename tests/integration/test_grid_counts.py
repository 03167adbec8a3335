"""The grid counts what was lost, repeated and out of order, and writes it down."""

import json
from dataclasses import asdict, replace

import pytest

from tests.grid.__main__ import BEGIN, END, insert, keep, merged, page, ways_of
from tests.grid.cells import WAYS, Result, judged

DONE = [("a", 0), ("a", 1), ("b", 0)]


def confirmed(*pieces):
    return [{"what": "confirmed", "key": key, "number": number} for key, number in pieces]


def cell(**changes):
    facts = judged(confirmed(*DONE), DONE, DONE, 1.26)
    return Result(**{"service": "kafka", "way": "outbox + inbox", "fault": "sender", **facts, **changes})


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (DONE, {}),
        ([("a", 0), ("b", 0)], {"effects": 2, "lost": 1, "recovered": None}),
        ([*DONE, ("a", 0), ("a", 0)], {"repeated": 2}),
        ([("a", 1), ("a", 0), ("b", 0)], {"inversions": 1}),
        ([("a", 0), ("b", 0), ("a", 1), ("a", 0)], {"repeated": 1}),
        ([*DONE, ("c", 0)], {"phantoms": 1}),
    ],
)
def test_effects_are_counted(seen, expected):
    nothing = {"committed": 3, "confirmed": 3, "effects": 3, "lost": 0, "repeated": 0, "refused": 0}
    fine = {**nothing, "inversions": 0, "phantoms": 0, "recovered": 1.3}

    assert judged(confirmed(*DONE), DONE, seen, 1.26) == {**fine, **expected}


def test_confirmed_work_that_is_not_in_the_database_is_lost():
    assert judged(confirmed(*DONE, ("c", 1)), DONE, DONE, 0.0)["lost"] == 1


def test_refused_duplicates_are_counted():
    said = [{"what": "handled", "outcome": outcome} for outcome in ("acked", "duplicate", "duplicate")]

    assert judged(said, DONE, DONE, None)["refused"] == 2


@pytest.mark.parametrize(
    ("changes", "is_kept", "is_clean"),
    [
        ({}, True, True),
        ({"lost": 1}, False, False),
        ({"inversions": 1}, False, False),
        ({"inversions": 1, "fault": "consumer"}, True, False),
        ({"phantoms": 1}, False, True),
        ({"repeated": 1}, False, False),
        ({"repeated": 1, "way": "outbox"}, True, False),
        ({"lost": 1, "way": "outbox"}, False, False),
        ({"lost": 1, "way": "send after commit"}, True, False),
        ({"committed": 0}, False, True),
    ],
)
def test_promises_are_judged(changes, is_kept, is_clean):
    result = cell(**changes)

    assert (result.is_kept, result.is_clean) == (is_kept, is_clean)


def test_a_fault_of_the_relay_needs_one():
    assert ways_of("clock", WAYS) == ["outbox + inbox", "outbox"]
    assert ways_of("sender", WAYS) == [*WAYS]


def test_results_of_other_cells_stay(tmp_path):
    file = tmp_path / "grid.json"
    old = [cell(committed=1), cell(service="streams")]
    file.write_text(json.dumps([asdict(each) for each in old]))

    assert merged(file, [cell()]) == [old[1], cell()]
    assert merged(tmp_path / "none.json", [cell()]) == [cell()]


def test_the_table_takes_the_place_of_an_older_one(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")

    for _ in range(2):
        insert(file, "new")

    assert file.read_text() == f"before\n{BEGIN}\n\nnew\n{END}\nafter\n"


def test_results_are_kept_beside_those_of_other_cells(tmp_path):
    file = tmp_path / "grid.json"

    keep(file, [cell()])
    keep(file, [cell(service="streams")])

    assert [each["service"] for each in json.loads(file.read_text())] == ["streams", "kafka"]


def test_the_page_has_a_row_for_each_cell():
    text = page([cell(), replace(cell(), way="send after commit", lost=1, recovered=None)])

    assert text.splitlines()[0] == "### Kafka"
    assert "| the sender is killed after a commit | outbox + inbox | 3 | 0 | 0 | 0 | 0 | 1.3 s |" in text
    assert "| send after commit | 3 | 1 | 0 | 0 | 0 | never |" in text
