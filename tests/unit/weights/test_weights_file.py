"""Weights in and out: equal to the last bit, and nothing strange ever gets in."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speed_engine.models import dit
from speed_engine.weights import file as weights_file

SHAPE = {"channels": 1, "sample_size": 8, "num_classes": 10, "learned_variance": True}
SMALL = dit.Config(size="tiny/2", hidden_size=16, depth=2, num_heads=2)


def randomised(config: dit.Config = SMALL, seed: int = 1, **changes) -> dit.DiT:
    model = dit.build(config, **{**SHAPE, **changes}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


# ------------------------------------------------------------------------------ our own files


@pytest.mark.parametrize("num_classes", [0, 10])
def test_a_saved_model_comes_back_whole(tmp_path, num_classes):
    model = randomised(num_classes=num_classes, learned_variance=False)
    weights_file.save(tmp_path / "m.safetensors", model, notes={"step": 7, "lr": 1e-4})
    again, notes = weights_file.load(tmp_path / "m.safetensors")
    assert equal(model, again) and notes == {"step": 7, "lr": 1e-4}
    assert isinstance(again, dit.DiT) and again.config == SMALL
    assert (again.num_classes, again.learned_variance) == (num_classes, False)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_weights_replace_the_models_own_even_as_views_of_one_buffer(tmp_path):
    model = randomised()
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


def test_a_model_on_the_meta_device_is_a_blueprint(tmp_path):
    model, blueprint = randomised(), dit.build(SMALL, **SHAPE, device="meta")
    weights = model.state_dict()
    weights_file.save(tmp_path / "m.safetensors", blueprint, weights)
    assert equal(weights_file.load(tmp_path / "m.safetensors")[0], model)
    del weights["pos_embed"]
    with pytest.raises(ValueError, match="lack pos_embed"):
        weights_file.save(tmp_path / "m.safetensors", blueprint, weights)


def test_how_to_compute_is_not_stored(tmp_path):
    """A file from a machine with xformers loads on a laptop."""
    model = randomised(SMALL.model_copy(update={"recompute": "full"}))
    model.config = model.config.model_copy(update={"attention": "xformers"})
    weights_file.save(tmp_path / "m.safetensors", model)
    again, _ = weights_file.load(tmp_path / "m.safetensors")
    assert again.config == SMALL


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, old = tmp_path / "m.safetensors", randomised()
    weights_file.save(path, old)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        weights_file.save(path, randomised(seed=2))
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert equal(weights_file.load(path)[0], old)


def test_nan_is_neither_written_nor_read(tmp_path):
    model = randomised()
    key = "blocks.1.mlp.fc2.weight"
    broken = model.state_dict()[key].clone()
    broken[0, 3] = float("nan")
    with pytest.raises(ValueError, match=f"NaN or infinite in {key}"):
        weights_file.save(tmp_path / "m.safetensors", model, {key: broken})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"elsewhere has weights .* in {key}"):
        weights_file.load_into(model, {**randomised(seed=2).state_dict(), key: broken}, "elsewhere")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # all or nothing


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


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    weights_file.save(path, randomised())
    cases = damaged(path.read_bytes())
    for what, content in cases.items():
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="not a sound safetensors file"):
            weights_file.load(bad)
            pytest.fail(what)


@pytest.mark.parametrize("kind", ["os", "../secrets", "dit.Config", "torch.hub", "_x", ""])
def test_a_file_cannot_name_a_foreign_module(tmp_path, kind):
    model = randomised()
    header = {"model": weights_file.describe(model), "notes": {}}
    header["model"]["config"]["kind"] = kind
    save_file(
        dict(model.state_dict()), tmp_path / "m.safetensors", {"speed_engine": json.dumps(header)}
    )
    with pytest.raises(ValueError, match="which speed-engine does not have"):
        weights_file.load(tmp_path / "m.safetensors")


def test_files_without_a_usable_description_are_refused(tmp_path):
    path, model = tmp_path / "m.safetensors", randomised()
    description = weights_file.describe(model)
    for metadata in (None, {"speed_engine": "{"}, {"speed_engine": "[]"}, {"speed_engine": "{}"}):
        save_file(dict(model.state_dict()), path, metadata)
        with pytest.raises(ValueError, match="describes no model"):
            weights_file.load(path)
    for change in ({"depths": 3}, {"size": "XL/3"}):
        config = {**description["config"], **change}
        header = {"model": {**description, "config": config}, "notes": {}}
        save_file(dict(model.state_dict()), path, {"speed_engine": json.dumps(header)})
        with pytest.raises(ValueError, match=r"m\.safetensors has a description"):
            weights_file.load(path)


# ------------------------------------------------------------------------------ fitting weights


def test_keys_that_do_not_fit_are_named():
    model = randomised()
    good = model.state_dict()
    key = "blocks.0.mlp.fc1.bias"
    without = {k: v for k, v in good.items() if k != key}
    for weights, message in (
        (without, f"x does not fit the model .missing: {key}"),
        ({**good, "extra.weight": torch.zeros(1)}, "unknown: extra.weight"),
        ({**good, key: torch.zeros(5)}, r"fc1.bias is \[5\] instead of \[64\]"),
        ({**good, key: torch.zeros(64, dtype=torch.int64)}, f"not floating-point: {key}"),
        ({}, "missing: pos_embed, .* more"),
    ):
        with pytest.raises(ValueError, match=message):
            weights_file.load_into(model, weights, "x")


def test_wrong_size_is_named_in_one_sentence():
    shape = {**SHAPE, "channels": 4, "sample_size": 32}
    xl, base = (dit.build(dit.Config(size=s), **shape, device="meta") for s in ("XL/2", "B/4"))
    with pytest.raises(ValueError) as error:
        weights_file.load_into(xl, base.state_dict(), "a.pt")
    assert str(error.value) == (
        "a.pt holds a DiT-B/4 (hidden size 768, 12 blocks, patch 4), but the model is a DiT-XL/2"
        " (hidden size 1152, 28 blocks, patch 2)"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_are_converted(dtype):
    model, other = randomised(), randomised(seed=2)
    weights_file.load_into(model, {k: v.to(dtype) for k, v in other.state_dict().items()}, "x")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    wanted = other.blocks[0].attn.qkv.weight.to(dtype).float()
    assert torch.equal(model.blocks[0].attn.qkv.weight, wanted)


# ------------------------------------------------------------------------------ public checkpoints

PUBLIC = {"channels": 4, "sample_size": 16, "num_classes": 12, "learned_variance": True}


def layouts(weights: dict[str, torch.Tensor]) -> dict[str, object]:
    other = {key: torch.zeros_like(value) for key, value in weights.items()}

    def renamed(rename):
        return {rename(key): value for key, value in weights.items()}

    return {
        "bare": weights,
        "model": {"model": weights},
        "ema": {"model": other, "ema": weights, "opt": {"state": {}, "lr": 1e-4}},
        "DiT's train.py": {"ema": weights, "args": argparse.Namespace(model="DiT-XL/2", seed=0)},
        "DDP": {"model": renamed(lambda key: f"module.{key}")},
        "compiled": renamed(lambda key: f"_orig_mod.{key}"),
        "DDP and compiled": renamed(lambda key: f"module._orig_mod.{key}"),
        "compiled blocks": renamed(
            lambda key: key.replace("blocks.0.", "blocks.0._orig_mod.")
        ),
        "parameters": {key: torch.nn.Parameter(value) for key, value in weights.items()},
    }  # fmt: skip


def test_every_layout_of_a_public_checkpoint_loads(tmp_path):
    config = dit.Config(size="tiny/2")
    model = randomised(config, **PUBLIC)
    for what, content in layouts(dict(model.state_dict())).items():
        path = tmp_path / "m.pt"
        torch.save(content, path)
        again = weights_file.import_pt(path)  # the size, the latent and the classes are recognised
        assert equal(model, again), what
        assert again.config == config and weights_file.describe(again) == weights_file.describe(
            model
        )
    torch.save(dict(model.state_dict()), path, _use_new_zipfile_serialization=False)
    assert equal(model, weights_file.import_pt(path))


def test_unconditional_and_own_sizes(tmp_path):
    model = randomised(num_classes=0, learned_variance=False)
    torch.save(dict(model.state_dict()), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"own size .hidden size 16, 2 blocks, patch 2.*heads"):
        weights_file.import_pt(tmp_path / "m.pt")
    again = weights_file.import_pt(tmp_path / "m.pt", SMALL)
    assert equal(model, again) and again.num_classes == 0 and not again.learned_variance
    with pytest.raises(ValueError, match=r"m\.pt holds a DiT of its own size .* is a DiT-tiny/2"):
        weights_file.import_pt(tmp_path / "m.pt", dit.Config(size="tiny/2"))


def test_model_or_ema_can_be_asked_for(tmp_path):
    model, ema = randomised(), randomised(seed=2)
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "m.pt")
    assert equal(weights_file.import_pt(tmp_path / "m.pt", SMALL, which="model"), model)
    assert equal(weights_file.import_pt(tmp_path / "m.pt", SMALL), ema)


def test_the_pickle_of_an_attacker_is_never_executed(tmp_path):
    marker = tmp_path / "executed"
    weights = dict(randomised().state_dict())
    contents = [
        Bomb(marker),
        {"model": weights, "opt": Bomb(marker)},
        {**weights, "x": Bomb(marker)},
    ]
    for content in contents:
        for zipped in (True, False):
            path = tmp_path / "m.pt"
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match=r"m\.pt was not loaded.* more than tensors"):
                weights_file.import_pt(path, SMALL)
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match=r"m\.pt"):
        weights_file.import_pt(path, SMALL)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the bomb is a real one


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(dict(randomised().state_dict()), path)
    whole = path.read_bytes()
    torch.save(dict(randomised().state_dict()), path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    cut = [content[:size] for content in (whole, old) for size in (50, len(content) - 200)]
    for content in (b"", b"hello", b"\x80\x04", *cut, old[:90] + b"\xff" + old[91:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.pt"):
            weights_file.import_pt(path)
    for content in ({"step": 3}, [1, 2], {"model": [1]}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"m\.pt has no weights where expected"):
            weights_file.import_pt(path)
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"m\.pt holds no DiT: x_embedder\.proj\.weight"):
        weights_file.import_pt(path)
    with pytest.raises(FileNotFoundError):
        weights_file.import_pt(tmp_path / "absent.pt")
