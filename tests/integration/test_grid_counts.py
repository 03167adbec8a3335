"""The grid counts what was lost, repeated and out of order, and writes it down."""

import json
from dataclasses import asdict, replace

import pytest

from tests.grid import peers
from tests.grid.__main__ import BEGIN, BEGIN_PEERS, END, END_PEERS, cells_of, insert, keep, merged, page, ways_of
from tests.grid.cells import FAULTS, WAYS, Result, judged
from tests.grid.ledger import Fate, Settings, unreliably, work_under_keys

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
        ({"lost": 1, "way": "outbox", "library": "python-cqrs 5.3.0"}, True, False),
    ],
)
def test_promises_are_judged(changes, is_kept, is_clean):
    result = cell(**changes)

    assert (result.is_kept, result.is_clean) == (is_kept, is_clean)


def test_a_fault_of_the_relay_needs_one():
    assert ways_of("clock", WAYS) == ["outbox + inbox", "outbox"]
    assert ways_of("sender", WAYS) == [*WAYS]


def test_another_library_sends_in_its_own_way():
    libraries = ["FastStream 0.7.8", "python-cqrs 5.3.0"]

    assert cells_of("sender", libraries, WAYS) == [(libraries[0], "send after commit"), (libraries[1], "outbox")]
    assert cells_of("relay", libraries, WAYS) == [(libraries[1], "outbox")]
    assert cells_of("relay", ["diator"], WAYS) == [("diator", "outbox + inbox"), ("diator", "outbox")]


def test_other_libraries_are_named_with_the_version_that_is_installed():
    assert {*peers.FAULTS} <= {*FAULTS}
    for name, peer in peers.PEERS.items():
        library, version = name.split()
        assert peer.environment.pins[0].lower().startswith(library.lower())
        assert peer.environment.pins[0].endswith(f"=={version}")


@pytest.mark.parametrize(("luck", "is_sent", "fails"), [(0.1, False, True), (0.2, True, True), (0.4, True, False)])
async def test_half_of_the_failing_sends_arrive(monkeypatch, luck, is_sent, fails):
    monkeypatch.setattr("random.random", lambda: luck)
    sent, failed = [], False

    async def send():
        sent.append(1)

    try:
        await unreliably(send, 0.3, Fate(None))
    except ConnectionError:
        failed = True

    assert (bool(sent), failed) == (is_sent, fails)


async def test_the_next_piece_of_work_is_committed_while_the_first_one_stays_open():
    empty = dict.fromkeys(("service", "address", "database", "name"), "")
    settings = Settings(**empty, has_outbox=False, has_inbox=False, first=3, keys=1, count=2, pause=0.0, lasts=0.01)
    done = []

    async def do(key, number, before_commit):
        done.append(("stored", key, number))
        await before_commit()
        done.append(("committed", key, number))

    await work_under_keys(settings, do)

    words = ["stored", "stored", "committed", "committed"]
    assert done == [(word, "key-0", number) for word, number in zip(words, (3, 4, 4, 3), strict=True)]


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


def test_the_table_of_other_libraries_stands_between_its_own_comments(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"{BEGIN}\nours\n{END}\n{BEGIN_PEERS}\nold\n{END_PEERS}\nafter\n")

    insert(file, "new", BEGIN_PEERS, END_PEERS)

    assert file.read_text() == f"{BEGIN}\nours\n{END}\n{BEGIN_PEERS}\n\nnew\n{END_PEERS}\nafter\n"


def test_results_are_kept_beside_those_of_other_cells(tmp_path):
    file = tmp_path / "grid.json"

    keep(file, [cell()])
    keep(file, [cell(service="streams")])
    keep(file, [cell(library="FastStream 0.7.8")])

    kept = [(each["library"], each["service"]) for each in json.loads(file.read_text())]
    assert kept == [("diator", "streams"), ("diator", "kafka"), ("FastStream 0.7.8", "kafka")]


def test_the_page_has_a_row_for_each_cell():
    text = page([cell(), replace(cell(), way="send after commit", lost=1, recovered=None)])

    assert text.splitlines()[0] == "### Kafka"
    assert "| the sender is killed after a commit | outbox + inbox | 3 | 0 | 0 | 0 | 0 | 1.3 s |" in text
    assert "| send after commit | 3 | 1 | 0 | 0 | 0 | never |" in text


def test_another_library_stands_under_its_name_version_and_settings():
    name = "FastStream 0.7.8"
    text = page([cell(), cell(library=name, way="send after commit", service="rabbitmq")])

    heading = f"### {name}, RabbitMQ\n\n{peers.PEERS[name].settings} Installed: `faststream[rabbit]==0.7.8`, `"
    assert text.index("### Kafka") < text.index(heading)
