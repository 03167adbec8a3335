"""The examples against private services: a program of the tester's may use the same prefix."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

EXAMPLES = Path(__file__).parents[2] / "examples"
MEETINGS = EXAMPLES / "meetings.py"


def meetings(address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(MEETINGS), "--broker", address]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_meetings_publishes_to_redis(private_redis):
    """The same program, one argument changed; a plain subscriber receives its event."""
    with redis.Redis.from_url(private_redis.url) as client, client.pubsub() as subscriber:
        subscriber.psubscribe("python_diator_channel:notification_event:UserJoinedNotificationEvent")
        assert subscriber.get_message(timeout=5)["type"] == "psubscribe"

        run = meetings(private_redis.url)
        received = subscriber.get_message(timeout=5)

    assert (run.returncode, run.stderr) == (0, "")
    assert "RedisMessageBroker confirmed" in run.stdout
    assert b'"user_id":7' in received["data"]


def test_meetings_reports_an_unreachable_redis():
    """An unreachable server is one sentence and a failure, without a traceback."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        run = meetings(f"redis://127.0.0.1:{unused.getsockname()[1]}/0")

    assert run.returncode == 1
    assert run.stderr.startswith("meetings: Redis at 127.0.0.1:")
    assert "Traceback" not in run.stderr


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("scheme", "service"),
    [("redis-streams", "private_redis"), ("amqp", "private_rabbitmq"), ("kafka", "private_kafka")],
)
def test_meetings_consumes_what_another_process_sends(request, scheme, service):
    """The same program twice, on every transport that stores messages for a consumer group."""
    address = f"{scheme}://{request.getfixturevalue(service).url.rpartition('//')[2]}"
    consumer = subprocess.Popen(
        [sys.executable, "-u", str(MEETINGS), "--broker", address, "--consume"], stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 30
        while (run := meetings(address)).returncode and time.monotonic() < deadline:
            assert "did not confirm" in run.stderr
        assert run.returncode == 0
        handled = next(line for line in consumer.stdout if "count_members" in line)
    finally:
        consumer.terminate()
        consumer.communicate(timeout=20)

    assert "handles UserJoinedNotificationEvent" in handled
    assert consumer.returncode == 0


def the_trace(*arguments: str) -> list[str]:
    """Return the tree that the example draws, without times, and its last line."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / "one_trace.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert run.returncode == 0, run.stderr
    return [re.sub(r"\d+\.\d ms", "… ms", line) for line in run.stdout.splitlines() if line]


def test_one_trace_in_memory():
    *tree, last = the_trace()
    assert last == "7 spans, 1 trace"
    assert tree == [
        "handle PlaceOrder  (orders, … ms)",
        "├─ send notification_event.OrderPlaced  (orders, … ms, diator_memory)",
        "├─ process notification_event.OrderPlaced  (orders, … ms, diator_memory, retried)",
        "│  └─ settle notification_event.OrderPlaced  (orders, … ms, diator_memory, retried)",
        "└─ process notification_event.OrderPlaced  (orders, … ms, diator_memory, acked)",
        "   ├─ send notification_event.OrderBilled  (orders, … ms, diator_memory)",
        "   └─ process notification_event.OrderBilled  (mailing, … ms, diator_memory, acked)",
    ]


@pytest.mark.timeout(180)
def test_one_trace_leads_through_rabbitmq_and_kafka(rabbitmq_url, kafka_servers):
    *tree, last = the_trace("--rabbitmq", rabbitmq_url, "--kafka", kafka_servers)
    assert last.endswith(" 1 trace")
    assert tree[0] == "handle PlaceOrder  (orders, … ms)"
    assert "├─ process notification_event.OrderPlaced  (orders, … ms, rabbitmq, retried)" in tree
    assert "   └─ process notification_event.OrderBilled  (mailing, … ms, kafka, acked)" in tree
