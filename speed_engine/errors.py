"""A user's mistake is told in one sentence, with exit code 2 and no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from speed_engine.progress import for_reader

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes
# What libraries raise where a user can mend it, by name: to import them takes seconds.
OF_LIBRARIES = {
    "SafetensorError": "a file of weights cannot be read or written",
    "DistNetworkError": "the processes do not reach each other",
    "DistStoreError": "the processes do not reach each other",
    "ZeRORuntimeException": "DeepSpeed refuses these settings (engine.json_file)",
    "DeepSpeedConfigError": "DeepSpeed refuses these settings (engine.json_file)",
}


class SaidElsewhere(ValueError):
    """This process ends because of a failure that another process tells: quietly, with the same code."""


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
    except SaidElsewhere:
        return BAD_INPUT
    except (ValueError, OSError) as error:
        return _say(str(error))
    except Exception as error:
        from speed_kernels.build import BuildError  # here, for it takes torch's seconds
        from speed_kernels.contract import BackendError

        if isinstance(error, (BackendError, BuildError)):
            return _say(str(error))
        kinds = [each.__name__ for each in type(error).__mro__]
        if told := [text for name, text in OF_LIBRARIES.items() if name in kinds]:
            return _say(f"{told[0]}: {' '.join(str(error).split())[:300]}")
        if not _is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [""])[0][:200]
        return _say(f"not enough memory ({first}); ask for smaller batches or a smaller model")


def rank_told() -> str:
    """What a launcher says of this process's number; "0" for one process alone."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def _say(text: str) -> int:
    rank = rank_told()
    who = "error" if rank == "0" else f"error (process {rank})"
    print(for_reader(f"{who}: {text}", sys.stderr), file=sys.stderr, flush=True)
    return BAD_INPUT


def _is_out_of_memory(error: Exception) -> bool:
    """Python's and numpy's, or torch's on any device, which has no one class for it."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return "out of memory" in text or "allocate memory" in text
