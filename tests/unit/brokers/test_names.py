"""Names and headers for services that allow only some characters or lengths."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diator.brokers.names import escaped, shortened, unescaped

UNSAFE = re.compile("[^A-Za-z0-9_]")
ANY = st.text(st.characters(exclude_categories=["Cs"]))


@given(ANY)
def test_what_is_escaped_is_safe_and_comes_back(text):
    name = escaped(text, UNSAFE, "=")

    assert re.fullmatch("(?:[A-Za-z0-9_]|=[0-9A-F]{2})*", name)
    assert unescaped(name, "=") == text


def test_each_byte_of_an_unsafe_character_has_two_digits():
    assert escaped("a-Å.\n", UNSAFE, "%") == "a%2D%C3%85%2E%0A"
    assert escaped("a-Å", UNSAFE, "-", "02x") == "a-2d-c3-85"
    assert escaped("plain_1", UNSAFE, "%") == "plain_1"
    with pytest.raises(UnicodeEncodeError):
        escaped("\ud800", UNSAFE, "%")


@pytest.mark.parametrize(
    ("text", "read"),
    [("%", "%"), ("%4", "%4"), ("%zz", "%zz"), ("%41%", "A%"), ("%c3%85", "Å"), ("%FF", "\N{REPLACEMENT CHARACTER}")],
)
def test_a_text_of_another_program_is_read_as_far_as_it_can(text, read):
    assert unescaped(text, "%") == read


@pytest.mark.parametrize("letter", ["a", "Å", "\N{PILE OF POO}"])
def test_a_long_name_is_shortened_to_its_beginning_and_a_hash(letter):
    fits = "x" * (60 - len(letter.encode())) + letter
    long, longer = fits + "y", fits + "z"

    assert shortened(fits, 60, "==") == fits
    assert shortened(long, 60, "==") != shortened(longer, 60, "==")
    for name in (long, longer, letter * 100):
        short = shortened(name, 60, "==")
        beginning, mark, digest = short.partition("==")
        assert name.startswith(beginning)
        assert (mark, len(digest)) == ("==", 40)
        assert 60 - len(letter.encode()) < len(short.encode()) <= 60
