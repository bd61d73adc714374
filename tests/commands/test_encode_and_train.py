"""encode and train, and `train.py` as a script: data sets and runs that hold what was asked for."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------------------------------------- encode


def stored(folder: Path) -> tuple[list[np.ndarray], list[int]]:
    """Pixels and labels of a set, by nothing but a tar reader."""
    arrays, labels = [], []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                content = file.read()
                if member.name.endswith(".npy"):
                    arrays.append(np.load(io.BytesIO(content)))
                else:
                    labels.append(int(content))
    return arrays, labels


def test_encode_writes_the_digits(data, read_json):
    from sklearn.datasets import load_digits

    index = read_json(data / "index.json")
    assert index["count"] == 1797 and index["num_classes"] == 10
    assert index["shape"] == [1, 8, 8] and [s["count"] for s in index["shards"]] == [1000, 797]
    scans, classes = load_digits(return_X_y=True)
    arrays, labels = stored(data)
    assert labels == classes.tolist()
    ink = np.stack(arrays).reshape(1797, 64) / 255 * 16
    assert np.abs(ink - scans).max() <= 16 / 255 / 2 + 1e-9


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of three grey pictures each, of one brightness a picture."""
    for number in range(6):
        path = tmp_path / "images" / ("cat" if number < 3 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 40 * number + 7).save(path)
    return tmp_path / "images"


def test_encode_takes_a_folder_of_images(good, images, tmp_path, read_json):
    (images / "cat" / "notes.txt").write_text("not a picture")
    words = ("encode", "--images", images, "--out", tmp_path / "set", "--size", "8")
    answer = good(*words, "--channels", "1")
    index = read_json(tmp_path / "set" / "index.json")
    assert index["class_names"] == ["cat", "dog"] and index["shape"] == [1, 8, 8]
    arrays, labels = stored(tmp_path / "set")
    assert labels == [0, 0, 0, 1, 1, 1]
    assert [set(array.ravel().tolist()) for array in arrays] == [{40 * n + 7} for n in range(6)]
    assert "notes.txt" in (tmp_path / "set" / "skipped.json").read_text()
    assert "6 samples" in answer.err


def test_encode_again_changes_nothing(good, data, listing):
    before = listing(data)
    good("encode", "--images", "digits", "--out", data, "--shard-size", "1000")
    assert listing(data) == before


def test_encode_verifies_and_indexes_again(good, command, data, tmp_path, read_json):
    assert "no fault" in good("encode", "--verify", data).out
    copy = tmp_path / "copy"
    copy.mkdir()
    for shard in data.glob("*.tar"):
        shutil.copy(shard, copy)
    good("encode", "--reindex", copy)
    assert read_json(copy / "index.json")["count"] == 1797
    damaged = copy / "shard-000001.tar"
    damaged.chmod(0o644)
    content = bytearray(damaged.read_bytes())
    content[600] ^= 1  # in the second entry's pixels or header, wherever: a bit is a bit
    damaged.write_bytes(content)
    answer = command("encode", "--verify", copy)
    assert answer.code == 1 and "shard-000001.tar" in answer.out


# ----------------------------------------------------------------------------------------------- train


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers_of(run: Path) -> list[dict]:
    """The metrics without the clock."""
    clock = {"images_per_s", "tflops_per_device", "mfu", "data_wait", "time"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines_of(run)]


def test_train_writes_the_run_that_was_configured(run, data, read_json):
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [10, 20]
    assert [line["images"] for line in lines] == [160, 320]
    # The rate of the last update: within the warm-up of 16 steps, and after it.
    assert [line["lr"] for line in lines] == pytest.approx([5e-3 * 10 / 16, 5e-3])
    assert 0 < lines[1]["loss"] < 0.8 * lines[0]["loss"]  # it learns
    assert all(line["images_per_s"] > 0 and line["skipped"] == 0 for line in lines)
    config = read_json(run / "manifest.json")["config"]
    assert config["timesteps"]["k"] == 4 and config["engine"]["kind"] == "torch"
    assert config["train"]["global_batch"] == 16 and config["data"]["path"] == data.name
    (events,) = (run / "tensorboard").iterdir()
    assert events.stat().st_size > 100


def test_train_commits_checkpoints(run, read_json):
    folders = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert folders == ["step-00000010", "step-00000020"]
    newest = run / "checkpoints" / "step-00000020"
    assert read_json(newest / "manifest.json")["step"] == 20
    model, ema = (load_file(newest / f"{name}.safetensors") for name in ("model", "ema"))
    assert model.keys() == ema.keys() and len(model) > 50
    assert all(np.isfinite(value).all() for value in [*model.values(), *ema.values()])
    assert any((model[key] != ema[key]).any() for key in model)
    before = load_file(run / "checkpoints" / "step-00000010" / "model.safetensors")
    assert any((model[key] != before[key]).any() for key in model)


def test_train_says_what_runs_and_how_far(run, good, overrides, tmp_path):
    answer = good("train", "--config", "digits_dit_tiny", *overrides(tmp_path / "run"))
    said = answer.out + answer.err
    loss = lines_of(tmp_path / "run")[-1]["loss"]
    assert re.search(rf"step 20/20 +loss {loss:.4f}", said), said
    for kernel in json.loads((tmp_path / "run" / "manifest.json").read_text())["kernels"]:
        assert re.search(rf"{kernel['op']}\b.*{kernel['backend']}", said)
    assert numbers_of(tmp_path / "run") == numbers_of(run)  # seed and configuration decide


def test_train_py_as_a_script_is_the_same_run(run, overrides, tmp_path):
    """From another folder, with nothing of ours on the path: the same numbers, the same weights.

    One process on engine torch starts without torch's compiler, which takes two seconds to import.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK")}
    words = ["--config", "digits_dit_tiny", "--local_rank=0", *overrides(Path("mine"))]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "speed_engine" / "train.py"), *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert " torch.nn" in done.stderr and " torch._dynamo" not in done.stderr
    assert numbers_of(tmp_path / "mine") == numbers_of(run)
    name = Path("checkpoints") / "step-00000020" / "ema.safetensors"
    mine, theirs = load_file(tmp_path / "mine" / name), load_file(run / name)
    assert all((mine[key] == theirs[key]).all() for key in theirs)
