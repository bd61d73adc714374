"""The command line, one file a command: `add_arguments(parser)` and `run(args)`, which gives the exit code.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speed_engine.config import RunConfig


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with overrides allowed anywhere in it (argparse wants them together)."""
    args, rest = parser.parse_known_args()
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) != len(rest) or (late and not hasattr(args, "overrides")):
        parser.error(
            f"unrecognized arguments: {' '.join(w for w in rest if w not in late) or late[0]}"
        )
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--config and dotted overrides."""
    parser.add_argument(
        "--config",
        default=default,
        required=default is None,
        help="a preset's name, or a YAML file",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run_arguments(
    parser: argparse.ArgumentParser, required: bool = True, many: bool = False
) -> None:
    """--run, and the modules that the run may name. many: may be repeated, and is a list."""
    if many:
        parser.add_argument(
            "--run", type=Path, required=required, action="append", help="a run folder; repeatable"
        )
    else:
        parser.add_argument("--run", type=Path, required=required, help="the run folder")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of your own that the run names (my_lab.mine); it is imported, so its code runs",
    )


def configured(args: argparse.Namespace) -> RunConfig:
    """The configuration that the arguments of `config_arguments` name, checked. Raises ConfigError."""
    from speed_engine.config import load

    return load(args.config, args.overrides)


def refuse_folder(out: Path) -> None:
    """Raises ValueError where a file is to be written and `out` is a folder."""
    if out.is_dir():
        raise ValueError(
            f"--out {out} is a folder; give the file to write, {out}/weights.safetensors"
        )
