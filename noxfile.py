"""
The sessions that people and CI run. ``nox -l`` lists them.

``lint``, ``types``, ``unit`` and ``build`` need only Python. The other sessions start their services if they can; the
last lines of a test run name the missing ones.
"""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.11"
nox.options.sessions = ["lint", "types", "unit", "build", "benchmarks_smoke", "third_party", "tests"]
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
CLIENTS = ",".join(PROJECT["project"]["optional-dependencies"])

#: Tests with services mostly wait, so there are more processes than cores.
AT_ONCE = ("-n", os.environ.get("DIATOR_TEST_PROCESSES", "4"))
#: The conformance suite multiplies its deadlines by this, since other tests run beside it.
BUSY = {"DIATOR_CONFORMANCE_SCALE": os.environ.get("DIATOR_CONFORMANCE_SCALE", "3")}
#: Print the slowest tests.
SLOWEST = ("--durations=15", "--durations-min=1")

#: The services of the tests: the variable of each address, and the public image.
SERVICES = {
    "redis": ("DIATOR_TEST_REDIS_URL", "redis:8"),
    "rabbitmq": ("DIATOR_TEST_RABBITMQ_URL", "rabbitmq:4-management"),
    "kafka": ("DIATOR_TEST_KAFKA_SERVERS", "apache/kafka:4.3.1"),
    "postgres": ("DIATOR_TEST_POSTGRES_URL", "postgres:17"),
}


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and spelling."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    """Run both type checkers on the library, and on right and wrong programs. Every public name must have a type."""
    session.install("-e", f".[{CLIENTS}]", *group("types"))
    session.run("mypy")
    session.run("pyright")
    session.run("pytest", "tests/typing")
    session.run("pyright", "--verifytypes", "diator", "--ignoreexternal")


@nox.session(python=PYTHONS)
@nox.parametrize("extras", ["without", "with"])
def unit(session: nox.Session, extras: str) -> None:
    """Run the tests without services. Without extras they show that the core imports no client library."""
    if extras == "with":
        session.install("-e", f".[{CLIENTS}]", *group("tests"))
    else:
        session.install("-e", ".", *group("unit"))
    session.run("pytest", "tests/unit", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """Run the tests with services. Without arguments, write the reports and the matrix, too."""
    session.install("-e", f".[{CLIENTS}]", *group("tests"))
    environment = {**BUSY, **images(session, *SERVICES)}
    if not session.posargs:
        session.run("python", "-m", "tests.integration.publish", env=environment)
    session.run("pytest", "tests/integration", *AT_ONCE, *SLOWEST, *session.posargs, env=environment)


@nox.session
def conformance(session: nox.Session) -> None:
    """Write the reports and the matrix of the documentation; after `--` the names of transports."""
    session.install("-e", f".[{CLIENTS}]", *group("tests"))
    session.run("python", "-m", "tests.integration.publish", *session.posargs, env=images(session, *SERVICES))


@nox.session
def interoperation(session: nox.Session) -> None:
    """Exchange messages with other libraries, and with programs in other languages if their toolchains are there."""
    session.install("-e", f".[{CLIENTS}]", *group("tests"))
    files = [f"tests/integration/test_{name}.py" for name in ("interoperation", "other_languages", "cloudevents")]
    environment = {**BUSY, **images(session, "redis", "rabbitmq", "kafka")}
    session.run("pytest", *files, "-n", str(len(files)), *SLOWEST, *session.posargs, env=environment)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests and the documentation, with coverage."""
    session.install("-e", f".[{CLIENTS}]", *group("tests"))
    # Without services a third of the code is not covered. That is not a failure where no service can be started.
    enough = ["--cov-fail-under=97"] if os.environ.get("DIATOR_REQUIRE_BACKENDS") else []
    environment = {**BUSY, **images(session, *SERVICES)}
    session.run("pytest", *AT_ONCE, *SLOWEST, "--cov", *enough, *session.posargs, env=environment)


@nox.session
def mutation(session: nox.Session) -> None:
    """
    Find what no unit test notices: `nox -s mutation -- FILE… [--minutes N]`, such as `retrying codec`.

    It takes minutes for each file, so neither `nox` nor CI runs this session. See `tests/mutation.py`.
    """
    session.install("-e", f".[{CLIENTS}]", *group("mutation"))
    session.run("python", "tests/mutation.py", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure the numbers of the documentation on this machine."""
    session.install(f".[{CLIENTS}]", *group("bench"))  # they install the compared libraries themselves
    session.run("python", "-m", "benchmarks", *session.posargs, env=images(session, *SERVICES))


@nox.session
def benchmarks_smoke(session: nox.Session) -> None:
    """Run each benchmark once, tiny: it works, and all messages arrive. Nothing is measured."""
    session.install("-e", f".[{CLIENTS}]", *group("tests"))  # `tests.services`, and the clients
    session.run("python", "-m", "benchmarks", "--smoke")
    services = images(session, *SERVICES)
    session.run("python", "-m", "benchmarks", "brokers", "--smoke", env=services)
    session.run("python", "-m", "benchmarks", "hostile", "--smoke", env=services)
    session.run("python", "-m", "benchmarks", "skew", "--smoke", env=services)
    session.run("python", "-m", "benchmarks", "telemetry", "--smoke", env=services)
    session.run("python", "-m", "benchmarks", "outbox", "--smoke", env=services)


@nox.session
def newest(session: nox.Session) -> None:
    """
    Test with the newest client libraries, without our ceilings.

    The outcome depends on the day, so neither `nox` nor CI runs this session.
    """
    session.install("-e", f".[{CLIENTS}]", *group("tests"))
    session.install("--upgrade", *unbounded(*PROJECT["project"]["optional-dependencies"]))
    session.run("python", "-m", "pip", "list")
    environment = {**BUSY, **images(session, *SERVICES)}
    session.run("pytest", "tests/unit", *AT_ONCE)
    longer = "not conformance and not saboteurs and not kills and not writing_a_transport"
    session.run("pytest", "tests/integration", *AT_ONCE, "-k", longer, *session.posargs, env=environment)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel and the sdist, and run a program with the wheel alone, outside of the checkout."""
    session.install("build", "twine")
    dist = built(session)
    session.run("twine", "check", "--strict", *map(str, dist.iterdir()))
    with tempfile.TemporaryDirectory() as elsewhere:
        session.run("python", "-m", "venv", f"{elsewhere}/venv")
        python = f"{elsewhere}/venv/bin/python"
        (wheel,) = dist.glob("*.whl")
        session.run(python, "-m", "pip", "install", "--quiet", str(wheel), external=True)
        shutil.copy(ROOT / "examples" / "meetings.py", elsewhere)
        with session.chdir(elsewhere):
            session.run(python, "meetings.py", external=True)


@nox.session
@nox.parametrize("example", ["third-party-transport", "nats-transport"])
def third_party(session: nox.Session, example: str) -> None:
    """Test a third-party transport with the conformance suite, with wheels alone, outside of the checkout."""
    session.install("build", *group("tests"))  # `tests/services.py` runs in this environment
    (wheel,) = built(session).glob("*.whl")
    with tempfile.TemporaryDirectory() as elsewhere:
        folder = Path(shutil.copytree(ROOT / "examples" / example, f"{elsewhere}/example"))
        needs = nox.project.dependency_groups(nox.project.load_toml(folder / "pyproject.toml"), "tests")
        session.run("python", "-m", "venv", f"{elsewhere}/venv")
        python = f"{elsewhere}/venv/bin/python"
        session.run(python, "-m", "pip", "install", "--quiet", f"{wheel}[testing]", folder, *needs, external=True)
        for package in folder.glob("diator_*"):
            shutil.rmtree(package)  # so that the installed package is tested
        with session.chdir(folder):
            run, environment = [python, "-m", "pytest", *session.posargs], {**BUSY, "PYTHONPATH": None}
            if example == "third-party-transport":  # the server of the other one is a wheel among its needs
                run = ["python", ROOT / "tests" / "services.py", "postgres", "--", *run]
                environment |= images(session, "postgres")
            session.run(*run, env=environment, external=True)


def built(session: nox.Session) -> Path:
    """Build the wheel and the sdist, and return their folder."""
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    return dist


def group(name: str) -> tuple[str, ...]:
    """Return the requirements of a dependency group."""
    return nox.project.dependency_groups(PROJECT, name)


def unbounded(*extras: str) -> list[str]:
    """Return the names of the requirements of *extras*, without versions."""
    wanted = [requirement for extra in extras for requirement in PROJECT["project"]["optional-dependencies"][extra]]
    return [re.match(r"[\w.-]+(\[[\w,-]+\])?", requirement)[0] for requirement in wanted]


def images(session: nox.Session, *services: str) -> dict[str, str]:
    """
    Return environment variables that name images for *services*.

    Services that the environment names already are left out. For the others: the public images if they can be pulled;
    otherwise, on a Debian machine, images that are built from packages; otherwise nothing, and the tests report it.
    """
    wanted = {
        name: image
        for name, (address, image) in SERVICES.items()
        if name in services and not {address, f"DIATOR_{name.upper()}_IMAGE"} & os.environ.keys()
    }
    # If we have built images before, the public ones were not available.
    built = docker("image", "inspect", "localhost/diator/debian:trixie")
    if not wanted or (not built and docker("info") and all(map(at_hand, wanted.values()))):
        return {}
    if os.geteuid() == 0 and Path("/etc/debian_version").exists():
        command = [ROOT / "containers" / "up", *wanted]
        up = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if up.returncode == 0:
            return dict(word.split("=", 1) for word in shlex.split(up.stdout) if "=" in word)
    session.warn(f"no images for {', '.join(wanted)}: see CONTRIBUTING.md")
    return {}


def at_hand(image: str) -> bool:
    """Return whether a public image is present, or can be pulled."""
    return docker("image", "inspect", image) or docker("pull", image)


def docker(*arguments: str) -> bool:
    """Return whether a container engine runs the command successfully."""
    if not shutil.which("docker"):
        return False
    return not subprocess.run(["docker", *arguments], check=False, capture_output=True).returncode
