"""Low pictures beside samples: what is stored, mirrored with its sample, blurred by address, read from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from speed_engine.conditions import image
from speed_engine.data import DataError, Source, low_resolution, resident
from speed_engine.data.encode import encode
from speed_engine.data.loader import Loader
from speed_engine.data.shards import Shards
from speed_engine.data.space import Space
from speed_engine.distributed import Processes
from speed_engine.sampling.guidance import completed

CPU = torch.device("cpu")


def pictures(folder: Path, num: int = 6, size: int = 8, mode: str = "RGB") -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(num):
        values = random.integers(0, 256, (size, size, 3)).astype(np.uint8)
        Image.fromarray(values).convert(mode).save(folder / f"p{number}.png")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with a factor of 2."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    two |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (4, 4)}
    model: Any = AutoencoderKL(
        **two, norm_num_groups=2, sample_size=8, scaling_factor=0.9, shift_factor=0.1
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


def condition(source: Source, **settings: Any) -> image.Image:
    return image.build(image.Config(**settings), "image", source.facts.conditions["image"])


def loader(source: Source, told: image.Image, micro: int = 8) -> Loader:
    here = Processes(0, 1, 0, CPU)
    return Loader(source, {"image": told}, 3, 8, micro, True, here, "reference")


def test_a_pixel_is_the_mean_of_a_square() -> None:
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    found = low_resolution.reduced(pixels, 2)
    assert found.dtype == np.uint8
    assert found.tolist() == [[[2, 4], [10, 12]], [[18, 20], [26, 28]]]  # 2.5 -> 2, 4.5 -> 4 ...


def test_pixels_are_mirrored_with_their_samples(tmp_path: Path) -> None:
    encode(pictures(tmp_path / "p"), tmp_path / "set", size=8, low_resolution=4)
    source = Shards(tmp_path / "set")
    assert source.index.arrays["image"].shape == (3, 4, 4) and not source.index.conditions
    whole = resident.Resident(source, True, CPU)
    (batch,) = loader(source, condition(source)).batches(0, 1)
    (same,) = loader(whole, condition(source)).batches(0, 1)
    upright, _ = source.read(range(6))
    some = batch.x0[:, None] == source.decode(upright)[None]
    assert 0 < int(some.flatten(2).all(2).any(1).sum()) < 8, "some are mirrored, and some are not"
    means = F.avg_pool2d(batch.x0, 2)
    assert (means - batch.conditions["image"]).abs().max() <= 1.01 / 255  # half a step of 2 / 255
    assert not batch.conditions["image_noise"].any()
    assert all(
        torch.equal(batch.conditions[name], same.conditions[name]) for name in same.conditions
    )


def test_latents_have_those_of_the_mirrored_pictures(tmp_path: Path, vae: Path) -> None:
    folder = pictures(tmp_path / "p")
    told: dict[str, Any] = {"size": 8, "mode": "latents", "vae": str(vae), "low_resolution": 4}
    encode(folder, tmp_path / "set", flip=True, **told)
    source = Shards(tmp_path / "set", check_scale=False)
    assert source.index.arrays["image_mirrored"].shape == (4, 2, 2)
    one = condition(source)
    assert one.space == Space("latents", (0.9,) * 4, (0.1,) * 4, vae=vae.name)

    from speed_engine.data.autoencoder import Vae

    (tmp_path / "low").mkdir()
    (tmp_path / "turned").mkdir()
    for path in sorted(folder.iterdir()):
        pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)
        for name, each in (("low", pixels), ("turned", pixels[..., ::-1])):
            small = low_resolution.reduced(each, 4).transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(small)).save(tmp_path / name / path.name)
    _, arrays = source.read(range(6))
    flips = torch.tensor([True, False] * 3)
    found = one.told(one.mirrored(arrays, flips)["image"])["image"]
    low, turned = (
        one.told(low_resolution.read(tmp_path / name, one, Vae(str(vae), "cpu"))[1])["image"]
        for name in ("low", "turned")
    )
    torch.testing.assert_close(found, torch.where(flips[:, None, None, None], turned, low))

    encode(folder, tmp_path / "unturned", **told)
    flat = Shards(tmp_path / "unturned", check_scale=False)
    with pytest.raises(ValueError, match=r"cannot be turned around.*--flip"):
        condition(flat).mirrored(flat.read(range(6))[1], flips)


def test_noise_has_its_level_and_does_not_know_of_micro_batches(tmp_path: Path) -> None:
    encode(pictures(tmp_path / "p"), tmp_path / "set", size=8, low_resolution=4)
    source = Shards(tmp_path / "set")
    plain, blurred = condition(source), condition(source, noise=0.8, dropout=0.2)
    (clean,) = loader(source, plain).batches(0, 1)
    (whole,) = loader(source, blurred).batches(0, 1)
    parts = list(loader(source, blurred, micro=2).batches(0, 1))
    for name, each in whole.conditions.items():
        assert torch.equal(each, torch.cat([part.conditions[name] for part in parts]))
    slots = {"seed": 5, "step": 7, "first_slot": 0}
    told = {"image": torch.full((4000, 3, 4, 4), 0.5), "image_noise": torch.zeros(4000)}
    found = blurred.noised(told, **slots)
    level = found["image_noise"]
    assert level.min() >= 0 and level.max() < 0.8 and abs(level.mean() - 0.4) < 0.02
    kept = (1 - level.square()).sqrt()[:, None, None, None]
    normal = (found["image"] - kept * 0.5) / level[:, None, None, None]
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert plain.noised(clean.conditions, **slots) == {}, "without noise nothing is changed"


def test_a_level_at_sampling_is_one_that_was_learned(tmp_path: Path) -> None:
    encode(pictures(tmp_path / "p"), tmp_path / "set", size=8, low_resolution=4)
    source = Shards(tmp_path / "set")
    one = condition(source, noise=0.4)
    told = one.told(source.read(range(6))[1]["image"])
    found = one.at_level(told, 0.4, seed=1)
    assert found["image_noise"].tolist() == pytest.approx([0.4] * 6)
    first = one.at_level({name: each[:2] for name, each in told.items()}, 0.4, seed=1)
    assert torch.equal(first["image"], found["image"][:2])
    assert not torch.equal(one.at_level(told, 0.4, seed=2)["image"], found["image"])
    with pytest.raises(ValueError, match=r"level 0\.5: the network knows levels from 0 to 0\.4"):
        one.at_level(told, 0.5, seed=1)
    with pytest.raises(
        ValueError, match=r"0 alone: it was trained with conditions\.image\.noise=0"
    ):
        condition(source).at_level(told, 0.1, seed=1)
    # A weights file tells the level, and no configuration does.
    again = image.build(image.Config(), "image", one.facts)
    assert again.noise == 0.4 and again.facts == one.facts


def test_folders_of_pictures_that_do_not_fit(tmp_path: Path) -> None:
    encode(pictures(tmp_path / "p"), tmp_path / "set", size=8, low_resolution=4)
    one = condition(Shards(tmp_path / "set"))
    names, stored = low_resolution.read(pictures(tmp_path / "low", 12, 4), one, None)
    assert names == sorted(names) and stored.shape == (12, 3, 4, 4)
    for wrong, why in ((5, "p0.png: has 5 x 5 pixels instead of 4 x 4"), (0, "holds no image")):
        folder = pictures(tmp_path / f"wrong{wrong}", 1 if wrong else 0, wrong or 4)
        with pytest.raises(DataError, match=why):
            low_resolution.read(folder, one, None)
    Image.new("RGB", (4, 4)).save(tmp_path / "low" / "p0.bmp")
    with pytest.raises(DataError, match="two pictures of the name p0"):
        low_resolution.read(tmp_path / "low", one, None)


def test_a_network_that_never_learned_none_is_told_both_keywords(tmp_path: Path) -> None:
    encode(pictures(tmp_path / "p"), tmp_path / "set", size=8, low_resolution=4)
    one = {"image": condition(Shards(tmp_path / "set"))}
    told = {"image": torch.zeros(2, 3, 4, 4), "image_noise": torch.zeros(2)}
    assert completed(one, told, 2, CPU) == told
    with pytest.raises(ValueError, match="is not told imagery"):
        completed(one, {**told, "imagery": torch.zeros(2)}, 2, CPU)
    with pytest.raises(ValueError, match="no null image"):
        completed(one, {}, 2, CPU)
