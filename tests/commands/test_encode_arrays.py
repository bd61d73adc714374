"""`encode --arrays`: from arrays to a network that is told a class and a vector, and a video that is none the wiser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from speed_engine.data.shards import Shards

NUM = 40
GENERATOR = np.random.default_rng(3)
X = GENERATOR.integers(0, 255, (NUM, 1, 8, 8), dtype=np.uint8)
LABEL = np.arange(NUM) % 3
VECTOR = GENERATOR.normal(size=(NUM, 3)).astype(np.float32)
VIDEO_MODEL = """
import math
import torch
from torch import nn
from speed_engine.kinds import Section

TAKES = ()

class Config(Section):
    kind: str = "mine"
    width: int = 4

class Video(nn.Module):
    def __init__(self, config, facts, num_outputs):
        super().__init__()
        self.config, self.facts, self.num_outputs = config, facts, num_outputs
        self.inside = nn.Conv3d(facts.shape[0], config.width, 1)
        self.outside = nn.Conv3d(config.width, num_outputs, 1)

    def forward(self, x, time_B):
        hidden = self.inside(x.to(self.inside.weight.dtype))
        wave = torch.cos(time_B / 100).to(hidden.dtype)[:, None, None, None, None]
        return self.outside(torch.tanh(hidden + wave))

def build(config, facts, num_outputs, *, seed=0, device="cpu", dtype=None, backends=None):
    torch.manual_seed(seed)
    with torch.device(device):
        return Video(config, facts, num_outputs)

def macs_per_sample(config, facts, num_outputs):
    return math.prod(facts.shape[1:]) * config.width * (facts.shape[0] + num_outputs)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, good) -> Path:
    """A set of 8x8 pixels with a class and a vector each."""
    folder = tmp_path_factory.mktemp("arrays")
    names = np.array(["cat", "dog", "owl"])
    np.savez(folder / "all.npz", x=X, label=LABEL, class_names=names, vector=VECTOR)
    good("encode", "--arrays", folder / "all.npz", "--out", folder / "set", "--shard-size", 16)
    return folder


def test_arrays_come_back_by_name_in_any_order(told: Path, good) -> None:
    source = Shards(told / "set")
    order = [39, 0, 17, 17, 5]
    stored, arrays = source.read(order)
    assert np.array_equal(stored.numpy(), X[order])
    assert arrays["label"].tolist() == LABEL[order].tolist()
    assert np.array_equal(arrays["vector"].numpy(), VECTOR[order])
    label, vector = (source.facts.conditions[name] for name in ("label", "vector"))
    assert label.names == ("cat", "dog", "owl") and vector.kind == "vector"
    assert vector.arrays["vector"].shape == (3,) and vector.arrays["vector"].dtype == "float32"
    assert json.loads((told / "set" / "index.json").read_text())["version"] == 2
    assert "no fault" in good("encode", "--verify", told / "set").out
    before = source.index.fingerprint
    good("encode", "--reindex", told / "set")
    again = Shards(told / "set").index
    assert again.fingerprint == before


def test_the_same_arrays_in_a_folder_are_the_same_set(told: Path, tmp_path: Path, good) -> None:
    (tmp_path / "npy").mkdir()
    for name, array in {"x": X, "label": LABEL, "vector": VECTOR}.items():
        np.save(tmp_path / "npy" / f"{name}.npy", array)
    good("encode", "--arrays", tmp_path / "npy", "--out", tmp_path / "set", "--shard-size", 16)
    one, other = Shards(told / "set"), Shards(tmp_path / "set")
    assert [s.sha256 for s in one.index.shards] == [s.sha256 for s in other.index.shards]


def test_a_network_is_told_class_and_vector_from_shards_to_samples(
    told: Path, tmp_path: Path, good, command
) -> None:
    run = tmp_path / "run"
    small = ["model.size=tiny/2", "model.depth=1", "model.hidden_size=16", "model.num_heads=1"]
    words = ["train", "--config", "digits_dit_tiny", "engine=torch", "data.kind=shards", *small]
    words += [f"data.path={told / 'set'}", f"run_dir={run}", "train.global_batch=8", "log.every=1"]
    words += ["conditions.vector.dropout=0.5", "train.steps=4", "checkpoint.every=2"]
    good(*words)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["config"]["conditions"] == {
        "label": {"kind": "label", "dropout": 0.1},
        "vector": {"kind": "vector", "dropout": 0.5},
    }
    assert manifest["data"]["conditions"]["vector"]["null"] is True
    plan = good("plan", *words[1:]).out
    assert "vector float32 [3], dropped at 0.5" in plan and "3 values" in plan
    common = ["sample", "--run", run, "--num", 2, "--sampler", "ddim", "--steps", 2]
    for number, ask in enumerate(["0.1,0.2,0.3", "3,-2,1"]):
        asked = ["--condition", f"vector={ask}", "--label", "owl", "--out", tmp_path / str(number)]
        good(*common, *asked, "--guidance", 2)
    with np.load(tmp_path / "0" / "samples.npz") as one:
        assert one["labels"].tolist() == [2, 2] and one["arr_0"].shape == (2, 8, 8, 1)
    for wrong, word in (
        ("vector=1,2", "3 finite numbers"),
        ("label=emu", "cat, dog, owl"),
        ("text=hello", "not told text"),
        ("vector", "NAME=REQUEST"),
    ):
        answer = command(*common, "--out", tmp_path / "no", "--condition", wrong)
        assert answer.code == 2 and word in answer.err and not (tmp_path / "no").exists()


def test_a_model_that_does_not_take_the_condition_is_refused_or_spared_it(
    tmp_path: Path, good, command
) -> None:
    np.savez(tmp_path / "a.npz", x=X, camera=VECTOR, tokens=np.arange(NUM))
    good("encode", "--arrays", tmp_path / "a.npz", "--out", tmp_path / "set")
    words = ["train", "--config", "digits_dit_tiny", "engine=torch", "data.kind=shards"]
    words += [f"data.path={tmp_path / 'set'}", f"run_dir={tmp_path / 'run'}", "train.steps=1"]
    words += ["model.size=tiny/2", "model.depth=1", "model.hidden_size=16", "model.num_heads=1"]
    answer = command(*words)
    assert answer.code == 2 and "conditions.camera=null" in answer.err
    assert not (tmp_path / "run").exists()
    answer = command(*words, "conditions.camera=null")
    assert answer.code == 2 and "conditions.tokens=null" in answer.err
    spared = ["conditions.camera=null", "conditions.tokens=null"]
    good(*words, *spared, "train.global_batch=4")
    answer = command(*words, "conditions.label.dropout=0.2", *spared)
    assert answer.code == 2 and "conditions.label" in answer.err


def test_a_video_is_encoded_trained_on_and_sampled(
    tmp_path: Path, good, command, monkeypatch
) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "film.py").write_text(VIDEO_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    video = GENERATOR.normal(size=(NUM, 2, 3, 4, 4)).astype(np.float16)
    np.savez(tmp_path / "v.npz", x=video)
    good(
        "encode",
        "--arrays",
        tmp_path / "v.npz",
        "--out",
        tmp_path / "set",
        "--scale",
        2,
        "--shift",
        0.5,
    )
    source = Shards(tmp_path / "set", check_scale=False)
    x = source.decode(source.read([7])[0])
    np.testing.assert_allclose(x[0].numpy(), (video[7].astype(np.float32) - 0.5) * 2, rtol=1e-6)
    run = tmp_path / "run"
    words = ["train", "--config", "digits_dit_tiny", "engine=torch", "model.kind=lab.film"]
    words += ["data.kind=shards", f"data.path={tmp_path / 'set'}", "train.steps=3"]
    words += ["data.check_scale=false", f"run_dir={run}", "train.global_batch=8"]
    good(*words)
    from speed_engine.reports.run_folder import open_run
    from speed_engine.sampling.process import Process, Recipe, sample

    opened = open_run(run, ["lab.film"])
    config = opened.config
    process = Process.of(
        opened.table().schedule, config.objective, config.learned_variance, opened.facts.shape, {}
    )
    model = opened.model()
    assert isinstance(model, nn.Module)
    drawn: Tensor = sample(model, process, Recipe("ddim", 3), numbers=range(2))
    assert drawn.shape == (2, 2, 3, 4, 4) and torch.isfinite(drawn).all()
    words = ["sample", "--run", run, "--trust", "lab.film", "--num", 2, "--device", "cpu"]
    words += ["--sampler", "ddim", "--steps", 3, "--out", tmp_path / "drawn"]
    good(*words)
    files = sorted((tmp_path / "drawn" / "arrays").iterdir())
    assert [file.name for file in files] == ["000000.npy", "000001.npy"]
    stored = np.stack([np.load(file) for file in files])  # as the set holds them: x / scale + shift
    np.testing.assert_allclose(stored, drawn.numpy() / 2 + 0.5, rtol=1e-5, atol=1e-6)
    before = [file.stat().st_mtime_ns for file in files]
    good(*words)
    assert [file.stat().st_mtime_ns for file in files] == before
    answer = command("score", "--samples", tmp_path / "drawn", "--reference", "digits")
    assert answer.code == 2 and "holds arrays and no pictures" in answer.err
    answer = command(*words[:-1], tmp_path / "other", "--vae", tmp_path)
    assert answer.code == 2 and "--vae" in answer.err and "[2, 3, 4, 4]" in answer.err


def test_pixels_of_four_channels_are_drawn_as_bytes(tmp_path: Path, good) -> None:
    pixels = GENERATOR.integers(0, 255, (NUM, 4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels, label=LABEL)
    good("encode", "--arrays", tmp_path / "a.npz", "--out", tmp_path / "set")
    words = ["train", "--config", "digits_dit_tiny", "engine=torch", "data.kind=shards"]
    words += [f"data.path={tmp_path / 'set'}", f"run_dir={tmp_path / 'run'}", "train.steps=1"]
    words += ["model.size=tiny/2", "model.depth=1", "model.hidden_size=16", "model.num_heads=1"]
    good(*words, "train.global_batch=4")
    drawn = tmp_path / "drawn"
    good("sample", "--run", tmp_path / "run", "--out", drawn, "--num", 2, "--steps", 2)
    one = np.load(drawn / "arrays" / "000001.npy")
    assert one.shape == (4, 8, 8) and one.dtype == np.uint8 and one.std() > 1
    assert np.load(drawn / "labels.npy").tolist() == [0, 1]


def test_channels_that_are_not_of_unit_scale_are_named_and_mended(
    tmp_path: Path, good, command
) -> None:
    latents = GENERATOR.normal(size=(NUM, 3, 8, 8)) * np.array([1.0, 3.0, 0.9])[:, None, None] + 0.5
    np.savez(tmp_path / "a.npz", x=latents.astype(np.float32))
    data, words = tmp_path / "set", ["--config", "digits_dit_tiny", "data.kind=shards"]
    words += [f"data.path={data}", "engine=torch", "train.steps=1", "train.global_batch=4"]
    words += ["model.size=tiny/2", "model.depth=1", "model.hidden_size=16", "model.num_heads=1"]
    good("encode", "--arrays", tmp_path / "a.npz", "--out", data, "--scale", 1)
    said = "root mean square of channel 1 (3"
    assert said in good("train", *words, f"run_dir={tmp_path / 'one'}").err
    assert said in good("plan", *words).out
    good("encode", "--reindex", data, "--scale", "auto")
    source = Shards(data)
    assert np.allclose(source.mean, 0, atol=1e-6) and np.allclose(source.std, 1, atol=1e-6)
    x = source.decode(source.read(range(NUM))[0])
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-3)
    assert said not in good("train", *words, f"run_dir={tmp_path / 'two'}").err
    good("encode", "--reindex", data, "--scale", "1,0.5,2", "--shift", "0,1,-1")
    space = Shards(data).facts.space
    assert space.scale == (1.0, 0.5, 2.0) and space.shift == (0.0, 1.0, -1.0)
    for wrong, word in (
        ("1,2", "2 numbers for 3 channels"),
        ("0,1,1", "above 0"),
        ("nan", "finite"),
    ):
        answer = command("encode", "--reindex", data, "--scale", wrong)
        assert answer.code == 2 and word in answer.err


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"label": LABEL}, "no array x"),
        ({"x": X, "label": LABEL[:3]}, "x has 40 samples"),
        ({"x": X, "label": VECTOR}, "must be N integers"),
        ({"x": X.astype(np.float64)}, "uint8, float16 or float32"),
        ({"x": X[:, 0, 0]}, "of the shape (N, C, ...)"),
        ({"x": X, "vector": VECTOR.astype(np.complex64)}, "vector is complex64"),
        ({"x": X, "Camera": VECTOR}, "cannot be an array's name"),
        ({"x": X.astype(np.float32)}, "--scale"),
        ({"x": X, "label": LABEL - 1}, "sample 0: the label -1 is not from 0"),
        ({"x": X, "vector": np.full((NUM, 2), np.nan, np.float32)}, "NaN"),
        ({"x": X, "vector": np.array([None] * NUM)}, "allow_pickle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_cannot_be_stored(arrays, word: str, tmp_path: Path, command) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    answer = command("encode", "--arrays", tmp_path / "a.npz", "--out", tmp_path / "set")
    assert answer.code == 2 and word in answer.err and "Traceback" not in answer.err, answer.err
    assert not (tmp_path / "set").exists()
