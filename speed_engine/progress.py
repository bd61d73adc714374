"""The one progress bar: what is done of how much, and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


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
