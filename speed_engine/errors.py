"""A user's mistake is told in one sentence, with exit code 2 and no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


def told_in_one_sentence(action: Callable[[], int]) -> int:
    """Run `action`; ValueError and OSError are what a user can mend, everything else is our bug and
    keeps its traceback. Of many processes the first one speaks plainly."""
    from speed_kernels.build import BuildError
    from speed_kernels.contract import BackendError

    try:
        return action()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, BackendError, BuildError) as error:
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        who = "error" if rank == "0" else f"error (process {rank})"
        print(f"{who}: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
