"""`encode`: images or arrays -> WebDataset shards with an index."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from speed_engine.data import encode

    encode.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from speed_engine.data import encode

    return encode.run(args)
