"""Many processes write one set: the same bytes with any number of them, and the first one tells how it goes."""

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from speed_engine.data import DataError, encode_set
from speed_engine.data.encode import encode
from speed_engine.data.encode_arrays import encode_arrays
from speed_engine.data.encode_set import Team, counted, duration, size, team_of
from speed_engine.data.shards import Shards
from speed_engine.data.storage.index import verify
from speed_engine.errors import SaidElsewhere

NUM = 23


def shared(world, action):
    """action(team) in `world` processes of one set, as threads; what each gave or raised."""
    ends = [None] * world

    def one(rank):
        try:
            ends[rank] = action(Team(rank, world, rank, world, "start", patience=10))
        except Exception as error:
            ends[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes, and bad files, enough for one shard of five without any sample."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(NUM):
        path = folder / ("cat" if i < 12 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(path)
    for name in ("03", "05", "06", "07", "08", "09"):
        (folder / "cat" / f"{name}.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    model = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("what", ["pixels", "latents", "arrays"])
def test_the_same_set_with_any_number(tmp_path, images, vae, what):
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "x.npy", np.random.default_rng(1).normal(size=(NUM, 2, 3)).astype(np.float32))
    np.save(arrays / "label.npy", np.arange(NUM) % 3)

    def write(out, team):
        if what == "arrays":
            return encode_arrays(arrays, out, scale=1.0, shard_size=5, team=team)
        of_latents = {"mode": "latents", "vae": str(vae), "flip": True, "batch_size": 2}
        told = of_latents if what == "latents" else {}
        return encode(images, out, size=8, shard_size=5, device="cpu", team=team, **told)

    write(tmp_path / "alone", Team())
    expected = files(tmp_path / "alone")
    for world in (2, 3, 7):
        out = tmp_path / f"out{world}"
        index, *others = shared(world, lambda team, out=out: write(out, team))
        assert others == [None] * (world - 1)
        assert files(out) == expected and index == Shards(out, check_scale=False).index
    assert verify(out) == []
    assert shared(2, lambda team: write(out, team)) == [index, index]  # it is there already
    assert files(out) == expected
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {".alone.lock", *(f".out{world}.lock" for world in (2, 3, 7))}


def test_a_shard_is_its_source_images(tmp_path, images):
    index = encode(images, tmp_path / "out", size=8, shard_size=5)
    assert index.count == NUM - 6
    assert [(s.name[6:12], s.count) for s in index.shards] == [
        *[("000000", 4), ("000002", 5), ("000003", 5), ("000004", 3)]
    ]
    expected = [0] * 6 + [1] * 11
    assert Shards(tmp_path / "out").read(range(NUM - 6))[1]["label"].tolist() == expected


def test_a_mistake_is_told_by_one_and_the_others_go_on_later(tmp_path, images):
    def strict(team):
        return encode(images, tmp_path / "out", size=8, shard_size=5, strict=True, team=team)

    first, *others = shared(3, strict)
    assert [type(end) for end in (first, *others)].count(DataError) == 1
    assert isinstance(first, DataError | SaidElsewhere)
    # One that had made its shards before the mistake was met has ended well.
    assert all(end is None or isinstance(end, DataError | SaidElsewhere) for end in others)
    _, other = shared(
        2, lambda team: encode(images, tmp_path / "out", size=8, shard_size=5, team=team)
    )
    assert other is None and verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"size": 0}, "--size and --batch-size must be"),
        ({"size": 8, "mode": "latents", "vae": "EMPTY"}, "cannot be loaded"),
        ({"size": 8, "mode": "latents", "vae": "VAE", "device": "cuda:1"}, "is one device for 2"),
    ],
)
def test_what_all_find_wrong_is_told_by_one(tmp_path, images, vae, told, reason):
    empty = tmp_path / "empty"
    empty.mkdir()
    folders = {"VAE": str(vae), "EMPTY": str(empty)}
    told = {name: folders.get(each, each) for name, each in told.items()}
    ends = shared(2, lambda team: encode(images, tmp_path / "out", team=team, **told))
    said = [end for end in ends if isinstance(end, DataError)]
    assert len(said) == 1 and reason in str(said[0])
    assert sum(type(end) is SaidElsewhere for end in ends) == 1


def test_the_plan_comes_first_and_the_speed_at_times(tmp_path, images, monkeypatch):
    monkeypatch.setattr(encode_set, "FIRST_WORD", 0.0)
    monkeypatch.setattr(encode_set, "REDRAW", 0.0)
    text = io.StringIO()
    console = Console(file=text, soft_wrap=True, width=200)
    encode(images, tmp_path / "out", size=8, shard_size=5, console=console)
    whole = text.getvalue().replace(
        "\n    ", " "
    )  # what is too long for a terminal goes on below, indented
    first, *others = [line for line in whole.splitlines() if line.strip()]
    source = sum(path.stat().st_size for path in images.rglob("*.png"))
    assert f"{NUM} images -> 3 x 8 x 8 pixels; {size(source)} read, about " in first
    assert first.endswith("2 classes: 0 = cat (12), 1 = dog (11); 5 shards")
    about = NUM * sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar")) / (NUM - 6)
    told = float(first.split(", about ")[1].split(" kB")[0]) * 1000
    assert told == pytest.approx(about, rel=0.5)  # a tar ends with up to 10 kB of nothing
    assert any(f" of {NUM} images, " in line and " left" in line for line in others)


def test_a_disk_that_is_too_small_is_told(tmp_path, images, monkeypatch):
    monkeypatch.setattr(encode_set.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    text = io.StringIO()
    encode(images, tmp_path / "out", size=8, console=Console(file=text, soft_wrap=True))
    said = " ".join(text.getvalue().split())
    assert "are to be written, and " in said and "has 1 kB left" in said


def test_words_for_sizes_and_times():
    assert [counted(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    assert [size(12), size(1234), size(2.5e12)] == ["12 bytes", "1.23 kB", "2.5 TB"]
    assert [duration(59.6), duration(600), duration(12345)] == ["60 s", "10 min", "3.4 h"]


def test_a_launcher_needs_to_tell_no_network():
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    assert (team_of(slurm).rank, team_of(slurm).world, team_of(slurm).local_rank) == (3, 4, 1)
    assert team_of({"MASTER_ADDR": "a", "MASTER_PORT": "1"}).world == 1
    with pytest.raises(ValueError, match="RANK and LOCAL_RANK are not"):
        team_of({"WORLD_SIZE": "2"})
