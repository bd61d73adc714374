"""The folder of samples: resume, refusal of other recipes, exact files, the grid."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from speed_engine.conditions import Condition
from speed_engine.conditions import label as label_file
from speed_engine.objectives import epsilon
from speed_engine.sampling.folder import (
    array_path,
    image_path,
    read_recipe,
    read_samples,
    sample_to_folder,
    to_uint8,
    write_json,
)
from speed_engine.sampling.montage import SEPARATOR, SMALLEST_TILE, grid_picture
from speed_engine.sampling.process import Process, Recipe, sample
from speed_engine.schedules import from_betas


def labelled(num: int, dropout: float = 0.1) -> dict[str, Condition]:
    """A class of `num`, with a null label where it is dropped."""
    config = label_file.Config(dropout=dropout)
    return {"label": label_file.build(config, "label", label_file.described(num))}


def process(shape=(1, 4, 4), learned_variance=False, num_steps=100, classes=None) -> Process:
    schedule = from_betas("linear", torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64))
    return Process.of(schedule, epsilon.Config(), learned_variance, shape, classes or {})


PROCESS = process(classes=labelled(3))
RECIPE = Recipe(sampler="ddim", steps=4)
LABELS = torch.arange(10) % 3


class Model:
    """Counts samples; stops, like a user would, after a given number of calls."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.num, self.left = 0, stop_after

    def __call__(self, x: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.num += len(x)
        return x


def draw(out, model=None, **changes):
    arguments = {
        "num": 10,
        "conditions_N": {"label": LABELS},
        "batch_size": 3,
        "show_progress": False,
    }
    arguments |= {"source": {"checkpoint": "runs/a/step-5", "ema": True}, **changes}
    recipe = arguments.pop("recipe", RECIPE)
    facts = arguments.pop("process", PROCESS)
    return sample_to_folder(model or Model(), facts, recipe, out, **arguments)


def test_a_finished_folder(tmp_path) -> None:
    out = draw(tmp_path / "a b ä")
    pixels, labels = read_samples(out)
    assert pixels.shape == (10, 4, 4, 1) and pixels.dtype == np.uint8
    assert labels is not None and labels.tolist() == LABELS.tolist()
    for i in range(10):
        with Image.open(image_path(out, i)) as picture:
            assert np.array_equal(np.asarray(picture), pixels[i, :, :, 0])
    recipe = read_recipe(out)
    assert (
        recipe["sampler"] == "ddim"
        and recipe["schedule"] == "linear"
        and recipe["steps"] == 4
        and recipe["num"] == 10
    )
    assert recipe["guidance"] == 1.0 and recipe["guidance_channels"] == "all"
    assert recipe["source"] == {"checkpoint": "runs/a/step-5", "ema": True}
    assert set(recipe["versions"]) == {"torch", "diffusers", "numpy"}
    assert sorted(p.name for p in out.iterdir()) == [
        "grid.png",
        "images",
        "recipe.json",
        "samples.npz",
    ]
    assert len(list((out / "images").iterdir())) == 10  # the grid is not among them


def test_interrupted_sampling_resumes_without_duplicates(tmp_path) -> None:
    whole = draw(tmp_path / "whole")
    out = tmp_path / "pieces"
    with pytest.raises(KeyboardInterrupt):
        draw(out, Model(stop_after=9))  # two batches of three are written, the third is lost
    assert len(list((out / "images").iterdir())) == 6
    with pytest.raises(ValueError, match=r"samples\.npz is missing"):
        read_samples(out)
    image_path(out, 2).unlink()  # a hole in the middle
    (out / "images" / "000001.png.partial").write_bytes(b"half a file")
    before = image_path(out, 0).stat().st_mtime_ns
    model = Model()
    draw(out, model)
    assert model.num == 5 * RECIPE.steps  # samples 2, 6, 7, 8, 9 and no other
    assert image_path(out, 0).stat().st_mtime_ns == before
    assert np.array_equal(read_samples(out)[0], read_samples(whole)[0])
    assert not list(out.rglob("*.partial"))
    idle = Model(stop_after=0)
    draw(out, idle)  # a finished folder: nothing left to do
    assert idle.num == 0


def test_a_folder_goes_on_that_knew_fewer_settings(tmp_path) -> None:
    """What a version that wrote its recipe could not choose was as it is by default."""
    out = draw(tmp_path)
    told = json.loads((out / "recipe.json").read_text())
    del told["guidance_power"]
    (out / "recipe.json").write_text(json.dumps(told))
    idle = Model(stop_after=0)
    draw(out, idle)
    assert idle.num == 0
    with pytest.raises(ValueError, match=r"guidance_power=0\.0 \(now 4\.0\)"):
        draw(out, recipe=replace(RECIPE, guidance=2.0, guidance_power=4.0))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"recipe": Recipe(sampler="ddim", steps=5)}, "steps=4 (now 5)"),
        ({"recipe": Recipe(sampler="ddim", steps=4, seed=1)}, "seed=0 (now 1)"),
        ({"source": {"checkpoint": "runs/b"}}, "source="),
        ({"conditions_N": {"label": torch.zeros(10, dtype=torch.int64)}}, "conditions_sha256"),
        ({"num": 9, "conditions_N": {"label": LABELS[:9]}}, "num=10 (now 9)"),
        ({"dtype": torch.float64}, "dtype="),
        ({"process": process(num_steps=50, classes=labelled(3))}, "process_sha256"),
        ({"upscale": 2}, "upscale=1 (now 2)"),
    ],
)
def test_another_recipe_is_refused(tmp_path, changes, word: str) -> None:
    out = draw(tmp_path)
    before = (out / "recipe.json").read_bytes()
    with pytest.raises(ValueError, match="another recipe") as caught:
        draw(out, **changes)
    assert word in str(caught.value)
    assert (out / "recipe.json").read_bytes() == before


def test_other_versions_may_continue(tmp_path) -> None:
    out = draw(tmp_path)
    recipe = read_recipe(out)
    recipe["versions"] = {"torch": "1.0"}
    write_json(out / "recipe.json", recipe)
    draw(out)


def test_foreign_folders_and_broken_files_are_named(tmp_path) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "images").mkdir(parents=True)
    (foreign / "images" / "cat.png").touch()
    with pytest.raises(ValueError, match=r"no recipe\.json"):
        draw(foreign)
    out = draw(tmp_path / "out")
    data = image_path(out, 3).read_bytes()
    image_path(out, 3).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"000003\.png cannot be read"):
        draw(out)
    for text in ("", "[]", "{}", "{"):
        (out / "recipe.json").write_text(text)
        with pytest.raises(ValueError, match=r"recipe\.json"):
            draw(out)


def test_bad_arguments_leave_no_folder(tmp_path) -> None:
    out = tmp_path / "out"
    latents = process((4, 4, 4))
    for changes, word in (
        ({"num": 0, "conditions_N": None}, "at least 1"),
        ({"upscale": 0}, "at least 1"),
        ({"num": 9}, "10 of label for 9 samples"),
        ({"recipe": Recipe(steps=101)}, "more than the 100"),
        ({"process": latents, "conditions_N": None}, "give the VAE"),
    ):
        with pytest.raises(ValueError, match=word):
            draw(out, **changes)
    assert not out.exists()


def test_decoded_latents_and_upscaled_pictures(tmp_path) -> None:
    latents = process((4, 2, 2), learned_variance=True)

    def model(x: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.cat([x, x], dim=1)

    out = draw(
        tmp_path,
        model,
        process=latents,
        conditions_N=None,
        decode=lambda x: x[:, :3].repeat_interleave(2, dim=2),
        upscale=3,
    )
    pixels, labels = read_samples(out)
    assert pixels.shape == (10, 4, 2, 3) and labels is None
    with Image.open(image_path(out, 7)) as picture:
        assert picture.size == (6, 12) and picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture)[::3, ::3], pixels[7])


def test_the_archive_is_what_the_evaluator_reads(tmp_path) -> None:
    """numpy's own, uint8 NHWC, written picture by picture; the grid shows the first of each class."""
    out = draw(tmp_path, process=process((3, 6, 4), classes=labelled(3)))
    with np.load(out / "samples.npz", allow_pickle=False) as archive:
        pixels = archive["arr_0"]
        assert archive.files == ["arr_0", "labels"] and archive["labels"].dtype == np.int64
    assert pixels.shape == (10, 6, 4, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    for number in range(10):
        with Image.open(image_path(out, number)) as picture:
            assert np.array_equal(np.asarray(picture), pixels[number])
    whole = np.asarray(grid_picture(pixels, LABELS.numpy()))
    with Image.open(out / "grid.png") as grid:
        assert np.array_equal(np.asarray(grid), whole)
    Image.new("RGB", (5, 5)).save(image_path(out, 4))
    with pytest.raises(ValueError, match=r"000004\.png is no picture of \(6, 4, 3\)"):
        draw(tmp_path, process=process((3, 6, 4), classes=labelled(3)))
    assert np.array_equal(np.load(out / "samples.npz")["arr_0"], pixels)  # the old one, whole


def test_a_grid_of_many_shows_the_first(tmp_path) -> None:
    labels = torch.cat([torch.zeros(18, dtype=torch.int64), torch.arange(22)])
    out = draw(
        tmp_path, process=process(classes=labelled(22)), num=40, conditions_N={"label": labels}
    )
    pixels, told = read_samples(out)
    with Image.open(out / "grid.png") as grid:
        assert np.array_equal(np.asarray(grid), np.asarray(grid_picture(pixels, told)))


def test_two_commands_do_not_draw_into_one_folder(tmp_path) -> None:
    class Nested(Model):
        def __call__(self, x: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
            with pytest.raises(ValueError, match="another command is drawing into"):
                draw(tmp_path, Model())
            return super().__call__(x, tau, label)

    model = Nested()
    out = draw(tmp_path, model)
    assert model.num == 10 * RECIPE.steps and len(read_samples(out)[0]) == 10


VIDEO = process((2, 3, 4, 4), classes=labelled(3))


def test_samples_that_are_no_pictures_are_arrays(tmp_path) -> None:
    whole = draw(tmp_path / "whole", process=VIDEO)
    assert sorted(p.name for p in whole.iterdir()) == ["arrays", "labels.npy", "recipe.json"]
    found = np.stack([np.load(array_path(whole, i)) for i in range(10)])
    assert found.shape == (10, 2, 3, 4, 4) and found.dtype == np.float32
    wanted = sample(Model(), VIDEO, RECIPE, conditions_N={"label": LABELS})
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)
    assert np.load(whole / "labels.npy").tolist() == LABELS.tolist()
    assert read_recipe(whole)["saved_as"] == "arrays"
    with pytest.raises(ValueError, match="holds arrays and no pictures"):
        read_samples(whole)

    out = tmp_path / "pieces"
    with pytest.raises(KeyboardInterrupt):
        draw(out, Model(stop_after=9), process=VIDEO)
    assert len(list((out / "arrays").iterdir())) == 6
    array_path(out, 2).unlink()
    model = Model()
    draw(out, model, process=VIDEO)
    assert model.num == 5 * RECIPE.steps
    for i in range(10):
        assert array_path(out, i).read_bytes() == array_path(whole, i).read_bytes()


def test_arrays_are_saved_as_the_data_were(tmp_path) -> None:
    out = draw(tmp_path, process=VIDEO, stored=lambda x: x / 2 + 100)
    assert 90 < np.load(array_path(out, 0)).mean() < 110
    other = tmp_path / "other"
    with pytest.raises(ValueError, match="no pictures; leave upscale"):
        draw(other, process=VIDEO, upscale=2)
    foreign = tmp_path / "foreign"
    (foreign / "arrays").mkdir(parents=True)
    (foreign / "arrays" / "mine.npy").touch()
    with pytest.raises(ValueError, match=r"holds arrays but no recipe\.json"):
        draw(foreign, process=VIDEO)
    assert not other.exists()


def test_the_grid_has_the_names_of_classes(tmp_path) -> None:
    pixels, labels = np.zeros((4, 8, 8, 1), dtype=np.uint8), np.array([0, 1, 0, 1])
    numbers = grid_picture(pixels, labels)
    named = grid_picture(pixels, labels, ["a long name of a class", "cat"])
    assert named.width > numbers.width + 40 and named.height == numbers.height
    shorter = grid_picture(pixels, labels, ["a long name of a", "cat"])
    assert named.tobytes() == shorter.tobytes()  # names are cut at 16 letters


def test_nan_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="NaN"):
        draw(tmp_path, lambda x, tau, label: x * float("nan"))


def test_uint8_rounds_and_clips() -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0]).reshape(1, 1, 1, 7)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_grid_has_classes_as_rows() -> None:
    labels = np.array([2, 0, 2, 2, 0])
    pixels = np.zeros((5, 8, 8, 1), dtype=np.uint8)
    pixels[labels == 2] = 255
    picture = np.asarray(grid_picture(pixels, labels))
    tile = SMALLEST_TILE + SEPARATOR
    assert picture.shape[0] == 2 * tile + SEPARATOR
    margin = picture.shape[1] - (3 * tile + SEPARATOR)
    assert 0 < margin < 64
    middle = SEPARATOR + SMALLEST_TILE // 2
    centres = picture[[middle, middle + tile]][:, [margin + middle + c * tile for c in range(3)], 0]
    assert centres.tolist() == [[0, 0, 236], [255, 255, 255]]  # class 0 twice, class 2 three times


def test_grid_without_labels_and_limits() -> None:
    colour = np.zeros((7, 96, 64, 3), dtype=np.uint8)
    picture = grid_picture(colour, None)
    assert picture.size == (3 * (64 + SEPARATOR) + SEPARATOR, 3 * (96 + SEPARATOR) + SEPARATOR)
    many = grid_picture(np.zeros((600, 64, 64, 1), dtype=np.uint8), np.arange(600) % 100)
    assert many.height == 20 * (64 + SEPARATOR) + SEPARATOR


def test_json_is_valid_or_refused(tmp_path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
