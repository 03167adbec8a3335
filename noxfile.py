"""
The one door: what people and CI run. ``nox -l`` lists it.

``lint``, ``types``, ``unit`` and ``build`` need nothing but Python; ``integration`` and ``tests``
get their services themselves where they can, and say in their last lines what they went without.
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

#: How pytest shares out tests with services: nearly all of their time they wait, so more processes than cores.
AT_ONCE = ("-n", os.environ.get("DIATOR_TEST_PROCESSES", "6"))
#: What the conformance suite multiplies its deadlines by while other tests run beside it.
BUSY = {"DIATOR_CONFORMANCE_SCALE": os.environ.get("DIATOR_CONFORMANCE_SCALE", "3")}
#: What a run shows of its slowest tests.
SLOWEST = ("--durations=15", "--durations-min=1")

#: The services of the tests: where the address of each may stand, and its public image.
SERVICES = {
    "redis": ("DIATOR_TEST_REDIS_URL", "redis:8"),
    "rabbitmq": ("DIATOR_TEST_RABBITMQ_URL", "rabbitmq:4-management"),
    "kafka": ("DIATOR_TEST_KAFKA_SERVERS", "apache/kafka:4.3.1"),
    "postgres": ("DIATOR_TEST_POSTGRES_URL", "postgres:17"),
}


@nox.session
def lint(session: nox.Session) -> None:
    """Style and spelling."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    """Both type checkers on the library and on its use; every public name has a type."""
    session.install("-e", f".[{CLIENTS}]", *group("types"))
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "diator", "--ignoreexternal")


@nox.session(python=PYTHONS)
@nox.parametrize("extras", ["without", "with"])
def unit(session: nox.Session, extras: str) -> None:
    """What needs no service; without extras it proves that the core loads no client library."""
    if extras == "with":
        session.install("-e", f".[{CLIENTS}]", *group("tests"))
    else:
        session.install("-e", ".", *group("unit"))
    session.run("pytest", "tests/unit", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """What needs services; without arguments, the reports and the matrix are made anew, too."""
    session.install("-e", f".[{CLIENTS}]", *group("tests"))
    environment = {**BUSY, **images(session, *SERVICES)}
    if not session.posargs:
        session.run("python", "-m", "tests.integration.publish", env=environment)
    session.run("pytest", "tests/integration", *AT_ONCE, *SLOWEST, *session.posargs, env=environment)


@nox.session
def conformance(session: nox.Session) -> None:
    """The reports and the matrix of the documentation, made anew; after `--` the names of transports."""
    session.install("-e", f".[{CLIENTS}]", *group("tests"))
    session.run("python", "-m", "tests.integration.publish", *session.posargs, env=images(session, *SERVICES))


@nox.session
def tests(session: nox.Session) -> None:
    """Everything in one run: unit, integration, documentation; with coverage."""
    session.install("-e", f".[{CLIENTS}]", *group("tests"))
    # Without services a third of the code is not covered. That is not a failure where no service can be started.
    enough = ["--cov-fail-under=97"] if os.environ.get("DIATOR_REQUIRE_BACKENDS") else []
    environment = {**BUSY, **images(session, *SERVICES)}
    session.run("pytest", *AT_ONCE, *SLOWEST, "--cov", *enough, *session.posargs, env=environment)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """The numbers of the documentation, measured here."""
    session.install(f".[{CLIENTS}]", *group("bench"))  # the libraries they compare with they install themselves
    session.run("python", "-m", "benchmarks", *session.posargs, env=images(session, *SERVICES))


@nox.session
def benchmarks_smoke(session: nox.Session) -> None:
    """Every benchmark once and tiny: that it works, and that all messages arrive; nothing is measured."""
    session.install("-e", f".[{CLIENTS}]", *group("tests"))  # our services, and what the transports are measured with
    session.run("python", "-m", "benchmarks", "--smoke")
    session.run("python", "-m", "benchmarks", "brokers", "--smoke", env=images(session, "redis", "rabbitmq", "kafka"))


@nox.session
def newest(session: nox.Session) -> None:
    """
    The newest client libraries, whatever versions we allow: what the next release of each will bring.

    Its outcome depends on the day, so that neither `nox` nor CI runs it by itself.
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
    """The wheel and the sdist; a program runs with the wheel alone, far from the checkout."""
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
def third_party(session: nox.Session) -> None:
    """A transport of somebody else's and the suite that proves it, with wheels alone, far from the checkout."""
    session.install("build", *group("tests"))  # it is here that the service is looked for
    (wheel,) = built(session).glob("*.whl")
    with tempfile.TemporaryDirectory() as elsewhere:
        example = Path(shutil.copytree(ROOT / "examples" / "third-party-transport", f"{elsewhere}/example"))
        needs = nox.project.dependency_groups(nox.project.load_toml(example / "pyproject.toml"), "tests")
        session.run("python", "-m", "venv", f"{elsewhere}/venv")
        python = f"{elsewhere}/venv/bin/python"
        session.run(python, "-m", "pip", "install", "--quiet", f"{wheel}[testing]", example, *needs, external=True)
        shutil.rmtree(example / "diator_postgres")  # what is tested is what was installed
        with session.chdir(example):
            with_postgres = ["python", ROOT / "tests" / "services.py", "postgres", "--"]
            environment = {**images(session, "postgres"), "PYTHONPATH": None}
            session.run(*with_postgres, python, "-m", "pytest", *session.posargs, env=environment)


def built(session: nox.Session) -> Path:
    """Where the wheel and the sdist are, built now."""
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    return dist


def group(name: str) -> tuple[str, ...]:
    """The requirements of a dependency group."""
    return nox.project.dependency_groups(PROJECT, name)


def unbounded(*extras: str) -> list[str]:
    """The names of the requirements of *extras*, without versions."""
    wanted = [requirement for extra in extras for requirement in PROJECT["project"]["optional-dependencies"][extra]]
    return [re.match(r"[\w.-]+(\[[\w,-]+\])?", requirement)[0] for requirement in wanted]


def images(session: nox.Session, *services: str) -> dict[str, str]:
    """
    Environment that names images for *services*.

    What the caller's environment names is taken as it is. For the rest: the public images, where
    they can be had; else, on a Debian machine, our own, built from packages; else nothing, and the
    tests say so.
    """
    wanted = {
        name: image
        for name, (address, image) in SERVICES.items()
        if name in services and not {address, f"DIATOR_{name.upper()}_IMAGE"} & os.environ.keys()
    }
    # Where we have built images before, there were none to be had.
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
    """Whether a public image is here, or can be pulled."""
    return docker("image", "inspect", image) or docker("pull", image)


def docker(*arguments: str) -> bool:
    """Whether a container engine is there and does as it is told."""
    if not shutil.which("docker"):
        return False
    return not subprocess.run(["docker", *arguments], check=False, capture_output=True).returncode
