"""`python -m speed_engine COMMAND`: everything but the multi-process launch of training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from speed_engine import commands
from speed_engine.errors import told_in_one_sentence

Run = Callable[[argparse.Namespace], int]
Arguments = Callable[[argparse.ArgumentParser], None]


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from speed_engine.train import add_arguments

    add_arguments(parser)


def _train(args: argparse.Namespace) -> int:
    from speed_engine.train import run

    return run(args)


def _encode_arguments(parser: argparse.ArgumentParser) -> None:
    from speed_engine.data.encode import add_arguments

    add_arguments(parser)


def _encode(args: argparse.Namespace) -> int:
    from speed_engine.data.encode import run

    return run(args)


COMMANDS: dict[str, tuple[str, Arguments, Run]] = {
    "doctor": (
        "what is here, which kernel will run, and why",
        commands.doctor_arguments,
        commands.doctor,
    ),
    "plan": (
        "the resolved configuration, its FLOPs and memory; starts nothing",
        commands.config_arguments,
        commands.plan,
    ),
    "table": (
        "the step table: noise, density, weight and area of every step",
        commands.table_arguments,
        commands.table,
    ),
    "encode": ("images -> WebDataset shards with an index", _encode_arguments, _encode),
    "train": (
        "train in one process (for many: deepspeed speed_engine/train.py)",
        _train_arguments,
        _train,
    ),
    "sample": (
        "pictures from a run's averaged weights",
        commands.sample_arguments,
        commands.sample,
    ),
    "score": ("how good a folder of samples is", commands.score_arguments, commands.score),
    "plot": ("the pictures of a run", commands.plot_arguments, commands.plot),
    "summary": (
        "one page on a run, and summary.json",
        commands.summary_arguments,
        commands.summary,
    ),
    "export": (
        "weights as safetensors or as a diffusers folder",
        commands.export_arguments,
        commands.export,
    ),
    "import": (
        "a public DiT checkpoint or diffusers folder as our safetensors",
        commands.import_arguments,
        commands.import_weights,
    ),
}


def main() -> int:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(prog="python -m speed_engine")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, _) in COMMANDS.items():
        add_arguments(subparsers.add_parser(name, help=text, description=text))
    args = commands.parse(parser)
    return told_in_one_sentence(lambda: COMMANDS[args.command][2](args))


if __name__ == "__main__":
    sys.exit(main())
