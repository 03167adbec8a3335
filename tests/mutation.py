"""
Find the lines that could be wrong without a unit test noticing it, in the files that decide about messages.

``python tests/mutation.py retrying codec`` changes these files in a copy of the checkout, one small change after the
other (mutmut makes them), and runs the unit tests of the file on each (``mutants.py`` does). A change that no test
notices has survived: write the test that was missing, or, if no program can tell the difference, add the changed lines
with the reason to ``tests/survivors.toml``: it is not tried any more. ``--minutes`` limits the time; what was tried by
then counts.
``nox -s mutation`` runs this.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from difflib import unified_diff
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

ROOT = Path(__file__).parents[1]
SURVIVORS = ROOT / "tests" / "survivors.toml"
#: What share of the changes that matter must be noticed.
ENOUGH = 0.95
#: Lines that no program sees: what is said to type checkers, the names of tasks, and what cannot happen. Another test
#: compares `__all__` with the documentation.
_INVISIBLE = [r"\b__all__\b", r"\bcast\(", r": TypeAlias =", r"\bTypeVar\(", r"\bcreate_task\(.*name=", r"^\s*assert "]

_OF_HANDLERS = ["test_mediator.py", "test_requests.py", "test_events.py", "test_emitter.py", "test_middlewares.py"]
#: What a consumer tells all that it calls, what an outbox and an inbox ask of everybody, and what constructors refuse.
_OF_ALL = [
    *("test_context.py", "test_headers.py", "test_instruments.py", "test_options.py"),
    *("outbox/test_emitting.py", "outbox/test_inbox.py"),
]
_OF_EMITTER = [
    *("test_emitter.py", "test_mediator.py", "test_outgoing.py", "test_events.py", "test_models.py"),
    *("brokers/test_codec_chosen.py", *_OF_ALL),
]
_OF_MEDIATOR = [
    *("test_mediator.py", "test_middlewares.py", *_OF_ALL),
    *("container/test_builtin.py", "container/test_contract.py", "brokers/test_codec_chosen.py"),
]
_OF_CONSUMER = ["consumer", "test_awkward_errors.py", "test_signals.py", "brokers/test_codec_chosen.py", *_OF_ALL]

#: The files, each with the unit tests that have to notice a change of it.
FILES = {
    "diator/_dispatcher.py": [*_OF_MEDIATOR, "test_only_for.py"],
    "diator/_handlers.py": [*_OF_HANDLERS, *_OF_ALL, "test_awkward_errors.py", "container"],
    "diator/_handling.py": _OF_CONSUMER,
    "diator/_running.py": _OF_CONSUMER,
    "diator/brokers/batching.py": ["brokers/test_batching.py"],
    "diator/brokers/capabilities.py": ["brokers/test_capabilities.py"],
    "diator/brokers/codec.py": [
        *("brokers/test_codec.py", "brokers/test_codec_chosen.py", "brokers/test_codec_foreign.py"),
        *("brokers/test_payloads.py", "brokers/test_payloads_peculiar.py", "brokers/test_message.py", "test_models.py"),
    ],
    "diator/brokers/kafka/_offsets.py": ["brokers/test_kafka_offsets.py"],
    "diator/brokers/memory.py": [
        *("brokers/test_memory.py", "brokers/test_memory_subscription.py", "brokers/test_memory_loops.py"),
        *("brokers/test_codec_chosen.py", "test_options.py"),
    ],
    "diator/brokers/settling.py": ["brokers/test_settling.py"],
    "diator/brokers/supervisor.py": ["brokers/test_supervisor.py", "brokers/test_connecting.py", "test_options.py"],
    "diator/consumer.py": [*_OF_CONSUMER, "test_only_for.py"],
    "diator/container/base.py": [
        *("container", "test_mediator.py", "test_awkward_errors.py"),
    ],
    "diator/container/_builtin.py": [
        "test_mediator.py",
        "container/test_builtin.py",
        "container/test_contract.py",
        "container/test_factories.py",
    ],
    "diator/events/_emitter.py": [*_OF_EMITTER, "test_awkward_errors.py", "brokers/test_codec_chosen.py"],
    "diator/mediator.py": _OF_MEDIATOR,
    "diator/retrying.py": ["test_retrying.py", "test_options.py"],
}


def main() -> None:
    """Try the files of the command line, and print what survived."""
    parser = argparse.ArgumentParser(prog="nox -s mutation --")
    known = {Path(file).stem.lstrip("_"): file for file in FILES}
    parser.add_argument("files", nargs="+", metavar="FILE", choices=[*known, *FILES], help=", ".join(known))
    parser.add_argument("--minutes", type=float, default=30, help="how long it may take for each file (default: 30)")
    parser.add_argument("--jobs", type=int, default=1, help="how many changes to try at once (default: 1)")
    parser.add_argument("--only", default="*", help="a pattern: try the changes whose names match, such as '*_watch*'")
    arguments = parser.parse_args()
    rates = [tried(known.get(file, file), arguments) for file in arguments.files]
    sys.exit(not all(rate >= ENOUGH for rate in rates))


def tried(file: str, arguments: argparse.Namespace) -> float:
    """Change *file* again and again, print the survivors, and return the share that was noticed."""
    until = monotonic() + 60 * arguments.minutes
    with SURVIVORS.open("rb") as listed:
        reasons = tomllib.load(listed).get(file, {})
    with TemporaryDirectory(prefix="diator-mutation-") as name_of_folder:
        folder = Path(name_of_folder)
        copy_checkout(file, folder)
        inside, outside = changes_inside(file, folder), changes_outside(file, folder)
        changes = inside | {name: change for name, (_, change) in outside.items()}
        named = {name: change for name, change in changes.items() if fnmatch(name, arguments.only)}
        left = {name: change for name, change in named.items() if not keys(name, change) & reasons.keys()}
        noticed = mutate(file, folder, [name for name in left if name in inside], arguments)
        variants = {name: outside[name][0] for name in left if name in outside}
        noticed |= mutate_outside(file, folder, variants, until)
    done = [name for name, is_noticed in noticed.items() if is_noticed is not None]
    survivors = [name for name in done if not noticed[name]]
    for name in survivors:
        print(f"{name}\n{left[name]}")
    for reason in reasons.keys() - {key for change in changes.items() for key in keys(*change)}:
        print(f"a reason of no change any more: {reason}")
    rate = 1 - len(survivors) / len(done) if done else 0.0
    print(
        f"{file}: {rate:.1%} noticed; {len(done)} of {len(left)} changes tried, {len(survivors)} survived; "
        f"{len(named) - len(left)} others have a reason",
        flush=True,
    )
    return rate


#: Makes the changes, all of them in one copy of the file: the one whose name is in the environment has an effect.
_CHANGE = """
from mutmut import __main__ as mutmut
mutmut.set_mutant_under_test("mutant_generation")
mutmut.copy_src_dir()
mutmut.copy_also_copy_files()
mutmut.create_mutants(1)
"""


def changes_inside(file: str, folder: Path) -> dict[str, str]:
    """Return the changes of the functions of *file*, which are then in the copy of the checkout in *folder*."""
    subprocess.run([sys.executable, "-c", _CHANGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    made = json.loads((folder / "mutants" / f"{file}.meta").read_text())
    return differences(file, folder, [*made["exit_code_by_key"]])


def mutate(file: str, folder: Path, names: list[str], arguments: argparse.Namespace) -> dict[str, bool | None]:
    """Try the changes of these *names*. Return whether a test noticed each of them; None if it was not tried."""
    mutants, found = folder / "names.json", folder / "outcomes.json"
    mutants.write_text(json.dumps(names))
    options = ["-q", "-s", "-p", "tests.mutants", "-p", "no:cacheprovider"]
    environment = {"PYTHONPATH": ".", "MUTANTS": str(mutants), "OUTCOMES": str(found)}
    environment |= {"MINUTES": str(arguments.minutes), "JOBS": str(arguments.jobs)}
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests_of(file)],
        cwd=folder / "mutants",
        env=os.environ | environment,
        check=False,
    )
    return json.loads(found.read_text()) if found.exists() else {}


#: Prints the changes of a file that are outside of its functions: mutmut makes them, and cannot try them.
_OUTSIDE = """
import json, sys
from mutmut.mutation.file_mutation import create_mutations
module, changes, *_ = create_mutations(sys.argv[1], open(sys.argv[1]).read())
outside = [each for each in changes if each.contained_by_top_level_function is None]
print(json.dumps([module.deep_replace(each.original_node, each.mutated_node).code for each in outside]))
"""


def changes_outside(file: str, folder: Path) -> dict[str, tuple[str, str]]:
    """Return the changes of the constants and tables of *file*: the changed file, and the change."""
    original, changes = (folder / file).read_text(), dict[str, tuple[str, str]]()
    make = [sys.executable, "-c", _OUTSIDE, file]
    made = subprocess.run(make, cwd=folder, check=True, capture_output=True, text=True)
    for number, variant in enumerate(json.loads(made.stdout), 1):
        lines = [*unified_diff(original.splitlines(), variant.splitlines(), n=0, lineterm="")][2:]
        change = "\n".join(line for line in lines if line.startswith(("-", "+")))
        if not any(re.search(each, change) for each in _INVISIBLE):
            changes[f"{file[:-3].replace('/', '.')}.outside__mutmut_{number}"] = variant, change
    return changes


def mutate_outside(file: str, folder: Path, variants: dict[str, str], until: float) -> dict[str, bool | None]:
    """Try each of *variants* of *file*. Return whether a test noticed it; None if it was not tried."""
    outcomes = dict[str, bool | None].fromkeys(variants)
    run = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests_of(file)]
    for name, variant in variants.items():
        if monotonic() < until:
            (folder / file).write_text(variant)
            outcomes[name] = subprocess.run(run, cwd=folder, check=False, capture_output=True).returncode != 0
            sys.stderr.write("." if outcomes[name] else "S")
    return outcomes


def tests_of(file: str) -> list[str]:
    """Return the tests of *file*, without those that measure it: what mutmut puts around each function takes time."""
    return [f"tests/unit/{name}" for name in FILES[file]]


def copy_checkout(file: str, folder: Path) -> None:
    """Copy what git tracks to *folder*, with the settings that mutmut needs for *file*."""
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / file).write_text(undecorated((ROOT / file).read_text()))
    beside = sorted(each.name for each in folder.iterdir() if each.name not in {"diator", "tests", "pyproject.toml"})
    settings = {
        "source_paths": ["diator"],
        "only_mutate": [file],
        "also_copy": beside,
        "do_not_mutate_patterns": _INVISIBLE,
        "use_git_change_detection": False,
    }
    with (folder / "pyproject.toml").open("a") as project:
        project.write("\n[tool.mutmut]\n")
        project.writelines(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


def undecorated(source: str) -> str:
    """Decorate properties and context managers after their definition: mutmut passes over whatever has a decorator."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [each.id for each in node.decorator_list if isinstance(each, ast.Name)]
            if names in (["property"], ["contextmanager"], ["asynccontextmanager"]):
                lines[node.decorator_list[0].lineno - 1] = ""
                lines[node.end_lineno - 1] += f"\n{' ' * node.col_offset}{node.name} = {names[0]}({node.name})"
    return "\n".join(lines) + "\n"


def keys(name: str, diff: str) -> set[str]:
    """
    Return the keys that a change can have in `survivors.toml`: what it has made of its lines, or which it has removed.

    The name of the function may stand before that, if the same change elsewhere is another matter.
    """
    lines = diff.splitlines()
    made = [line[1:].strip() for line in lines if line.startswith("+")]
    key = " ".join(made) or "without " + " ".join(line[1:].strip() for line in lines)
    function = re.split(r"ǁ|\.x_", name.rpartition("__mutmut_")[0])[-1]
    return {key, f"{function}: {key}"}


#: Prints each name of the command line with its change. One process for each name would take a second.
_SHOW = """
import json, sys
from mutmut.mutation.diff_apply import get_diff_for_mutant
print(json.dumps({name: get_diff_for_mutant(name, path=sys.argv[1]) for name in sys.argv[2:]}))
"""


def differences(file: str, folder: Path, names: list[str]) -> dict[str, str]:
    """Return the lines that mutmut has removed from *file* and added, for each of its changes of these *names*."""
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW, file, *names], cwd=folder, check=True, capture_output=True, text=True
    )
    return {
        name: "\n".join(line for line in diff.partition("@@")[2].splitlines() if line.startswith(("-", "+")))
        for name, diff in json.loads(shown.stdout).items()
    }


if __name__ == "__main__":
    main()
