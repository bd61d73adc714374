"""score as it is typed: every kind of place on both sides, six lines, a file, and what is not compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def places(good, data, tmp_path_factory) -> dict[str, Path | str]:
    """The real scans in every form that a reference can have."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("places")
    scans, classes = load_digits(return_X_y=True)
    pixels = np.round(scans * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    (folder / "classes").mkdir()
    for number, (picture, label) in enumerate(zip(pixels, classes, strict=True)):
        place = folder / "classes" / f"class {label}" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(picture[..., 0]).save(place)
    np.savez(folder / "reference.npz", arr_0=pixels)
    return {
        "digits": "digits", "encoded": data, "classes": folder / "classes",
        "archive": folder / "reference.npz",
    }  # fmt: skip


def lines(answer) -> list[str]:
    found = answer.out.replace(
        "\n" + " " * 13, " "
    ).splitlines()  # rows that were broken are whole again
    heads = ["samples", "reference", "Frechet", "kernel", "neighbours", "also"]
    assert [line.split()[0] for line in found] == heads
    return found


def test_one_set_in_every_form_is_one_reference(good, samples, places, tmp_path, read_json):
    words = ["score", "--samples", samples, "--features", "pixels"]
    reports = {}
    for name, place in places.items():
        out = tmp_path / f"{name}.json"
        told = lines(good(*words, "--reference", place, "--out", out))
        assert str(out) in told[-1] and "20 of samples, ddim 5 steps, guidance 1.5" in told[0]
        reports[name] = read_json(out)
        assert reports[name]["recipe"] == read_json(samples / "recipe.json")
    first = reports["digits"]
    for name, report in reports.items():
        assert report["reference"]["num"] == 1797
        for key in ("frechet", "kernel", "neighbours"):
            # A folder of classes has another order, and so other random parts.
            if name != "classes":
                assert report[key] == first[key], (name, key)
        assert report["frechet"]["distance"] == pytest.approx(first["frechet"]["distance"])
        assert report["measured"]["space"] == {"kind": "pixels"}


def test_samples_may_be_any_place_too(good, places, tmp_path, read_json, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["score", "--samples", places["classes"], "--features", "pixels"]
    told = lines(good(*words, "--reference", places["archive"]))
    report = read_json(tmp_path / "score-classes.json")  # not among the user's pictures
    assert "score-classes.json" in told[-1] and report["recipe"] is None
    assert report["frechet"]["distance"] < 1e-9 and report["neighbours"]["coverage"] == 1
    # The other numbers of the digits' own judge, of pictures that `sample` did not draw.
    good("score", "--samples", places["archive"], "--reference", "digits", "--out", "own.json")
    assert read_json(tmp_path / "own.json")["memorisation"]["copies"] == 1


def test_a_reference_is_stored_and_given_again(good, command, samples, places, tmp_path, read_json):
    words = ["score", "--samples", samples, "--features", "pixels", "--out", tmp_path / "a.json"]
    answer = good(*words, "--reference", places["archive"], "--store", tmp_path / "s.npz")
    assert f"kept in {tmp_path / 's.npz'}" in " ".join(answer.err.split())
    first = read_json(tmp_path / "a.json")
    words[-1] = tmp_path / "b.json"
    good(*words, "--reference", tmp_path / "s.npz")
    again = read_json(tmp_path / "b.json")
    assert again["reference"] == first["reference"] and again["measured"] == first["measured"]
    assert again["frechet"]["distance"] == pytest.approx(first["frechet"]["distance"])
    assert again["neighbours"] == first["neighbours"] and again["kernel"] == first["kernel"]
    # Moments alone, as other tools store them.
    with np.load(tmp_path / "s.npz") as arrays:
        np.savez(tmp_path / "fid.npz", mu=arrays["mean"], sigma=arrays["covariance"])
    answer = good(*words, "--reference", tmp_path / "fid.npz")
    assert "does not say which network" in answer.err and "only the Frechet distance" in answer.err
    moments = read_json(tmp_path / "b.json")
    assert moments["frechet"]["distance"] == pytest.approx(first["frechet"]["distance"])
    assert "not told" in lines(answer)[3]
    np.savez(tmp_path / "fid.npz", mu=np.zeros(7), sigma=np.eye(7))
    answer = command(*words, "--reference", tmp_path / "fid.npz")
    assert answer.code == 2 and "statistics of 7 features, and this space has 64" in answer.err


def test_a_network_of_ones_own(good, command, samples, places, tmp_path, read_json):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    torch.jit.script(torch.nn.Sequential(*layers)).save(str(tmp_path / "net.pt"))
    words = ["score", "--samples", samples, "--reference", places["archive"]]
    words += ["--features", tmp_path / "net.pt", "--out", tmp_path / "a.json"]
    answer = command(*words)
    assert answer.code == 2 and "--trust-network" in answer.err
    answer = command(*words, "--trust-network")
    assert answer.code == 2 and "see --network-input" in answer.err  # it takes no bytes
    told = lines(good(*words, "--trust-network", "--network-input", "signed"))
    assert "features: net.pt (" in told[1] and "given signed" in told[1]
    report = read_json(tmp_path / "a.json")
    assert report["measured"]["space"]["input"] == "signed" and report["frechet"]["distance"] > 0


def test_only_what_was_measured_alike_is_compared(good, command, samples, places, tmp_path):
    files = {}
    for name, more in {
        "a": [], "b": [], "seed": ["--seed", "1"], "large": ["--resize", "16"],
        "own": ["--features"],
    }.items():  # fmt: skip
        files[name] = tmp_path / f"{name}.json"
        words = ["score", "--samples", samples, "--reference", "digits", "--out", files[name]]
        good(*words, *([] if name == "own" else ["--features", "pixels", *more]))
    answer = good("score", "--compare", files["a"], files["b"])
    head, first, second = answer.out.splitlines()
    assert head.split()[:4] == ["Frechet", "same", "size", "kernel"]
    assert head.split()[4:] == ["precision", "recall", "density", "coverage"]
    assert first.split()[1:] == second.split()[1:]
    for name, word in (("seed", "seed 1 and 0"), ("large", "size of pictures 16 and 8")):
        answer = command("score", "--compare", files["a"], files[name])
        assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
        assert "not measured alike" in answer.err and word in answer.err
    answer = command("score", "--compare", files["a"], files["own"])
    assert answer.code == 2 and "feature space" in answer.err
    old = json.loads(files["b"].read_text())
    del old["measured"]
    files["b"].write_text(json.dumps(old))
    answer = command("score", "--compare", files["a"], files["b"])
    assert answer.code == 2 and "score again" in answer.err


def test_pictures_of_other_sizes_are_scaled_and_it_is_said(
    good, command, places, samples, tmp_path
):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, size in enumerate([(16, 20)] * 12 + [(31, 17)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{number}.png")
    out = ["--out", tmp_path / "a.json", "--features", "pixels"]
    answer = good("score", "--samples", samples, "--reference", folder, *out)
    assert "pictures of photos are cropped to their centre square and scaled to 8x8" in answer.err
    answer = command("score", "--samples", folder, "--reference", "digits", *out)
    assert answer.code == 2 and "give --resize" in answer.err
    answer = good("score", "--samples", folder, "--reference", "digits", "--resize", "8", *out)
    assert "pictures of photos are cropped" in answer.err
    (folder / "notes.txt").write_text("no picture, by its name")
    answer = good("score", "--samples", samples, "--reference", folder, *out)
    assert "left out of photos: 1 of its files (notes.txt" in answer.err
    (folder / "3.png").write_bytes(b"no picture")
    answer = command("score", "--samples", folder, "--reference", "digits", "--resize", "8", *out)
    assert answer.code == 2 and "3.png cannot be decoded" in answer.err


def test_tars_are_read_a_picture_at_a_time_and_a_summary_takes_any_score(
    good, run, samples, places, tmp_path, read_json
):
    import tarfile

    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for number, path in enumerate(sorted((Path(places["classes"]) / "class 3").iterdir())):
            archive.add(path, f"{number:03d}.png")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    drawn = Path(shutil.copytree(samples, copy / "samples"))
    good("score", "--samples", drawn, "--reference", tmp_path / "set.tar", "--features", "pixels")
    report = read_json(drawn / "score.json")
    assert report["reference"]["num"] == len(list((Path(places["classes"]) / "class 3").iterdir()))
    good("summary", "--run", copy)
    told = read_json(copy / "summary.json")
    assert told["frechet_distance"] == report["frechet"]["same_size"]["mean"]
    assert told["class_agreement"] is None and "nearest_scan_ratio" not in told


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "give --samples and --reference"),
        (["--samples", "{samples}"], "give --samples and --reference"),
        (["--samples", "{samples}", "--reference", "nowhere"], "nowhere is not there"),
        (["--samples", "{samples}", "--reference", "digits", "--batch-size", "0"], "--batch-size"),
        (["--samples", "{samples}", "--reference", "digits", "--store", "x.npz"], "--store"),
        (["--samples", "{text}", "--reference", "digits"], "not a folder"),
        (["--samples", "{odd}", "--reference", "digits"], "arr_0, uint8"),
        (["--samples", "{float}", "--reference", "digits"], "must be uint8"),
        (["--compare", "{text}"], "two reports"),
        (["--compare", "{text}", "{text}"], "no report of `score`"),
    ],
)
def test_mistakes(command, samples, tmp_path, words, named):
    (tmp_path / "text").write_text("text")
    np.savez(tmp_path / "odd.npz", weights=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((3, 8, 8, 1)))
    there = {"samples": samples, "text": tmp_path / "text"}
    there |= {"odd": tmp_path / "odd.npz", "float": tmp_path / "float.npz"}
    answer = command("score", *(word.format(**there) for word in words))
    assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert named in answer.err
    assert not list(tmp_path.glob("*.json"))


def test_latents_are_decoded_by_their_autoencoder(good, command, places, tmp_path, read_json):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2,
        sample_size=16, latent_channels=4, scaling_factor=1.5,
    ).save_pretrained(tmp_path / "vae", safe_serialization=True)  # fmt: skip
    few = tmp_path / "few"
    for label in ("class 0", "class 1"):
        (few / label).mkdir(parents=True)
        for path in sorted((Path(places["classes"]) / label).iterdir())[:8]:
            shutil.copy(path, few / label)
    good(
        "encode", "--images", few, "--out", tmp_path / "latents", "--mode", "latents",
        "--size", "16", "--vae", tmp_path / "vae",
    )  # fmt: skip
    words = ["score", "--samples", tmp_path / "latents", "--reference", few, "--features", "pixels"]
    words += ["--out", tmp_path / "a.json"]
    answer = command(*words)
    assert answer.code == 2 and "holds latents; give --vae" in answer.err
    answer = good(*words, "--vae", tmp_path / "vae")
    assert "is decoded from latents" in answer.err
    report = read_json(tmp_path / "a.json")
    assert report["num_samples"] == 16 and report["measured"]["size"] == 16
