"""A person's own data: what `encode` finds and leaves out, and which preset it fits."""

from pathlib import Path

import pytest
from PIL import Image


def picture(path: Path, grey: int = 100, side: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (grey, grey, grey)).save(path)
    return path


@pytest.fixture(scope="module")
def pixels(good, tmp_path_factory) -> Path:
    """Six pictures of two classes as 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("own")
    for number in range(6):
        picture(folder / "images" / f"class{number % 2}" / f"{number}.png", 40 * number)
    good("encode", "--images", folder / "images", "--out", folder / "set", "--size", "32")
    return folder / "set"


@pytest.mark.parametrize("command_name", ["train", "plan"])
def test_a_preset_refuses_data_it_is_not_made_for(command, pixels, tmp_path, command_name):
    words = (command_name, "--config", "imagenet256_dit_s2", f"data.path={pixels}")
    answer = command(*words, "engine=torch", f"run_dir={tmp_path / 'run'}")
    assert answer.code == 2 and not (tmp_path / "run").exists()
    for part in (
        str(pixels),
        "pixels 3x32x32",
        "latents 4x32x32",
        "data.expect=null",
        "`python -m speed_engine encode --images DIR --size 256 --mode latents --vae ",
    ):
        assert part in answer.err


def test_what_a_preset_expects_can_be_changed_and_lifted(command, good, pixels):
    plan = ("plan", "--config", "imagenet256_dit_s2", f"data.path={pixels}")
    assert "pixels of 3x32x32" in good(*plan, "data.expect=null").out
    assert "pixels of 3x32x32" in good(*plan, "data.expect={shape: null, space: pixels}").out
    answer = command(*plan, "data.expect.space=pixels")
    assert answer.code == 2 and "pixels 4x32x32" in answer.err
