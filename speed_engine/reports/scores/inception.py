"""Inception's features, by torch-fidelity: the network behind the published FID numbers, and the Inception score."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speed_engine.reports.scores.sets import in_colour
from speed_engine.weights.pickles import read_pt

EXTRACTOR = "inception-v3-compat"  # torch-fidelity's port of the original FID network
FEATURES, LOGITS = "2048", "logits_unbiased"
DOWNLOAD = "91 MB"
SPLITS = 10  # of the Inception score


class InceptionSpace:
    """See `features.Space`."""

    def __init__(self, weights: Path | None, device: torch.device | str) -> None:
        """weights: a local copy of torch-fidelity's file, read as data; default: its download. Raises ValueError."""
        network: Any = _network_class()
        if weights is not None:
            if not weights.is_file():
                raise ValueError(f"there is no file --weights {weights}")
            read_pt(weights)  # the other reader would run what is in it: only tensors may be
        else:
            _tell_of_download()
        place = None if weights is None else str(weights)
        try:
            made = network(
                EXTRACTOR, [FEATURES, LOGITS], feature_extractor_weights_path=place, verbose=False
            )
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            cure = (
                "give another file"
                if weights
                else "download them elsewhere and give --weights FILE"
            )
            raise ValueError(f"Inception's weights cannot be had ({reason}); {cure}") from error
        self.network, self.device = made.to(device), device
        self.logits: list[torch.Tensor] = []
        self.identity = {
            "kind": "inception",
            "extractor": f"torch-fidelity {EXTRACTOR}",
            "weights": _digest(made),
        }

    @torch.no_grad()
    def rows(self, pixels_NHWC: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(in_colour(pixels_NHWC)).to(self.device)
        rows, logits = self.network(x)
        self.logits.append(logits.double().cpu())
        return rows

    def more(self) -> dict[str, float]:
        """The Inception score, mean and deviation over ten parts (Salimans et al., arXiv 1606.03498)."""
        if not self.logits:
            return {}
        found, self.logits = inception_score(torch.cat(self.logits)), []
        return found


def inception_score(logits_NK: torch.Tensor, splits: int = SPLITS) -> dict[str, float]:
    """exp of the mean divergence of p(class | picture) from p(class), in each of `splits` parts of a fixed shuffle."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(logits_NK)))
    scores = []
    for part in logits_NK[order].tensor_split(min(splits, len(logits_NK))):
        p = part.softmax(1)
        divergence = (p * (part.log_softmax(1) - p.mean(0).log())).sum(1).mean()
        scores.append(float(divergence.exp()))
    return {"inception_score": float(np.mean(scores)), "inception_score_std": float(np.std(scores))}


def _network_class() -> Any:
    """torch-fidelity's network. Raises ValueError that names the package which is missing or does not fit."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except ModuleNotFoundError as error:
        missing = (error.name or "torch_fidelity").partition(".")[0]
        if missing == "torchvision":
            raise ValueError(
                f"torch-fidelity needs torchvision, which is not installed; install the one made for torch "
                f"{torch.__version__} (pip install torchvision, from the index that torch came from)"
            ) from error
        raise ValueError(
            f"--features inception needs {missing.replace('_', '-')}; pip install 'speed-engine[score]', or give "
            "another space: --features pixels, or a TorchScript file"
        ) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(
            f"torchvision {_version('torchvision')} does not fit torch {torch.__version__} ({first}); install the one "
            "made for it (pip install torchvision, from the index that torch came from)"
        ) from error
    return FeatureExtractorInceptionV3


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of no known version"


def _tell_of_download() -> None:
    """Before anything is fetched, what and where to."""
    from torch_fidelity import (  # pyright: ignore[reportMissingImports]
        feature_extractor_inceptionv3 as home,
    )

    address = str(getattr(home, "URL_INCEPTION_V3", ""))
    place = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if not place.exists():
        print(
            f"note: torch-fidelity now downloads Inception's weights ({DOWNLOAD}) from {address} to {place}; "
            "--weights FILE takes a local copy",
            file=sys.stderr,
        )


def _digest(network: Any) -> str:
    from speed_engine.weights.file import checksum

    return checksum({}, network.state_dict())
