"""Shards: what is written comes back, for us and for the stock reader, in any order."""

from __future__ import annotations

import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from speed_engine.data import DataError, Source, digits, shards
from speed_engine.data.storage import index as index_file
from speed_engine.data.storage.index import Index, reindex, verify
from speed_engine.data.storage.writer import SetWriter
from speed_engine.kinds import names

SETTINGS: dict[str, dict[str, Any]] = {
    "pixels": {"dtype": np.uint8, "shape": (3, 6, 5)},
    "latents": {"dtype": np.float16, "shape": (4, 8, 8)},
    "posterior": {"dtype": np.float16, "shape": (8, 4, 4), "posterior": True},
    "flipped": {"dtype": np.float16, "shape": (4, 4, 4), "flipped": True},
    "flipped_posterior": {
        "dtype": np.float16,
        "shape": (4, 4, 4),
        "flipped": True,
        "posterior": True,
    },
}


def arrays(num: int, dtype: Any, shape: tuple[int, ...], posterior: bool, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == np.uint8:
        return rng.integers(0, 256, (num, *shape), dtype=np.uint8)
    values = rng.standard_normal((num, *shape))
    if posterior:
        values[:, shape[0] // 2 :] = np.abs(values[:, shape[0] // 2 :]) * 0.1
    return values.astype(dtype)


def write(
    out: Path,
    num: int = 7,
    *,
    dtype: Any = np.uint8,
    shape: tuple[int, ...] = (1, 4, 4),
    flipped: bool = False,
    posterior: bool = False,
    labelled: bool = True,
    shard_size: int = 3,
    scale: float = 1.0,
    shift: float = 0.0,
) -> tuple[Index, np.ndarray, np.ndarray | None]:
    stored = arrays(num, dtype, shape, posterior, seed=1)
    mirrored = arrays(num, dtype, shape, posterior, seed=2) if flipped else None
    with SetWriter(out, {"num": num}, shard_size=shard_size, posterior=posterior) as writer:
        for i in range(num):
            label = i % 3 if labelled else None
            writer.write(i + 1, stored[i], label, None if mirrored is None else mirrored[i])
        latent = {} if dtype == np.uint8 else {"scale": scale, "shift": shift}
        index = writer.finish(**latent)
    return index, stored, mirrored


def decoded(source: shards.Shards, indices, flips=None, normals=None):
    """(x in model space, labels): what the loader makes of `read`."""
    stored, told = source.read(indices, flips)
    return source.decode(stored, normals), told.get("label")


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_written_comes_back_in_any_order(tmp_path: Path, name: str) -> None:
    setting = SETTINGS[name]
    index, stored, _ = write(tmp_path / "set", **setting)
    assert [shard.count for shard in index.shards] == [3, 3, 1]
    source = shards.build(shards.Config(path=str(tmp_path / "set")))
    order = [6, 0, 3, 3, 5, 1]
    raw, told = source.read(order)
    labels = told["label"]
    assert np.array_equal(raw.numpy(), stored[order])
    assert labels.dtype == torch.int64 and labels.tolist() == [i % 3 for i in order]
    again, _ = source.read(torch.tensor(order))  # the second time without checksums
    assert torch.equal(again, raw)
    x, _ = decoded(source, np.array(order))
    channels = source.facts.shape[0]
    assert x.shape == (6, *source.facts.shape) and x.dtype == torch.float32 and x.is_contiguous()
    if name == "pixels":
        assert torch.equal(x, torch.from_numpy(stored[order]).float() / 127.5 - 1)
    else:
        assert torch.equal(x, torch.from_numpy(stored[order]).float()[:, :channels])
    assert source.facts.space.posterior == ("posterior" in name)
    assert len(source) == 7 and source.facts.conditions["label"].num_values == 3
    assert verify(tmp_path / "set") == []


def test_empty_batch(tmp_path: Path) -> None:
    write(tmp_path / "set")
    x, labels = decoded(shards.Shards(tmp_path / "set"), [])
    assert x.shape == (0, 1, 4, 4) and labels is not None and labels.shape == (0,)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scale_and_shift(tmp_path: Path, dtype: Any) -> None:
    _, stored, _ = write(tmp_path / "set", dtype=dtype, scale=0.5, shift=0.25)
    source = shards.Shards(tmp_path / "set")
    raw, _ = source.read(range(7))
    x = source.decode(raw)
    expected = (torch.from_numpy(stored).float() - 0.25) * 0.5
    assert torch.equal(x, expected)
    assert np.array_equal(raw.numpy(), stored)  # decode leaves its input alone


def test_posterior_draw_is_mean_plus_std_times_normals(tmp_path: Path) -> None:
    _, stored, _ = write(tmp_path / "set", **SETTINGS["posterior"], scale=2.0)
    source = shards.Shards(tmp_path / "set")
    normals = torch.randn(7, *source.facts.shape)
    x, _ = decoded(source, range(7), normals=normals)
    mean, std = torch.from_numpy(stored).float().chunk(2, 1)
    torch.testing.assert_close(x, (mean + std * normals) * 2.0, rtol=1e-6, atol=1e-6)


def test_flips_of_pixels_mirror_and_flips_of_latents_take_the_stored_ones(tmp_path: Path) -> None:
    flips = [True, False, True, False, False, True, True]
    _, stored, _ = write(tmp_path / "pixels", shape=(1, 4, 5))
    raw, _ = shards.Shards(tmp_path / "pixels").read(range(7), flips)
    for i, flip in enumerate(flips):
        assert np.array_equal(raw[i].numpy(), stored[i, :, :, ::-1] if flip else stored[i])
    _, stored, mirrored = write(tmp_path / "latents", **SETTINGS["flipped"])
    assert mirrored is not None
    raw, _ = shards.Shards(tmp_path / "latents").read(range(7), flips)
    for i, flip in enumerate(flips):
        assert np.array_equal(raw[i].numpy(), mirrored[i] if flip else stored[i])


def test_hooks_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "set", dtype=np.float16)
    source = shards.Shards(tmp_path / "set")
    assert not source.facts.flips and not source.facts.space.posterior
    with pytest.raises(DataError, match="holds no flipped latents"):
        decoded(source, [0], flips=[True])
    with pytest.raises(ValueError, match="no posterior is stored"):
        decoded(source, [0], normals=torch.zeros(1, 1, 4, 4))
    with pytest.raises(DataError, match="as many flips"):
        decoded(source, [0], flips=[True, False])
    for wrong in ([7], [-1]):
        with pytest.raises(DataError, match=r"must lie in \[0, 7\)"):
            decoded(source, wrong)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_stock_reader_sees_the_same_samples(tmp_path: Path, name: str) -> None:
    index, stored, mirrored = write(tmp_path / "set", **SETTINGS[name])
    urls = [str(tmp_path / "set" / shard.name) for shard in index.shards]
    found = list(wds.WebDataset(urls, shardshuffle=False).decode())  # pyright: ignore
    assert len(found) == 7
    for i, sample in enumerate(found):
        assert sample["__key__"] == f"{i:09d}"
        assert sample["npy"].dtype == stored.dtype and np.array_equal(sample["npy"], stored[i])
        assert sample["cls"] == i % 3
        if mirrored is not None:
            assert np.array_equal(sample["flipped.npy"], mirrored[i])


def test_measured_mean_and_std_are_those_of_model_space(tmp_path: Path) -> None:
    index, _, _ = write(tmp_path / "set", **SETTINGS["latents"], scale=0.9, shift=0.1)
    x, _ = decoded(shards.Shards(tmp_path / "set"), range(7))
    mean, std = x.double().mean((0, 2, 3)), x.double().std((0, 2, 3), correction=0)
    np.testing.assert_allclose(index.mean, mean.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(index.std, std.numpy(), rtol=1e-5)


def test_writing_is_bit_identical_and_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first, _, _ = write(tmp_path / "a")
    second, _, _ = write(tmp_path / "b")
    other, _, _ = write(tmp_path / "c", num=6)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert shards.Shards(tmp_path / "a").fingerprint == first.fingerprint


FIRST_VERSION = {
    "pixels": "231cf376c8e04eedd4cf53eae64367a8dad3f21b10dd7769318b714f4a624b71",
    "posterior": "21c4e752e5043d85fe5d16882a92cf642e7cdda08da06e9624f681f901854d3c",
}


@pytest.mark.parametrize("name", FIRST_VERSION)
def test_a_set_that_the_first_version_knew_keeps_its_fingerprint(tmp_path: Path, name: str) -> None:
    """Runs that began with it go on. The sums were written by that version."""
    posterior = name == "posterior"
    with SetWriter(tmp_path / name, {}, shard_size=3, posterior=posterior) as writer:
        for i in range(5):
            array = np.arange(32).reshape(2, 4, 4) + i
            array = array.astype(np.float16 if posterior else np.uint8)
            writer.write(i + 1, array, i % 3, array[..., ::-1] if posterior else None)
        latent = {"scale": 0.18215, "shift": 0.5} if posterior else {}
        assert writer.finish(**latent).fingerprint == FIRST_VERSION[name]
    assert shards.Shards(tmp_path / name, check_scale=False).fingerprint == FIRST_VERSION[name]
    content = json.loads((tmp_path / name / index_file.INDEX).read_text())
    assert content["version"] == 1 and "arrays" not in content


@pytest.mark.parametrize("shape", [(2, 16), (2, 3, 4, 4)])
def test_a_set_that_the_first_version_did_not_know_has_another(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    index, stored, _ = write(tmp_path / "set", dtype=np.float32, shape=shape)
    assert index.version == 2 and index.shape == shape
    assert np.array_equal(shards.Shards(tmp_path / "set").read([3, 1])[0].numpy(), stored[[3, 1]])


def test_no_labels_and_one_class(tmp_path: Path) -> None:
    index, _, _ = write(tmp_path / "none", labelled=False)
    source = shards.Shards(tmp_path / "none")
    assert index.num_classes == 0 and not source.facts.conditions
    assert decoded(source, [0, 1])[1] is None
    index, _, _ = write(tmp_path / "one", num=1)
    source = shards.Shards(tmp_path / "one")
    assert source.facts.conditions["label"].num_values == 1
    assert source.read([0])[1]["label"].tolist() == [0]


def test_many_threads_read_the_same(tmp_path: Path) -> None:
    _, stored, _ = write(tmp_path / "set", num=60, shape=(3, 16, 16), shard_size=7)
    source = shards.Shards(tmp_path / "set")
    orders = [np.random.default_rng(seed).permutation(60) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for order, (raw, _) in zip(orders, pool.map(source.read, orders), strict=True):
            assert np.array_equal(raw.numpy(), stored[order])


def test_a_part_of_a_set(tmp_path: Path) -> None:
    _, stored, _ = write(tmp_path / "set")
    part = shards.Shards(tmp_path / "set", first=4, count=2)
    assert len(part) == 2 and part.index.count == 7
    assert np.array_equal(part.read([1, 0])[0].numpy(), stored[[5, 4]])
    assert part.fingerprint != shards.Shards(tmp_path / "set").fingerprint
    with pytest.raises(DataError, match="do not exist"):
        shards.Shards(tmp_path / "set", first=6, count=2)


def foreign(folder: Path, how: str) -> np.ndarray:
    """Three samples as other programs write them."""
    folder.mkdir()
    stored = arrays(3, np.uint8, (1, 4, 4), False, seed=3)
    if how == "webdataset":  # its time stamps have fractions: a PAX header for every member
        pattern = str(folder / "train-%02d.tar")
        with wds.ShardWriter(pattern, maxcount=2, verbose=0) as writer:  # pyright: ignore
            for i in range(3):
                writer.write({"__key__": f"n01/img_{i}", "npy": stored[i], "cls": i})
        return stored
    source = folder / "files"
    source.mkdir()
    for i in range(3):
        np.save(source / f"{i}.npy", stored[i])
        (source / f"{i}.cls").write_text(f"{i}\n")
    form = tarfile.GNU_FORMAT if how == "gnu" else tarfile.USTAR_FORMAT
    with tarfile.open(folder / "all.tar", "w", format=form) as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, arcname=path.name)
    return stored


@pytest.mark.parametrize("how", ["webdataset", "gnu", "ustar"])
def test_shards_of_others_are_read_after_reindex(tmp_path: Path, how: str) -> None:
    stored = foreign(tmp_path / "set", how)
    with pytest.raises(DataError, match=r"has shards but no index\.json.*--reindex"):
        shards.Shards(tmp_path / "set")
    index = reindex(tmp_path / "set")
    source = shards.Shards(tmp_path / "set")
    assert index.num_classes == 3
    assert np.array_equal(source.read([2, 0, 1])[0].numpy(), stored[[2, 0, 1]])
    assert source.read([2, 0, 1])[1]["label"].tolist() == [2, 0, 1]
    assert verify(tmp_path / "set") == []


def test_reindex_keeps_what_the_old_index_knew(tmp_path: Path) -> None:
    index, _, _ = write(tmp_path / "set", **SETTINGS["posterior"], scale=0.9, shift=0.1)
    assert reindex(tmp_path / "set") == index
    (tmp_path / "set" / "index.json").unlink()
    with pytest.raises(DataError, match="--scale"):
        reindex(tmp_path / "set")
    changed = reindex(tmp_path / "set", scale=1.1, posterior=True, num_classes=10)
    assert (changed.scale, changed.num_classes, changed.shape) == (1.1, 10, (4, 4, 4))
    with pytest.raises(DataError, match="label 2, but there are 2 classes"):
        reindex(tmp_path / "set", num_classes=2)


def test_scale_far_off_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set", dtype=np.float16, scale=0.18215)
    with pytest.raises(DataError, match=r"root mean square of 0\.1.*check_scale=false"):
        shards.build(shards.Config(path=str(tmp_path / "set")))
    assert len(shards.build(shards.Config(path=str(tmp_path / "set"), check_scale=False))) == 7


def test_kinds_and_protocol(tmp_path: Path) -> None:
    assert names("data") == ["digits", "glyphs", "shards"]
    source: Source = digits.build(digits.Config(path=str(tmp_path / "digits")))
    assert source.facts.shape == (1, 8, 8)


def test_digits(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    folder = tmp_path / "new" / "digits"
    source = digits.build(digits.Config(path=str(folder)))
    values, labels = load_digits(return_X_y=True)
    x, found = decoded(source, range(1797))
    assert found.tolist() == labels.tolist()
    expected = np.round(values * 255 / 16).reshape(-1, 1, 8, 8)
    assert np.array_equal(((x + 1) * 127.5).round().numpy(), expected)
    before = (folder / "index.json").stat().st_mtime_ns
    train = digits.build(digits.Config(path=str(folder), held_out=0.2))
    rest = digits.build(digits.Config(path=str(folder), held_out=0.2, part="held_out"))
    assert (len(train), len(rest)) == (1438, 359)
    assert (folder / "index.json").stat().st_mtime_ns == before
    assert len({source.fingerprint, train.fingerprint, rest.fingerprint}) == 3
    assert torch.equal(decoded(rest, [0])[0], x[1438:1439])
    with pytest.raises(DataError, match="held_out above 0"):
        digits.build(digits.Config(path=str(folder), part="held_out"))


def test_digits_refuse_another_set(tmp_path: Path) -> None:
    write(tmp_path / "set")
    with pytest.raises(DataError, match="something else than the digits"):
        digits.build(digits.Config(path=str(tmp_path / "set")))


def test_index_is_plain_json(tmp_path: Path) -> None:
    index, _, _ = write(tmp_path / "set")
    content = json.loads((tmp_path / "set" / index_file.INDEX).read_text())
    assert content["format"] == "speed-engine shards" and content["version"] == 1
    assert content["fingerprint"] == index.fingerprint and content["count"] == 7
