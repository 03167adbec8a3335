"""
The project uses the words of its field, so that a reader who searches for one finds the text.

The changelog is not checked: its table lists the older names.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: "It is no longer there" is plain English, and so is "there is no connection". "It is no error" is not.
COMPARED = r"(?:longer|later|earlier|slower|faster|larger|more|less|such)(?![a-z])"

#: A pattern of words, and what to write instead. A space also stands for the end of a line.
WORDS = {
    r"put(s|ting)? (\w+ ){0,2}aside|\baside, (with|and)": "dead-letter, dead-letter queue",
    r"crash-loops?|crash loops?": "poison message",
    r"killers?": "poison message",
    r"g(ive|ives|iven|ave|iving) (it |them |one |a message |messages |what \w+ )?back": "requeue, or return",
    r"handl(e|es|ed|ing) again": "retry",
    r"bears? a repeat": "be idempotent",
    r"repeats (of|carry|carries)|(a|each|every|the) repeat (of|carries)": "duplicate, redelivery",
    r"events? that travels?|what travels": "integration event",
    r"verdicts?": "send error, or result",
    r"rungs?": "delay bucket",
    r"shar(e|es|ed) anew": "rebalance",
    r"reads? ahead|read-ahead": "prefetch",
    r"is let|are let": "may, or is allowed to",
    r"mend(s|ed)?": "fix",
    r"nobody could tell": "it is ambiguous",
    r"in vain": "without success",
    r"cannot be told( apart)?": "cannot be distinguished",
    rf"(?<!there\s)(?<!there_)is no (?!{COMPARED})[a-z]\w*": "is not a",
    r"WiringError": "ConfigurationError, or UsageError",
    r"Patience": "ReconnectPolicy",
    r"Supervised": "ResilientSubscription",
    r"enlists?": "transactional",
    r"most_attempts": "max_attempts",
    r"own_verdict": "own_error",
    r"metadata_age": "metadata_max_age",
    r"brokers[./](shared|_listing|_kafka_\w+|_rabbitmq_\w+|_redis_\w+)": "the folders of the services",
}

#: The same for text that is published: the documentation, and the docstrings and errors of the library.
PUBLISHED_WORDS = {
    r"hear(s|d)?": "receive, notice",
    r"(is|are|be|been) told": "is reported, is raised, is logged",
    r"g(ive|ives|iven|ave) out": "hand out, deliver",
}
PUBLISHED = ("README.md", "CONTRIBUTING.md", "docs/", "diator/", "examples/", "benchmarks/README.md")

#: Terms that somebody searches for. The glossary explains each.
GLOSSARY = [
    "dead-letter",
    "prefetch",
    "requeue",
    "backoff",
    "idempotent",
    "consumer group",
    "rebalance",
    "poison message",
    "graceful shutdown",
]

FILES = sorted(
    path
    for pattern in (
        *("README.md", "CONTRIBUTING.md", "noxfile.py", "conftest.py", "diator_pytest.py", "docs/**/*.md"),
        *("diator/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "benchmarks/**/*.md"),
        *("examples/**/*.py", "examples/**/*.md"),
    )
    for path in ROOT.glob(pattern)
    if path.name not in ("test_words.py", "test_old_names.py")
)

#: White space, the end of a line and the start of the next line of a comment, or the underscore of an identifier.
GAP = r"(?:[ \t]+|_|[ \t]*\n[ \t]*(?:#:?[ \t]*)?)"
PATTERNS = {
    words: re.compile(
        rf"(?<![A-Za-z])(?:{words.replace(' ', GAP)})(?![A-Za-z])", re.IGNORECASE if words.islower() else 0
    )
    for words in WORDS | PUBLISHED_WORDS
}


def found_in(text: str, listed: Iterable[str] = WORDS) -> Iterator[tuple[str, int, str]]:
    """Yield each word of *text* that is *listed*: its pattern, its line, and the text around it."""
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    for words in listed:
        for match in PATTERNS[words].finditer(text):
            around = text[max(match.start() - 30, 0) : match.end() + 30]
            yield words, bisect_right(starts, match.start()), " ".join(around.split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_words_are_those_of_the_field(path):
    name = path.relative_to(ROOT).as_posix()
    listed = WORDS | PUBLISHED_WORDS if name.startswith(PUBLISHED) else WORDS

    found = [
        f"{name}:{line}: {around!r}; write: {listed[words]}"
        for words, line, around in found_in(path.read_text(encoding="utf-8"), listed)
    ]

    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize("text", ["it is put aside", "it is given\n    back", "# Put\n# aside", "is_put_aside"])
def test_a_word_is_found(text):
    assert len([*found_in(text)]) == 1


@pytest.mark.parametrize("text", ["it is no longer there", "amend it", "the queue is not a list"])
def test_other_words_are_not(text):
    assert not [*found_in(text)]


@pytest.mark.parametrize("term", GLOSSARY)
def test_the_glossary_explains(term):
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")

    assert re.search(rf"^\|? ?\W*{term}", glossary, re.MULTILINE | re.IGNORECASE), f"no entry for {term!r}"
