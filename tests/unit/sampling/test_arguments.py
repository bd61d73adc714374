"""Which time steps a sampler visits, what it refuses, and the decoder of latents."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from speed_engine.objectives import Objective
from speed_engine.sampling.process import (
    Process,
    Recipe,
    kept_steps,
    latent_decoder,
    round_robin_labels,
    sample,
)
from speed_engine.schedules import from_alphas_cumprod

LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
COSINE = np.cumprod(
    1
    - np.minimum(
        0.999,
        1
        - np.cos((np.arange(1, 1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        / np.cos((np.arange(1000) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2,
    )
)
SHAPE = (1, 2, 2)
SHAPE = (1, 2, 2)


def process(objective="epsilon", alpha_bar=LINEAR, **changes) -> Process:
    schedule = from_alphas_cumprod(torch.from_numpy(np.asarray(alpha_bar)))
    zero, one = torch.zeros_like(schedule.alpha), torch.ones_like(schedule.alpha)
    columns = {"epsilon": (zero, one), "x0": (one, zero), "v": (-schedule.sigma, schedule.alpha)}
    facts = {"learned_variance": False, "shape": SHAPE, **changes}
    return Process(schedule, Objective(objective, *columns[objective], one), **facts)


def constant(x: Tensor, tau: Tensor, labels: Tensor | None) -> Tensor:
    """A network that has learned nothing."""
    return torch.zeros_like(x)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("spacing", ["auto", "linspace", "leading", "trailing"])
def test_kept_steps_are_distinct_for_every_count(sampler: str, spacing: str) -> None:
    facts = process("v")
    for steps in [*range(1, 40), 250, 333, 501, 750, 999, 1000]:
        kept = kept_steps(facts, Recipe(sampler=sampler, steps=steps, spacing=spacing))
        assert len(kept) == steps and kept[0] >= 0 and kept[-1] <= 999
        assert np.all(np.diff(kept) > 0)


def test_spacings() -> None:
    facts = process()
    ddpm = kept_steps(facts, Recipe(steps=250))
    assert ddpm[:4].tolist() == [0, 4, 8, 12] and ddpm[-1] == 999
    ddim = kept_steps(facts, Recipe(sampler="ddim", steps=50))
    assert ddim.tolist() == list(range(19, 1000, 20))
    old = kept_steps(facts, Recipe(sampler="ddim", steps=50, spacing="leading"))
    assert old.tolist() == list(range(0, 1000, 20))
    cosine = process(alpha_bar=COSINE)
    assert kept_steps(cosine, Recipe(sampler="ddim", steps=50))[-1] < 999  # ODE, epsilon
    assert kept_steps(cosine, Recipe(sampler="ddpm", steps=50))[-1] == 999
    assert kept_steps(process("v", COSINE), Recipe(sampler="ddim", steps=50))[-1] == 999


@pytest.mark.parametrize(
    ("facts", "recipe", "labels", "words"),
    [
        ({}, {"guidance": 2.0}, None, "class-conditional"),
        ({"num_classes": 3}, {"guidance": 2.0}, [0], "null label"),
        ({"num_classes": 3, "null_label": 3}, {"guidance": 2.0}, None, "needs labels"),
        ({"num_classes": 3}, {}, None, "no null label"),
        ({}, {}, [0], "unconditional"),
        ({"num_classes": 3}, {}, [0, 3], "label 3 is not a class; give labels from 0 to 2"),
        ({"num_classes": 3}, {}, [-1], "label -1"),
        ({}, {"steps": 1001}, None, "more than the 1000 time steps"),
        (
            {"num_classes": 3, "null_label": 3},
            {"guidance": 2.0, "guidance_channels": 3},
            [0],
            "from 1 to 1",
        ),
    ],
)
def test_contradictions_are_refused_before_any_work(facts, recipe, labels, words: str) -> None:
    def model(*_: object) -> Tensor:
        raise AssertionError("the model must not be called")

    labels = None if labels is None else torch.tensor(labels)
    with pytest.raises(ValueError, match=words) as caught:
        sample(
            model,
            process(**facts),
            Recipe(**recipe),
            labels_N=labels,
            numbers=None if labels is not None else [0],
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"sampler": "euler"}, "no sampler 'euler'"),
        ({"spacing": "even"}, "no spacing 'even'"),
        ({"steps": 0}, "at least 1"),
        ({"guidance": -1.0}, "from 0 up"),
        ({"guidance": math.nan}, "from 0 up"),
        ({"guidance_channels": 3}, "no effect"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_recipes(recipe, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**recipe)


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="returns 1 channels"):
        sample(constant, process(learned_variance=True), Recipe(steps=2), numbers=[0])
    with pytest.raises(ValueError, match="training mode"):
        sample(nn.Identity(), process(), Recipe(steps=2), numbers=[0])
    with pytest.raises(ValueError, match="how many"):
        sample(constant, process(), Recipe(steps=2))
    with pytest.raises(ValueError, match="2 labels for 3 samples"):
        facts = process(num_classes=2)
        sample(
            constant,
            facts,
            Recipe(steps=2),
            labels_N=torch.zeros(2).long(),
            numbers=[0, 1, 2],
        )


def test_round_robin_labels() -> None:
    labels = round_robin_labels(7, 3)
    assert labels is not None and labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert round_robin_labels(7, 0) is None


def test_latent_decoder_reads_a_diffusers_folder(tmp_path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    vae.save_pretrained(tmp_path / "vae", safe_serialization=True)
    x = torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        wanted = vae.decode(x / 0.5).sample
    torch.testing.assert_close(latent_decoder(tmp_path / "vae", scale=0.5)(x), wanted)
    assert wanted.shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"config\.json"):
        latent_decoder(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        latent_decoder(tmp_path / "vae")


def test_import_is_light() -> None:
    code = "import sys, speed_engine.sampling.process; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
