"""Latents as public projects keep them, told apart by their files. Nothing is unpickled or executed.

fast-DiT       *features/N.npy [1, C, h, w], scaled; *labels/N.npy [1]
LightningDiT   *.safetensors: latents [N, C, h, w], latents_flip, labels [N]; latents_stats.pt: mean, std [1, C, 1, 1]
edm2, REPA     dataset.json {"labels": [[name, class], ...]} and img-mean-std-*.npy [2C, h, w], in a folder or a zip
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import DataError
from .folders import natural
from .scaling import Numbers, Scale

STABLE_DIFFUSION = 0.18215  # the scale of its first autoencoder, which all three use by default


class Latent(NamedTuple):
    """Of one image: x [C or 2C, *space] as the autoencoder gave it, that of the mirrored image, the class."""

    x: np.ndarray
    flipped: np.ndarray | None
    label: int | None


@dataclass(frozen=True)
class Foreign:
    """All latents of a place, in the order of their files.

    files: (name, bytes) of all that is read. scale, shift: what the project does, x = (stored - shift) * scale; None:
    it is not known. read: latent number i; raises DataError, naming the file.
    """

    project: str
    count: int
    files: list[tuple[str, int]]
    posterior: bool
    scale: Scale | None
    shift: Numbers | None
    read: Callable[[int], Latent]


def find(place: Path, scale: Scale | None = None) -> Foreign:
    """The latents in `place`. scale: what a person said of it. Raises DataError where no known layout is found."""
    if place.is_file() and zipfile.is_zipfile(place):
        archive = zipfile.ZipFile(place)
        sizes = {each.filename: each.file_size for each in archive.infolist()}
        return _edm2(str(place), sizes, archive.read)
    if not place.is_dir():
        raise DataError(f"{place} is no folder and no zip archive; give --latents one with latents")
    place = place / "vae-sd" if (place / "vae-sd" / "dataset.json").exists() else place
    if (place / "dataset.json").exists():
        files = [path for path in place.rglob("*") if path.suffix in (".npy", ".json")]
        sizes = {path.relative_to(place).as_posix(): path.stat().st_size for path in files}
        return _edm2(str(place), sizes, lambda name: (place / name).read_bytes())
    if tensors := sorted(place.glob("*.safetensors")):
        return _lightning(place, tensors)
    features = [path for path in sorted(place.glob("*features")) if path.is_dir()]
    if len(features) == 1:
        return _fast_dit(features[0], scale)
    raise DataError(
        f"{place} holds no latents of a known layout: *features and *labels with .npy files (fast-DiT), *.safetensors "
        "(LightningDiT), or dataset.json with img-mean-std-*.npy (edm2, REPA); others can come as --arrays"
    )


def _fast_dit(features: Path, scale: Scale | None) -> Foreign:
    labels = features.with_name(features.name.removesuffix("features") + "labels")
    files = sorted(features.glob("*.npy"), key=lambda path: natural(path.name))
    known = {path.name for path in labels.glob("*.npy")}
    alone = known ^ {path.name for path in files} if known else set()
    if not files or alone:
        one = f"; {min(alone)} is in one of them only" if alone else ""
        raise DataError(f"{features} and {labels} do not hold one .npy file a sample each{one}")
    # Its files hold x = latent * scale. Stored is the latent, so that an autoencoder can decode what is sampled.
    factor = scale if isinstance(scale, float) else STABLE_DIFFUSION

    def read(number: int) -> Latent:
        path = files[number]
        x = _array(path.read_bytes(), path, "f")
        label = (
            _array((labels / path.name).read_bytes(), labels / path.name, "iu") if known else None
        )
        if x.ndim < 4 or len(x) != 1 or (label is not None and label.size != 1):
            raise DataError(f"{path} is {x.dtype} {x.shape}; it must be one latent, [1, C, h, w]")
        latent = (x[0].astype(np.float64) / factor).astype(np.float32)
        return Latent(latent, None, None if label is None else int(label.reshape(())))

    listed = [(path.name, path.stat().st_size) for path in files]
    return Foreign("fast-DiT", len(files), listed, False, factor, None, read)


def _lightning(place: Path, files: list[Path]) -> Foreign:
    from safetensors import SafetensorError, safe_open

    opened, first = [], [0]
    for path in files:
        try:
            file = safe_open(path, framework="pt")  # torch's, which knows bfloat16
        except SafetensorError as error:
            raise DataError(
                f"{path} is no sound safetensors file ({error}); fetch it again"
            ) from None
        names = set(file.keys())
        if "latents" not in names:
            raise DataError(f"{path} has no latents; it holds {', '.join(sorted(names)[:8])}")
        slices = {
            name: file.get_slice(name)
            for name in ("latents", "latents_flip", "labels")
            if name in names
        }
        counts = {name: each.get_shape()[0] for name, each in slices.items()}
        if len(set(counts.values())) != 1:
            raise DataError(f"{path} holds {counts}, and they should be as many")
        opened.append(slices)
        first.append(first[-1] + counts["latents"])

    def read(number: int) -> Latent:
        which = int(np.searchsorted(first, number, "right")) - 1
        row, slices = number - first[which], opened[which]

        def one(name: str) -> np.ndarray | None:
            if name not in slices:
                return None
            tensor = slices[name][row : row + 1][0]
            return (
                tensor.float() if tensor.is_floating_point() and tensor.itemsize != 4 else tensor
            ).numpy()

        x, label = one("latents"), one("labels")
        assert x is not None
        return Latent(x, one("latents_flip"), None if label is None else int(label.reshape(())))

    scale, shift = _stats(place / "latents_stats.pt")
    listed = [(path.name, path.stat().st_size) for path in files]
    return Foreign("LightningDiT", first[-1], listed, False, scale, shift, read)


def _stats(path: Path) -> tuple[Scale, Numbers | None]:
    """(scale, shift) by mean and deviation of each channel; without a file they are measured, as the project does."""
    import torch

    if not path.exists():
        return "auto", None
    try:
        stats = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (stats[name].double().flatten() for name in ("mean", "std"))
    except (
        RuntimeError,
        pickle.UnpicklingError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
    ) as error:
        reason = str(error).splitlines()[0][:120]
        raise DataError(
            f"{path} does not hold mean and std as tensors ({reason}); remove it to measure them"
        ) from None
    return tuple((1 / std).tolist()), tuple(mean.tolist())


def _edm2(place: str, sizes: dict[str, int], content: Callable[[str], bytes]) -> Foreign:
    names = sorted(name for name in sizes if name.endswith(".npy"))
    try:
        found = json.loads(content("dataset.json")).get("labels")
        labels = None if found is None else {str(name): int(number) for name, number in found}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f'{place} has no sound dataset.json with {{"labels": [[name, class], ...]}}'
        ) from None
    if not names:
        raise DataError(f"{place} holds no img-mean-std-*.npy; its images may not be encoded yet")
    if labels is not None and (alone := labels.keys() ^ set(names)):
        where = (
            "is in dataset.json only" if min(alone) in labels else "has no label in dataset.json"
        )
        raise DataError(f"{place}: {min(alone)} {where}; latents and labels must belong together")

    def read(number: int) -> Latent:
        name = names[number]
        try:
            raw = content(name)
        except zipfile.BadZipFile as error:
            raise DataError(
                f"{place}, {name}: damaged ({error}); fetch the archive again"
            ) from None
        x = _array(raw, f"{place}, {name}", "f")
        return Latent(x, None, None if labels is None else labels[name])

    four = read(0).x.shape[0] == 8
    listed = [(name, sizes[name]) for name in names]
    return Foreign("edm2", len(names), listed, True, STABLE_DIFFUSION if four else None, None, read)


def _array(raw: bytes, where: Path | str, kinds: str) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{where} cannot be read as an array ({str(error)[:80]})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds:
        raise DataError(f"{where} is no array of {'numbers' if 'f' in kinds else 'whole numbers'}")
    return array
