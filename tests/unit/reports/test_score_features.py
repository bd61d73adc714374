"""Feature spaces and stored statistics: what they are told apart by, and what a stranger's file may not do."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch

from speed_engine.reports.scores import features, inception, statistics
from speed_engine.reports.scores.features import NetworkSpace, PixelSpace, extract, open_space
from speed_engine.reports.scores.sets import Pictures


def some(num: int = 20, size: int = 4, channels: int = 3, seed: int = 0) -> Pictures:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (num, size, size, channels), dtype=np.uint8)
    return Pictures("some", num, size, channels, lambda at: pixels[at.start : at.stop])


class Net(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.float().mean((1, 2, 3)), x.float().amax((1, 2, 3))], 1)[..., None]


class WithFeatures(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        flat = x.float().flatten(1)
        return flat[:, :5] if return_features else flat.sum(1, keepdim=True)


@pytest.fixture
def network(tmp_path):
    torch.jit.script(Net()).save(str(tmp_path / "net.pt"))
    return tmp_path / "net.pt"


def test_features_do_not_depend_on_batches_and_know_their_pictures() -> None:
    pictures = some()
    whole = extract(PixelSpace(), pictures)
    parts = extract(PixelSpace(), pictures, batch_size=3)
    assert np.array_equal(whole.rows, parts.rows) and whole.sha256 == parts.sha256
    np.testing.assert_allclose(whole.rows, pictures.all().reshape(20, -1) / 255, rtol=1e-6)
    assert extract(PixelSpace(), some(seed=1)).sha256 != whole.sha256
    with pytest.raises(ValueError, match="have 12288 numbers"):
        extract(PixelSpace(), some(2, size=64))


def test_a_network_runs_only_when_it_is_trusted(network) -> None:
    with pytest.raises(
        ValueError, match="a program that runs when it is loaded; add --trust-network"
    ):
        NetworkSpace(network, "bytes", "cpu")
    space = NetworkSpace(network, "bytes", "cpu", trusted=True)
    pixels = some().all().reshape(20, -1).astype(float)
    wanted = np.stack([pixels.mean(1), pixels.max(1)], 1)
    np.testing.assert_allclose(extract(space, some()).rows, wanted, rtol=1e-5)
    unit = extract(NetworkSpace(network, "unit", "cpu", trusted=True), some()).rows
    np.testing.assert_allclose(unit, wanted / 255, rtol=1e-5)
    signed = extract(NetworkSpace(network, "signed", "cpu", trusted=True), some()).rows
    np.testing.assert_allclose(signed, wanted / 127.5 - 1, rtol=1e-4, atol=1e-5)
    assert space.identity["file"] == "net.pt" and len(space.identity["sha256"]) == 64


def test_a_network_is_asked_for_features_where_it_can_give_them(tmp_path) -> None:
    torch.jit.script(WithFeatures()).save(str(tmp_path / "f.pt"))
    grey = some(channels=1)
    rows = extract(NetworkSpace(tmp_path / "f.pt", "bytes", "cpu", trusted=True), grey).rows
    assert np.array_equal(rows, grey.all()[:, :, :, 0].reshape(20, -1)[:, :5])  # grey, repeated


def test_what_is_no_network_is_refused(tmp_path, network) -> None:
    (tmp_path / "text.pt").write_text("no network")
    for name, word in (("text.pt", "no TorchScript file"), ("none.pt", "is not there")):
        with pytest.raises(ValueError, match=word):
            open_space(str(tmp_path / name), trusted=True)
    with pytest.raises(ValueError, match="--weights are Inception's"):
        open_space("pixels", weights=network)

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().flatten(1) / 0

    torch.jit.script(Broken()).save(str(tmp_path / "nan.pt"))
    space = open_space(str(tmp_path / "nan.pt"), trusted=True)
    with pytest.raises(ValueError, match="are not finite"):
        extract(space, some())
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(7, 2))
    torch.jit.script(linear).save(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"cannot take pictures \[20, 3, 4, 4\]"):
        extract(open_space(str(tmp_path / "other.pt"), trusted=True), some())


# ------------------------------------------------------------------------------ stored statistics


def test_statistics_come_back_and_are_of_one_space(tmp_path, network) -> None:
    space = PixelSpace()
    made = statistics.of_features(extract(space, some()), some(), space)
    statistics.save(tmp_path / "new" / "s.npz", made)
    assert statistics.is_one(tmp_path / "new" / "s.npz") and not statistics.is_one(network)
    again = statistics.load(tmp_path / "new" / "s.npz", space, 4)
    assert np.array_equal(again.mean, made.mean) and again.told == made.told
    assert again.features is not None and np.array_equal(again.features, made.features)
    other = NetworkSpace(network, "bytes", "cpu", trusted=True)
    with pytest.raises(ValueError, match=r"another feature space: kind pixels \(now network\)"):
        statistics.load(tmp_path / "new" / "s.npz", other, 4)
    with pytest.raises(ValueError, match="pictures of 4x4, and these are 8x8; give --resize 4"):
        statistics.load(tmp_path / "new" / "s.npz", space, 8)


def test_statistics_of_others_are_told_to_be_of_no_known_network(tmp_path) -> None:
    np.savez(tmp_path / "fid.npz", mu=np.zeros(48), sigma=np.eye(48))
    assert statistics.is_one(tmp_path / "fid.npz")
    found = statistics.load(tmp_path / "fid.npz", PixelSpace(), 4)
    assert found.features is None and "does not say which network" in found.remarks[0]
    np.savez(tmp_path / "bad.npz", mu=np.zeros(4), sigma=np.eye(3))
    with pytest.raises(ValueError, match="do not fit"):
        statistics.load(tmp_path / "bad.npz", PixelSpace(), 4)
    np.savez(tmp_path / "both.npz", arr_0=some().all(), mu=np.zeros(4), sigma=np.eye(4))
    assert not statistics.is_one(tmp_path / "both.npz")  # pictures
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"no sound \.npz"):
        statistics.is_one(tmp_path / "text.npz")


# ------------------------------------------------------------------------------ Inception


class Inception(torch.nn.Module):
    """torch-fidelity's network, as far as it is called."""

    def __init__(self, name, wanted, feature_extractor_weights_path=None, verbose=True) -> None:
        super().__init__()
        assert (name, wanted) == ("inception-v3-compat", ["2048", "logits_unbiased"])
        self.register_buffer("weight", torch.ones(3))
        if feature_extractor_weights_path is not None:
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        mean = x.float().mean((2, 3)) * self.weight
        return mean, mean / 50


@pytest.fixture
def fidelity(monkeypatch, tmp_path):
    package = types.ModuleType("torch_fidelity")
    home = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    home.FeatureExtractorInceptionV3 = Inception  # type: ignore[attr-defined]
    home.URL_INCEPTION_V3 = "https://somewhere/weights.pth"  # type: ignore[attr-defined]
    package.feature_extractor_inceptionv3 = home  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", home)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def test_a_download_is_told_beforehand_and_a_file_needs_none(fidelity, tmp_path, capsys) -> None:
    space = open_space("inception")
    told = capsys.readouterr().err
    assert "91 MB" in told and "https://somewhere/weights.pth" in told and "--weights FILE" in told
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights.pth").touch()
    open_space("inception")
    assert capsys.readouterr().err == ""
    torch.save({"weight": torch.full((3,), 2.0)}, tmp_path / "mine.pth")
    (tmp_path / "checkpoints" / "weights.pth").unlink()
    other = open_space("inception", weights=tmp_path / "mine.pth")
    assert capsys.readouterr().err == "" and other.identity != space.identity
    found, wanted = extract(other, some()), some().all().mean((1, 2))
    np.testing.assert_allclose(found.rows, 2 * wanted, rtol=1e-5)
    assert 1 <= found.more["inception_score"] < 3
    with pytest.raises(ValueError, match="there is no file --weights"):
        open_space("inception", weights=tmp_path / "none.pth")


def test_a_weights_file_runs_no_code(fidelity, tmp_path) -> None:
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    torch.save({"weight": torch.ones(3), "more": Bomb()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        open_space("inception", weights=tmp_path / "bad.pth")


def test_the_inception_score_is_its_formula() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 5)))
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    kl = [sum(row * np.log(row / p.mean(0))) for row in p]
    found = inception.inception_score(logits, splits=1)
    assert found["inception_score"] == pytest.approx(np.exp(np.mean(kl)))
    sure = torch.eye(8).repeat(5, 1).double() * 100
    assert inception.inception_score(sure, splits=1)["inception_score"] == pytest.approx(8)


class Failing:
    """An import that fails in a certain way."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch_fidelity"):
            raise self.error
        return None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("x", name="torch_fidelity"), ["pip install 'speed-engine[score]'"]),
        (ModuleNotFoundError("x", name="torchvision"), ["needs torchvision", "not installed"]),
        (
            RuntimeError("operator torchvision::nms does not exist\nmore"),
            ["torchvision of no known version does not fit torch", "nms does not exist)"],
        ),
        (ImportError("libcudart.so: undefined symbol"), ["does not fit torch", "undefined symbol"]),
    ],
)
def test_the_package_that_is_missing_or_does_not_fit_is_named(monkeypatch, error, words) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Failing(error), *sys.meta_path])
    monkeypatch.setattr(inception, "_version", lambda package: "of no known version")
    with pytest.raises(ValueError) as caught:
        features.open_space("inception")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value) and json.dumps(str(caught.value))
