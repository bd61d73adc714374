"""Super-resolution on the digits, from 4x4 to 8x8 pixels: what is drawn of scans by writers that training never saw.

    python -m benchmarks.studies.superres_digits --work DIR --out superres-digits.json

The preset `digits_superres_tiny` by the commands that a user types; started again they go on. Then, of the samples and
of plain enlargements of the same 4x4 pictures: how often a classifier that was trained on the training part alone reads
the true class, and how far reducing a picture again leads from the one that it was drawn for. A picture lies beside the
JSON. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness.environment import conditions
from benchmarks.studies.captions_digits import command
from speed_engine.atomic_files import atomic, write_json
from speed_engine.data.digits import NUM_DIGITS, SIDE
from speed_engine.data.low_resolution import reduced

LOW, HELD_OUT = 4, 0.1664
NUM_TRAIN = NUM_DIGITS - round(HELD_OUT * NUM_DIGITS)
SEEDS, LEVELS = (0, 1, 2), (0.0, 0.3)  # of sampling; noise that is put into the pictures
SAMPLER_STEPS = 25
SHOWN, ENLARGED = 20, 5  # digits in the picture, and how many pixels of it one of theirs takes


def scans() -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [1797, 1, 8, 8], classes int64 [1797]), as `data.kind=digits` stores them."""
    from sklearn.datasets import load_digits

    ink, labels = load_digits(return_X_y=True)
    return np.round(ink * (255 / 16)).astype(np.uint8).reshape(-1, 1, SIDE, SIDE), labels


def write_low(folder: Path, low_N1hw: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(low_N1hw):
        Image.fromarray(picture[0]).save(folder / f"scan-{NUM_TRAIN + number}.png")


def drawn(folder: Path) -> np.ndarray:
    """uint8 [N, 1, 8, 8] in the order of the scans."""
    files = [folder / "images" / f"scan-{number}.png" for number in range(NUM_TRAIN, NUM_DIGITS)]
    return np.stack([np.asarray(Image.open(file))[None] for file in files])


def enlarged(low_N1hw: np.ndarray, how: Image.Resampling) -> np.ndarray:
    each = [Image.fromarray(one[0]).resize((SIDE, SIDE), how) for one in low_N1hw]
    return np.stack([np.asarray(one)[None] for one in each])


def psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    """In decibels, of the mean squared error over all pixels; None where there is no error."""
    error = float(np.mean((a.astype(float) - b) ** 2))
    return None if error == 0 else 10 * math.log10(255**2 / error)


class Judge:
    """The measures of a set of pictures of the held-out scans. all: of the whole 1,797."""

    def __init__(self, pixels_all: np.ndarray, labels_all: np.ndarray) -> None:
        from sklearn.svm import SVC

        support_vectors: Any = SVC  # its stubs know no number for gamma
        low_all = np.stack([reduced(one, LOW) for one in pixels_all])

        def fitted(pictures: np.ndarray, gamma: float) -> Any:
            ink = pictures[:NUM_TRAIN].reshape(NUM_TRAIN, -1) / 255 * 16
            return support_vectors(gamma=gamma).fit(ink, labels_all[:NUM_TRAIN])

        self.classifier = fitted(pixels_all, 0.001)  # as speed_engine.reports.scores.digits
        # A fourth of the pixels, each the mean of four: distances are about half as large.
        of_low = fitted(low_all, 0.004)
        self.truth, self.labels = pixels_all[NUM_TRAIN:], labels_all[NUM_TRAIN:]
        self.low = low_all[NUM_TRAIN:]
        num = len(self.low)
        self.read_from_low = float(of_low.score(self.low.reshape(num, -1) / 255 * 16, self.labels))

    def of(self, pictures_N1HW: np.ndarray) -> dict[str, Any]:
        """agreement: the classifier reads the true class. consistency: PSNR of the pictures, reduced again, against
        what they were drawn for; unrelated: against the next scan's. psnr: against the scan itself."""
        ink = pictures_N1HW.reshape(len(pictures_N1HW), -1) / 255 * 16
        again = np.stack([reduced(one, LOW) for one in pictures_N1HW])
        return {
            "agreement": float(self.classifier.score(ink, self.labels)),
            "consistency": psnr(again, self.low),
            "unrelated": psnr(again, np.roll(self.low, 1, axis=0)),
            "psnr": psnr(pictures_N1HW, self.truth),
        }


def draw_picture(rows: list[np.ndarray], path: Path) -> None:
    """One row a kind of picture, `SHOWN` of each, ink black on white."""
    tiles = []
    for pictures in rows:
        shown = pictures[:: len(pictures) // SHOWN][:SHOWN, 0]
        large = 255 - shown.repeat(ENLARGED, 1).repeat(ENLARGED, 2)
        tiles.append(np.concatenate(list(np.pad(large, ((0, 0), (3, 3), (3, 3)))), axis=1))
    with atomic(path) as partial, partial.open("wb") as file:
        Image.fromarray(np.concatenate(tiles).astype(np.uint8)).save(file, format="PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the data and the run")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    asked = parser.parse_args()
    work: Path = asked.work
    pixels, labels = scans()
    judge = Judge(pixels, labels)
    write_low(work / "low", judge.low)
    settings = [f"data.path={work / 'digits'}", "engine=torch", f"train.steps={asked.steps}"]
    command("train", "--config", "digits_superres_tiny", *settings, f"run_dir={work / 'run'}")
    found: dict[str, list[dict[str, Any]]] = {}
    first: np.ndarray | None = None
    for level in LEVELS:
        for seed in SEEDS:
            out = work / f"samples-{level:g}-{seed}"
            command(
                *("sample", "--run", work / "run", "--low-resolution", work / "low"),
                *("--low-resolution-noise", level, "--sampler", "ddim", "--steps", SAMPLER_STEPS),
                *("--seed", seed, "--out", out),
            )
            pictures = drawn(out)
            first = pictures if first is None else first
            found.setdefault(f"{level:g}", []).append(judge.of(pictures))
            print(f"noise {level:g}, seed {seed}: {found[f'{level:g}'][-1]}", flush=True)
    assert first is not None
    near, linear = (
        enlarged(judge.low, how) for how in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR)
    )
    draw_picture([near, linear, first, judge.truth], asked.out.with_suffix(".png"))
    write_json(
        asked.out,
        {
            "conditions": conditions(torch.device("cpu")),
            "steps": asked.steps,
            "sampler": f"ddim, {SAMPLER_STEPS} steps",
            "held_out": len(judge.low),
            "samples_by_noise_level": found,
            "scans_themselves": judge.of(judge.truth),
            "enlarged_nearest": judge.of(near),
            "enlarged_bilinear": judge.of(linear),
            "class_read_from_4x4": judge.read_from_low,
        },
    )


if __name__ == "__main__":
    main()
