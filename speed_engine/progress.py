"""What a terminal is told: the one progress bar (what is done of how much, the time left), and lines that fit."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


WIDTH = 100  # columns of a terminal
COPIED = (
    "python -m ",
    "deepspeed ",
    "torchrun ",
)  # how a line begins that is a command to be typed


def wrapped(text: str, indent: str = "    ") -> str:
    """`text` in lines of at most WIDTH columns, broken between words; those after the first begin with `indent`.

    A word that is longer (a path, a command's argument) stays whole, since it is there to be copied; so do `a = b` and
    a line that is a command.
    """
    return "\n".join(
        line
        if line.lstrip().startswith(COPIED)
        else textwrap.fill(
            line.replace(" = ", "\0=\0"),
            WIDTH,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
            drop_whitespace=True,
        )
        for line in text.split("\n")
    ).replace("\0=\0", " = ")


def for_reader(text: str, stream: TextIO) -> str:
    """`text` in lines that fit where a person reads along; whole in a file or a pipe, which programs search by line."""
    return wrapped(text) if stream.isatty() else text


@dataclass(frozen=True)
class Progress:
    """A running bar; a silent one does nothing."""

    bar: Any = None

    def at(self, done: int) -> None:
        """`done` units are done."""
        if self.bar is not None:
            self.bar.update(0, completed=done)

    def further(self, amount: int) -> None:
        """`amount` more units are done."""
        if self.bar is not None:
            self.bar.advance(0, amount)

    def say(self, status: str) -> None:
        """A few words behind the bar."""
        if self.bar is not None:
            self.bar.update(0, status=status)


@contextmanager
def progress(
    label: str, total: int, done: int = 0, console: Console | None = None, show: bool = True
) -> Iterator[Progress]:
    """A bar while the block runs; gone afterwards. show: whether there is somebody to look at it."""
    if not show or total == 0:
        yield Progress()
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn(label),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[status]}"),
    )
    with rich.Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(label, total=total, completed=done, status="")
        yield Progress(bar)
