"""`plan`: the resolved configuration, its FLOPs and memory; starts nothing."""

from __future__ import annotations

import argparse

from speed_engine.commands import config_arguments, configured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import plan

    return plan.run(configured(args))
