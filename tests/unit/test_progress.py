"""Lines that fit a terminal."""

from __future__ import annotations

import pytest

from speed_engine.progress import WIDTH, wrapped
from speed_engine.reports import keys


def test_words_stay_whole_and_in_order() -> None:
    text = " ".join(f"word{number}" for number in range(100))
    lines = wrapped(text).split("\n")
    assert len(lines) > 5 and max(map(len, lines)) <= WIDTH
    assert all(line.startswith("    word") for line in lines[1:])
    assert " ".join("\n".join(lines).split()) == text


def test_what_fits_is_left_as_it_is() -> None:
    text = "name      value\n\n  indented   " + "x" * 80
    assert wrapped(text) == text


@pytest.mark.parametrize("word", ["/a/very/long" * 12, "train.some-key=" + "9-" * 80])
def test_what_is_there_to_be_copied_is_not_broken(word: str) -> None:
    assert word in wrapped(f"the set is in {word} now").split()


def test_an_equation_is_not_torn() -> None:
    classes = [f"{number} = class{number} (60)" for number in range(40)]
    text = wrapped("40 classes: " + ", ".join(classes))
    assert "\0" not in text and all(f"{number} = class{number}" in text for number in range(40))


def test_the_page_of_keys_fits() -> None:
    assert max(map(len, keys.as_text(keys.groups()).split("\n"))) <= WIDTH
