"""A user's mistake is told in one sentence, with exit code 2 and no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


class ToldElsewhere(ValueError):
    """A mistake that another process of the run tells of; this one ends quietly, with the same code."""


def told_in_one_sentence(action: Callable[[], int]) -> int:
    """Run `action`; ValueError and OSError are what a user can mend, everything else is our bug and
    keeps its traceback. Of many processes the first one speaks plainly."""
    try:
        return action()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ToldElsewhere:
        return BAD_INPUT
    except (ValueError, OSError) as error:
        return _say(str(error))
    except (MemoryError, RuntimeError) as error:
        from speed_kernels.build import BuildError  # here, for it takes torch's seconds
        from speed_kernels.contract import BackendError

        if isinstance(error, (BackendError, BuildError)):
            return _say(str(error))
        if not _is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [""])[0][:200]
        return _say(f"not enough memory ({first}); ask for smaller batches or a smaller model")


def _say(text: str) -> int:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    who = "error" if rank == "0" else f"error (process {rank})"
    print(f"{who}: {text}", file=sys.stderr, flush=True)
    return BAD_INPUT


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Python's and numpy's, or torch's on any device, which has no one class for it."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
