"""A person's own data: what `encode` finds and leaves out, and which preset it fits."""

import os
import shutil
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
    plan = ("plan", "--config", "imagenet256_dit_s2", f"data.path={pixels}", "validation.every=0")
    assert "pixels of 3x32x32" in good(*plan, "data.expect=null").out
    assert "pixels of 3x32x32" in good(*plan, "data.expect={shape: null, space: pixels}").out
    answer = command(*plan, "data.expect.space=pixels")
    assert answer.code == 2 and "pixels 4x32x32" in answer.err


@pytest.fixture
def encoded(good, tmp_path, read_json):
    """encoded(folder, words...) -> (index, skipped files by name, what was said)."""

    def call(images: Path, *words: str):
        answer = good(
            "encode", "--images", images, "--out", tmp_path / "out", "--size", "8", *words
        )
        skipped = read_json(tmp_path / "out" / "skipped.json")
        reasons = {each["file"]: each["reason"] for each in skipped}
        return read_json(tmp_path / "out" / "index.json"), reasons, answer.err

    return call


def test_classes_are_sorted_as_people_do_and_shown(encoded, tmp_path):
    for name in ("10", "2", "1"):
        picture(tmp_path / "images" / name / "a.png")
    index, _, said = encoded(tmp_path / "images")
    assert index["class_names"] == ["1", "2", "10"]
    assert "3 classes: 0 = 1 (1), 1 = 2 (1), 2 = 10 (1)" in " ".join(said.split())
    assert "3 images -> 3 x 8 x 8 pixels" in said


def test_what_is_no_class_is_left_out_and_told(encoded, tmp_path):
    images = tmp_path / "images"
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "cat/.ipynb_checkpoints/1.png"):
        picture(images / name)
    (images / "zebra").mkdir()
    picture(images / "__MACOSX" / "cat" / "._1.png")
    elsewhere = picture(tmp_path / "elsewhere" / "3.png").parent
    (images / "dog" / "more").symlink_to(elsewhere)
    (images / "dog" / "round").symlink_to(images / "dog")
    (images / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    index, skipped, said = encoded(images)
    assert index["class_names"] == ["cat", "dog"] and index["count"] == 4
    assert skipped == {
        "dog/round": "a link to a folder that is there already",
        "dog/gone.png": "a link to nothing",
    }
    assert "no class: zebra" in said
    assert "left out: __MACOSX, cat/.ipynb_checkpoints" in said


def test_names_that_are_not_utf8(encoded, good, tmp_path):
    source = picture(tmp_path / "a.png")
    strange = os.fsdecode(b"caf\xe9")
    (tmp_path / "images" / strange).mkdir(parents=True)
    shutil.copy(source, tmp_path / "images" / strange / "1.png")
    (tmp_path / "images" / strange / os.fsdecode(b"\xe9.png")).touch()
    index, skipped, _ = encoded(tmp_path / "images")
    assert index["class_names"] == ["caf\\xe9"] and index["count"] == 1
    assert list(skipped) == ["caf\\xe9/\\xe9.png"]
    assert "no fault" in good("encode", "--verify", tmp_path / "out").out


def test_one_level_too_high_is_asked_about(command, encoded, tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png"):
        picture(tmp_path / "images" / name)
    words = ("encode", "--images", tmp_path / "images", "--out", tmp_path / "out")
    answer = command(*words)
    assert answer.code == 2 and not (tmp_path / "out").exists()
    assert f"--images {tmp_path / 'images' / 'train'}" in answer.err and "2 folders" in answer.err
    index, _, said = encoded(tmp_path / "images", "--no-labels")
    assert (index["count"], index["num_classes"]) == (3, 0) and "no classes" in said


def test_home_is_expanded_and_latents_have_no_silent_size(command, good, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture(tmp_path / "images" / "1.png")
    good("encode", "--images", "~/images", "--out", "~/set", "--size", "8")
    assert (tmp_path / "set" / "index.json").exists()
    assert "no fault" in good("encode", "--verify", "~/set").out
    words = ("--out", "~/other", "--mode", "latents", "--vae", "~/none")
    answer = command("encode", "--images", "~/images", *words)
    assert answer.code == 2 and "give --size" in answer.err
