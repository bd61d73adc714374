"""decode(encode(x)): through the commands a user types, with no constant that could hide by being 0 or 1."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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


# The constants that x = (stored - shift) * scale is told by, where none could hide by being 0 or 1.
CONSTANTS: dict[str, tuple[dict[str, object], list[str]]] = {
    "of the VAE": ({}, []),
    "of its channels": (
        {"latents_mean": [0.5, -1, 2, 0.25], "latents_std": [0.5, 2, 1.5, 3], "shift_factor": None},
        [],
    ),
    "measured": ({}, ["--scale", "auto"]),
    "given": ({}, ["--scale", "0.5,2,3,1.5", "--shift=-1,2,0.5,1"]),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_latents_are_decoded_by_the_constants_they_were_encoded_by(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """encode, train, sample --vae: a picture is the decoder's own answer to the latent that was sampled."""
    changes, words = CONSTANTS[case]
    save_vae(tmp_path / "vae", **changes)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 20, 20, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    encode = ["encode", "--images", tmp_path / "images", "--out", tmp_path / "set", "--size", 16]
    encode += ["--mode", "latents", "--vae", tmp_path / "vae", "--device", "cpu"]
    command(*encode, *words)
    source = shards.Shards(tmp_path / "set", check_scale=False)
    space, (stored, _) = source.facts.space, source.read(range(6))
    x, mean = source.decode(stored), stored.float()[:, :4]
    scale, shift = (torch.tensor(each).view(4, 1, 1) for each in (space.scale, space.shift))
    assert space.posterior and space.vae == "vae"
    if case == "of the VAE":
        assert space.scale == (SCALING,) * 4 and space.shift == (SHIFT,) * 4
    elif case == "of its channels":
        assert space.scale == (SCALING / 0.5, SCALING / 2, SCALING / 1.5, SCALING / 3)
        assert space.shift == (0.5, -1.0, 2.0, 0.25)
    elif case == "measured":  # of mean and deviation together: those of a draw
        drawn = torch.cat([source.decode(stored, torch.randn_like(mean)) for _ in range(40)])
        torch.testing.assert_close(drawn.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.05)
        torch.testing.assert_close(drawn.std((0, 2, 3)), torch.ones(4), rtol=0.05, atol=0)
    else:
        assert space.scale == (0.5, 2.0, 3.0, 1.5) and space.shift == (-1.0, 2.0, 0.5, 1.0)
    torch.testing.assert_close(x, (mean - shift) * scale, rtol=1e-5, atol=1e-5)
    vae = autoencoder.Vae(str(tmp_path / "vae"), "cpu")
    decode = autoencoder.decoder(space, str(tmp_path / "vae"), "cpu")
    torch.testing.assert_close(decode(x), vae.decode(mean), rtol=1e-5, atol=1e-5)

    run = tmp_path / "run"
    small = ["model.size=tiny/2", "model.depth=1", "model.hidden_size=16", "model.num_heads=1"]
    train = ["train", "--config", "digits_dit_tiny", "data.kind=shards", "engine=torch", *small]
    train += [f"data.path={tmp_path / 'set'}", "data.check_scale=false", f"run_dir={run}"]
    command(*train, "train.steps=1", "train.global_batch=4", "learned_variance=false")
    pictures = []
    for name in ("vae", "unshifted"):
        if name == "unshifted":  # the data's constants count, not the VAE's
            save_vae(tmp_path / name, scaling_factor=1.0, shift_factor=0.0)
        sample = ["sample", "--run", run, "--out", tmp_path / f"by_{name}", "--num", 2]
        sample += ["--sampler", "ddim", "--steps", 2, "--vae", tmp_path / name]
        command(*sample)
        with np.load(tmp_path / f"by_{name}" / "samples.npz") as file:
            pictures.append(file["arr_0"])
    assert pictures[0].shape == (2, 16, 16, 3) and np.array_equal(*pictures)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["speed_engine", *map(str, sample[:-2])])
        assert main() == 2
    assert "give --vae" in (said := capsys.readouterr().err) and "encoded by vae" in said


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
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    kept = load_file(weights)
    save_file({name: kept[name] for name in sorted(kept)[1:]}, weights, {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 weights \(decoder\.conv_in\.bias"):
        autoencoder.Vae(str(tmp_path / "vae"), "cpu")
    changed = kept | {"decoder.conv_in.bias": torch.zeros(3)}
    save_file(changed, weights, {"format": "pt"})
    with pytest.raises(DataError, match="cannot be loaded"):
        autoencoder.Vae(str(tmp_path / "vae"), "cpu")
    weights.unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        autoencoder.decoder(space, str(tmp_path / "vae"), "cpu")
