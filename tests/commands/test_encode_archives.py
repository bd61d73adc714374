"""Images in archives: WebDataset tars and CIFAR, made here as other tools write them."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from speed_engine.data.shards import Shards

RNG = np.random.default_rng(5)


def grey(level: int, ending: str = "png") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (level, level, level)).save(
        content, {"jpg": "jpeg"}.get(ending, ending)
    )
    return content.getvalue()


def tar(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    headers = {"comment": "made by hand"} if form == tarfile.PAX_FORMAT else None
    with tarfile.open(path, "w", format=form, pax_headers=headers) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def encoded(good, tmp_path, read_json):
    """encoded(place, words...) -> (levels of the images, labels or None, index, skipped, said)."""

    def call(place: Path, *words: str):
        out = tmp_path / "out"
        said = good("encode", "--images", place, "--out", out, *words).err
        source = Shards(out)
        stored, told = source.read(range(len(source)))
        label = told["label"].tolist() if "label" in told else None
        skipped = {each["file"]: each["reason"] for each in read_json(out / "skipped.json")}
        return stored.numpy(), label, source.index, skipped, said

    return call


def test_images_with_classes_in_two_tars(encoded, tmp_path):
    long = "long" * 40
    first = {
        "./": b"",
        "./a.cls": b"2\n",
        "./a.png": grey(10),
        "b.jpg": grey(20, "jpg"),
        "b.cls": b"0",
    }
    tar(tmp_path / "set" / "0.tar", first)
    second = {
        f"{long}.webp": grey(30, "webp"),
        f"{long}.json": b'{"label": 1, "url": "x"}',
        "c.cls": b"3",
    }
    tar(tmp_path / "set" / "1.tar", second, tarfile.PAX_FORMAT)
    stored, label, index, skipped, said = encoded(tmp_path / "set", "--size", "8")
    assert np.abs(stored.mean((1, 2, 3)) - [10, 20, 30]).max() < 3
    assert label == [2, 0, 1] and index.num_classes == 3 and "labels up to 2" in said
    assert skipped == {"1.tar/c": "a label or caption without an image"}


def test_named_classes_and_captions(encoded, tmp_path):
    members = {}
    for number, name in enumerate(("10", "café", "2 dogs")):
        members |= {f"x/{number}.png": grey(number), f"x/{number}.txt": b"a cat"}
        members |= {f"x/{number}.cls": name.encode()}
    place = tar(tmp_path / "one.tar", members)
    _, label, index, _, said = encoded(place, "--size", "8")
    assert index.class_names == ["2 dogs", "10", "café"] and label == [1, 2, 0]
    assert "3 captions (.txt) left out" in said


def test_reindex_says_how_arrays_are_read(good, tmp_path):
    content = io.BytesIO()
    np.save(content, np.zeros((16, 16, 3), np.uint8))
    tar(tmp_path / "set" / "0.tar", {"./0.npy": content.getvalue(), "./0.cls": b"4"})
    said = good("encode", "--reindex", tmp_path / "set").said
    assert "1 samples, pixels 16 x 16 x 3, 5 classes" in said and "read as 16 channels" in said


def test_damaged_tars_are_refused_with_their_place(command, tmp_path):
    def refused(place: Path) -> str:
        answer = command("encode", "--images", place, "--out", tmp_path / "out")
        assert answer.code == 2 and not (tmp_path / "out").exists()
        return answer.err

    members = {f"{i}.png": grey(i) for i in range(3)}
    whole = tar(tmp_path / "a.tar", members).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1500])
    assert "cut.tar, sample" in refused(tmp_path / "cut.tar")
    (tmp_path / "bit.tar").write_bytes(whole[:600] + whole[600:].replace(b"2.png", b"3.png"))
    assert "bit.tar, sample 1: the checksum" in refused(tmp_path / "bit.tar")
    two = tar(tmp_path / "two.tar", {"1.png": grey(1), "1.jpg": grey(1, "jpg")})
    assert "two.tar, sample 0: '1' has 2 images" in refused(two)


# ------------------------------------------------------------------------------------------------ CIFAR

PIXELS = RNG.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
NAMES = [f"name{i}" for i in range(10)]


def pickled(hundred: bool) -> dict[str, bytes]:
    """Two images a batch; of CIFAR-100 all in one."""
    files = {}
    for number, rows in enumerate(
        [slice(0, 10)] if hundred else [slice(i, i + 2) for i in range(0, 10, 2)]
    ):
        label = list(range(10))[rows]
        batch = {b"data": PIXELS[rows].reshape(-1, 3072), b"filenames": [b"x"] * len(label)}
        batch |= (
            {b"fine_labels": [90 + i for i in label], b"coarse_labels": label}
            if hundred
            else {b"labels": label}
        )
        files["train" if hundred else f"data_batch_{number + 1}"] = pickle.dumps(batch, protocol=2)
    meta = (
        {b"fine_label_names": [b"fine%d" % i for i in range(100)]}
        if hundred
        else {"label_names": NAMES}
    )
    return files | {
        "meta" if hundred else "batches.meta": pickle.dumps(meta, protocol=2),
        "test_batch": b"no",
    }


def binary(hundred: bool) -> dict[str, bytes]:
    rows = [bytes([0, 90 + i] if hundred else [i]) + PIXELS[i].tobytes() for i in range(10)]
    if hundred:
        return {
            "train.bin": b"".join(rows),
            "fine_label_names.txt": b"".join(b"fine%d\n" % i for i in range(100)),
        }
    batches = {f"data_batch_{n + 1}.bin": b"".join(rows[2 * n : 2 * n + 2]) for n in range(5)}
    return batches | {"batches.meta.txt": ("\n".join(NAMES) + "\n\n").encode()}


def packed(files: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-x/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def unpacked(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("files", "place", "hundred"),
    [
        (pickled(False), packed, False),
        (pickled(True), unpacked, True),
        (binary(False), unpacked, False),
        (binary(True), packed, True),
    ],
)
def test_cifar(encoded, tmp_path, files, place, hundred):
    name = "cifar.tar.gz" if place is packed else "cifar"
    stored, label, index, _, said = encoded(place(files, tmp_path / name), "--size", "32")
    assert np.array_equal(stored, PIXELS)
    assert label == [90 * hundred + i for i in range(10)]
    assert index.class_names == ([f"fine{i}" for i in range(100)] if hundred else NAMES)
    assert "10 images" in said


class Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_pickle_that_is_not_cifars_is_one_sentence_and_never_run(command, tmp_path):
    marker = tmp_path / "executed"
    good = pickled(False)
    hostile = pickle.dumps({"data": Command(marker), "labels": [0, 1]}, protocol=2)
    for number, content in enumerate(
        (hostile, pickle.dumps([1]), pickle.dumps({"data": b"x", "labels": [1]}), b"\x80\x02}", b"")
    ):
        place = unpacked(good | {"data_batch_3": content}, tmp_path / f"cifar{number}")
        answer = command("encode", "--images", place, "--out", tmp_path / "out")
        assert answer.code == 2 and "data_batch_3" in answer.err and "CIFAR's" in answer.err
        assert answer.err.count("\n") == 1 and "Traceback" not in answer.err
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
