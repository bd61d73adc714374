"""Our weights file: equal to the last bit, and nothing strange ever gets in."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys

import pytest
import torch
from safetensors.torch import save_file

from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models import dit
from speed_engine.weights import file as weights_file

SMALL = dit.Config(size="tiny/2", hidden_size=16, depth=2, num_heads=2)


def header_of(path) -> dict:
    return json.loads(weights_file.read_safetensors(path)[1]["speed_engine"])


def with_header(path, model, change) -> None:
    """Write a file whose header was changed by somebody who knows how to make a checksum."""
    tensors = dict(model.state_dict())
    header = weights_file.described(model, tensors, notes={})
    change(header)
    header["checksum"] = weights_file.checksum(header, tensors)
    save_file(tensors, path, {"speed_engine": json.dumps(header)})


@pytest.mark.parametrize(("num_classes", "null"), [(0, False), (10, False), (10, True)])
def test_a_saved_model_comes_back_whole(network, equal, tmp_path, num_classes, null):
    model = network(num_classes=num_classes, null=null, learned_variance=False)
    weights_file.save(tmp_path / "m.safetensors", model, notes={"step": 7, "lr": 1e-4})
    again, notes = weights_file.load(tmp_path / "m.safetensors")
    assert equal(model, again) and notes == {"step": 7, "lr": 1e-4}
    assert isinstance(again, dit.DiT) and again.config == SMALL
    assert (again.facts, again.num_outputs) == (model.facts, 1)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_weights_replace_the_models_own_even_as_views_of_one_buffer(network, tmp_path):
    model = network()
    parameters = dict(model.named_parameters())
    flat = torch.randn(sum(p.numel() for p in parameters.values()))
    parts = flat.split([p.numel() for p in parameters.values()])
    ema = {
        key: part.view(parameters[key].shape) for key, part in zip(parameters, parts, strict=True)
    }
    weights_file.save(tmp_path / "m.safetensors", model, ema)
    again, _ = weights_file.load(tmp_path / "m.safetensors")
    assert torch.equal(torch.cat([p.flatten() for p in again.parameters()]), flat)
    assert torch.equal(again.state_dict()["pos_embed"], model.pos_embed)
    with pytest.raises(ValueError, match=r"blocks\.9\.attn"):
        weights_file.save(tmp_path / "n.safetensors", model, {"blocks.9.attn": flat})


def test_a_model_on_the_meta_device_is_a_blueprint(network, facts, equal, tmp_path):
    model, blueprint = network(), dit.build(SMALL, facts(), 2, device="meta")
    weights = model.state_dict()
    weights_file.save(tmp_path / "m.safetensors", blueprint, weights)
    assert equal(weights_file.load(tmp_path / "m.safetensors")[0], model)
    del weights["pos_embed"]
    with pytest.raises(ValueError, match="lack pos_embed"):
        weights_file.save(tmp_path / "m.safetensors", blueprint, weights)


def test_how_to_compute_is_not_stored(network, tmp_path):
    """A file from a machine with xformers loads on a laptop."""
    model = network(SMALL.model_copy(update={"recompute": "full"}))
    model.config = model.config.model_copy(update={"attention": "xformers"})
    weights_file.save(tmp_path / "m.safetensors", model)
    again, _ = weights_file.load(tmp_path / "m.safetensors")
    assert again.config == SMALL


def test_a_failed_write_leaves_the_old_file(network, equal, tmp_path, monkeypatch):
    path, old = tmp_path / "m.safetensors", network()
    weights_file.save(path, old)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        weights_file.save(path, network(seed=2))
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert equal(weights_file.load(path)[0], old)


def test_a_full_disk_is_an_error_of_the_system(network, equal, tmp_path):
    """A limit on the size of files fails inside the writer, as a full disk does."""
    path, old = tmp_path / "m.safetensors", network()
    weights_file.save(path, old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=rf"cannot write weights into {tmp_path}: .*large"):
            weights_file.save(path, network(seed=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert equal(weights_file.load(path)[0], old)


def test_nan_is_not_written(network, tmp_path):
    model = network()
    key = "blocks.1.mlp.fc2.weight"
    broken = model.state_dict()[key].clone()
    broken[0, 3] = float("nan")
    with pytest.raises(ValueError, match=f"NaN or infinite in {key}"):
        weights_file.save(tmp_path / "m.safetensors", model, {key: broken})


# ------------------------------------------------------------------------------ the header


def test_the_header_says_what_the_network_is(network, tmp_path):
    path, model = tmp_path / "m.safetensors", network()
    weights_file.save(path, model, notes={"step": 3})
    header = header_of(path)
    assert sorted(header) == ["checksum", "facts", "format", "model", "notes"]
    assert header["format"] == 2 and header["notes"] == {"step": 3}
    assert header["model"]["kind"] == "dit" and header["model"]["num_outputs"] == 2
    assert not {"attention", "residual", "recompute", "products"} & set(header["model"]["config"])
    assert Facts.from_json(header["facts"]) == model.facts
    assert len(header["checksum"]) == 64


def test_no_place_of_the_writers_machine_is_told(network, tmp_path):
    model = network(channels=4)
    vae = "/home/alice/models/sd-vae"
    space = Space("latents", (0.5,) * 4, (0.0,) * 4, vae=vae)
    model.facts = Facts(model.facts.shape, space, model.facts.conditions)
    notes = {
        "run_dir": "/home/alice/runs/x",
        "data": {"path": ["~/data", "../alice/data", "data/a"]},
    }
    weights_file.save(tmp_path / "m.safetensors", model, notes=notes)
    again, told = weights_file.load(tmp_path / "m.safetensors")
    assert told == {"run_dir": "x", "data": {"path": ["data", "data", "data/a"]}}
    assert again.facts.space.vae == "sd-vae"
    assert b"alice" not in (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("space", ["pixels", "latents", None])
def test_files_of_the_first_format_are_read(network, equal, tmp_path, dropout, space):
    model = network(channels=4, null=dropout > 0)
    config = model.config.model_dump(exclude={"attention", "residual", "recompute", "products"})
    description = {
        "config": config | {"label_dropout": dropout},
        "channels": 4,
        "sample_size": 8,
        "num_classes": 10,
        "learned_variance": True,
    }
    data = {"space": space, "scale": 0.18215, "shift": 0.5}
    notes = {"step": 5, "data": data} if space else {}
    header = json.dumps({"model": description, "notes": notes})
    save_file(dict(model.state_dict()), tmp_path / "m.safetensors", {"speed_engine": header})
    again, found = weights_file.load(tmp_path / "m.safetensors")
    assert equal(model, again) and found == notes
    assert again.facts.conditions == model.facts.conditions and again.num_outputs == 8
    latents = Space("latents", (0.18215,) * 4, (0.5,) * 4)
    assert again.facts.space == (latents if space == "latents" else Space.pixels(4))


@pytest.mark.parametrize("number", [1, 3, "2", None])
def test_another_format_is_named(network, tmp_path, number):
    with_header(tmp_path / "m.safetensors", network(), lambda h: h.update(format=number))
    with pytest.raises(
        ValueError, match=rf"m\.safetensors is of format {number}, and this version"
    ):
        weights_file.load(tmp_path / "m.safetensors")


def test_files_without_a_usable_description_are_refused(network, tmp_path):
    path, model = tmp_path / "m.safetensors", network()
    for metadata in (None, {"speed_engine": "{"}, {"speed_engine": "[]"}, {"speed_engine": "{}"},
                     {"speed_engine": "[" * 100_000}):  # fmt: skip
        save_file(dict(model.state_dict()), path, metadata)
        with pytest.raises(ValueError, match="describes no model"):
            weights_file.load(path)
    for change in (
        lambda h: h["model"]["config"].update(depths=3),
        lambda h: h["model"]["config"].update(size="XL/3"),
        lambda h: h["model"].update(config=None),
        lambda h: h["model"].pop("num_outputs"),
        lambda h: h["facts"].pop("space"),
        lambda h: h["facts"].update(shape=None),
        lambda h: h["facts"]["conditions"]["label"].update(num_values="ten"),
        lambda h: h["facts"].update(conditions=[]),
    ):
        with_header(path, model, change)
        with pytest.raises(ValueError, match=r"^\S+m\.safetensors has a description") as error:
            weights_file.load(path)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------ damage


def damaged(data: bytes) -> dict[str, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])

    def with_header(change) -> bytes:
        copy = json.loads(json.dumps(header))
        change(copy)
        text = json.dumps(copy).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    first, second = [key for key in header if key != "__metadata__"][:2]
    return {
        "oversize header": struct.pack("<Q", 1 << 60) + data[8:],
        "overlapping offsets": with_header(
            lambda h: h[second].update(data_offsets=h[first]["data_offsets"])
        ),
        "offsets outside": with_header(lambda h: h[second].update(data_offsets=[0, 1 << 40])),
        "wrong dtype": with_header(lambda h: h[first].update(dtype="F64")),
        "truncated": data[:-5],
        "empty": b"",
        "text": b"not a model at all",
    }


def test_damaged_safetensors_are_refused(network, tmp_path):
    path = tmp_path / "m.safetensors"
    weights_file.save(path, network())
    cases = damaged(path.read_bytes())
    for what, content in cases.items():
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="not a sound safetensors file"):
            weights_file.load(bad)
            pytest.fail(what)


def test_every_changed_byte_is_noticed(network, equal, tmp_path):
    """Some hundred of them: in the length, all over the header, and in the tensors."""
    path, model = tmp_path / "m.safetensors", network(SMALL.model_copy(update={"depth": 1}))
    weights_file.save(path, model, notes={"step": 7})
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    places = [*range(0, start, 9), *range(start, len(content), 211)]
    assert len(places) > 400 and start > 2000
    refused = 0
    for number, place in enumerate(places):
        changed = bytearray(content)
        changed[place] ^= 1 << number % 8
        path.write_bytes(changed)
        try:
            again, notes = weights_file.load(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error), place
            refused += 1
        else:  # a byte that says nothing, as in the metadata of others
            assert equal(model, again) and notes == {"step": 7}, place
            assert (again.config, again.facts) == (model.config, model.facts), place
    assert refused > 0.98 * len(places)


def test_damage_in_a_tensor_is_told_as_such(network, tmp_path):
    path = tmp_path / "m.safetensors"
    weights_file.save(path, network())
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.safetensors is damaged: its checksum"):
        weights_file.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 10**9},
        {"hidden_size": 4 * 10**9},
        {"patch_size": 10**6},
        {"mlp_ratio": 1e12},
        {"hidden_size": 4 * 10**30},
        {"depth": 1000, "hidden_size": 2**20},
    ],
)
def test_a_small_file_cannot_claim_a_huge_network(network, tmp_path, changes):
    """A few hundred bytes that describe terabytes, or minutes of building."""
    tensors = {"x": torch.zeros(1)}
    header = weights_file.described(network(), tensors, notes={})
    header["model"]["config"] |= changes
    size = 10**6 if "patch_size" in changes else 8
    header["facts"]["shape"] = [1, size, size]
    header["checksum"] = weights_file.checksum(header, tensors)
    save_file(tensors, tmp_path / "m.safetensors", {"speed_engine": json.dumps(header)})
    with pytest.raises(
        ValueError, match=r"m\.safetensors (describes a model of far|does not fit|has)"
    ):
        weights_file.load(tmp_path / "m.safetensors")


def test_a_small_file_of_the_first_format_neither(tmp_path):
    description = {"config": {"kind": "dit", "depth": 10**9}, "channels": 10**9, "sample_size": 8,
                   "num_classes": 10**12, "learned_variance": True}  # fmt: skip
    for channels in (4, 10**9, 10**12, -1, "x", None):
        header = {"model": description | {"channels": channels}, "notes": {}}
        save_file(
            {"x": torch.zeros(1)}, tmp_path / "m.safetensors", {"speed_engine": json.dumps(header)}
        )
        with pytest.raises(
            ValueError, match=r"m\.safetensors (describes a model of far|has a desc)"
        ):
            weights_file.load(tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------ foreign modules


@pytest.mark.parametrize("kind", ["os", "../secrets", "dit.Config", "torch.hub", "_x", "", 3])
def test_a_file_cannot_name_a_foreign_module(network, tmp_path, kind):
    path = tmp_path / "m.safetensors"
    with_header(path, network(), lambda h: h["model"].update(kind=kind))
    with pytest.raises(ValueError, match=rf"^{path}: model\.kind"):
        weights_file.load(path)


MINE = """
import torch
from speed_engine.kinds import Section
from pathlib import Path

Path(__file__).with_suffix(".imported").touch()
TAKES = ()

class Config(Section):
    width: int = 3

class Net(torch.nn.Module):
    def __init__(self, config, facts, num_outputs):
        super().__init__()
        self.config, self.facts, self.num_outputs = config, facts, num_outputs
        self.layer = torch.nn.Linear(config.width, num_outputs)

def build(config, facts, num_outputs, *, seed=0, device="cpu", dtype=None, backends=None):
    torch.manual_seed(seed)
    return Net(config, facts, num_outputs).to(device)

def macs_per_sample(config, facts, num_outputs):
    return 1
"""


def test_an_outside_network_is_built_only_by_those_who_trust_it(
    equal, facts, tmp_path, monkeypatch
):
    from speed_engine.kinds import config_of

    (tmp_path / "my_nets").mkdir()
    (tmp_path / "my_nets" / "mine.py").write_text(MINE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    config = config_of("model", {"kind": "my_nets.mine", "width": 5})
    model = sys.modules["my_nets.mine"].build(config, facts(num_classes=0), 2, seed=3)
    path = tmp_path / "m.safetensors"
    weights_file.save(path, model)
    imported = tmp_path / "my_nets" / "mine.imported"
    for module in ("my_nets", "my_nets.mine"):
        monkeypatch.delitem(sys.modules, module)
    imported.unlink()
    with pytest.raises(ValueError, match=r"m\.safetensors: .*add --trust my_nets\.mine"):
        weights_file.load(path)
    assert not imported.exists()
    again, _ = weights_file.load(path, trusted=["my_nets.mine"])
    assert equal(model, again) and again.config.width == 5 and imported.exists()
