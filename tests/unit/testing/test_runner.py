"""Tests of the runner of the conformance suite, with made-up scenarios."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

import diator
from diator.brokers.base import Delivery
from diator.brokers.capabilities import Capabilities
from diator.brokers.memory import MemoryMessageBroker
from diator.brokers.message import Message
from diator.testing.conformance import (
    SCENARIOS,
    SUITE_VERSION,
    Deviation,
    EnvironmentMissing,
    Harness,
    Ledger,
    Limits,
    Nonconformance,
    Received,
    Scenario,
    TransportConformance,
    UnknownScenario,
    run_scenario,
    run_suite,
    select,
)
from diator.testing.conformance.__main__ import main
from diator.testing.conformance._consumer_process import ConsumerProcess
from diator.testing.conformance._ledger import contrast, difference
from diator.testing.conformance._leftovers import Open, nothing_is_left
from diator.testing.conformance._rules import RULES, rule
from diator.testing.conformance._scenario import scenario
from tests.integration.harnesses import MemoryHarness

ROOT = Path(__file__).parents[3]


def result_of(run, *, harness=None, timeout=2.0, **options):
    made = Scenario(id="PUB-01", title="made up", level="C", run=run, timeout=timeout, **options)
    return run_scenario(made, harness or MemoryHarness(), seed=7)


async def passing(ctx):
    await ctx.send(await ctx.broker(), ctx.topic())


async def failing(ctx):
    ctx.check(holds=False, otherwise="this is wrong")


class Absent(MemoryHarness):
    def start(self):
        raise EnvironmentMissing("nobody is there")


class Deviating(MemoryHarness):
    deviations: ClassVar = {"PUB-01": Deviation(reason="known to be wrong", issue="#1")}


class SlowToSettle(MemoryHarness):
    """A transport that sends each acknowledgement on its own and waits for the answer."""

    def transport(self):
        return SlowToSettleBroker()


class SlowToSettleBroker(MemoryMessageBroker):
    @asynccontextmanager
    async def subscribe(self, topics, /, **options):
        async with super().subscribe(topics, **options) as deliveries:
            yield SlowDeliveries(deliveries)


class SlowDeliveries:
    def __init__(self, deliveries):
        self.deliveries = deliveries

    def __aiter__(self):
        return self

    async def __anext__(self):
        delivery = await anext(self.deliveries)
        delivery.settler = SlowSettler(delivery.settler)
        return delivery


class SlowSettler:
    def __init__(self, settler):
        self.settler = settler

    async def ack(self, delivery, /):
        await asyncio.sleep(0.005)
        await self.settler.ack(delivery)


# -- one scenario ------------------------------------------------------------------------------------------------


def test_a_scenario_passes():
    result = result_of(passing)

    assert (result.outcome, result.reason, result.seed) == ("PASS", "", 7)
    assert result.seconds > 0


def test_a_scenario_fails():
    result = result_of(failing)

    assert (result.outcome, result.reason) == ("FAIL", "this is wrong")
    assert isinstance(result.error, Nonconformance)


def test_an_acknowledgement_completes_when_a_scenario_stops_reading():
    result = run_scenario(SCENARIOS["ENC-02"], SlowToSettle(), seed=1)

    assert (result.outcome, result.reason) == ("PASS", "")


def test_any_error_is_a_failure():
    async def broken(ctx):
        raise ZeroDivisionError("oh")

    result = result_of(broken)

    assert result.outcome == "FAIL"
    assert result.reason.startswith("ZeroDivisionError: oh")


def test_a_scenario_that_hangs_fails_with_the_line_where_it_waited():
    async def hanging(ctx):
        await asyncio.Event().wait()

    result = result_of(hanging, timeout=0.05)

    assert result.outcome == "FAIL"
    assert re.match(r"not done after [\d.]+ s; it waited in ", result.reason)


def test_a_scenario_that_cannot_be_cancelled_fails():
    async def stubborn(ctx):
        ends = asyncio.get_running_loop().time() + 0.3
        while asyncio.get_running_loop().time() < ends:
            try:
                await asyncio.sleep(0.5)
            except asyncio.CancelledError:
                continue

    result = result_of(stubborn, timeout=0.05)

    assert result.outcome == "FAIL"
    assert "it cannot be cancelled" in result.reason


def test_the_harness_scales_the_timeout():
    class Slow(MemoryHarness):
        limits = Limits(scale=100.0)

    async def slow(ctx):
        await asyncio.sleep(0.1)

    assert result_of(slow, timeout=0.01, harness=Slow()).outcome == "PASS"


def test_a_leaked_task_is_a_failure():
    async def leaking(ctx):
        leaking.task = asyncio.create_task(asyncio.sleep(60))

    result = result_of(leaking)

    assert (result.outcome, result.reason) == ("FAIL", "tasks are still running: sleep")


@pytest.mark.parametrize("leak", [socket.socket, Path(__file__).open], ids=["socket", "file"])
def test_a_leaked_file_is_a_failure(leak):
    left = []

    async def leaking(ctx):
        left.append(leak())

    result = result_of(leaking)

    left.pop().close()
    assert result.outcome == "FAIL"
    assert "1 file is still open" in result.reason


def test_a_leaked_thread_is_a_failure():
    done = threading.Event()

    async def leaking(ctx):
        threading.Thread(target=done.wait).start()

    result = result_of(leaking)

    done.set()
    assert result.outcome == "FAIL"
    assert re.match(r"1 thread is still running: Thread-\d+ \(wait\) in ", result.reason)


WAITING_IN_A_THREAD = """
import asyncio, threading
from tests.unit.testing.test_runner import result_of

async def waiting(ctx):
    await asyncio.to_thread(threading.Event().wait)

print(result_of(waiting, timeout=0.1))
"""


def test_a_thread_that_never_ends_does_not_stop_the_suite():
    """Neither here nor at the end of the process: a transport may wait in a thread for a client that never answers."""
    command = [sys.executable, "-c", WAITING_IN_A_THREAD]

    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)

    assert (run.returncode, run.stderr) == (0, "")
    assert "outcome='FAIL'" in run.stdout


def test_a_thread_that_is_ending_is_not_a_leak():
    """An example is the thread that waited for the end of a process."""

    async def ending(ctx):
        threading.Timer(0.1, int).start()

    assert result_of(ending).outcome == "PASS"


@pytest.mark.parametrize("unseen", ["task", "coroutine", "file"])
def test_an_unretrieved_error_is_a_failure(unseen):
    async def fail():
        raise ZeroDivisionError

    async def careless(ctx):
        if unseen == "task":
            task = asyncio.create_task(fail())
            await asyncio.sleep(0)
            del task
        elif unseen == "coroutine":
            fail()
        else:
            socket.socket()

    result = result_of(careless)

    texts = {"task": "never retrieved: ZeroDivisionError() in ", "coroutine": "was never awaited", "file": "unclosed"}
    assert result.outcome == "FAIL"
    assert texts[unseen] in result.reason


def test_the_brokers_of_a_scenario_are_closed():
    brokers = []

    async def failing_later(ctx):
        brokers.append(await ctx.broker())
        ctx.check(holds=False, otherwise="later")

    result_of(failing_later)

    assert brokers[0]._closed


# -- gates -------------------------------------------------------------------------------------------------------


def test_without_a_facility_it_is_not_run():
    result = result_of(failing, facilities=frozenset({"proxy", "raw"}))

    assert (result.outcome, result.reason) == ("NOT_RUN", "the harness has no facility proxy")


def test_without_a_capability_it_is_unsupported():
    result = result_of(failing, needs=Capabilities(durability="crash"))

    assert result.outcome == "UNSUPPORTED"
    assert result.reason == "not promised: durability (none, needed is crash)"


def test_a_missing_capability_that_is_not_refused_is_a_failure():
    class Careless(MemoryMessageBroker):
        capabilities = Capabilities(distribution=frozenset({"broadcast"}), max_message_bytes=1000)

    class CarelessHarness(MemoryHarness):
        def transport(self):
            return Careless()

    needs = Capabilities(distribution=frozenset({"competing"}))

    result = result_of(failing, needs=needs, harness=CarelessHarness())

    assert result.outcome == "FAIL"
    assert "expected UnsupportedCapability" in result.reason


def test_a_scenario_that_does_not_apply_is_not_run():
    async def inapplicable(ctx):
        ctx.applies(holds=False, otherwise="there is nothing to prove")

    result = result_of(inapplicable)

    assert (result.outcome, result.reason) == ("NOT_RUN", "not applicable: there is nothing to prove")


# -- deviations --------------------------------------------------------------------------------------------------


def test_a_known_failure_is_a_deviation():
    result = result_of(failing, harness=Deviating())

    assert (result.outcome, result.reason) == ("DEVIATION", "known to be wrong, #1 [this is wrong]")


def test_a_deviation_that_passes_is_a_failure():
    result = result_of(passing, harness=Deviating())

    assert result.outcome == "FAIL"
    assert "remove the deviation" in result.reason


@pytest.mark.parametrize(("run", "outcome"), [(passing, "PASS"), (failing, "DEVIATION")])
def test_a_deviation_for_a_race_may_pass(run, outcome):
    harness = Deviating()
    harness.deviations = {"PUB-01": Deviation(reason="a race", sometimes=True)}

    assert result_of(run, harness=harness).outcome == outcome


def test_a_deviation_that_fails_in_another_way_is_a_failure():
    async def broken(ctx):
        raise ZeroDivisionError

    result = result_of(broken, harness=Deviating())

    assert result.outcome == "FAIL"
    assert "a deviation with AssertionError is declared, but it fails otherwise" in result.reason


@pytest.mark.parametrize("deviations", [{"PUB-99": Deviation(reason="why not")}, {"PUB-01": Deviation(reason=" ")}])
def test_a_deviation_needs_a_scenario_and_a_reason(deviations):
    class Wrong(MemoryHarness):
        pass

    Wrong.deviations = deviations

    with pytest.raises(UnknownScenario):
        run_suite(Wrong(), select("PUB-01"))


# -- the registry ------------------------------------------------------------------------------------------------


def test_an_id_is_registered_once():
    with pytest.raises(ValueError, match="PUB-01 is registered already"):
        scenario("PUB-01", "again")(passing)


def test_a_scenario_names_the_defect_that_it_catches():
    with pytest.raises(ValueError, match="has no docstring that names the defect"):
        scenario("PUB-98", "silent")(passing)
    assert all(each.catches.startswith("Catch ") for each in SCENARIOS.values())


def test_scenarios_are_selected_by_words():
    assert [each.id for each in select("ack-03 ACK-01")] == ["ACK-01", "ACK-03"]
    assert select("zebra") == []
    assert {each.group for each in select("grp-")} == {"GRP"}


# -- the ledger --------------------------------------------------------------------------------------------------


async def delivered(ledger, *messages, name="s"):
    broker = MemoryMessageBroker()
    for message in messages:
        topic = (message.message_type, message.message_name)
        async with broker.subscribe([topic]) as deliveries:
            await broker.send_message(message)
            ledger.received.append(Received.of(await anext(deliveries), name))


async def test_the_ledger_finds_lost_duplicated_unexpected_and_reordered_messages():
    ledger = Ledger()
    messages = [Message.create(message_name="n", payload={"n": number}) for number in range(5)]
    for message in messages:
        ledger.attempt(message).fate = "confirmed"
    stranger = Message.create(message_name="n", payload={})
    await delivered(ledger, messages[1], messages[0], messages[2], messages[2], stranger)

    comparison = ledger.compare("s", messages)

    ids = [message.message_id for message in messages]
    assert (comparison.lost, comparison.duplicated) == (ids[3:], [ids[2]])
    assert (comparison.unexpected, comparison.reordered, comparison.explained) == ([stranger.message_id], [ids[0]], [])
    with pytest.raises(
        Nonconformance, match=r"2 lost .* 1 duplicated .* 1 unexpected .* 1 out of order \(no\. 1 came after no\. 2\)"
    ):
        comparison.verify(in_order=True)


async def test_a_redelivery_of_an_abandoned_delivery_is_explained():
    ledger = Ledger()
    message = Message.create(message_name="n", payload={})
    ledger.attempt(message).fate = "confirmed"
    await delivered(ledger, message, message)
    ledger.received[0].abandoned = True

    comparison = ledger.compare("s", [message])

    assert (comparison.explained, comparison.duplicated) == ([message.message_id], [])
    comparison.verify()


async def test_a_message_that_failed_and_arrived_is_unexpected():
    ledger = Ledger()
    message = Message.create(message_name="n", payload={})
    ledger.attempt(message).fate = "failed"
    await delivered(ledger, message)

    assert ledger.compare("s", [message]).unexpected == [message.message_id]


def test_a_comparison_without_messages_is_refused():
    with pytest.raises(ValueError, match="proves nothing"):
        Ledger().compare("s", [])


# -- pytest ------------------------------------------------------------------------------------------------------


def test_a_test_of_the_suite_cannot_be_overridden():
    with pytest.raises(TypeError, match="test_scenario"):

        class Shadowing(TransportConformance):
            harness = MemoryHarness

            def test_scenario(self): ...


def test_an_unknown_deviation_is_refused_when_the_class_is_made():
    with pytest.raises(UnknownScenario, match="PUB-99"):

        class Unknown(TransportConformance):
            harness = MemoryHarness
            deviations: ClassVar = {"PUB-99": Deviation(reason="why not")}


OUTCOMES = """
from diator.testing.conformance import *
from tests.integration.harnesses import MemoryHarness

class Absent(MemoryHarness):
    def start(self):
        raise EnvironmentMissing("nobody is there")

class TestGood(TransportConformance):
    harness = MemoryHarness

class TestAbsent(TransportConformance):
    harness = Absent

class TestRequired(TransportConformance):
    harness = Absent
    required = True

class TestUnneeded(TransportConformance):
    harness = MemoryHarness
    deviations = {"PUB-01": Deviation(reason="it is fine")}
"""


def test_pytest_distinguishes_the_outcomes(tmp_path):
    """Each scenario is a test with its id in the name. Nothing but pytest is needed."""
    (tmp_path / "test_it.py").write_text(OUTCOMES)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:asyncio", "-c", "/dev/null", "-rA"]

    run = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "-k", "PUB-01 or UNR-02", str(tmp_path)],
        check=False, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip

    output = run.stdout
    assert "::TestGood::test_scenario[PUB-01]" in output.split("PASSED ")[1]
    assert "UNSUPPORTED: not promised: unroutable" in output
    assert "no service: nobody is there" in output
    failed = [line.rpartition("::Test")[2] for line in output.splitlines() if line.startswith("FAILED ")]
    assert {line.split(" ")[0] for line in failed if "PUB-01" in line} == {
        "Required::test_scenario[PUB-01]", "Unneeded::test_scenario[PUB-01]"
    }  # fmt: skip
    assert run.returncode == 1


# -- the command line --------------------------------------------------------------------------------------------

HARNESS = "tests.integration.harnesses:MemoryHarness"
HERE = f"{__name__}:"


def test_the_shape_of_the_report(tmp_path, capsys):
    file = tmp_path / "report.json"

    assert main([HARNESS, "--report", str(file), "-k", "PUB-01 UNR-02", "--seed", "5"]) == 0

    report = json.loads(file.read_text())
    assert report.keys() == {
        "suite_version", "diator_version", "transport", "broker", "driver", "result", "capabilities", "facilities",
        "totals", "scenarios",
    }  # fmt: skip
    assert (report["suite_version"], report["transport"], report["broker"]) == (SUITE_VERSION, "memory", "in process")
    assert report["totals"] == {"PASS": 1, "FAIL": 0, "UNSUPPORTED": 1, "NOT_RUN": 0, "DEVIATION": 0, "PROVISIONAL": 0}
    assert report["capabilities"]["redelivery"] == ["close", "crash", "retry"]
    first = report["scenarios"][0]
    assert first.keys() == {"id", "title", "level", "outcome", "reason", "seconds", "seed"}
    assert (first["id"], first["level"], first["outcome"], first["seed"]) == ("PUB-01", "C", "PASS", 5)
    assert "1 PASS, 1 UNSUPPORTED" in capsys.readouterr().out


def test_the_levels_are_printed_and_selectable(capsys):
    assert main([HARNESS, "-k", "PUB-01 SIZ-02 ACK-01 ACK-16", "--levels", "XS"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:-2]] == [["PASS", "X", "ACK-01"], ["PASS", "S", "ACK-16"]]
    assert main([HARNESS, "--levels", "Z"]) == 2
    assert "there are the levels C, X, F, S, not Z" in capsys.readouterr().err


def test_a_failure_is_printed_with_its_place_and_its_causes(monkeypatch, capsys):
    async def failing_for_a_reason(ctx):
        raise Nonconformance("nothing came") from ConnectionError("the link")

    monkeypatch.setitem(SCENARIOS, "PUB-01", replace(SCENARIOS["PUB-01"], run=failing_for_a_reason))

    assert main([HARNESS, "-k", "PUB-01"]) == 1

    first, place, cause, observed, contract, stands, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("FAIL        C PUB-01")
    assert re.match(r"    at .*test_runner.py:\d+ `raise Nonconformance", place)
    assert cause.startswith("    because of ConnectionError('the link') in ")
    assert observed == "    until then: 0 messages sent (none)"
    assert contract.startswith("    the contract: Publish *message*. Return when the service has confirmed it")
    assert re.match(r"        MessageBroker.send_message, diator/brokers/sending.py:\d+; docs/writing-a-tran", stands)


@pytest.mark.parametrize(
    ("found", "wanted", "text"),
    [
        (1, 2, "got 1, expected 2"),
        ({"a": "1", "b": "2"}, {"a": "1", "c": "3"}, "1 missing ('c'); 1 added ('b')"),
        ({"a": "1"}, {"a": "2"}, "1 different ('a': got '1', expected '2')"),
        ([*range(50)], [*range(49), 99], "1 of 50 differ, the first is no. 50: got 49, expected 99"),
        ([*range(50)], [], "got [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … (50)], expected []"),
        ("x" * 200, "x" * 100 + "y" * 100, f"different from position 100 on: got …{'x' * 40!r}…, expected …"),
        (b"x" * 200, b"x" * 201, "200 instead of 201 long, different from position 200 on: got …"),
        (None, "x" * 200, f"got None, expected '{'x' * 119}… (202 characters)"),
        ({"b", "a"}, {"a"}, "got {'a', 'b'}, expected {'a'}"),
        (("b", "a"), ("a",), "got ('b', 'a'), expected ('a')"),
    ],
)
def test_two_values_are_contrasted_briefly(found, wanted, text):
    assert contrast(found, wanted).startswith(text)


def test_two_messages_are_contrasted_by_their_fields():
    message = Message.create(message_name="n", payload={"n": 1}, headers={"a": "1"})
    other = replace(message, payload_json=b"{}", headers={})

    assert contrast(other, message) == "payload_json: got b'{}', expected b'{\"n\":1}'; headers: 1 missing ('a')"
    assert contrast([other.message_id], [], lambda _: "no. 1") == "got [no. 1], expected []"
    assert contrast(other, None, lambda _: "no. 1") == "got the message no. 1, expected None"


def test_each_scenario_proves_one_rule_of_the_contract():
    """The rules are found where they stand. A scenario that is new has to say which one it proves, in `RULES`."""
    ids = [id_ for ids in RULES.values() for id_ in ids.split()]

    assert sorted(ids) == sorted(SCENARIOS)
    for name in RULES:
        found = rule(name)
        file, line = found.place.rpartition(", ")[2].split(":")
        assert found.text.split(" ")[0].strip("*`") in (ROOT / file).read_text().splitlines()[int(line) - 1]
        page, _, section = found.guide.partition("#")
        titles = [line.lstrip("# ") for line in (ROOT / page).read_text().splitlines() if line.startswith("#")]
        assert not section or section in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in titles]


def test_a_rule_that_nobody_wrote_is_not_found():
    with pytest.raises(LookupError, match="no paragraph that begins with 'Nonsense'"):
        rule("subscribe: Nonsense")


def test_a_failure_says_what_happened_until_then():
    async def losing(ctx):
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic) as reader:
            await ctx.send(broker, topic, 3)
            await reader.take(2)
            await reader.take(1, settle="nothing")
            ctx.ledger.sent.pop()
            ctx.check(holds=False, otherwise="this is wrong")

    assert re.fullmatch(
        r"2 messages sent \(2 confirmed\); '.*' received 3 deliveries \(2 ack, 1 unsettled\), 1 of a message that "
        "nobody sent",
        result_of(losing).observed,
    )


def test_an_iterator_that_a_cancelled_wait_ends_is_told_by_name():
    class Generating(MemoryMessageBroker):
        @asynccontextmanager
        async def subscribe(self, topics, /, **options):
            async with super().subscribe(topics, **options) as deliveries:
                yield (delivery async for delivery in deliveries)

    class Generator(MemoryHarness):
        def transport(self):
            return Generating()

    async def reading_twice(ctx):
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic) as reader:
            await reader.expect_nothing()
            await reader.take(1)

    result = result_of(reading_twice, harness=Generator())

    assert re.search("^the iterator of '.*' has ended, and its subscription is still open; an asynch", result.reason)
    assert result.error.rule == "subscribe: Reconnecting:"


@pytest.mark.parametrize("ordering", ["destination", "key"])
def test_a_loss_that_may_be_a_wrong_order_says_so(ordering):
    """A scenario reads until a message that was sent last, so whatever that one has overtaken is missing."""

    class Overtaking(MemoryMessageBroker):
        capabilities = replace(MemoryMessageBroker().capabilities, ordering=ordering)

        async def send_message(self, message, /):
            if b"number" not in message.payload_json:
                await super().send_message(message)

    class Unordered(MemoryHarness):
        def transport(self):
            return Overtaking()

    async def reading(ctx):
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic) as reader:
            messages = [ctx.message(topic, number) for number in range(2)]
            await ctx.send_all(broker, messages)
            await reader.until_fence()
            ctx.ledger.compare(reader.name, messages).verify()

    hint = ": a message that was sent after them has arrived, and ordering=destination is promised"
    assert (
        f"2 lost{hint * (ordering == 'destination')} (no. 1, no. 2)" in result_of(reading, harness=Unordered()).reason
    )


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (dict.fromkeys([1000], 2000000), ""),  # a table that has grown once
        (
            dict.fromkeys(range(2_500), 500),
            r"^5\d\d bytes are kept for each message, most of them of .*test_runner.py:",
        ),
    ],
    ids=["once", "each"],
)
def test_what_is_kept_for_each_message_is_told_from_what_grows_once(sizes, reason):
    class Keeping(MemoryMessageBroker):
        kept: ClassVar = []

        async def send_message(self, message, /):
            await super().send_message(message)
            self.kept.append(bytes(sizes.get(len(self.kept), 0)))

    class Growing(MemoryHarness):
        def transport(self):
            return Keeping()

    result = run_scenario(SCENARIOS["LEK-06"], Growing(), seed=7)

    assert re.search(reason, result.reason)
    assert result.outcome == ("FAIL" if reason else "PASS"), result.reason


@pytest.mark.real_time
async def test_a_process_that_ends_too_early_says_where_its_error_is():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(3)", stdout=subprocess.PIPE)

    with pytest.raises(Nonconformance, match="ended with exit code 3; its error is on standard error"):
        await ConsumerProcess(process).ready()


def test_dead_letters_are_expected_only_where_they_are_promised():
    class Lacking(MemoryMessageBroker):
        capabilities = replace(MemoryMessageBroker().capabilities, dead_letter=False)

    class WithoutLetters(MemoryHarness):
        def transport(self):
            return Lacking()

    result = run_scenario(SCENARIOS["FRN-09"], WithoutLetters(), seed=7)

    assert result.outcome == "PASS", result.reason


def test_a_delivery_that_nobody_expects_is_told_with_what_came_before():
    async def requeued(ctx):
        broker, topic = await ctx.broker(), ctx.topic()
        async with ctx.reading(broker, topic, prefetch=2) as reader:
            await ctx.send(broker, topic, 2)
            await reader.take(1, settle="nothing")
            await (await reader.next()).delivery.retry()
            await reader.expect_nothing()

    assert re.fullmatch(
        r"'.*', whose prefetch is 2 and which had 1 unsettled, received message no. 2, attempt 2, after attempt 1 "
        r"\(retry\); expected nothing",
        result_of(requeued).reason,
    )


def test_a_failure_says_why_the_consumer_has_not_acknowledged():
    async def refusing(ctx):
        async def handle(_):
            raise LookupError

        broker = await ctx.broker()
        async with ctx.consuming(broker, handle) as run:
            await ctx.send_all(broker, [run.message(), run.message()])
            await run.until_handled(2)
            ctx.check(holds=False, otherwise="this is wrong")

    observed = result_of(refusing).observed

    assert re.search(r"has handled 2 dead_lettered \(2 times retries-exhausted: LookupError in .*\)$", observed)


@pytest.mark.parametrize("wait", ["until_handled", "until_settled"])
def test_a_failure_says_how_many_more_were_expected_of_the_consumer(wait):
    async def waiting_for_three(ctx):
        async def handle(_): ...

        broker = await ctx.broker()
        async with ctx.consuming(broker, handle) as run:
            await ctx.send_all(broker, [run.message()])
            await getattr(run, wait)(1)
            await getattr(run, wait)(3)

    assert result_of(waiting_for_three, timeout=0.5).observed.endswith("has handled 1 acked, with 2 more expected")


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ("", "this transport promises unroutable='retained'"),
        ("Capabilities: redelivery:", "this transport promises redelivery={close, crash, retry}"),
        ("aclose: Nothing remains:", "the contract: Nothing remains: no task"),
        ("Health: receiving:", "the consumer is diator's: look at what it calls"),
    ],
)
def test_a_failure_says_which_promise_is_broken_and_where_to_look(broken, line, monkeypatch, capsys):
    async def breaking(ctx):
        ctx.check(holds=False, otherwise="this is wrong", rule=broken)

    monkeypatch.setitem(SCENARIOS, "UNR-01", replace(SCENARIOS["UNR-01"], run=breaking))

    assert main([HARNESS, "-k", "UNR-01"]) == 1

    assert line in capsys.readouterr().out


def test_what_is_left_of_a_broker_breaks_the_rule_about_its_end():
    async def leaking(ctx):
        before = Open.now()
        ctx.start(asyncio.sleep(60))
        await nothing_is_left(ctx, before, "a closed broker")

    assert result_of(leaking, timeout=10).error.rule == "aclose: Nothing remains:"


def test_a_consumer_that_has_failed_is_not_waited_for():
    """The error of the consumer is the result, not the end of the time."""

    async def failing_consumer(ctx):
        async def handle(event): ...

        async with ctx.consuming(Failing(), handle) as run:
            await run.until_handled(1)

    class Failing(MemoryMessageBroker):
        @asynccontextmanager
        async def subscribe(self, topics, /, **options):
            async def deliveries():
                raise ZeroDivisionError
                yield

            yield deliveries()

    assert result_of(failing_consumer).reason.startswith("ZeroDivisionError")


# -- a transport of the wrong shape ------------------------------------------------------------------------------


class Sending(MemoryMessageBroker):
    def send_message(self, message, /): ...


class Promising(MemoryMessageBroker):
    def capabilities(self): ...


class Subscribing(MemoryMessageBroker):
    async def subscribe(self, topics, /, **options):
        yield


class Unopened:
    capabilities = MemoryMessageBroker().capabilities
    send_message = subscribe = aclose = MemoryMessageBroker.send_message


@pytest.mark.parametrize(
    ("transport", "reason"),
    [
        (lambda: None, "`Harness.transport` returned a NoneType, which has no method send_message"),
        (Unopened, "`Harness.transport` returned a Unopened, which has no method __aenter__"),
        (Promising, "`capabilities` of Promising is a method; make it a property"),
        (Subscribing, "`subscribe` of Subscribing returns no asynchronous context manager; write it as"),
        (Sending, "send_message() returned None, which cannot be awaited; write it with `async def`"),
    ],
)
def test_a_transport_of_the_wrong_shape_fails_by_name(transport, reason):
    class Misshapen(MemoryHarness):
        def transport(self):
            return transport()

    assert result_of(passing, harness=Misshapen()).reason.startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"body": "text"}, "Delivery.body is a str, not bytes"),
        ({"headers": None}, "Delivery.headers is not a mapping of texts to texts"),
        ({"headers": {"a": 1}}, "Delivery.headers is not a mapping of texts to texts"),
        ({"attempt": None}, "Delivery.attempt is None; it is 1 for the first delivery"),
        ({"attempt": 0}, "Delivery.attempt is 0; it is 1 for the first delivery"),
    ],
)
def test_a_delivery_of_the_wrong_shape_fails_by_name(change, reason):
    fields = {"topic": ("event", "n"), "body": b"{}", "headers": {}, "attempt": 1, "settler": None}

    with pytest.raises(Nonconformance, match=re.escape(reason)) as raised:
        Received.of(Delivery(**{**fields, **change}), "s")

    assert rule(raised.value.rule).text.startswith(f"{next(iter(change))}: ")


def test_what_is_not_a_delivery_fails_by_name():
    with pytest.raises(Nonconformance, match="the iterator returned a dict, not a Delivery"):
        Received.of({}, "s")


def test_a_facility_without_its_method_fails_by_name():
    class Claiming(Harness):
        name, facilities = "claiming", frozenset({"raw"})

        def transport(self):
            return MemoryMessageBroker()

    result = run_scenario(SCENARIOS["PSN-01"], Claiming(), seed=1)

    assert result.reason == "the harness names a facility and does not write its method send_raw"


def test_a_harness_without_a_name_is_refused_before_anything_runs(monkeypatch, capsys):
    class Nameless(Harness):
        def transport(self):
            raise NotImplementedError

    monkeypatch.setattr("tests.integration.harnesses.MemoryHarness", Nameless)

    assert main([HARNESS]) == 2
    assert capsys.readouterr().err == "Nameless has no name: set its class attribute `name`, for the report\n"


def test_a_facility_that_nobody_knows_is_refused():
    class Misspelt(MemoryHarness):
        facilities = frozenset({"row", "raw"})

    with pytest.raises(UnknownScenario, match="no scenario knows the facility row; there are alarm, "):
        run_suite(Misspelt(), select("PUB-01"))


# -- a blocked event loop ----------------------------------------------------------------------------------------


class Impatient(MemoryHarness):
    limits = Limits(standstill=0.3)


def forever():
    while True:
        ...


def read_for_ever():
    one, other = socket.socketpair()
    with one, other:
        one.recv(1)


def swallow():
    try:
        forever()
    except Exception:  # noqa: BLE001  # as a careless transport
        return


@pytest.mark.real_time
@pytest.mark.parametrize("block", [forever, read_for_ever, lambda: threading.Event().wait(), swallow])
@pytest.mark.parametrize("where", ["scenario", "callback"])
def test_a_call_that_blocks_the_event_loop_is_interrupted(block, where):
    """The result shows the place and the stack, also if the transport swallows the interruption."""
    before = signal.getsignal(signal.SIGUSR2)

    async def blocking(ctx):
        if where == "callback":
            asyncio.get_running_loop().call_soon(block)
            await asyncio.sleep(0.1)
        else:
            block()

    result = result_of(blocking, harness=Impatient(), timeout=10.0)

    assert result.outcome == "FAIL"
    assert re.match(r"the event loop stood still for 0.3 s, in .*test_runner.py:\d+ `", result.reason)
    assert "the stack:" in "".join(result.error.__notes__)
    assert signal.getsignal(signal.SIGUSR2) is before


BLOCKED = """
import threading
from diator.testing.conformance import *
from tests.integration.harnesses import MemoryHarness

class TestBlocked(TransportConformance):
    class harness(MemoryHarness):
        limits = Limits(standstill=0.3)

        def transport(self):
            while True:
                try:
                    threading.Event().wait()
                except Exception:
                    pass
"""


@pytest.mark.real_time
def test_a_call_that_cannot_be_interrupted_ends_the_run(tmp_path):
    """The scenario, the place and the stack are shown although pytest captures the output."""
    (tmp_path / "test_it.py").write_text(BLOCKED)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:asyncio", "-c", "/dev/null"]

    run = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "-k", "PUB-01", str(tmp_path)],
        check=False, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip

    assert run.returncode == 1
    assert re.search(r"FAIL PUB-01: the event loop stood still for 0.3 s, in .*test_it.py:\d+ ", run.stderr)
    assert "the call cannot be interrupted, so the run ends here" in run.stderr


def test_the_order_is_explained_by_places():
    sent = [*"abcdef"]

    assert difference("abcdef", sent) == ""
    assert difference("adcbff", sent) == (
        "1 missing (no. 5); 1 came again (no. 6); 2 overtaken (no. 3 came after no. 4, no. 2 came after no. 4)"
    )


def test_a_failure_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(MemoryHarness, "deviations", {"PUB-01": Deviation(reason="it is fine")})

    assert main([HARNESS, "-k", "PUB-01"]) == 1


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--require"], 1)])
def test_a_missing_service_is_an_error_where_it_is_required(arguments, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(MemoryHarness, "start", Absent.start)
    file = tmp_path / "report.json"

    assert main([HARNESS, "-k", "PUB", "--report", str(file), *arguments]) == code

    report = json.loads(file.read_text())
    assert (report["broker"], report["capabilities"]) == (None, None)
    assert report["totals"]["NOT_RUN"] == len(select("PUB"))


@pytest.mark.parametrize(
    "arguments",
    [["no.such.module:Harness"], ["tests.integration.harnesses:Nothing"], ["pathlib:Path"], [HARNESS, "-k", "zebra"]],
)
def test_a_wrong_command_line(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err


def test_an_unknown_deviation_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(MemoryHarness, "deviations", {"PUB-99": Deviation(reason="why not")})

    assert main([HARNESS]) == 2
    assert "PUB-99" in capsys.readouterr().err


def test_the_program_runs_without_warnings():
    command = [sys.executable, "-W", "error", "-m", "diator.testing.conformance", HARNESS, "-k", "SIZ-02"]

    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)

    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("PASS        C SIZ-02")


def test_a_facility_is_prepared_outside_of_the_scenario():
    """A service that starts slowly uses no time of a scenario, and a missing service fails no scenario."""

    class Slow(MemoryHarness):
        facilities = frozenset({"outages", "alarm"})

        def prepare(self, facility):
            if facility == "alarm":
                raise EnvironmentMissing("no container engine answers")
            self.kept = socket.socket()  # left open on purpose

    harness = Slow()
    try:
        assert result_of(passing, harness=harness, facilities=frozenset({"outages"})).outcome == "PASS"
        missing = result_of(passing, harness=harness, facilities=frozenset({"alarm"}))
    finally:
        harness.kept.close()

    assert (missing.outcome, missing.reason) == (
        "NOT_RUN",
        "facility alarm is not available: no container engine answers",
    )


THIS_MINOR = ".".join(diator.__version__.split(".")[:2])


@pytest.mark.parametrize(
    ("since", "strict", "outcome"),
    [(THIS_MINOR, "", "PROVISIONAL"), (THIS_MINOR, "1", "FAIL"), ("0.9", "", "FAIL"), ("", "", "FAIL")],
)
def test_a_new_scenario_does_not_fail_yet(since, strict, outcome, monkeypatch):
    monkeypatch.setenv("DIATOR_CONFORMANCE_STRICT", strict)

    result = result_of(failing, since=since)

    assert (result.outcome, "this is wrong" in result.reason) == (outcome, True)
    assert result_of(passing, since=since).outcome == "PASS"


def test_a_new_scenario_fails_for_the_transports_of_diator():
    """The environment of this run is strict, and no harness or test class can change that."""
    assert result_of(failing, since=THIS_MINOR).outcome == "FAIL"


def test_a_deviation_from_a_new_scenario_is_as_strict_as_any():
    harness = MemoryHarness()
    harness.deviations = {"PUB-01": Deviation(reason="known")}

    assert result_of(failing, since=THIS_MINOR, harness=harness).outcome == "DEVIATION"
    assert result_of(passing, since=THIS_MINOR, harness=harness).outcome == "FAIL"
