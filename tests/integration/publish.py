"""
Run the suite against the transports of diator and publish the results: `python -m tests.integration.publish`.

The program writes `docs/conformance/<transport>.json` and the tables of `docs/conformance.md`. The arguments are the
names of the transports to run; without arguments, all are run. The page shows all existing reports.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from diator.testing.conformance.matrix import main as write_tables
from tests.services import BACKENDS, MissingService, Services

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "docs" / "conformance"
PAGE = ROOT / "docs" / "conformance.md"
SEED = "1"
COARSE = (0, 3, 30, 300)

#: The harness of each report and the service that it needs, by the name of the report, in the order of the columns.
TRANSPORTS = {
    "memory": ("tests.integration.harnesses:MemoryHarness", None),
    "redis": ("tests.integration.harnesses:RedisHarness", "redis"),
    "redis-streams": ("tests.integration.harnesses:RedisStreamHarness", "redis"),
    "rabbitmq": ("tests.integration.harnesses:RabbitMQHarness", "rabbitmq"),
    "kafka": ("tests.integration.harnesses:KafkaHarness", "kafka"),
}


def main(names):
    """Run the transports *names*, or all. Return 1 if a scenario failed or a service was not available."""
    services = Services()
    try:
        failed = [name for name in names or TRANSPORTS if not publish(name, services)]
    finally:
        services.close()
    write_tables([*map(str, reports()), "--into", str(PAGE)])
    return 1 if failed else 0


def publish(name, services):
    """Run one transport and write its report. Return whether that succeeded."""
    harness, service = TRANSPORTS[name]
    environment = {**os.environ, "DIATOR_CONFORMANCE_STRICT": "1"}  # a failure of a new scenario counts
    try:
        if service is not None:
            environment[BACKENDS[service].variable] = services.url(service)
    except MissingService as missing:
        sys.stderr.write(f"{name}: no {service}: {missing}\n")
        return False
    REPORTS.mkdir(exist_ok=True)
    report = REPORTS / f"{name}.json"
    command = [sys.executable, "-m", "diator.testing.conformance", harness, "--require", "--seed", SEED]
    run = subprocess.run([*command, "--report", report], check=False, cwd=ROOT, env=environment)
    report.write_text(publishable(json.loads(report.read_text())), encoding="utf-8")
    return run.returncode == 0


def publishable(report):
    """Return the report with coarse times and one line for each scenario, so that similar runs have a small diff."""
    scenarios = [
        {**each, "seconds": next((bound for bound in COARSE if each["seconds"] <= bound), round(each["seconds"]))}
        for each in report["scenarios"]
    ]
    lines = ",\n".join(f"    {json.dumps(each, ensure_ascii=False)}" for each in scenarios)
    head = json.dumps({**report, "scenarios": []}, indent=2, ensure_ascii=False)
    return head.replace('"scenarios": []', f'"scenarios": [\n{lines}\n  ]') + "\n"


def reports():
    """Return the paths of the existing reports, in the order of the columns."""
    return [path for name in TRANSPORTS if (path := REPORTS / f"{name}.json").exists()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
