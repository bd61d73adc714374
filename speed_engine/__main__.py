"""`python -m speed_engine COMMAND`: everything but the multi-process launch of training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from speed_engine.complaint import told_in_one_sentence

# Each command: name, one line of help, the function that adds its arguments, the function that runs it. Commands
# import what they need when they run, so that `--help` and small commands start at once.


def _config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--config", default=default, required=default is None, help="a preset's name or a YAML file"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _doctor(args: argparse.Namespace) -> int:
    from speed_engine.doctor import run

    return run(args.json)


def _plan(args: argparse.Namespace) -> int:
    from speed_engine.config import load
    from speed_engine.plan import run

    return run(load(args.config, args.overrides))


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    from speed_engine.commands_table import add_arguments

    _config_arguments(parser, default="imagenet256_dit_xl2")
    add_arguments(parser)


def _table(args: argparse.Namespace) -> int:
    from speed_engine.commands_table import run

    return run(args)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from speed_engine.train import add_arguments

    add_arguments(parser)


def _train(args: argparse.Namespace) -> int:
    from speed_engine.train import run

    return run(args)


def _encode_arguments(parser: argparse.ArgumentParser) -> None:
    from speed_engine.encode import add_arguments

    add_arguments(parser)


def _encode(args: argparse.Namespace) -> int:
    from speed_engine.encode import run

    return run(args)


COMMANDS: dict[str, tuple[str, Callable[..., None], Callable[[argparse.Namespace], int]]] = {
    "doctor": ("what is here, which kernel will run, and why", _doctor_arguments, _doctor),
    "plan": ("resolved configuration, FLOPs, memory; starts nothing", _config_arguments, _plan),
    "table": ("the step table: density, weight and area of every step", _table_arguments, _table),
    "train": (
        "train in this process (many: deepspeed speed_engine/train.py)",
        _train_arguments,
        _train,
    ),
    "encode": ("images -> WebDataset shards with an index", _encode_arguments, _encode),
}


def main() -> int:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(prog="python -m speed_engine", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, description=text))
    args = parser.parse_intermixed_args() if False else parser.parse_args()
    return told_in_one_sentence(lambda: COMMANDS[args.command][2](args))


if __name__ == "__main__":
    sys.exit(main())
