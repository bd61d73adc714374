"""decode(encode(x)): through the commands a user types, with no constant that could hide by being 0 or 1."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from speed_engine.__main__ import main
from speed_engine.data import DataError, autoencoder, shards
from speed_engine.data.space import Space

SCALING, SHIFT = 1.5, 2.0


def save_vae(folder: Path, **changes: object) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    settings = {"latent_channels": 4, "scaling_factor": SCALING, "shift_factor": SHIFT, **changes}
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        **settings,
    ).save_pretrained(folder, safe_serialization=True)


def command(*words: object) -> None:
    """`python -m speed_engine WORDS`, to a good end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["speed_engine", *map(str, words)])
        assert main() == 0


def test_a_run_on_shifted_latents_is_decoded_with_the_shift(tmp_path: Path) -> None:
    """encode, train, sample --vae: a picture is the decoder's own answer to the latent that was sampled."""
    save_vae(tmp_path / "vae")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 20, 20, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    encode = ["encode", "--images", tmp_path / "images", "--out", tmp_path / "set", "--size", 16]
    encode += ["--mode", "latents", "--vae", tmp_path / "vae", "--device", "cpu"]
    command(*encode)
    source = shards.Shards(tmp_path / "set", check_scale=False)
    stored, _ = source.read(range(6))
    x = source.decode(stored)
    mean = stored.float()[:, :4]
    assert torch.allclose(x, (mean - SHIFT) * SCALING)
    vae = autoencoder.Vae(str(tmp_path / "vae"), "cpu")
    decode = autoencoder.decoder(source.facts.space, str(tmp_path / "vae"), "cpu")
    torch.testing.assert_close(decode(x), vae.decode(mean), rtol=1e-5, atol=1e-5)

    run = tmp_path / "run"
    small = ["model.size=tiny/2", "model.depth=1", "model.hidden_size=16", "model.num_heads=1"]
    train = ["train", "--config", "digits_dit_tiny", "data.kind=shards", "engine=torch", *small]
    train += [f"data.path={tmp_path / 'set'}", "data.check_scale=false", f"run_dir={run}"]
    command(*train, "train.steps=1", "train.global_batch=4", "learned_variance=false")
    pictures = []
    for name in ("vae", "unshifted"):
        if name == "unshifted":
            save_vae(tmp_path / name, shift_factor=0.0)  # the data's constants count, not the VAE's
        sample = ["sample", "--run", run, "--out", tmp_path / f"by_{name}", "--num", 2]
        sample += ["--sampler", "ddim", "--steps", 2, "--vae", tmp_path / name]
        command(*sample)
        with np.load(tmp_path / f"by_{name}" / "samples.npz") as file:
            pictures.append(file["arr_0"])
    assert pictures[0].shape == (2, 16, 16, 3) and np.array_equal(*pictures)


def test_scale_and_shift_of_every_channel() -> None:
    space = Space("latents", (0.5, 1.5, 2.5, 3.0), (1.0, -2.0, 0.25, 4.0), posterior=True)
    mean, std = torch.randn(2, 4, 3, 5), torch.rand(2, 4, 3, 5)
    stored, normals = torch.cat([mean, std], 1), torch.randn(2, 4, 3, 5)
    x = space.to_model(stored)
    for channel in range(4):
        by_hand = (mean[:, channel] - space.shift[channel]) * space.scale[channel]
        torch.testing.assert_close(x[:, channel], by_hand)
    torch.testing.assert_close(space.to_stored(x), mean, rtol=1e-5, atol=1e-5)
    drawn = space.to_stored(space.to_model(stored, normals))
    torch.testing.assert_close(drawn, mean + std * normals, rtol=1e-5, atol=1e-5)
    assert Space.from_json(space.to_json()) == space
    video = Space("latents", (2.0, 3.0), (1.0, 0.0))
    frames = torch.randn(1, 2, 3, 4, 4)
    torch.testing.assert_close(video.to_stored(video.to_model(frames)), frames)


def test_an_autoencoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_vae(tmp_path / "vae", latent_channels=8)
    space = Space("latents", (1.0,) * 4, (0.0,) * 4, vae="sd-vae")
    with pytest.raises(DataError, match=r"8 channels, and the samples have 4; .* sd-vae"):
        autoencoder.decoder(space, str(tmp_path / "vae"), "cpu")
    with pytest.raises(DataError, match="give --vae the folder"):
        autoencoder.decoder(space, str(tmp_path / "nothing"), "cpu")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        autoencoder.decoder(space, str(tmp_path / "vae"), "cpu")
