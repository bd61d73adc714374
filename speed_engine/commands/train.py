"""`train`: train in one process, or in each of those that a launcher started."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from speed_engine import train

    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from speed_engine import train

    return train.run(args)
