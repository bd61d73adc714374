"""What libraries say while a command runs goes to a file; the terminal keeps our own lines, and one that tells where.

DeepSpeed, diffusers, transformers and torch log through handlers that they attach to themselves when they are imported,
which is in the middle of a run. So their records are taken where every record passes, in `Logger.callHandlers`, until
the command ends; Python's warnings likewise. Nothing is lost: what comes before there is a folder is held, and shown
where there never is one; an error that is not told in one sentence leaves its traceback in the file, too.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from speed_engine.progress import wrapped

# First words of the names of their loggers.
LIBRARIES = frozenset(
    ("DeepSpeed", "deepspeed", "diffusers", "huggingface_hub", "torch", "transformers", "triton")
)
OURS = str(Path(__file__).resolve().parents[1])
FORM = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(filename)s:%(lineno)d: %(message)s")


def file_of(folder: Path, rank: int) -> Path:
    """Where process `rank` writes: each has a file, since not every shared file system can append from many."""
    return folder / ("libraries.log" if rank == 0 else f"libraries.{rank}.log")


class LibraryLog:
    """The lines of one process. Until `into` they are held in memory."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.held: list[str] = []
        self.told = False
        self.path: Path | None = None
        self.say: Callable[[str], None] = _told

    def into(self, folder: Path, say: Callable[[str], None] | None = None) -> None:
        """From now on to a file of `folder`, which exists; with the first line a person is told where it is."""
        self.path, self.say = file_of(folder, self.rank), say or _told
        held, self.held = self.held, []
        for line in held:
            self.write(line)

    def write(self, line: str) -> None:
        """One more line, or several. Storage that refuses it must not end a training: it is shown instead."""
        if self.path is None:
            self.held.append(line)
            return
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line.rstrip("\n") + "\n")
        except OSError:
            _show(line)
            return
        if not self.told and self.rank == 0:
            self.told = True
            self.say(f"what libraries say is in {self.path}")

    def show(self) -> None:
        """To the terminal, what has found no folder."""
        for line in self.held:
            _show(line)
        self.held = []


@contextlib.contextmanager
def libraries_apart(rank: int) -> Iterator[LibraryLog]:
    """While the block runs, what libraries log and warn goes to the log that it is given.

    An error that `told_in_one_sentence` tells (ValueError, OSError) drops what is still held: it says what matters.
    """
    log = LibraryLog(rank)
    handlers, shown = logging.Logger.callHandlers, warnings.showwarning

    def call_handlers(self: logging.Logger, record: logging.LogRecord) -> None:
        if self.name.partition(".")[0] in LIBRARIES:
            log.write(FORM.format(record))
        else:
            handlers(self, record)

    def show_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any
    ) -> None:
        if filename.startswith(OURS) and category is UserWarning:  # ours, to be read
            shown(message, category, filename, lineno, *rest)
        else:
            log.write(warnings.formatwarning(message, category, filename, lineno))

    logging.Logger.callHandlers = call_handlers
    warnings.showwarning = show_warning
    try:
        yield log
    except (ValueError, OSError):
        log.held = []
        raise
    except Exception:
        if log.path is not None:
            log.write(traceback.format_exc())
        raise
    finally:
        logging.Logger.callHandlers, warnings.showwarning = handlers, shown
        log.show()


def _told(text: str) -> None:
    print(wrapped(text))


def _show(line: str) -> None:
    with contextlib.suppress(OSError):  # of an output that is gone
        print(line.rstrip("\n"), file=sys.stderr, flush=True)
