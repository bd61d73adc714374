"""Public DiT checkpoints: every layout, nothing executed, no more memory than the file; what is assumed is told."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch

from speed_engine.data.space import Space
from speed_engine.models import dit
from speed_engine.weights import dit_public
from speed_engine.weights.dit_public import import_pt

SMALL = dit.Config(size="tiny/2", hidden_size=16, depth=2, num_heads=2)
PUBLIC = {"channels": 4, "size": 16, "num_classes": 12}


def layouts(weights: dict[str, torch.Tensor]) -> dict[str, object]:
    other = {key: torch.zeros_like(value) for key, value in weights.items()}

    def renamed(rename):
        return {rename(key): value for key, value in weights.items()}

    return {
        "bare": weights,
        "model": {"model": weights},
        "ema": {"model": other, "ema": weights, "opt": {"state": {}, "lr": 1e-4}},
        "no ema": {"model": weights, "ema": None},
        "DiT's train.py": {"ema": weights, "args": argparse.Namespace(model="DiT-XL/2", seed=0)},
        "a path in the arguments": {
            "ema": weights, "args": argparse.Namespace(data_path=pathlib.PosixPath("/data"))
        },
        "numpy's numbers": {"model": weights, "best": np.float64(0.1), "step": np.int64(3)},
        "Lightning": {"state_dict": renamed(lambda key: f"model.{key}") | {"vae.w": torch.ones(2)}},
        "DDP": {"model": renamed(lambda key: f"module.{key}")},
        "compiled": renamed(lambda key: f"_orig_mod.{key}"),
        "DDP and compiled": renamed(lambda key: f"module._orig_mod.{key}"),
        "compiled blocks": renamed(
            lambda key: key.replace("blocks.0.", "blocks.0._orig_mod.")
        ),
        "parameters": {key: torch.nn.Parameter(value) for key, value in weights.items()},
    }  # fmt: skip


def test_every_layout_of_a_public_checkpoint_loads(network, equal, tmp_path):
    config = dit.Config(size="tiny/2")
    model = network(config, **PUBLIC)
    path = tmp_path / "m.pt"
    for what, content in layouts(dict(model.state_dict())).items():
        torch.save(content, path)
        again = import_pt(path)  # the size, the latent and the classes are recognised
        assert equal(model, again), what
        assert again.config == config and again.num_outputs == 8
        assert again.facts.conditions == model.facts.conditions
        assert again.facts.shape == (4, 16, 16)
        assert again.facts.space == Space("latents", (0.18215,) * 4, (0.0,) * 4)
    torch.save(dict(model.state_dict()), path, _use_new_zipfile_serialization=False)
    assert equal(model, import_pt(path))


def test_unconditional_and_own_sizes(network, equal, tmp_path):
    path = tmp_path / "m.pt"
    model = network(num_classes=0, learned_variance=False)
    torch.save(dict(model.state_dict()), path)
    with pytest.raises(ValueError, match=r"own size .hidden size 16, 2 blocks, patch 2.*heads"):
        import_pt(path)
    for again in (import_pt(path, SMALL), import_pt(path, num_heads=2)):
        assert equal(model, again) and again.facts.conditions == {} and again.num_outputs == 1
        assert again.config.resolved() == SMALL.resolved()
    assert import_pt(path, SMALL).facts.space == Space.pixels(1)
    with pytest.raises(ValueError, match=r"m\.pt holds a DiT of its own size .* is a DiT-tiny/2"):
        import_pt(path, dit.Config(size="tiny/2"))
    with pytest.raises(ValueError, match=r"m\.pt has the hidden size 16.* no multiple of 3"):
        import_pt(path, num_heads=3)


def test_wrong_size_is_named_in_one_sentence(network, tmp_path):
    torch.save(dict(network(dit.Config(size="tiny/2")).state_dict()), tmp_path / "a.pt")
    with pytest.raises(ValueError) as error:
        import_pt(tmp_path / "a.pt", dit.Config(size="XL/2"))
    assert str(error.value) == (
        f"{tmp_path / 'a.pt'} holds a DiT-tiny/2 (hidden size 128, 6 blocks, patch 2), but"
        " the model is a DiT-XL/2 (hidden size 1152, 28 blocks, patch 2)"
    )


def test_model_or_ema_can_be_asked_for(network, equal, tmp_path):
    model, ema = network(), network(seed=2)
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "m.pt")
    assert equal(import_pt(tmp_path / "m.pt", SMALL, which="model"), model)
    assert equal(import_pt(tmp_path / "m.pt", SMALL), ema)


def test_two_networks_in_one_file_are_not_guessed_at(network, tmp_path):
    weights = network().state_dict()
    both = {f"{part}.{key}": value for part in ("net", "ema_net") for key, value in weights.items()}
    torch.save({"state_dict": both}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt holds several DiTs: 'net\.', 'ema_net\.'"):
        import_pt(tmp_path / "m.pt", SMALL)


# ------------------------------------------------------------------------------ the label table


@pytest.mark.parametrize(
    ("rows", "asked", "wanted"),
    [(11, None, (10, True)), (11, 10, (10, True)), (11, 11, (11, False)), (1, None, (1, False)),
     (2, 1, (1, True)), (2, 2, (2, False))],
)  # fmt: skip
def test_a_label_table_has_a_null_row_unless_it_is_said_not_to(
    network, equal, tmp_path, rows, asked, wanted
):
    model = network(num_classes=rows, null=False)
    torch.save(dict(model.state_dict()), tmp_path / "m.pt")
    again = import_pt(tmp_path / "m.pt", SMALL, num_classes=asked)
    told = again.facts.conditions["label"]
    assert (told.num_values, told.null) == wanted and equal(model, again)
    taken = dit_public.assumptions(again.facts)[0]
    assert taken.startswith(f"a label table of {rows} row")
    assert f", read as {wanted[0]} class" in taken
    assert ("without a null label" in taken) != wanted[1]


@pytest.mark.parametrize(("rows", "asked"), [(11, 9), (11, 12), (1, 0), (11, 0), (0, 3), (11, -1)])
def test_a_number_of_classes_that_the_table_has_not_is_refused(network, tmp_path, rows, asked):
    torch.save(dict(network(num_classes=rows, null=False).state_dict()), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=rf"m\.pt has .*{asked}.*--num-classes"):
        import_pt(tmp_path / "m.pt", SMALL, num_classes=asked)


# ------------------------------------------------------------------------------ strangers


def test_the_pickle_of_an_attacker_is_never_executed(network, bomb, tmp_path):
    marker = tmp_path / "executed"
    weights = dict(network().state_dict())
    contents = [
        bomb(marker),
        {"model": weights, "opt": bomb(marker)},
        {**weights, "x": bomb(marker)},
    ]
    path = tmp_path / "m.pt"
    for content in contents:
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match=r"m\.pt was not loaded.* more than tensors"):
                import_pt(path, SMALL)
    path.write_bytes(pickle.dumps(bomb(marker)))
    with pytest.raises(ValueError, match=r"m\.pt"):
        import_pt(path, SMALL)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the bomb is a real one


def test_numbers_of_numpy_that_hold_objects_execute_nothing(network, bomb, tmp_path):
    """numpy's own reader would unpickle them: they are read as blanks."""

    class Number:
        def __reduce__(self):
            from numpy._core.multiarray import scalar

            return scalar, (np.dtype("O"), pickle.dumps(bomb(tmp_path / "executed")))

    path = tmp_path / "m.pt"
    torch.save({"model": dict(network().state_dict()), "best": Number()}, path)
    import_pt(path, SMALL)
    assert not (tmp_path / "executed").exists()


def test_a_tensor_cannot_claim_more_than_the_file_holds(network, tmp_path):
    path = tmp_path / "m.pt"
    weights = dict(network().state_dict())
    one, terabytes = torch.zeros(1), 10**12
    shared = torch.zeros(1000)
    for claimed in (
        {"y_embedder.embedding_table.weight": one.expand(terabytes, 16)},  # stride 0
        {f"blocks.{number}.x": shared for number in range(2, 1000)},  # one storage many times
        {"y_embedder.embedding_table.weight": torch.zeros(11, 16, device="meta")},
        {"y_embedder.embedding_table.weight": torch.zeros(11, 16).to_sparse()},
    ):
        for zipped in (True, False):
            torch.save(weights | claimed, path, _use_new_zipfile_serialization=zipped)
            assert path.stat().st_size < 1_000_000
            with pytest.raises(ValueError, match=r"m\.pt has weights that (claim|are not plain)"):
                import_pt(path, SMALL)


def test_a_compressed_checkpoint_is_refused(network, tmp_path):
    torch.save(dict(network().state_dict()), tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    with pytest.raises(ValueError, match=r"m\.pt is not a sound torch checkpoint: .* compressed"):
        import_pt(tmp_path / "m.pt", SMALL)


def test_files_that_are_no_checkpoint_are_refused(network, tmp_path):
    path = tmp_path / "m.pt"
    torch.save(dict(network().state_dict()), path)
    whole = path.read_bytes()
    torch.save(dict(network().state_dict()), path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    cut = [content[:size] for content in (whole, old) for size in (50, len(content) - 200)]
    html = b"<html>quota exceeded</html>"
    for content in (b"", b"hello", html, b"\x80\x04", *cut, old[:90] + b"\xff" + old[91:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.pt"):
            import_pt(path)
    for content, reason in ((b"", "it is empty"), (html, "it begins with b'<html>quota")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"not a sound torch checkpoint: {reason}"):
            import_pt(path)
    for content in ({"step": 3}, [1, 2], {"model": [1]}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"m\.pt has no weights where expected"):
            import_pt(path)
    for content in (
        {"conv.weight": torch.zeros(3)},
        {key: torch.zeros(3) for key in (dit_public.FIRST, dit_public.LAST, dit_public.PLACES)},
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"m\.pt holds no DiT: x_embedder\.proj\.weight"):
            import_pt(path)
    with pytest.raises(FileNotFoundError):
        import_pt(tmp_path / "absent.pt")
