"""Text for logs, for errors, and for the reasons of dead letters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diator._text import MAX_CHARACTERS, counted, explained, printable, without_credentials

#: `st.text()` has no surrogates; a sender's JSON can contain them all the same.
ANY_TEXT = st.text(st.characters(codec=None))


@given(ANY_TEXT)
def test_a_text_becomes_one_printable_line_that_can_be_encoded(text):
    shown = printable(text)

    assert shown.isprintable()
    assert len(shown) <= MAX_CHARACTERS
    shown.encode()
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("Anna, Œuvre, 東京, 🎉", "Anna, Œuvre, 東京, 🎉"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\x1b[2J\x00\x7f\x85", r"\x1b[2J\x00\x7f\x85"),
        ("\u2028\u202e", r"\u2028\u202e"),
        ("\ud800", r"\ud800"),
    ],
    ids=ascii,
)
def test_what_is_not_printable_is_escaped(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("character", ["x", "\n", "\ud800"], ids=ascii)
def test_a_long_text_is_cut_visibly(character):
    assert printable("x" * MAX_CHARACTERS) == "x" * MAX_CHARACTERS

    cut = printable(character * 1_000_000)

    assert len(cut) == MAX_CHARACTERS
    assert cut.endswith("…")


class KafkaConnectionError(Exception):
    def __str__(self):
        return f"KafkaConnectionError: {self.args[0]}"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("a\n  b"), "ValueError: a b"),
        (ConnectionResetError(), "ConnectionResetError"),
        (TimeoutError(), "no answer in time"),
        (TimeoutError("too late"), "TimeoutError: too late"),
        (KafkaConnectionError("no node"), "KafkaConnectionError: no node"),
        (ExceptionGroup("unhandled", [ExceptionGroup("", [OSError("refused")])]), "OSError: refused"),
        (ValueError("cannot read amqp://user:pass@word@host/"), "ValueError: cannot read amqp://host/"),
    ],
)
def test_an_error_is_explained_in_one_line(error, text):
    assert explained(error) == text


def test_a_time_limit_is_named():
    assert explained(TimeoutError(), within=2.5) == "no answer within 2.5 s"


@pytest.mark.parametrize(
    "text",
    [
        "redis://:secret@h",
        "amqp://u:secret@h/,amqp://u:secret@h",
        "amqp://u:se:cret@h/v and //u:secret@h",
        "amqp://u:12/secret@h/v",
        "amqp://u:12//se@/cret@h/v",
    ],
)
def test_no_credentials_of_any_url_are_shown(text):
    assert "cret" not in without_credentials(text)
    assert "h" in without_credentials(text)


def test_every_address_of_several_is_shown():
    assert without_credentials("amqp://u:p/p@a/,amqp://u:p@b/ or //c/d") == "amqp://a/,amqp://b/ or //c/d"


@pytest.mark.parametrize(
    ("count", "nouns", "text"),
    [
        (0, ("message",), "0 messages"),
        (1, ("message",), "1 message"),
        (2, ("message",), "2 messages"),
        (1234, ("message",), "1,234 messages"),
        (1, ("delivery was", "deliveries were"), "1 delivery was"),
        (2, ("delivery was", "deliveries were"), "2 deliveries were"),
    ],
)
def test_a_count_has_its_noun(count, nouns, text):
    assert counted(count, *nouns) == text
