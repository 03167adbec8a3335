"""The examples run as processes, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_meetings_runs_in_memory():
    """A command passes middleware, handler, domain event and broker; a query returns its response."""
    meetings = run("meetings.py")

    assert (meetings.returncode, meetings.stderr) == (0, "")
    steps = [
        "middleware                    JoinMeetingCommand comes in",
        "JoinMeetingCommandHandler     handles JoinMeetingCommand(meeting_id=1, user_id=7)",
        "MeetingAPI                    user 7 joins meeting 1",
        "UserJoinedDomainEventHandler  handles UserJoinedDomainEvent(meeting_id=1, user_id=7)",
        "MeetingAPI                    everybody in meeting 1 reads: New user joined!",
        "middleware                    None goes out",
        "message broker                MemoryMessageBroker confirmed",
        '"message_name": "UserJoinedNotificationEvent"',
        "read_meeting                  handles ReadMeetingQuery(meeting_id=1)",
        "answer                        https://meetings.example/1",
        "count_members                 handles UserJoinedNotificationEvent",
    ]
    positions = [meetings.stdout.find(step) for step in steps]
    assert -1 not in positions, meetings.stdout
    assert positions == sorted(positions)
    body = json.loads(meetings.stdout[meetings.stdout.index("{") : meetings.stdout.rindex("}") + 1])
    assert list(body) == ["message_type", "message_name", "message_id", "payload"]


@pytest.mark.parametrize("address", ["nats://localhost", "memories"])
def test_meetings_refuses_an_unknown_scheme(address):
    meetings = run("meetings.py", "--broker", address)

    assert meetings.returncode == 1
    assert meetings.stderr.startswith("meetings: there is no broker for")
    assert "Traceback" not in meetings.stderr
