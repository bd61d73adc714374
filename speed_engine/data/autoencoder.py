"""The autoencoder between pictures and latents, both directions: the only place that loads one.

    stored = what the encoder says            x = (stored - shift) * scale            decoder(x / scale + shift)

Scale and shift are those of the data's `Space`, in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed_engine.data import DataError
from speed_engine.data.space import Space
from speed_engine.data.storage.scaling import Numbers


def _loaded(kind: Any, place: str, sub: str) -> tuple[Any, dict[str, Any]]:
    """(autoencoder, what diffusers found missing)."""
    settings = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    return kind.from_pretrained(place, subfolder=sub, **settings)


class Vae:
    """A diffusers AutoencoderKL, loaded from safetensors only, computing in `dtype`.

    name: its folder, the folder of a pipeline that holds it, or its name on a hub. scale, shift: those of
    its configuration, one number or one a channel. identity: what the index says of it, its name on a hub or the
    name of its folder (not the place, an index travels). factor: pixels of a side over those of the latent. Raises
    DataError.
    """

    def __init__(
        self, name: str, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        try:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        except ImportError as error:
            raise DataError(f"latents need diffusers ({error}); `pip install diffusers`") from None
        folder = Path(name).expanduser()
        sub = "vae" if (folder / "vae" / "config.json").is_file() else ""
        place = str(folder) if folder.exists() else name
        try:
            vae, info = _loaded(AutoencoderKL, place, sub)
            scaling = float(vae.config.scaling_factor)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0].rstrip(". :")
            raise DataError(
                f"the VAE {name!r} cannot be loaded ({reason}); give --vae the folder of a diffusers AutoencoderKL"
            ) from None
        if missing := sorted(info["missing_keys"]):  # diffusers goes on with random numbers
            raise DataError(
                f"the VAE {name!r} lacks {len(missing)} weights ({missing[0]} ...); give --vae the folder of a whole "
                "diffusers AutoencoderKL"
            )
        self.model = vae.to(device, dtype).eval().requires_grad_(False)
        self.device = device
        self.identity = folder.resolve().name if folder.exists() else name
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = int(vae.config.in_channels)
        self.latent_channels = int(vae.config.latent_channels)
        self.scale: Numbers = scaling
        self.shift: Numbers = float(getattr(vae.config, "shift_factor", None) or 0.0)
        mean, std = (getattr(vae.config, f"latents_{what}", None) for what in ("mean", "std"))
        if mean is not None and std is not None:
            # As diffusers' pipelines do: (latent - mean) * scaling / std.
            self.scale = tuple(scaling / float(each) for each in std)
            self.shift = tuple(map(float, mean))

    @torch.no_grad()
    def encode(self, pixels_BCHW: np.ndarray, posterior: bool) -> np.ndarray:
        """uint8 [B, C, H, W] -> float16 [B, C', h, w]: the mean, and below it the deviation."""
        x = torch.from_numpy(pixels_BCHW).to(self.device).float().div_(127.5).sub_(1)
        found = self.model.encode(x.to(self.model.dtype)).latent_dist
        latent = torch.cat([found.mean, found.std], 1) if posterior else found.mean
        return latent.to(torch.float16).cpu().numpy()

    @torch.no_grad()
    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Latents as the encoder gives them -> pictures in about [-1, 1], float32 [B, 3, H, W]."""
        latent = latent_BCHW.to(device=self.device, dtype=self.model.dtype)
        return self.model.decode(latent).sample.float()


def decoder(space: Space, name: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """A function from model space [B, C, h, w] to pictures [B, 3, H, W] in about [-1, 1].

    Raises DataError where the autoencoder `name` does not fit the latents.
    """
    vae = Vae(name, device)
    if vae.latent_channels != len(space.scale):
        raise DataError(
            f"the VAE {name!r} has latents of {vae.latent_channels} channels, and the samples have {len(space.scale)}; "
            f"give the one that encoded the data{f', {space.vae}' if space.vae else ''}"
        )
    return lambda x: vae.decode(space.to_stored(x))
