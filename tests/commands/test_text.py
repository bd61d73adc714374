"""Text to image as a user types it: captions encoded, a network told them, prompts. transformers has a stand-in here,
which reads folders as the real one does: a CLIP of eight numbers a token, a token a word."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from speed_engine.conditions import clip as clip_module
from speed_engine.data.shards import Shards
from speed_engine.data.storage import index as index_file

LENGTH, WIDTH, WORDS = 6, 8, 50
MODEL = "model={kind: dit_text, size: tiny/2, hidden_size: 16, depth: 2, num_heads: 2, cross_attention: true}"
TINY = ["engine=torch", "train.global_batch=4", "checkpoint.every=2", "train.flip=false", MODEL]
TINY += ["optim.lr=2e-2", "optim.warmup_steps=1"]  # captions must show after four steps


class CLIPTextModel(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=width, max_position_embeddings=LENGTH)
        weight = torch.randn(WORDS, width, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(weight)

    @staticmethod
    def from_pretrained(place: str, **settings: Any) -> tuple[CLIPTextModel, dict[str, Any]]:
        told = json.loads((Path(place) / "config.json").read_text())
        return CLIPTextModel(told["width"], told["seed"]), {"missing_keys": told["missing"]}

    def forward(self, input_ids: torch.Tensor) -> Any:
        tokens = self.table[input_ids]
        return types.SimpleNamespace(last_hidden_state=tokens, pooler_output=tokens.sum(1))


class CLIPModel(nn.Module):
    """A picture's vector is its mean level, a text's its number of words; both in two dimensions."""

    config = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(image_size=4),
        text_config=types.SimpleNamespace(max_position_embeddings=LENGTH),
    )

    @staticmethod
    def from_pretrained(place: str, **settings: Any) -> tuple[CLIPModel, dict[str, Any]]:
        return CLIPModel(), {"missing_keys": []}

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> Any:
        words = (input_ids > 1).sum(1).float()
        level = pixel_values.mean((1, 2, 3))
        text = torch.stack([words, torch.ones_like(words)], 1)
        return types.SimpleNamespace(
            text_embeds=text, image_embeds=torch.stack([level, torch.ones_like(level)], 1)
        )


class CLIPTokenizer:
    pad_token_id = 1

    @staticmethod
    def from_pretrained(place: str, **settings: Any) -> CLIPTokenizer:
        return CLIPTokenizer()

    def __call__(self, texts: list[str], verbose: bool = True) -> Any:
        rows = [
            [0, *(2 + sum(1 + ord(c) for c in word) % (WORDS - 2) for word in t.split()), 1]
            for t in texts
        ]
        return types.SimpleNamespace(input_ids=rows)


@pytest.fixture(scope="module")
def transformers() -> Iterator[None]:
    module: Any = types.ModuleType("transformers")
    module.__spec__ = ModuleSpec("transformers", None)  # others ask whether it is there
    for each in (CLIPTextModel, CLIPTokenizer, CLIPModel):
        setattr(module, each.__name__, each)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", module)
        yield


def clip(folder: Path, width: int = WIDTH, seed: int = 0, missing: tuple[str, ...] = ()) -> Path:
    folder.mkdir()
    told = {"width": width, "seed": seed, "missing": missing}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def picture(level: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (8, 8), level).save(content, "png")
    return content.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, transformers: None, good: Any) -> Path:
    """A CLIP, eight pictures with COCO's captions of six, and the set that is made of them."""
    folder = tmp_path_factory.mktemp("text")
    clip(folder / "clip")
    (folder / "pictures").mkdir()
    for number in range(8):
        (folder / "pictures" / f"{number}.png").write_bytes(picture(30 * number))
    said = [(n, f"picture {n} said {k}") for n in range(6) for k in range(1 + n % 3)]
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in (*range(6), 77)],
        "annotations": [{"image_id": n, "caption": caption} for n, caption in said]
        + [{"image_id": 77, "caption": "not here"}, {"image_id": 99, "caption": "of nothing"}],
    }
    (folder / "captions.json").write_text(json.dumps(coco))
    words = ["--captions", folder / "captions.json", "--text-encoder", folder / "clip"]
    answer = good(
        "encode", *ENCODE, folder / "pictures", "--out", folder / "set", *words, "--verify"
    )
    (folder / "said").write_text(answer.err)
    return folder


ENCODE = ["--size", "8", "--channels", "1", "--images"]


@pytest.fixture(scope="module")
def run(place: Path, good: Any) -> Path:
    """Four steps, of which two are a continuation; the same numbers as four at once."""
    every = ["--config", "own_pixels", f"data.path={place / 'set'}", *TINY]
    for steps in (2, 4):
        good("train", *every, f"run_dir={place / 'run'}", f"train.steps={steps}")
    good("train", *every, f"run_dir={place / 'whole'}", "train.steps=4")
    return place / "run"


def test_all_captions_are_stored_and_what_does_not_match_is_said(
    place: Path, read_json: Any
) -> None:
    said = " ".join((place / "said").read_text().split())  # lines are broken at 100 columns
    assert "9 captions" not in said and "12 captions, up to 3 a picture, by clip" in said
    assert "1 captions are empty or of no picture in it" in said
    assert "1 pictures that it has captions of are not in" in said and "77.png" in said
    assert "2 pictures have no caption, and are left out (the first: 6.png)" in said
    skipped = {each["file"]: each["reason"] for each in read_json(place / "set" / "skipped.json")}
    assert skipped == {"6.png": "it has no caption", "7.png": "it has no caption"}
    source = Shards(place / "set")
    _, told = source.read([2, 3])
    assert told["text_count"].tolist() == [3, 1]
    written = [
        bytes(each).rstrip(b"\0").decode().split("\n") for each in told["text_utf8"].tolist()
    ]
    assert written == [[f"picture 2 said {k}" for k in range(3)], ["picture 3 said 0"]]
    numbers = CLIPTokenizer()(["picture 2 said 1"]).input_ids[0]
    expected = CLIPTextModel(WIDTH, 0).table[numbers].detach().half()
    torch.testing.assert_close(told["text_tokens"][0, 1], expected)
    assert not told["text"][1, 1:].any()
    facts = source.facts.conditions["text"]
    assert facts.kind == "text" and len(facts.arrays) == 4 and facts.details["encoder"] == "clip"


def test_reindex_keeps_the_condition(place: Path, good: Any, tmp_path: Path) -> None:
    before = index_file.load(place / "set")
    good("encode", "--reindex", place / "set")
    assert index_file.load(place / "set").conditions == before.conditions


def test_a_continued_run_has_the_same_numbers(run: Path) -> None:
    files = [
        sorted((folder / "checkpoints").rglob("*.safetensors"))
        for folder in (run, run.parent / "whole")
    ]
    last = [
        [f for f in each if "4" in f.parent.name or "4" in f.parent.parent.name] for each in files
    ]
    assert last[0] and len(last[0]) == len(last[1])
    for one, other in zip(*last, strict=True):
        tensors = [load_file(path) for path in (one, other)]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(each, tensors[1][name]) for name, each in tensors[0].items()), one


def test_captions_encoded_while_training_are_the_same_numbers(
    place: Path, run: Path, good: Any, read_json: Any, tmp_path: Path
) -> None:
    """Weights of four steps, one after a resume with the CLIP in another place, and validation, which reads, too."""
    words = ["--captions", place / "captions.json", "--text-encoder", place / "clip"]
    good("encode", *ENCODE, place / "pictures", "--out", tmp_path / "set", *words, "--texts-only")
    index = index_file.load(tmp_path / "set")
    assert sorted(index.conditions["text"].arrays) == ["text_count", "text_utf8"]
    sizes = [
        sum(f.stat().st_size for f in w.glob("*.tar")) for w in (tmp_path / "set", place / "set")
    ]
    assert sizes[0] < sizes[1]
    shutil.copytree(place / "clip", tmp_path / "moved")
    every = [
        "--config",
        "own_pixels",
        *TINY,
        "validation.every=2",
        "validation.samples=2",
        "log.every=2",
    ]
    for name, where in (("stored", place / "set"), ("read", tmp_path / "set")):
        for steps, clip in ((3, place / "clip"), (4, tmp_path / "moved")):
            online = [f"conditions.text.encoder={clip}"] if name == "read" else []
            folder = [f"run_dir={tmp_path / name}", f"data.path={where}", f"train.steps={steps}"]
            good("train", *every, *folder, *online)
    for file in ("model", "ema"):
        found, expected = (
            load_file(next((tmp_path / name / "checkpoints").glob(f"step-*4/{file}.safetensors")))
            for name in ("read", "stored")
        )
        assert all(torch.equal(found[key], each) for key, each in expected.items())
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("read", "stored")
    ]
    measured = [{k: v for k, v in each[-1].items() if k.startswith("validation")} for each in lines]
    assert measured[0] == measured[1] and measured[0]
    words = ["--text-encoder", place / "clip", "--prompt", "a b", "--num", "1", "--steps", "2"]
    good("sample", "--run", tmp_path / "read", *words, "--out", tmp_path / "samples")


def test_mistakes_of_an_encoder_while_training(
    place: Path, command: Any, good: Any, tmp_path: Path
) -> None:
    words = ["--captions", place / "captions.json", "--text-encoder", place / "clip"]
    good("encode", *ENCODE, place / "pictures", "--out", tmp_path / "set", *words, "--texts-only")
    where = tmp_path / "set"
    for data, encoder, why in (
        (where, "clap", "the CLIP 'clap' cannot be loaded"),
        (where, clip(tmp_path / "other", seed=1), "another one than encoded the data"),
        (where, clip(tmp_path / "wide", WIDTH + 2), "the data, conditions.text.encoder=clip"),
        (place / "set", place / "clip", "is for data of encode --texts-only"),
    ):
        words = [*TINY, f"data.path={data}", f"run_dir={tmp_path / 'run'}"]
        words.append(f"conditions.text.encoder={encoder}")
        answer = command("train", "--config", "own_pixels", *words)
        assert answer.code == 2 and why in answer.err and "Traceback" not in answer.err, answer.err
        assert not (tmp_path / "run").exists()


def test_prompts_are_taken_in_turn(run: Path, place: Path, good: Any, read_json: Any) -> None:
    (place / "prompts.txt").write_text("picture 1\n\na b c d e f g h\n")
    words = ["--run", run, "--num", "6", "--steps", "2", "--sampler", "ddim", "--guidance", "2"]
    words += ["--text-encoder", place / "clip", "--weights", "model"]
    one = good(
        "sample",
        *words,
        "--prompt",
        "picture 5",
        "--prompts",
        place / "prompts.txt",
        "--out",
        place / "one",
    )
    assert one.out.count("is longer than 6 tokens, and cut") == 1 and "'a b c d e f g h'" in one.out
    recipe = read_json(place / "one" / "recipe.json")
    assert recipe["source"]["prompts"] == ["picture 5", "picture 1", "a b c d e f g h"]
    good("sample", *words, "--prompt", "picture 5", "--out", place / "two")
    pixels = [np.load(place / name / "samples.npz")["arr_0"] for name in ("one", "two")]
    same = [np.array_equal(a, b) for a, b in zip(*pixels, strict=True)]
    assert same[0] and same[3] and not all(same)


def test_without_a_prompt_no_clip_is_needed(
    run: Path, place: Path, good: Any, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = ["--run", run, "--num", "2", "--steps", "2", "--sampler", "ddim"]
    good("sample", *words, "--out", place / "none")
    answer = command(
        "sample", *words, "--prompt", "a", "--text-encoder", place / "clip", "--out", place / "no"
    )
    assert (
        answer.code == 2
        and "prompts need transformers" in answer.err
        and "pip install" in answer.err
    )
    assert not (place / "no").exists()


def test_a_wrong_clip_is_refused_in_one_sentence(
    run: Path, place: Path, command: Any, tmp_path: Path
) -> None:
    for name, settings, why in (
        ("wide", {"width": 12}, "vectors of 12 numbers, and the network was trained on 8"),
        ("other", {"seed": 1}, "another one than encoded the data"),
        ("part", {"missing": ("a.weight",)}, "lacks 1 weights (a.weight ...)"),
    ):
        words = ["--text-encoder", clip(tmp_path / name, **settings), "--prompt", "a"]
        answer = command("sample", "--run", run, "--num", "1", *words, "--out", tmp_path / "out")
        assert answer.code == 2 and why in answer.err and not (tmp_path / "out").exists()


def test_captions_in_tars(place: Path, good: Any, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in {
            "a.png": picture(9),
            "a.txt": "zwei\n Möwen".encode(),
            "b.png": picture(99),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    words = ["--text-encoder", place / "clip", "--pooled-only", "--out", tmp_path / "set"]
    said = good("encode", *ENCODE, tmp_path / "0.tar", *words).err
    assert "1 pictures have no caption, and are left out (the first: 0.tar/b.png)" in said
    _, told = Shards(tmp_path / "set").read([0])
    assert (
        bytes(told["text_utf8"][0].tolist()).decode() == "zwei Möwen" and "text_tokens" not in told
    )


def test_mistakes_of_encode(place: Path, command: Any, tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text('{"images": [], "annotations": [{"image_id": 1}]}')
    (tmp_path / "other.json").write_text(
        '{"images": [{"id": 1, "file_name": "x.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}'
    )
    encoder = ["--text-encoder", place / "clip"]
    for words, why in (
        (["--captions", place / "captions.json"], "need --text-encoder"),
        (encoder, "has a caption; give --captions FILE"),
        ([*encoder, "--captions", tmp_path / "no.json"], "cannot be read"),
        ([*encoder, "--captions", place / "pictures" / "1.png"], "is no JSON"),
        ([*encoder, "--captions", tmp_path / "instances.json"], "is not COCO's captions"),
        ([*encoder, "--captions", tmp_path / "other.json"], "names other pictures"),
    ):
        answer = command("encode", *ENCODE, place / "pictures", "--out", tmp_path / "out", *words)
        assert answer.code == 2 and why in answer.err and not (tmp_path / "out").exists(), (
            answer.err
        )
        assert len(answer.err.strip().splitlines()) == 1


def test_clip_score(place: Path, good: Any, command: Any, tmp_path: Path, read_json: Any) -> None:
    np.savez(
        tmp_path / "two.npz", arr_0=np.stack([np.full((8, 8, 3), v, np.uint8) for v in (0, 255)])
    )
    (tmp_path / "prompts").write_text("a\na b c\n")
    words = [
        "--samples",
        tmp_path / "two.npz",
        "--clip",
        place / "clip",
        "--out",
        tmp_path / "it.json",
    ]
    said = good("score", *words, "--prompts", tmp_path / "prompts").out
    mean, std = np.array(clip_module.MEAN), np.array(clip_module.STD)
    levels = [float(((v - mean) / std).mean()) for v in (0.0, 1.0)]
    cosines = [
        (level * count + 1) / np.hypot(level, 1) / np.hypot(count, 1)
        for level, count in zip(levels, (1, 3), strict=True)
    ]
    report = read_json(tmp_path / "it.json")
    assert abs(report["clip_score"] - np.mean(cosines)) < 1e-5 and report["num_samples"] == 2
    assert f"{report['clip_score']:.4f}" in said
    answer = command("score", *words)
    assert answer.code == 2 and "does not say its prompts" in answer.err


def test_weights_alone_take_prompts(run: Path, place: Path, good: Any, tmp_path: Path) -> None:
    """What sampling needs of the captions travels with the weights."""
    good("export", "--run", run, "--weights", "model", "--out", tmp_path / "it.safetensors")
    words = ["--num", "2", "--steps", "2", "--sampler", "ddim", "--guidance", "2"]
    words += ["--prompt", "picture 5", "--text-encoder", place / "clip"]
    good("sample", "--weights", tmp_path / "it.safetensors", *words, "--out", tmp_path / "a")
    good("sample", "--run", run, "--weights", "model", *words, "--out", tmp_path / "b")
    pixels = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab"]
    assert np.array_equal(*pixels)
