"""`keys`: every key of the configuration."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", help="model, timesteps, train ... (default: all)")
    parser.add_argument("kind", nargs="?", help="one kind of it: `keys timesteps speed`")
    parser.add_argument("--markdown", action="store_true", help="all of them as a page")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import keys

    if args.markdown and args.section:
        raise ValueError("--markdown writes the page of all sections; leave out the section")
    print(
        keys.as_markdown() if args.markdown else keys.as_text(keys.groups(args.section, args.kind))
    )
    return 0
