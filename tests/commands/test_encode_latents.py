"""Latents of other projects, in layouts made here: values, classes and constants come through `encode --latents`."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from speed_engine.data.shards import Shards

N = 12
RNG = np.random.default_rng(3)
RAW = RNG.normal(0, 5, (N, 4, 2, 2)).astype(np.float32)
STD = RNG.uniform(0.1, 1, (N, 4, 2, 2)).astype(np.float32)
LABELS = np.arange(N) % 3


def fast_dit(place: Path) -> Path:
    for name in ("imagenet256_features", "imagenet256_labels"):
        (place / name).mkdir(parents=True)
    for i in range(N):
        np.save(place / "imagenet256_features" / f"{i}.npy", RAW[i : i + 1] * np.float32(0.18215))
        np.save(place / "imagenet256_labels" / f"{i}.npy", LABELS[i : i + 1])
    return place


def lightning(place: Path) -> Path:
    place.mkdir()
    x, label = torch.from_numpy(RAW), torch.from_numpy(LABELS)
    for number, part in enumerate((slice(0, 5), slice(5, N))):
        tensors = {"latents": x[part], "latents_flip": x[part].flip(-1), "labels": label[part]}
        tensors = {name: each.contiguous() for name, each in tensors.items()}
        save_file(tensors, place / f"latents_rank00_shard{number:03d}.safetensors")
    stats = {"mean": x.mean((0, 2, 3), True), "std": x.std((0, 2, 3), keepdim=True)}
    torch.save(stats, place / "latents_stats.pt")
    return place


def edm2(place: Path) -> dict[str, bytes]:
    files, labels = {}, []
    for i in range(N):
        content = io.BytesIO()
        np.save(content, np.concatenate([RAW[i], STD[i]]))
        name = f"{i // 10:05d}/img-mean-std-{i:08d}.npy"
        files[name] = content.getvalue()
        labels.append([name, int(LABELS[i])])
    return files | {"dataset.json": json.dumps({"labels": labels}).encode()}


def edm2_folder(place: Path) -> Path:
    for name, content in edm2(place).items():
        path = place / "vae-sd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return place


def edm2_zip(place: Path) -> Path:
    with zipfile.ZipFile(place.with_suffix(".zip"), "w") as archive:
        for name, content in edm2(place).items():
            archive.writestr(name, content)
    return place.with_suffix(".zip")


@pytest.mark.parametrize("layout", [fast_dit, lightning, edm2_folder, edm2_zip])
def test_values_classes_and_constants(good, tmp_path, layout):
    place = layout(tmp_path / "others")
    said = good("encode", "--latents", place, "--out", tmp_path / "set", "--shard-size", "7").err
    source = Shards(tmp_path / "set")
    assert f"{N} latents of" in said and source.index.num_classes == 3
    stored, told = source.read(range(N))
    assert told["label"].tolist() == LABELS.tolist()
    x = source.decode(stored).numpy()
    raw = torch.from_numpy(RAW)
    if layout is lightning:
        mean, std = raw.mean((0, 2, 3), True), raw.std((0, 2, 3), keepdim=True)
        assert stored.numpy() == pytest.approx(RAW, abs=0)
        assert x == pytest.approx(((raw - mean) / std).numpy(), rel=1e-5, abs=1e-6)
        mirrored, _ = source.read(range(N), [True] * N)
        assert np.array_equal(mirrored.numpy(), RAW[..., ::-1])
        assert source.facts.space.shift == pytest.approx(mean.flatten().tolist())
    else:
        assert x == pytest.approx(RAW * np.float32(0.18215), rel=3e-7)
        assert source.facts.space.scale == (0.18215,) * 4
    if layout in (edm2_folder, edm2_zip):
        assert np.array_equal(stored.numpy(), np.concatenate([RAW, STD], 1))
        assert source.facts.space.posterior
    assert "no fault" in good("encode", "--verify", tmp_path / "set").out


def test_what_does_not_fit_is_named(command, tmp_path):
    def refused(place: Path) -> str:
        answer = command("encode", "--latents", place, "--out", tmp_path / "set")
        assert answer.code == 2 and not (tmp_path / "set").exists()
        return answer.err

    (tmp_path / "empty").mkdir()
    assert "no latents of a known layout" in refused(tmp_path / "empty")
    place = fast_dit(tmp_path / "one_lost")
    (place / "imagenet256_labels" / "3.npy").unlink()
    assert "3.npy is in one of them only" in refused(place)
    place = edm2_folder(tmp_path / "unlabelled")
    (place / "vae-sd" / "00000" / "img-mean-std-00000002.npy").unlink()
    assert "img-mean-std-00000002.npy is in dataset.json only" in refused(place)
    place = lightning(tmp_path / "broken")
    (place / "latents_rank00_shard001.safetensors").write_bytes(b"no")
    assert "shard001.safetensors is no sound safetensors file" in refused(place)
    place = lightning(tmp_path / "stats")
    marker = tmp_path / "executed"
    (place / "latents_stats.pt").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(marker))
    assert "latents_stats.pt does not hold mean and std" in refused(place)
    assert not marker.exists()
