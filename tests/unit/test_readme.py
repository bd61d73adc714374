"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from speed_engine import config

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_three_lines_train_a_stock_unet():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    losses: list[float] = []
    torch.manual_seed(0)
    scope = {"losses": losses}
    exec(block.replace("loss.backward()", "loss.backward(); losses.append(loss.item())"), scope)
    assert len(losses) == 30
    assert sum(losses[-10:]) / 10 < 0.8 * sum(losses[:5]) / 5  # it learns


@pytest.mark.parametrize("line", re.findall(r"--config (\S+ ?[^#\n]*)", README))
def test_the_presets_and_overrides_shown_exist(line):
    name, *rest = line.split()
    config.load(name, [word for word in rest if "=" in word and not word.startswith("-")])


def test_the_commands_shown_exist():
    from speed_engine.__main__ import COMMANDS

    assert set(re.findall(r"python -m speed_engine (\w+)", README)) <= set(COMMANDS)


def test_the_pictures_shown_exist():
    root = Path(__file__).resolve().parents[2]
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (root / path).is_file(), path
