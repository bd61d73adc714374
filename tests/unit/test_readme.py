"""What README and the guide's pages show runs as it stands, names what is there, and leads somewhere."""

import re
from pathlib import Path

import pytest
import torch

from speed_engine import config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "speed_engine" / "DESIGN.md",
    *sorted((ROOT / "speed_engine" / "guide").glob("*.md")),
]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
LIBRARY = (ROOT / "speed_engine" / "guide" / "library.md").read_text(encoding="utf-8")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_three_lines_train_a_stock_unet():
    (block,) = python_blocks(README)
    losses: list[float] = []
    torch.manual_seed(0)
    scope = {"losses": losses}
    exec(block.replace("loss.backward()", "loss.backward(); losses.append(loss.item())"), scope)
    assert len(losses) == 30
    assert sum(losses[-10:]) / 10 < 0.8 * sum(losses[:5]) / 5  # it learns


def test_the_librarys_flow_draws_the_points_it_was_shown():
    flow, levels = python_blocks(LIBRARY)
    scope: dict = {}
    exec(flow, scope)
    assert scope["points"].shape == (200, 2)
    assert (scope["points"].mean(0) - scope["centre"]).abs().max() < 0.15
    assert scope["points"].std(0).max() < 0.3  # noise would be 1
    exec(levels, scope)
    assert scope["loss"].isfinite() and scope["table"].num_rows == 400


@pytest.mark.parametrize("line", sorted(set(re.findall(r"--config (\S+ ?[^#\n`|]*)", TEXT))))
def test_the_presets_and_overrides_shown_exist(line):
    name, *rest = line.split()
    if set(name) <= set(".`") or name.endswith(".yaml"):  # stands for any
        return
    config.load(name, [word for word in rest if "=" in word and not word.startswith("-")])


def test_the_commands_shown_exist():
    from speed_engine.__main__ import COMMANDS

    shown = set(re.findall(r"(?:python -m speed_engine|speed-engine) ([a-z]+)\b", TEXT))
    assert {"encode", "sample", "plan"} <= shown <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pictures_and_pages_shown_exist(page):
    for path in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert path.startswith("http") or (page.parent / path).exists(), path
