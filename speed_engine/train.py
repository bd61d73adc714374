"""What `deepspeed speed_engine/train.py` runs: mend sys.path, read the arguments, train."""

import os
import sys

# Run as a script, this file's folder is sys.path[0], where its modules would shadow other packages.
_HERE = os.path.dirname(os.path.realpath(__file__))
if sys.path and os.path.realpath(sys.path[0]) == _HERE:
    sys.path[0:1] = [os.path.dirname(_HERE), os.path.join(os.path.dirname(_HERE), "kernels")]
    sys.path.append(
        os.getcwd()
    )  # last: a user's own module (`my_lab.mine`) is found, and hides none

import argparse  # noqa: E402
import contextlib  # noqa: E402

EXIT_CODES = """SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1, to any process, save a checkpoint and end; so does the
launcher's death; a second Ctrl-C ends at once. Exit codes: 0 done, or saved on request; 2 a mistake, told in one
sentence; 3 gradients not finite for too long; 4 another process is gone or frozen, or a request could not be answered;
5 a gradient computed again (train.replay_every) was not the same bits; 75 saved after SIGUSR1 and unfinished: start the
same command again; 128+N ended by signal N before the first step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training."""
    parser.epilog = EXIT_CODES
    parser.add_argument("--config", required=True, help="a preset's name, or a YAML file")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="same as engine.json_file=JSON")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run(arguments: argparse.Namespace) -> int:
    """Train; a user's mistake becomes one sentence and exit code 2."""
    from speed_engine.config import ConfigError, load
    from speed_engine.errors import SaidElsewhere
    from speed_engine.reports.scores import judge_of
    from speed_engine.training.loop import train

    if arguments.local_rank is not None and "RANK" in os.environ:  # alone it says nothing
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    overrides = list(arguments.overrides)
    if arguments.deepspeed_config:
        overrides.append(f"engine.json_file={arguments.deepspeed_config}")
    try:
        config = load(arguments.config, overrides)
    except ConfigError as error:
        neighbour = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        if neighbour != "0":  # of this machine the first process tells: the files are the same
            raise SaidElsewhere(str(error)) from error
        raise
    return train(config, judge_of(config.data.kind))


def main() -> int:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a diffusion model.")
    add_arguments(parser)
    from speed_engine.commands import parse
    from speed_engine.errors import told_in_one_sentence

    arguments = parse(parser)
    return told_in_one_sentence(lambda: run(arguments))


if __name__ == "__main__":
    exit_code = main()
    # Everything is closed by now. In a few of about a hundred runs of two processes the interpreter's
    # own end aborted ("terminate called without an active exception"; cause not found), which would
    # turn a finished run into a failed one.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # the terminal is gone, or never was
            stream.flush()
    os._exit(exit_code)
