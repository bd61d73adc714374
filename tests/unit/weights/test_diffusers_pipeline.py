"""Exported pipelines: stock diffusers, or the lines of the card, draw from the folder what we draw."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_engine import kinds
from speed_engine.conditions import label as label_file
from speed_engine.data import Facts
from speed_engine.data.autoencoder import decoder
from speed_engine.data.space import Space
from speed_engine.models import dit, unet
from speed_engine.sampling.process import Process, Recipe, sample
from speed_engine.weights import source
from speed_engine.weights.diffusers_pipeline import Published, export_pipeline
from speed_engine.weights.diffusers_scheduler import Scheduler, scheduler_of

DIT = dit.Config(size="tiny/2", hidden_size=16, depth=2, num_heads=2, frequency_shift=1)
LATENTS = Space("latents", (0.5,) * 4, (0.0,) * 4, vae="somebody/vae")
BY_CHANNEL = Space("latents", (0.5, 2.0, 1.0, 0.25), (1.0, 0.0, -1.0, 0.5), vae="somebody/vae")
STEPS = 10
NOTHING = Published({"step": 3}, {"Recipe": {"steps": 3}})


def network(
    config: Any = DIT,
    space: Space = LATENTS,
    num_classes: int = 5,
    null: bool = True,
    learned_variance: bool = True,
) -> Any:
    """Small, with random weights."""
    channels, names = len(space.scale), [f"class {i}, thing" for i in range(num_classes)]
    told = {"label": label_file.described(num_classes, names, null=null)} if num_classes else {}
    facts = Facts((channels, 8, 8), space, told)
    model = kinds.home(config).build(config, facts, channels * (1 + learned_variance), seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def process_of(
    model: Any, schedule: str = "linear", objective: str = "epsilon", **more: Any
) -> Process:
    config = kinds.config_of("schedule", {"kind": schedule, **more})
    built = kinds.home(config).build(config)
    conditions = {}
    if told := model.facts.conditions.get("label"):
        chosen = label_file.Config(dropout=0.1 if told.null else 0)
        conditions["label"] = label_file.build(chosen, "label", replace(told, null=False))
    learned = model.num_outputs != model.facts.shape[0]
    settings = kinds.config_of("objective", objective)
    return Process.of(built, settings, learned, model.facts.shape, conditions)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder whose own constants are none of the networks'."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        latent_channels=4,
        scaling_factor=1.5,
        shift_factor=2.0,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def drawn_here(model: Any, process: Process, vae: Path | None) -> tuple[np.ndarray, Tensor]:
    """(pictures NHWC in [0, 1] of `sample` with DDIM, the noise that they began with)."""
    told = model.facts.conditions.get("label")
    asked = {"label": torch.arange(4) % told.num_values} if told else None
    guidance = 1.5 if told and told.null else 1.0
    pixels = model.facts.space.kind == "pixels"
    recipe = Recipe("ddim", STEPS, guidance=guidance, clip_x0=pixels)
    start: list[Tensor] = []

    def spy(x: Tensor, time_B: Tensor, **more: Tensor) -> Tensor:
        start.append(x[:4])
        return model(x, time_B, **more)

    x = sample(spy, process, recipe, conditions_N=asked, numbers=range(4))
    if vae is not None:
        x = decoder(model.facts.space, str(vae), "cpu")(x)
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), start[0]


def drawn_there(folder: Path, noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What the lines of the card draw in the folder, from the same noise."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    text = code[1].replace(
        "num_inference_steps=50", f"num_inference_steps={STEPS}, output_type='np'"
    )
    text = text.replace("steps, num = 50", f"steps, num = {STEPS}")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: noise.clone())
    for pipeline in ("dit.pipeline_dit", "ddim.pipeline_ddim"):
        place = f"diffusers.pipelines.{pipeline}.randn_tensor"
        monkeypatch.setattr(place, lambda *_, **__: noise.clone())
    names: dict[str, Any] = {}
    exec(text, names)
    found = names["pictures"]
    return found.permute(0, 2, 3, 1).numpy() if isinstance(found, Tensor) else found


UNET = unet.Config(multipliers=(1,), num_blocks=1, attention_at=())
PIXELS = Space.pixels(3)
V = {"schedule": "cosine", "objective": "v", "zero_terminal_snr": True}
FLOW = {"schedule": "rectified_flow", "objective": "flow", "shift": 3.0}
OLD = DIT.model_copy(update={"frequency_shift": 0})
# name -> (network, process, whether stock diffusers draws the same from the folder alone)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "five classes": ({}, {}, True),
    "no classes": ({"num_classes": 0, "learned_variance": False}, {}, True),
    "v at zero SNR": ({}, V, True),
    "x0": ({}, {"schedule": "scaled_linear", "objective": "x0"}, True),
    "public frequencies": ({"config": OLD}, {}, False),
    "constants by channel": ({"space": BY_CHANNEL}, {}, False),
    "no null label": ({"null": False}, {"schedule": "quadratic"}, False),
    "flow": ({"learned_variance": False}, FLOW, False),
    "pixels": ({"space": PIXELS, "config": OLD}, {}, False),
    "U-Net": (
        {"config": UNET, "space": PIXELS, "num_classes": 0, "learned_variance": False}, {}, True,
    ),
    "U-Net with classes": ({"config": UNET, "space": PIXELS}, {}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_same_pictures_there_and_here(
    name: str, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_network, of_process, stock = CASES[name]
    model = network(**of_network)
    process = process_of(model, **of_process)
    latents = model.facts.space.kind == "latents"
    folder = tmp_path / "folder"
    said = export_pipeline(folder, model, process, NOTHING, str(vae) if latents else None)
    assert (folder / "model_index.json").exists() == stock == (len(said) == 1)
    wanted, noise = drawn_here(model, process, vae if latents else None)
    found = drawn_there(folder, noise, monkeypatch)
    assert wanted.shape == found.shape and wanted.std() > 0.02
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    again = source.read(folder)
    assert again.notes == {"step": 3} and again.model.facts == model.facts
    same = zip(again.model.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_the_pipeline_knows_classes_by_name_and_any_of_them_is_none(
    vae: Path, tmp_path: Path
) -> None:
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

    model = network()
    export_pipeline(tmp_path / "d", model, process_of(model), NOTHING, str(vae))
    pipeline: Any = DiTPipeline.from_pretrained(tmp_path / "d")
    assert pipeline.labels["class 3"] == 3
    assert pipeline.vae.config.scaling_factor == 0.5 and pipeline.vae.config.shift_factor is None
    table = pipeline.transformer.transformer_blocks[
        0
    ].norm1.emb.class_embedder.embedding_table.weight
    ours = model.y_embedder.embedding_table.weight
    assert len(table) == 1001 and torch.equal(table[:6], ours)
    assert all(torch.equal(row, ours[5]) for row in (table[6], table[1000]))


def test_the_card_says_what_must_be_known(vae: Path, tmp_path: Path) -> None:
    model = network()
    published = Published(
        {}, {"Data": {"kind": "a | b", "nested": {"lr": 1e-4, "no": None}}}, ("FD 3",)
    )
    said = export_pipeline(tmp_path / "d", model, process_of(model), published, str(vae))
    assert said == [
        "README.md has an empty `license`: choose one and fill it in before you publish"
    ]
    card = (tmp_path / "d" / "README.md").read_text()
    assert card.startswith("---\nlicense: #") and "| nested | lr 0.0001 |" in card
    assert "a \\| b" in card and "- FD 3\n" in card
    digests = re.findall(r"^([0-9a-f]{64})  (\S+)$", card, re.MULTILINE)
    files = sorted(p for p in (tmp_path / "d").rglob("*.safetensors"))
    assert [tmp_path / "d" / name for _, name in digests] == files and len(files) == 2
    for digest, name in digests:
        assert hashlib.sha256((tmp_path / "d" / name).read_bytes()).hexdigest() == digest
    told = "".join(path.read_text() for path in (tmp_path / "d").rglob("*.json"))
    assert str(vae) not in told + card


@pytest.mark.parametrize(
    ("of_network", "of_process", "word"),
    [
        ({}, {"schedule": "cosine"}, "so noisy that a network of objective epsilon tells nothing"),
        ({}, {"schedule": "edm", "objective": "edm"}, "do not scale the network's input"),
        ({}, {"schedule": "continuous_vp"}, "no scheduler for this network on the continuous"),
        ({"num_classes": 1200}, {}, "the label 1000 for none, which is a class"),
    ],
)
def test_where_diffusers_cannot_it_says_why(
    of_network: dict[str, Any], of_process: dict[str, Any], word: str, vae: Path, tmp_path: Path
) -> None:
    model = network(**of_network)
    process = process_of(model, **of_process)
    said = export_pipeline(tmp_path / "d", model, process, NOTHING, str(vae))
    assert word in said[0] and not (tmp_path / "d" / "model_index.json").exists()
    there = isinstance(scheduler_of(process, False), Scheduler)
    assert (tmp_path / "d" / "scheduler").exists() == there
    assert ("speed_engine sample" in (tmp_path / "d" / "README.md").read_text()) != there


def test_every_discrete_schedule_is_theirs_to_float32() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    model = network()
    for kind in ("linear", "scaled_linear", "quadratic", "cosine"):
        for zero in (False, True):
            process = process_of(model, kind, "v", zero_terminal_snr=zero)
            scheduler = scheduler_of(process, True)
            assert isinstance(scheduler, Scheduler), scheduler
            by_name = scheduler.config["trained_betas"] is None
            assert by_name == (kind != "cosine" and not zero)
            theirs: Any = DDIMScheduler.from_config(json.loads(json.dumps(scheduler.config)))
            alpha_bar = process.schedule.alpha.square()
            torch.testing.assert_close(
                theirs.alphas_cumprod.double(), alpha_bar, rtol=1e-4, atol=1e-6
            )


def test_what_is_refused_leaves_nothing(vae: Path, tmp_path: Path) -> None:
    model = network()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    for place in ("full", "file"):
        with pytest.raises(ValueError, match="is there already; choose another --out"):
            export_pipeline(tmp_path / place, model, process_of(model), NOTHING, str(vae))
    other = network(space=PIXELS)
    with pytest.raises(ValueError, match="leave out --vae"):
        export_pipeline(tmp_path / "d", other, process_of(other), NOTHING, str(vae))
    wide = network(space=Space("latents", (1.0,) * 8, (0.0,) * 8))
    with pytest.raises(ValueError, match="4 channels, and the samples have 8"):
        export_pipeline(tmp_path / "d", wide, process_of(wide), NOTHING, str(vae))
    flat = network(config=DIT.model_copy(update={"mlp_ratio": 2.0}))
    with pytest.raises(ValueError, match="mlp_ratio"):
        export_pipeline(tmp_path / "d", flat, process_of(flat), NOTHING, str(vae))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
