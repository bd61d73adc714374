"""Manifests of real checkpoints with damage of every kind: refused in a sentence, or as sound as before."""

import copy
import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from speed_engine import train
from speed_engine.reports.run_folder import open_run
from speed_engine.training import sealed
from speed_engine.training.checkpoint import CheckpointError, newest, verified

SETTINGS = [
    "model.depth=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "train.global_batch=8",
    "checkpoint.every=1",
    "engine=torch",
]


def run_train(folder: Path, *overrides: str) -> int:
    place = [f"run_dir={folder}", f"data.path={folder.parent / 'data'}"]
    words = ["--config=digits_dit_tiny", *SETTINGS, *place, *overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words])
        return train.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "run"
    assert run_train(folder, "train.steps=2") == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to damage: checkpoints of the steps 1 and 2."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def step_2(run: Path) -> Path:
    return run / "checkpoints" / "step-00000002"


def first_format(manifest: dict) -> dict:
    """The same run as the first version wrote it."""
    old = copy.deepcopy({k: v for k, v in manifest.items() if k in sealed.FIRST_FORMAT})
    config, data = old["config"], old["data"]
    config["model"]["label_dropout"] = config.pop("conditions")["label"]["dropout"]
    shape, samples, print_ = data["shape"], data["num_samples"], data["fingerprint"]
    old["data"] = {"shape": shape, "num_classes": 10, "num_samples": samples, "fingerprint": print_}
    old["data"] |= {"space": "pixels", "scale": 1 / 127.5, "shift": 127.5}
    return old


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def forge(path: Path, change) -> None:
    """Change the manifest and seal it again: what a bug or a forger does, not a disk."""
    value = json.loads(path.read_text())
    del value["sha256"]
    change(value)
    path.write_text(json.dumps(sealed.seal(value)))


def test_bit_flips_are_refused_or_change_nothing(run):
    path = step_2(run) / "manifest.json"
    sound, content = verified(step_2(run)).manifest, path.read_bytes()
    draw, refused = random.Random(0), 0
    places = [(draw.randrange(len(content)), draw.randrange(8)) for _ in range(1500)]
    # All bits of the fields that say what the rest means.
    for field in (b'"format"', b'"sha256"', b'"step"'):
        start = content.index(field)
        places += [(start + at, bit) for at in range(len(field) + 4) for bit in range(8)]
    for place, bit in places:
        path.write_bytes(flipped(content, place, bit))
        try:
            assert verified(step_2(run)).manifest == sound, (place, bit)
        except CheckpointError as error:
            assert "\n" not in str(error) and "manifest.json" in str(error)
            refused += 1
    assert refused > 1500


def test_truncations_are_refused(run):
    path = step_2(run) / "manifest.json"
    content = path.read_bytes().rstrip()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            verified(step_2(run))


def test_the_older_checkpoint_is_taken(run):
    path = step_2(run) / "manifest.json"
    path.write_bytes(flipped(path.read_bytes(), 100, 1))
    said: list[str] = []
    found = newest(run, said.append)
    assert found is not None and found.step == 1
    assert "step-00000002" in said[0]


def test_the_first_format_is_read_and_continued(run):
    for folder in (run / "checkpoints").glob("step-*"):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(first_format(manifest)))
    opened = open_run(run)
    assert opened.step == 2 and opened.facts.conditions["label"].num_values == 10
    assert opened.facts.shape == (1, 8, 8)
    assert run_train(run, "train.steps=3", "checkpoint.resume=must") == 0
    after = json.loads((run / "checkpoints" / "step-00000003" / "manifest.json").read_text())
    assert after["format"] == 2 and len(after["sha256"]) == 64


@pytest.mark.slow
def test_bit_flips_of_the_first_format_never_surprise(run):
    """It has no hash, so some go unseen; none ends in anything but a run or a sentence."""
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    path = step_2(run) / "manifest.json"
    content = json.dumps(first_format(json.loads(path.read_text()))).encode()
    draw, refused = random.Random(1), 0
    for _ in range(600):
        path.write_bytes(flipped(content, draw.randrange(len(content)), draw.randrange(8)))
        try:
            assert open_run(run).step == 2
        except ValueError:
            refused += 1
    assert 200 < refused < 600


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(step=3), ["is not the checkpoint of step 2", "says 3"]),
        (lambda m: m.update(step=True), ["is not the checkpoint of step 2"]),
        (lambda m: m.pop("step"), ["is not the checkpoint of step 2"]),
        (lambda m: m.update(files={}), ["its list of files lacks", "model.safetensors", "state/"]),
        (lambda m: m.pop("files"), ["its list of files lacks"]),
        (lambda m: m.update(files=[]), ["its list of files lacks"]),
        (lambda m: m["files"].pop("ema.safetensors"), ["lacks ema.safetensors"]),
        (lambda m: m["files"].pop("state/shard-00000.safetensors"), ["lacks state/"]),
        (lambda m: m["files"].update({"../../../x": {"bytes": 1, "crc32": 1}}), ["'../../../x'"]),
        (lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "crc32": 1}}), ["/etc/passwd"]),
        (lambda m: m["files"].update({"x": {"bytes": "1", "crc32": 1}}), ["entry 'x'"]),
        (lambda m: m["files"].update({"x": None}), ["entry 'x'"]),
        (lambda m: m["files"].update({"x": {"bytes": 1, "crc32": 1}}), ["lacks its file x"]),
    ],
)
def test_what_a_sealed_manifest_may_not_say(run, change, words):
    forge(step_2(run) / "manifest.json", change)
    with pytest.raises(CheckpointError) as caught:
        verified(step_2(run))
    for word in ["step-00000002", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("number", [3, 0, "2", None, 2.5, True, [2]])
def test_an_unknown_format_is_refused(run, number):
    path = step_2(run) / "manifest.json"
    value = json.loads(path.read_text()) | {"format": number}
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"has the format .* knows 1 and 2"):
        verified(step_2(run))


def test_a_copy_under_another_name_is_refused(run):
    copy_ = run / "checkpoints" / "step-00000009"
    shutil.copytree(step_2(run), copy_)
    with pytest.raises(
        CheckpointError, match="is not the checkpoint of step 9: its manifest says 2"
    ):
        verified(copy_)


@pytest.mark.parametrize("name", ["notes.txt", "state/other.pt", "deep/er/file"])
def test_a_foreign_file_is_named(run, name):
    path = step_2(run) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    with pytest.raises(CheckpointError, match=f"holds {name}, which its manifest does not list"):
        verified(step_2(run))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{}", '{"a": NaN}', "[" * 100_000, '{"format": 2}', "\ud800"],
    ids=lambda text: text[:9].encode("utf-8", "replace").decode(),
)
def test_what_is_no_manifest_is_refused(run, text):
    (step_2(run) / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="step-00000002"):
        verified(step_2(run))


def test_a_damaged_newest_never_costs_the_one_just_saved(run):
    """keep=1: what was committed last stays, whatever lies behind it."""
    (step_2(run) / "model.safetensors").write_bytes(b"")
    shutil.copytree(step_2(run), run / "checkpoints" / "step-00000050")
    assert run_train(run, "train.steps=2", "checkpoint.keep=1") == 0
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-00000002"]
    assert open_run(run).step == 2
