"""`python -m speed_engine COMMAND` (or `speed-engine COMMAND`): everything but the multi-process launch of training."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from speed_engine import __version__
from speed_engine.commands import parse
from speed_engine.errors import BAD_INPUT, rank_told, told_in_one_sentence
from speed_engine.progress import for_reader

COMMANDS = {
    "doctor": "what is here, which kernel will run, and why",
    "keys": "every key of a configuration: type, range, default, meaning",
    "plan": "the resolved configuration, its FLOPs and memory; starts nothing",
    "table": "the step table: noise, density, weight and area of every step",
    "encode": "images -> WebDataset shards with an index",
    "train": "train in one process (for many: deepspeed speed_engine/train.py)",
    "sample": "pictures from a run's averaged weights",
    "score": "how good pictures are, against others or stored statistics",
    "plot": "the pictures of a run, or of several in one",
    "paper": "what the papers report, row by row, and the commands that run a row",
    "compare": "a study: methods x seeds x settings, run and compared with intervals",
    "summary": "one page on a run, and summary.json",
    "export": "weights as safetensors, or as a diffusers folder with a model card",
    "import": "a public DiT checkpoint or diffusers folder as our safetensors",
}


def module(command: str) -> ModuleType:
    """The file of a command in `commands/`."""
    name = "import_weights" if command == "import" else command  # `import` is a word of Python's
    return importlib.import_module(f"speed_engine.commands.{name}")


class Parser(argparse.ArgumentParser):
    """One that speaks once: of the processes that a launcher started, the first."""

    def error(self, message: str) -> NoReturn:
        if rank_told() != "0":
            sys.exit(BAD_INPUT)
        super().error(for_reader(message, sys.stderr))


def main() -> int:
    """Parse the command line and run one command."""
    script = Path(sys.argv[0]).stem == "speed-engine"
    if script:  # as `python -m` does: a user's own module (`my_lab.mine`) is found
        sys.path.append(os.getcwd())
    parser = Parser(prog="speed-engine" if script else "python -m speed_engine")
    parser.add_argument("--version", action="version", version=__version__)
    # DeepSpeed's launcher puts it first.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text)
        if name in sys.argv[1:3]:  # only the one asked for is imported
            module(name).add_arguments(command)
    args = parse(parser)
    return told_in_one_sentence(lambda: module(args.command).run(args))


if __name__ == "__main__":
    sys.exit(main())
