"""The examples run as a person runs them: as processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_meetings_tells_the_whole_story_in_memory():
    """A command goes through middleware, handler, domain event and broker; a query is answered."""
    told = run("meetings.py")

    assert (told.returncode, told.stderr) == (0, "")
    steps = [
        "middleware                    JoinMeetingCommand comes in",
        "JoinMeetingCommandHandler     handles JoinMeetingCommand(meeting_id=1, user_id=7)",
        "MeetingAPI                    user 7 joins meeting 1",
        "UserJoinedDomainEventHandler  handles UserJoinedDomainEvent(meeting_id=1, user_id=7)",
        "MeetingAPI                    everybody in meeting 1 reads: New user joined!",
        "middleware                    None goes out",
        "message broker                MemoryMessageBroker has",
        '"message_name": "UserJoinedNotificationEvent"',
        "read_meeting                  handles ReadMeetingQuery(meeting_id=1)",
        "answer                        https://meetings.example/1",
        "count_members                 hears of UserJoinedNotificationEvent",
    ]
    positions = [told.stdout.find(step) for step in steps]
    assert -1 not in positions, told.stdout
    assert positions == sorted(positions)
    body = json.loads(told.stdout[told.stdout.index("{") : told.stdout.rindex("}") + 1])
    assert list(body) == ["message_type", "message_name", "message_id", "payload"]


@pytest.mark.parametrize("address", ["nats://localhost", "memories"])
def test_meetings_refuses_a_scheme_that_it_does_not_know(address):
    told = run("meetings.py", "--broker", address)

    assert told.returncode == 1
    assert told.stderr.startswith("meetings: there is no broker for")
    assert "Traceback" not in told.stderr
