"""A folder of samples: written piece by piece, resumable, and read back for scoring.

    recipe.json          what decided these pictures; another recipe is refused
    images/000000.png    one file a sample; apart from the grid, which no score must read
    samples.npz          arr_0: uint8 NHWC (what the ADM evaluator reads), labels: int64 N
    grid.png             classes as rows; written last, so it marks a finished folder

Every file appears whole or not at all, so an interrupted run continues with the samples that are
missing. How a sample comes about is the business of process.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from speed_engine.atomic_files import atomic, write_json
from speed_engine.progress import progress
from speed_engine.sampling.process import Model, Process, Recipe, check, kept_steps, sample

SMALLEST_TILE = 64  # pixels of a picture's side in the grid: an 8x8 digit is enlarged 8 times
SEPARATOR = 3  # pixels between two tiles of the grid
PAPER, INK = (236, 236, 236), (40, 40, 40)


def to_uint8(x_NCHW: Tensor) -> np.ndarray:
    """Model space [-1, 1] -> uint8 [N, H, W, C], rounded and clipped. Raises ValueError on NaN."""
    if not torch.isfinite(x_NCHW).all():
        raise ValueError(
            "the samples hold NaN or infinity; sample with other --steps or another --sampler, and if that gives them, "
            "too, the weights are at fault: take an older checkpoint"
        )
    scaled = ((x_NCHW.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def open_folder(out: Path, recipe: Mapping[str, Any]) -> list[int]:
    """Prepare `out` for `recipe["num"]` samples; return the numbers of those missing, ascending.

    A folder of the same recipe is continued. Everything in `recipe` must agree except the key
    `versions`, which is for the reader. Raises ValueError for a folder of another recipe, or one
    that holds images and no recipe.
    """
    images = out / "images"
    wanted = json.loads(json.dumps(recipe))  # tuples become lists, as they will when read back
    if (out / "recipe.json").exists():
        found = read_recipe(out)
        keys = [k for k in {**wanted, **found} if k != "versions"]
        differing = [k for k in keys if wanted.get(k) != found.get(k)]
        if differing:
            there = ", ".join(f"{k}={found.get(k)!r} (now {wanted.get(k)!r})" for k in differing)
            raise ValueError(
                f"{out} holds samples of another recipe: {there}; choose another --out"
            )
    elif images.exists() and any(images.iterdir()):
        raise ValueError(f"{out} holds images but no recipe.json; choose another --out")
    images.mkdir(parents=True, exist_ok=True)
    for leftover in images.glob("*.partial"):
        leftover.unlink()
    if not (out / "recipe.json").exists():
        write_json(out / "recipe.json", recipe)
    return [i for i in range(int(recipe["num"])) if not image_path(out, i).exists()]


def image_path(out: Path, number: int) -> Path:
    """Where sample `number` lies."""
    return out / "images" / f"{number:06d}.png"


def save_images(
    pixels_NHWC: np.ndarray, out: Path, numbers: Sequence[int], upscale: int = 1
) -> None:
    """Write one PNG a sample (uint8 with 1 or 3 channels), each atomically.

    `upscale` repeats every pixel that many times in both directions; `samples.npz` stays at the
    original size, but scores that read the PNGs see the enlarged ones.
    """
    for pixels_HWC, number in zip(pixels_NHWC, numbers, strict=True):
        enlarged = pixels_HWC.repeat(upscale, axis=0).repeat(upscale, axis=1)
        with atomic(image_path(out, number)) as partial, partial.open("wb") as file:
            _as_picture(enlarged).save(file, format="PNG")


def _as_picture(pixels_HWC: np.ndarray) -> Image.Image:
    """uint8 [H, W, 1 or 3] -> a grey or colour picture. Raises ValueError for other channels."""
    channels = pixels_HWC.shape[2]
    if channels not in (1, 3):
        raise ValueError(
            f"a picture has 1 or 3 channels, not {channels}; give the VAE that decodes the latents"
        )
    return Image.fromarray(pixels_HWC[:, :, 0] if channels == 1 else pixels_HWC)


def close_folder(out: Path, labels_N: np.ndarray | None, upscale: int = 1) -> None:
    """Gather all PNGs into samples.npz and grid.png. Raises ValueError naming an unreadable PNG."""
    num = int(read_recipe(out)["num"])
    pixels = np.stack([_read_png(image_path(out, i))[::upscale, ::upscale] for i in range(num)])
    arrays = {"arr_0": pixels}
    if labels_N is not None:
        arrays["labels"] = labels_N.astype(np.int64)
    with atomic(out / "samples.npz") as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    with atomic(out / "grid.png") as partial, partial.open("wb") as file:
        grid_picture(pixels, labels_N).save(file, format="PNG")


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


def grid_picture(
    pixels_NHWC: np.ndarray, labels_N: np.ndarray | None, max_rows: int = 20, max_columns: int = 16
) -> Image.Image:
    """A montage: one row a class with its number on the left; without labels nearly square.

    The first `max_rows` classes and `max_columns` samples of each are shown. Small pictures are
    enlarged by a whole factor (nearest) to a side of at least SMALLEST_TILE pixels.
    """
    num, height, width, _ = pixels_NHWC.shape
    if labels_N is None:
        columns = min(max_columns, max(1, round(num**0.5)))
        numbers = list(range(min(num, columns * max_rows)))
        rows = [numbers[i : i + columns] for i in range(0, len(numbers), columns)]
        names = [""] * len(rows)
    else:
        classes = sorted({int(label) for label in labels_N})[:max_rows]
        rows = [np.flatnonzero(labels_N == c)[:max_columns].tolist() for c in classes]
        names = [str(c) for c in classes]
    factor = max(1, -(-SMALLEST_TILE // min(height, width)))
    tile_h, tile_w = height * factor + SEPARATOR, width * factor + SEPARATOR
    text_size = max(14, min(28, height * factor // 4))
    font = ImageFont.load_default(size=text_size)
    margin = max(int(font.getlength(name)) for name in names)
    margin = margin + text_size if margin else 0
    columns = max(len(row) for row in rows)
    size = (margin + columns * tile_w + SEPARATOR, len(rows) * tile_h + SEPARATOR)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = SEPARATOR + r * tile_h
        if name:
            middle = (margin // 2, top + height * factor // 2)
            draw.text(middle, name, fill=INK, font=font, anchor="mm")
        for c, number in enumerate(row):
            tile = _as_picture(pixels_NHWC[number]).convert("RGB")
            tile = tile.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + SEPARATOR + c * tile_w, top))
    return canvas


def sample_to_folder(
    model: Model,
    process: Process,
    recipe: Recipe,
    out: Path,
    *,
    num: int,
    conditions_N: Mapping[str, Tensor] | None = None,
    source: Mapping[str, Any] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    upscale: int = 1,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    show_progress: bool = True,
) -> Path:
    """Draw `num` samples into `out` and return it; an interrupted folder is continued.

    source: JSON-able facts on where the weights come from (checkpoint, step, EMA); kept in
    recipe.json and part of what must agree when a folder is continued. decode: turns model space
    into [-1, 1] pictures (`data.autoencoder.decoder`). upscale: enlarges the single PNGs. Raises ValueError
    as `sample` does, and for a folder of another recipe.
    """
    if num < 1 or upscale < 1:
        raise ValueError(f"num and upscale must be at least 1, not {num} and {upscale}")
    for name, values in (conditions_N or {}).items():
        if len(values) != num:
            raise ValueError(f"{len(values)} of {name} for {num} samples; give one for each")
    if decode is None and process.shape[0] not in (1, 3):
        raise ValueError(
            f"{process.shape[0]} channels are no picture; give the VAE that decodes the latents"
        )
    check(process, recipe, conditions_N)
    missing = open_folder(
        out, _facts(process, recipe, num, conditions_N, source, upscale, dtype, decode is not None)
    )
    total = len(missing) * recipe.steps  # sampler steps times samples
    with progress("sampling", total, show=show_progress) as bar:
        for start in range(0, len(missing), batch_size):
            numbers = missing[start : start + batch_size]
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
                progress=bar.further,
            )
            pixels = to_uint8(decode(x) if decode else x)
            save_images(pixels, out, numbers, upscale)
    labels_N = (conditions_N or {}).get("label")
    close_folder(out, None if labels_N is None else labels_N.cpu().numpy(), upscale)
    return out


def _facts(
    process: Process,
    recipe: Recipe,
    num: int,
    conditions_N: Mapping[str, Tensor] | None,
    source: Mapping[str, Any] | None,
    upscale: int,
    dtype: torch.dtype,
    decoded: bool,
) -> dict[str, Any]:
    """The contents of recipe.json: everything that decides the pictures, then versions."""
    from importlib.metadata import version

    schedule, objective = process.schedule, process.objective
    columns = hashlib.sha256()
    for column in (schedule.alpha, schedule.sigma, schedule.time, *objective.x0_columns(schedule)):
        columns.update(column.double().numpy().tobytes())
    kept = kept_steps(process, recipe)
    return {
        "num": num,
        **asdict(recipe),
        "schedule": process.schedule.kind,
        "objective": process.objective.kind,
        "process_sha256": columns.hexdigest(),
        "learned_variance": process.learned_variance,
        "shape": list(process.shape),
        "log_snr": [round(float(each), 6) for each in np.log(_snr(process)[kept])],
        "conditions_sha256": {
            name: hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()
            for name, values in (conditions_N or {}).items()
        },
        "dtype": str(dtype).removeprefix("torch."),
        "decoded": decoded,
        "upscale": upscale,
        "source": dict(source or {}),
        "versions": {name: version(name) for name in ("torch", "diffusers", "numpy")},
    }


def _snr(process: Process) -> np.ndarray:
    """alpha^2 / sigma^2 of every row, with a floor that a logarithm can take."""
    bar = process.alpha_bar
    return np.maximum(bar / (1 - bar), np.finfo(np.float64).tiny)
