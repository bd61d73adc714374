"""Hugging Face data sets as parquet and arrow files, made here: pictures and classes come through `encode --images`."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from speed_engine.data.shards import Shards

N = 9
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)
LABELS = [2, 0, 1, 2, 0, 0, 1, 2, 2]
NAMES = ["bird", "cat", "dog"]


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def rows(first=0, last=N, **columns):
    struct = [{"bytes": png(PIXELS[i]), "path": f"{i}.png"} for i in range(first, last)]
    return {"image": struct, "label": LABELS[first:last], **columns}


def table(columns, names=NAMES, label="label"):
    """As the library `datasets` lays it out, with its notes in the schema."""
    pa = pytest.importorskip("pyarrow")
    features = {"image": {"_type": "Image"}}
    if names is not None:
        features[label] = {"_type": "ClassLabel", "names": names}
    notes = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(notes)


def parquet(path, columns, rows_of_group=2, keep=N, **notes):
    pq = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(columns, **notes).slice(0, keep), path, row_group_size=rows_of_group)
    return path


def arrow(path, columns, as_file=False, **notes):
    pa = pytest.importorskip("pyarrow")
    made = table(columns, **notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with kind(str(path), made.schema) as writer:
        writer.write_table(made, max_chunksize=4)
    return path


def encoded(good, place, out, *words):
    said = good("encode", "--images", place, "--out", out, "--size", 8, "--shard-size", 4, *words)
    source = Shards(out)
    stored, told = source.read(range(len(source)))
    return source, stored.numpy().transpose(0, 2, 3, 1), told, said.err


def hub(place):
    parquet(place / "data" / "train-00000-of-00002.parquet", rows(0, 5))
    parquet(place / "data" / "train-00001-of-00002.parquet", rows(5, N), 100)
    parquet(place / "data" / "test-00000-of-00001.parquet", rows(0, 2))
    return place


def saved(place):
    arrow(place / "data-00000-of-00002.arrow", rows(0, 5))
    arrow(place / "data-00001-of-00002.arrow", rows(5, N))
    (place / "dataset_info.json").write_text("{}")
    return place


def one_file(place):
    return arrow(place / "all.arrow", rows(), as_file=True)


@pytest.mark.parametrize("layout", [hub, saved, one_file])
def test_pictures_and_classes(good, tmp_path, layout):
    place = layout(tmp_path / "given")
    source, pixels, told, said = encoded(good, place, tmp_path / "set")
    assert np.array_equal(pixels, PIXELS) and told["label"].tolist() == LABELS
    assert source.index.class_names == NAMES
    assert "3 classes: 0 = bird (3), 1 = cat (2), 2 = dog (4)" in " ".join(said.split())
    left_out = "1 files of other parts are left out, test-00000-of-00001.parquet first" in said
    assert left_out == (layout is hub)


def test_names_as_text_plain_bytes_and_what_is_missing(good, tmp_path):
    label = ["10", "9", "9", None, "10", "9", "9", "9", "10"]
    image = [png(each) for each in PIXELS]
    image[1] = b"no picture"
    place = parquet(
        tmp_path / "a.parquet", {"img": image, "label": label, "text": ["x"] * N}, names=None
    )
    source, pixels, told, said = encoded(good, place, tmp_path / "set")
    assert source.index.class_names == ["9", "10"]
    assert told["label"].tolist() == [1, 0, 1, 0, 0, 0, 1]
    assert np.array_equal(pixels, PIXELS[[0, 2, 4, 5, 6, 7, 8]])
    assert "text of each picture is not stored" in said
    skipped = json.loads((tmp_path / "set" / "skipped.json").read_text())
    assert [each["file"] for each in skipped] == ["a.parquet/0000003", "a.parquet/0000001"]
    source, pixels, told, _ = encoded(good, place, tmp_path / "bare", "--no-labels")
    assert not source.index.num_classes and len(pixels) == N - 1


def test_two_kinds_of_classes_and_rows_without_bytes(good, tmp_path):
    columns = rows(coarse_label=[0] * N, fine_label=LABELS)
    del columns["label"]
    columns["image"][4] = {"bytes": None, "path": "elsewhere.png"}
    place = parquet(tmp_path / "a.parquet", columns, label="fine_label")
    source, pixels, _, _ = encoded(good, place, tmp_path / "set")
    assert source.index.class_names == NAMES and len(pixels) == N - 1
    skipped = json.loads((tmp_path / "set" / "skipped.json").read_text())
    assert skipped == [{"file": "a.parquet/0000004", "reason": "the table holds no bytes of it"}]


def damaged(place):
    path = parquet(place / "a.parquet", rows())
    path.write_bytes(path.read_bytes()[:-20])


def damaged_within(place):
    path = parquet(place / "a.parquet", rows(), 100)
    content = bytearray(path.read_bytes())
    content[4:600] = bytes(596)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (damaged, "a.parquet cannot be read ("),
        (damaged_within, "a.parquet"),
        (lambda p: parquet(p / "a.parquet", {"label": LABELS}), "no column of pictures"),
        (
            lambda p: parquet(p / "a.parquet", rows(), names=["a"]),
            "0: the label 2 is not from 0 to 0",
        ),
        (lambda p: parquet(p / "a.parquet", rows(), keep=0), "holds no picture"),
        (
            lambda p: [parquet(p / f"{n}-0.parquet", rows()) for n in ("test", "validation")],
            "holds several parts (test, validation) and none is called train",
        ),
        (
            lambda p: [
                parquet(p / "a.parquet", rows()),
                parquet(p / "b.parquet", {"image": rows()["image"]}),
            ],
            "b.parquet has image image, label none",
        ),
    ],
)
def test_mistakes_are_one_sentence(command, tmp_path, make, reason):
    pytest.importorskip("pyarrow")
    place = tmp_path / "given"
    place.mkdir()
    make(place)
    answer = command("encode", "--images", place, "--out", tmp_path / "out")
    assert answer.code == 2 and reason in answer.err and "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_without_pyarrow_the_cure_is_told(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    answer = command("encode", "--images", tmp_path, "--out", tmp_path / "out")
    assert answer.code == 2 and "`pip install pyarrow`" in answer.err
