"""The spaces that pictures are compared in: each turns uint8 pictures into rows of features, and says what it is.

pixels      the pictures' own numbers; for tiny pictures
inception   the network of the published FID numbers, by torch-fidelity (see inception.py)
FILE        any network as a TorchScript file, which is code and runs
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from speed_engine.progress import progress
from speed_engine.reports.scores.sets import Pictures, in_colour

MOST_PIXELS = 4096  # features of the space `pixels`: a covariance of 16 million numbers
Input = Literal["bytes", "unit", "signed"]


class Space(Protocol):
    """identity: what makes two spaces the same, JSON-able."""

    identity: dict[str, Any]

    def rows(self, pixels_NHWC: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, C] -> float [B, F]."""
        ...

    def more(self) -> dict[str, float]:
        """Further scores of all pictures since the last call, of the space's own."""
        ...


@dataclass(frozen=True)
class Features:
    """rows: float32 [N, F]. sha256: of the pictures' bytes, in order. more: the space's own scores of the set."""

    rows: np.ndarray
    sha256: str
    more: dict[str, float] = field(default_factory=dict)


def extract(space: Space, pictures: Pictures, batch_size: int = 64) -> Features:
    """The features of all pictures. Raises ValueError for one that is not finite."""
    digest, parts = hashlib.sha256(), []
    seen = sys.stdout.isatty()
    with progress(f"looking at {pictures.name}", pictures.num, show=seen) as bar:
        for pixels in pictures.batches(batch_size):
            digest.update(np.ascontiguousarray(pixels).data)
            parts.append(space.rows(pixels).float().cpu().numpy())
            bar.further(len(pixels))
    rows = np.concatenate(parts)
    if not np.isfinite(rows).all():
        raise ValueError(
            f"the features of {pictures.name} are not finite: the feature network is damaged, or wants other input "
            "(--network-input)"
        )
    return Features(rows, digest.hexdigest(), space.more())


class PixelSpace:
    """Pixels from 0 to 1, in a row."""

    identity: dict[str, Any] = {"kind": "pixels"}  # noqa: RUF012  never changed

    def rows(self, pixels_NHWC: np.ndarray) -> torch.Tensor:
        num = pixels_NHWC[0].size
        if num > MOST_PIXELS:
            raise ValueError(
                f"--features pixels is for tiny pictures, and these have {num} numbers (at most {MOST_PIXELS}); give "
                "inception, or a network's file"
            )
        return torch.from_numpy(pixels_NHWC.reshape(len(pixels_NHWC), -1)).float() / 255

    def more(self) -> dict[str, float]:
        return {}


class NetworkSpace:
    """A TorchScript network: [B, 3, H, W] -> [B, F], or more dimensions, which are put in a row.

    given: bytes = uint8 from 0 to 255 (what the published Inception scripts take), unit = float from 0 to 1, signed =
    float from -1 to 1. A forward method with an argument `return_features` is asked for them.
    """

    def __init__(
        self, path: Path, given: Input, device: torch.device | str, trusted: bool = False
    ) -> None:
        """Raises ValueError where the file is none, or may not run."""
        if not path.is_file():
            raise ValueError(
                f"--features {path} is not there; give pixels, inception or a TorchScript file"
            )
        if not trusted:
            raise ValueError(
                f"--features {path} is a program that runs when it is loaded; add --trust-network if you trust where "
                "it comes from"
            )
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
            named = {each.name for each in self.network.forward.schema.arguments}
        except (RuntimeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"--features {path} is no TorchScript file ({' '.join(str(error).split())[:120]}); write one with "
                "torch.jit.script(network).save(FILE)"
            ) from error
        self.given, self.device = given, device
        self.keywords = {"return_features": True} if "return_features" in named else {}
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.identity = {"kind": "network", "file": path.name, "sha256": digest, "input": given}

    @torch.no_grad()
    def rows(self, pixels_NHWC: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(in_colour(pixels_NHWC)).to(self.device)
        if self.given != "bytes":
            x = x.float() / 255
            x = x if self.given == "unit" else 2 * x - 1
        try:
            found = self.network(x, **self.keywords)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1][:160]
            raise ValueError(
                f"the feature network {self.identity['file']} cannot take pictures {list(x.shape)} {x.dtype} ({last}); "
                "see --network-input and --resize"
            ) from error
        if not isinstance(found, torch.Tensor) or len(found) != len(x) or found.dim() < 2:
            raise ValueError(
                f"the feature network {self.identity['file']} must give a tensor [B, features]"
            )
        return found.flatten(1)

    def more(self) -> dict[str, float]:
        return {}


def open_space(
    name: str,
    *,
    given: Input = "bytes",
    trusted: bool = False,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
) -> Space:
    """name: pixels, inception, or a TorchScript file. Raises ValueError, with the cure."""
    if weights is not None and name != "inception":
        raise ValueError("--weights are Inception's; leave it out, or use --features inception")
    if name == "pixels":
        return PixelSpace()
    if name == "inception":
        from speed_engine.reports.scores.inception import InceptionSpace

        return InceptionSpace(weights, device)
    return NetworkSpace(Path(name), given, device, trusted)
