"""A folder of samples: written piece by piece, resumable, and read back for scoring.

    recipe.json          what decided these samples; another recipe is refused
    images/000000.png    one file a sample, of its number or its name; apart from the grid, which no score must read
    samples.npz          arr_0: uint8 NHWC (what the ADM evaluator reads), labels: int64 N
    grid.png             classes as rows; written last, so it marks a finished folder

Samples that are no pictures (videos, points, latents of other shapes) are arrays:

    arrays/000000.npy    one file a sample, [C, *space]
    labels.npy           int64 [N], where there are classes

Every file appears whole or not at all, so an interrupted run continues with the samples that are
missing. Any number of processes share them by batches: the batches, and so the samples, are those of one process. How
a sample comes about is the business of process.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from speed_engine.atomic_files import atomic, write_json
from speed_engine.distributed import Processes
from speed_engine.progress import progress
from speed_engine.sampling.guidance import Model
from speed_engine.sampling.montage import as_picture, grid_picture
from speed_engine.sampling.process import Process, Recipe, check, sample


def to_uint8(x_NCHW: Tensor) -> np.ndarray:
    """Model space [-1, 1] -> uint8 [N, H, W, C], rounded and clipped. Raises ValueError on NaN."""
    if not torch.isfinite(x_NCHW).all():
        raise ValueError(
            "the pictures hold NaN or infinity, which the samples did not: the VAE's weights are damaged"
        )
    return as_bytes(x_NCHW).permute(0, 2, 3, 1).cpu().numpy()


def as_bytes(x: Tensor) -> Tensor:
    """Model space [-1, 1] -> uint8, rounded and clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def open_folder(out: Path, recipe: Mapping[str, Any]) -> list[int]:
    """Prepare `out` for `recipe["num"]` samples; return the numbers of those missing, ascending.

    A folder of the same recipe is continued. Everything in `recipe` must agree except the key
    `versions`, which is for the reader; what the folder does not say is at `Recipe`'s default.
    Raises ValueError for a folder of another recipe, or one that holds images and no recipe.
    """
    images = sample_path(out, recipe, 0).parent
    wanted = json.loads(json.dumps(recipe))  # tuples become lists, as they will when read back
    if (out / "recipe.json").exists():
        defaults = {each.name: each.default for each in fields(Recipe)}
        found = defaults | read_recipe(out)
        keys = [k for k in {**wanted, **found} if k != "versions"]
        differing = [k for k in keys if wanted.get(k) != found.get(k)]
        if differing:
            there = ", ".join(f"{k}={found.get(k)!r} (now {wanted.get(k)!r})" for k in differing)
            raise ValueError(
                f"{out} holds samples of another recipe: {there}; choose another --out"
            )
    elif images.exists() and any(images.iterdir()):
        raise ValueError(f"{out} holds {images.name} but no recipe.json; choose another --out")
    images.mkdir(parents=True, exist_ok=True)
    for leftover in images.glob("*.partial"):
        leftover.unlink()
    if not (out / "recipe.json").exists():
        write_json(out / "recipe.json", recipe)
    return [i for i in range(int(recipe["num"])) if not sample_path(out, recipe, i).exists()]


def image_path(out: Path, number: int | str) -> Path:
    """Where the picture of a sample lies, by its number or its name."""
    return out / "images" / f"{number if isinstance(number, str) else f'{number:06d}'}.png"


def array_path(out: Path, number: int | str) -> Path:
    """Where the array of a sample lies, by its number or its name."""
    return out / "arrays" / f"{number if isinstance(number, str) else f'{number:06d}'}.npy"


def named(recipe: Mapping[str, Any], number: int) -> int | str:
    """What sample `number` is called in a folder of this recipe: that number, or one of its names."""
    names = recipe.get("names")
    return names[number] if names else number


def sample_path(out: Path, recipe: Mapping[str, Any], number: int) -> Path:
    """Where sample `number` lies in a folder of this recipe; first versions knew only pictures."""
    path = array_path if recipe.get("saved_as") == "arrays" else image_path
    return path(out, named(recipe, number))


def save_images(
    pixels_NHWC: np.ndarray, out: Path, numbers: Sequence[int | str], upscale: int = 1
) -> None:
    """Write one PNG a sample (uint8 with 1 or 3 channels), each atomically.

    `upscale` repeats every pixel that many times in both directions; `samples.npz` stays at the
    original size, but scores that read the PNGs see the enlarged ones.
    """
    for pixels_HWC, number in zip(pixels_NHWC, numbers, strict=True):
        enlarged = pixels_HWC.repeat(upscale, axis=0).repeat(upscale, axis=1)
        with atomic(image_path(out, number)) as partial, partial.open("wb") as file:
            as_picture(enlarged).save(file, format="PNG")


def save_arrays(arrays_N: np.ndarray, out: Path, numbers: Sequence[int | str]) -> None:
    """Write one .npy a sample, each atomically."""
    for array, number in zip(arrays_N, numbers, strict=True):
        with atomic(array_path(out, number)) as partial, partial.open("wb") as file:
            np.save(file, array)


def close_folder(
    out: Path, labels_N: np.ndarray | None, upscale: int = 1, class_names: Sequence[str] = ()
) -> None:
    """Gather all PNGs into samples.npz and grid.png, one picture at a time. Raises ValueError naming a PNG that cannot
    be read or has another size.
    """
    recipe = read_recipe(out)
    num = int(recipe["num"])

    def read(number: int) -> np.ndarray:
        return _read_png(sample_path(out, recipe, number))[::upscale, ::upscale]

    shape = read(0).shape
    # As numpy writes it, but without ever holding all pictures: 50,000 of 256x256 are ten gigabytes.
    with atomic(out / "samples.npz") as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (num, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for number in range(num):
                pixels = read(number)
                if pixels.shape != shape or pixels.dtype != np.uint8:
                    raise ValueError(
                        f"{sample_path(out, recipe, number)} is no picture of {shape} as the first one is; delete it "
                        "and sample again"
                    )
                file.write(pixels.tobytes())
        if labels_N is not None:
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, labels_N.astype(np.int64))
    numbers = _shown(num, labels_N)
    labels = None if labels_N is None else labels_N[numbers]
    with atomic(out / "grid.png") as partial, partial.open("wb") as file:
        tiles = np.stack([read(number) for number in numbers])
        grid_picture(tiles, labels, class_names).save(file, format="PNG")


def _shown(num: int, labels_N: np.ndarray | None, rows: int = 20, columns: int = 16) -> list[int]:
    """The samples that a grid of so many rows and columns shows, ascending."""
    if labels_N is None:
        return list(range(min(num, rows * columns)))
    classes = np.unique(labels_N)[:rows]
    return sorted(int(n) for c in classes for n in np.flatnonzero(labels_N == c)[:columns])


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No second command draws into `folder` meanwhile, where the file system can tell; ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some network file systems lock no folders
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ValueError(
                    f"another command is drawing into {folder}; wait for it, or choose another --out (for many "
                    "processes on one folder: torchrun)"
                ) from error
        yield
    finally:
        os.close(descriptor)


def _read_png(path: Path) -> np.ndarray:
    """One PNG as uint8 [H, W, C]."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise ValueError(f"{path} cannot be read ({error}); delete it and sample again") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def read_recipe(out: Path) -> dict[str, Any]:
    """The recipe of a folder of samples. Raises ValueError where there is none that can be read."""
    path = out / "recipe.json"
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); give a folder written by `sample`"
        ) from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("num"), int):
        raise ValueError(f"{path} is not a recipe of samples: the key `num` is missing")
    return recipe


def read_samples(out: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """samples.npz of a finished folder: (uint8 NHWC, labels int64 N or None). Raises ValueError."""
    path = out / "samples.npz"
    if read_recipe(out).get("saved_as") == "arrays":
        raise ValueError(f"{out} holds arrays and no pictures; give a folder of pictures")
    if not path.exists():
        raise ValueError(f"{path} is missing; run `sample` again to finish this folder")
    with np.load(path, allow_pickle=False) as arrays:
        pixels = arrays["arr_0"]
        labels = arrays.get("labels")
    if (
        pixels.ndim != 4
        or pixels.dtype != np.uint8
        or (labels is not None and len(labels) != len(pixels))
    ):
        raise ValueError(f"{path} must hold arr_0 as uint8 NHWC, and labels of the same length")
    return pixels, labels


def sample_to_folder(
    model: Model,
    process: Process,
    recipe: Recipe,
    out: Path,
    *,
    num: int,
    conditions_N: Mapping[str, Tensor] | None = None,
    names: Sequence[str] | None = None,
    source: Mapping[str, Any] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    stored: Callable[[Tensor], Tensor] | None = None,
    upscale: int = 1,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    show_progress: bool = True,
    processes: Processes | None = None,
) -> Path:
    """Draw `num` samples into `out` and return it; an interrupted folder is continued.

    names: what the samples' files are called, without endings; default: their numbers. source: JSON-able facts on where
    the weights come from (checkpoint, step, EMA); kept in recipe.json and part of what must agree when a folder is
    continued. decode: turns model space into [-1, 1] pictures (`data.autoencoder.decoder`). stored: turns model space
    into what is saved as arrays, of samples that are no pictures (default: nothing is done). upscale: enlarges the
    single PNGs. processes: those that share the work, each of which must call this; with one batch_size they draw what
    one process draws. Raises ValueError as `sample` does, and for a folder of another recipe.
    """
    shape = process.shape
    arrays = decode is None and (stored is not None or len(shape) != 3)
    if num < 1 or upscale < 1:
        raise ValueError(f"num and upscale must be at least 1, not {num} and {upscale}")
    for name, values in (conditions_N or {}).items():
        if len(values) != num:
            raise ValueError(f"{len(values)} of {name} for {num} samples; give one for each")
    if not arrays and decode is None and shape[0] not in (1, 3):
        raise ValueError(
            f"{shape[0]} channels are no picture; give the VAE that decodes the latents"
        )
    if arrays and upscale != 1:
        raise ValueError(f"samples of the shape {shape} are no pictures; leave upscale at 1")
    check(process, recipe, conditions_N)
    facts = _facts(process, recipe, num, conditions_N, source, dtype)
    facts |= {"saved_as": "arrays" if arrays else "pictures", "upscale": upscale}
    facts |= {"decoded": decode is not None, **({"names": list(names)} if names else {})}
    processes = processes or Processes(0, 1, 0, torch.device(device))

    def draw(numbers: Sequence[int], tell: Callable[[int], None]) -> None:
        told = conditions_N and {name: each[numbers] for name, each in conditions_N.items()}
        x = sample(
            model,
            process,
            recipe,
            conditions_N=told,
            numbers=numbers,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            progress=tell,
        )
        called = [named(facts, number) for number in numbers]
        if arrays:
            save_arrays((stored(x) if stored else x).cpu().numpy(), out, called)
        else:
            save_images(to_uint8(decode(x) if decode else x), out, called, upscale)

    def draw_all(batches: Sequence[Sequence[int]]) -> None:
        total = sum(map(len, batches)) * recipe.steps  # sampler steps times samples
        with progress("sampling", total, show=show_progress and processes.first) as bar:
            for numbers in batches:
                draw(numbers, bar.further)

    with contextlib.ExitStack() as stack:

        def begin() -> list[int]:
            if not processes.first:
                return []
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_alone(out))
            return open_folder(out, facts)

        missing = processes.from_first(processes.attempt(begin))
        batches = [missing[at : at + batch_size] for at in range(0, len(missing), batch_size)]
        processes.attempt(lambda: draw_all(batches[processes.rank :: processes.world]))
        if processes.first:
            finish = functools.partial(_finish, out, process, conditions_N, arrays, upscale)
        else:
            finish = _nothing
        processes.attempt(finish)
    return out


def _nothing() -> None:
    """What the other processes have to finish."""


def _finish(
    out: Path,
    process: Process,
    conditions_N: Mapping[str, Tensor] | None,
    arrays: bool,
    upscale: int,
) -> None:
    """What a folder has beside its samples."""
    labels = (conditions_N or {}).get("label")
    labels_N = None if labels is None else labels.cpu().numpy()
    if not arrays:
        classes = process.conditions.get("label")
        close_folder(out, labels_N, upscale, classes.facts.names if classes else ())
    elif labels_N is not None:
        with atomic(out / "labels.npy") as partial, partial.open("wb") as file:
            np.save(file, labels_N)


def _facts(
    process: Process,
    recipe: Recipe,
    num: int,
    conditions_N: Mapping[str, Tensor] | None,
    source: Mapping[str, Any] | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What decides the samples, and versions: recipe.json but for how they are saved."""
    from importlib.metadata import version

    schedule = process.schedule.unmoved
    objective = process.objective_on(schedule)
    columns = hashlib.sha256()
    for column in (schedule.alpha, schedule.sigma, schedule.time, *objective.x0_columns(schedule)):
        columns.update(column.double().numpy().tobytes())
    log_snr = process.levels(recipe).log_snr.tolist()
    return {
        "num": num,
        **asdict(recipe),
        "schedule": schedule.kind,
        "objective": objective.kind,
        "process_sha256": columns.hexdigest(),
        "learned_variance": process.learned_variance,
        "shape": list(process.shape),
        # Of the levels that were visited, from clean to noisy; null is pure noise.
        "log_snr": [round(each, 6) if math.isfinite(each) else None for each in log_snr],
        "conditions_sha256": {
            name: hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()
            for name, values in (conditions_N or {}).items()
        },
        "dtype": str(dtype).removeprefix("torch."),
        "source": dict(source or {}),
        "versions": {name: version(name) for name in ("torch", "diffusers", "numpy")},
    }
