"""Images to shards: cropping, classes, latents through a tiny VAE, and the command itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from speed_engine.commands.encode import add_arguments, run
from speed_engine.data import DataError
from speed_engine.data.encode import encode
from speed_engine.data.shards import Shards
from speed_engine.data.storage import pictures
from speed_engine.errors import told_in_one_sentence


def image_folder(root: Path, num: int = 7, side: int = 12) -> Path:
    """Two classes of smooth random images."""
    rng = np.random.default_rng(0)
    for i in range(num):
        path = root / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(values).resize((side * 2, side)).save(path)
    return root


def command(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    return told_in_one_sentence(lambda: run(args))


def test_class_folders_become_labels(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    index = encode(images, tmp_path / "out", size=8, shard_size=3)
    assert index.class_names == ["cat", "dog"] and index.num_classes == 2
    assert index.shape == (3, 8, 8) and index.count == 7
    assert [shard.count for shard in index.shards] == [3, 3, 1]
    source = Shards(tmp_path / "out")
    stored, told = source.read(range(7))
    labels = told["label"]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1]  # sorted by class, then by name
    paths = [*sorted((images / "cat").iterdir()), *sorted((images / "dog").iterdir())]
    expected = np.stack([pictures.decode(path, 8, 3, 1) for path in paths])
    assert np.array_equal(stored.numpy(), expected)


def test_the_centre_square_is_taken(tmp_path: Path) -> None:
    values = np.zeros((10, 30, 3), np.uint8)
    values[:, 10:20] = [200, 100, 50]  # the centre; black left and right of it
    Image.fromarray(values).save(tmp_path / "a.png")
    for size in (10, 5):
        array = pictures.decode(tmp_path / "a.png", size, 3, 1)
        assert array.shape == (3, size, size) and array.dtype == np.uint8
        inner = array if size == 10 else array[:, :, 2:-2]  # a filter looks over the edge
        assert (array[:, :, 0] > 0).all()
        assert (inner == np.array([200, 100, 50]).reshape(3, 1, 1)).all()
    grey = pictures.decode(tmp_path / "a.png", 10, 1, 1)
    assert grey.shape == (1, 10, 10) and (grey == grey[0, 0, 0]).all()


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "images" / f"{i}.png")
    index = encode(tmp_path / "images", tmp_path / "out", size=8, channels=1)
    assert (index.num_classes, index.class_names, index.shape) == (0, [], (1, 8, 8))


def test_a_second_run_changes_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    index = encode(images, tmp_path / "out", size=8)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert encode(images, tmp_path / "out", size=8) == index
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match="is not empty and is not the same set"):
        encode(images, tmp_path / "out", size=9)
    (images / "cat" / "new.png").write_bytes((images / "cat" / "01.png").read_bytes())
    with pytest.raises(DataError, match="is not the same set"):
        encode(images, tmp_path / "out", size=8)
    assert encode(images, tmp_path / "out2", size=8).fingerprint != index.fingerprint


def test_an_empty_out_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert encode(image_folder(tmp_path / "images"), tmp_path / "out", size=8).count == 7


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = image_folder(tmp_path / "images"), tmp_path / "out"
    words = ("--images", images, "--out", out, "--size", "8")
    assert command(*words) == 0
    assert command(*words) == 0
    assert "already there: 7 samples" in capsys.readouterr().err
    assert command("--verify", out) == 0
    assert "no fault" in capsys.readouterr().out
    assert command(*words, "--verify") == 0  # of what it has just written, or found
    assert f"{out}: no fault" in capsys.readouterr().out
    shard = out / "shard-000000.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[1700] ^= 1  # a pixel
    shard.write_bytes(damaged)
    assert command("--verify", out) == 1
    assert "shard-000000.tar, sample 0: damaged" in capsys.readouterr().out
    assert command("--reindex", out) == 0
    assert command("--verify", out) == 0


def test_the_digits(tmp_path: Path) -> None:
    assert command("--images", "digits", "--out", tmp_path / "digits") == 0
    assert len(Shards(tmp_path / "digits")) == 1797
    for setting in ({"size": 32}, {"channels": 3}, {"flip": True}, {"strict": True}):
        with pytest.raises(DataError, match="leave out the other settings"):
            encode("digits", tmp_path / "other", **setting)
    index = encode("digits", tmp_path / "other", shard_size=600)
    assert [shard.count for shard in index.shards] == [600, 600, 597]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "give one of --images"),
        (["--images", "a", "--verify", "b"], "give one of --images"),
        (["--images", "a"], "give --out"),
        (["--images", "nowhere", "--out", "x"], "nowhere is not a folder"),
        (["--images", ".", "--out", "x", "--mode", "latents"], "--vae NAME and --mode latents"),
        (["--images", ".", "--out", "x", "--flip"], "--flip and --mean-only belong to"),
        (["--images", ".", "--out", "x", "--size", "0"], "--size and --batch-size"),
        (["--images", ".", "--out", "x", "--channels", "4"], "--channels 1 or 3"),
        (["--images", ".", "--out", "x", "--scale", "1"], "--scale and --shift belong to latents"),
        (["--images", ".", "--out", "x", "--posterior"], "--posterior belongs to --arrays or"),
        (["--arrays", "a", "--out", "x", "--size", "8"], "--size belongs to --images, not to"),
        (["--reindex", "a", "--out", "x"], "--out belongs to --images or --arrays or --latents"),
        (["--verify", "a", "--scale", "1"], "not to --verify; leave it out"),
        (["--arrays", "nowhere", "--out", "x"], "nowhere cannot be read as arrays"),
        (["--verify", "nowhere"], "there is no folder nowhere"),
        (["--reindex", "nowhere"], "nowhere holds no *.tar"),
        (["--verify"], "give one of --images"),
        (["--reindex", "a", "--verify"], "--verify without a folder belongs to --images"),
        (["--images", "a", "--out", "x", "--patience", "0"], "--patience must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*words) != 0
    said = capsys.readouterr()
    assert reason in said.out + said.err and "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VAE of a few thousand parameters with a factor of 2."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    model: Any = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=8,
        scaling_factor=0.9,
        shift_factor=0.1,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


def test_latents_with_posterior_and_flip(tmp_path: Path, vae: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    images = image_folder(tmp_path / "images", num=5)
    index = encode(
        images, tmp_path / "out", size=8, mode="latents", vae=str(vae), flip=True, batch_size=2
    )
    assert index.kind == "latents" and index.posterior and index.flipped
    assert index.shape == (4, 4, 4) and index.dtype == "float16"
    assert (index.scale, index.shift) == (0.9, 0.1)
    source = Shards(tmp_path / "out", check_scale=False)
    encode(images, tmp_path / "pixels", size=8)
    pixels = Shards(tmp_path / "pixels")
    model: Any = AutoencoderKL.from_pretrained(vae)
    for flips in (None, [True] * 5):
        x = pixels.decode(pixels.read(range(5), flips)[0])
        with torch.no_grad():
            found = model.encode(x).latent_dist
        raw, _ = source.read(range(5), flips)
        mean, std = raw.float().chunk(2, 1)
        torch.testing.assert_close(mean, found.mean, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(std, found.std, rtol=2e-3, atol=2e-3)
        latent = source.decode(source.read(range(5), flips)[0])
        torch.testing.assert_close(latent, (mean - 0.1) * 0.9)


def test_latents_mean_only_from_a_pipeline_folder(tmp_path: Path, vae: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "vae").symlink_to(vae)
    images = image_folder(tmp_path / "images", num=3)
    index = encode(
        images,
        tmp_path / "out",
        size=8,
        mode="latents",
        vae=str(tmp_path / "pipeline"),
        mean_only=True,
    )
    assert not index.posterior and not index.flipped and index.stored_shape == (4, 4, 4)


def test_a_vae_in_bf16_gives_about_the_same(tmp_path: Path, vae: Path) -> None:
    images = image_folder(tmp_path / "images", num=3)
    told: dict[str, Any] = {"size": 8, "mode": "latents", "vae": str(vae), "mean_only": True}
    for precision in ("fp32", "bf16"):
        encode(images, tmp_path / precision, precision=precision, **told)
    full, half = (
        Shards(tmp_path / name, check_scale=False).read(range(3))[0].float()
        for name in ("fp32", "bf16")
    )
    assert 0 < (full - half).abs().max() < 0.03 * full.abs().max()
    with pytest.raises(DataError, match="is not the same set"):
        encode(images, tmp_path / "fp32", precision="bf16", **told)


def test_wrong_vaes_are_refused(tmp_path: Path, vae: Path) -> None:
    images = image_folder(tmp_path / "images", num=2)
    with pytest.raises(DataError, match="size divisible by 2, not 3 and 9"):
        encode(images, tmp_path / "out", size=9, mode="latents", vae=str(vae))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot be loaded .*give --vae"):
        encode(images, tmp_path / "out2", size=8, mode="latents", vae=str(tmp_path / "empty"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((vae / "config.json").read_bytes())
    torch.save({}, pickled / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be loaded"):
        encode(images, tmp_path / "out3", size=8, mode="latents", vae=str(pickled))


def test_skipped_files_are_listed(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", num=3)
    (images / "cat" / "notes.txt").write_text("x")
    (images / "cat" / ".hidden").write_text("x")
    encode(images, tmp_path / "out", size=8)
    listed = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert listed == [{"file": "cat/notes.txt", "reason": "not an image by its ending"}]
