"""`python -m speed_engine COMMAND`: everything but the multi-process launch of training."""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

from speed_engine.commands import parse
from speed_engine.errors import told_in_one_sentence

COMMANDS = {
    "doctor": "what is here, which kernel will run, and why",
    "keys": "every key of a configuration: type, range, default, meaning",
    "plan": "the resolved configuration, its FLOPs and memory; starts nothing",
    "table": "the step table: noise, density, weight and area of every step",
    "encode": "images -> WebDataset shards with an index",
    "train": "train in one process (for many: deepspeed speed_engine/train.py)",
    "sample": "pictures from a run's averaged weights",
    "score": "how good a folder of samples is",
    "plot": "the pictures of a run",
    "paper": "what the SpeeD paper reports, row by row, and the commands that run a row",
    "compare": "a study: methods x seeds x settings, run and compared with intervals",
    "summary": "one page on a run, and summary.json",
    "export": "weights as safetensors or as a diffusers folder",
    "import": "a public DiT checkpoint or diffusers folder as our safetensors",
}


def module(command: str) -> ModuleType:
    """The file of a command in `commands/`."""
    name = "import_weights" if command == "import" else command  # `import` is a word of Python's
    return importlib.import_module(f"speed_engine.commands.{name}")


def main() -> int:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(prog="python -m speed_engine")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text)
        if sys.argv[1:2] == [name]:  # only the one asked for is imported
            module(name).add_arguments(command)
    args = parse(parser)
    return told_in_one_sentence(lambda: module(args.command).run(args))


if __name__ == "__main__":
    sys.exit(main())
