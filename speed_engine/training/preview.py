"""Samples while training runs: a grid of pictures every so often, of the same noise and the same requests.

    RUN/grids/step-00001000.png     as `sample` would draw it from that step's checkpoint

Every number of a grid is addressed (see sampling/process.py), so grids of one run, of a resumed run and of runs that
differ in their method can be laid side by side. The first process draws them; whatever goes wrong is one warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from speed_engine.atomic_files import atomic
from speed_engine.conditions import Augmenting, undropped
from speed_engine.conditions.image import Image
from speed_engine.config import RunConfig
from speed_engine.data import autoencoder
from speed_engine.engines import Engine
from speed_engine.sampling.folder import to_uint8
from speed_engine.sampling.montage import grid_picture
from speed_engine.sampling.process import Process, Recipe, check, sample
from speed_engine.training.assembly import Parts
from speed_engine.training.metrics import Journal
from speed_engine.weights import file as weights_file

# (pixels uint8 [N, H, W, C], labels int64 [N] or None) -> scores by name
Judge: TypeAlias = Callable[[np.ndarray, np.ndarray | None], Mapping[str, float]]
BATCH = 64  # samples at once


class Preview:
    """Draws grids; see `of`."""

    def __init__(self, parts: Parts, run: Path, blueprint: nn.Module, judge: Judge | None) -> None:
        config, facts = parts.config, parts.facts
        settings = self.settings = config.sample
        self.folder, self.judge, self.device = run / "grids", judge, parts.processes.device
        self.steps = config.train.steps
        kind = config.model.kind
        self.build = lambda: weights_file.build(
            weights_file.described(blueprint, {}),
            "the run's model",
            self.device,
            [kind] if "." in kind else [],
        )
        self.process = Process.of(
            parts.table.schedule,
            config.objective,
            config.learned_variance,
            facts.shape,
            parts.conditions,
        )
        self.recipe = Recipe(
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_power=settings.guidance_power,
            clip_x0=settings.clip and facts.space.kind == "pixels",
            seed=settings.seed,
        )
        self.told = _requests(parts, settings.num)
        check(self.process, self.recipe, self.told)
        self.decode = _decoder(parts) if parts.processes.first else None
        self.warned = False

    def due(self, step: int) -> bool:
        """Whether a grid belongs to this step: every `sample.every` steps, and at the end."""
        return step % self.settings.every == 0 or step == self.steps

    def draw(self, step: int, engine: Engine, journal: Journal) -> dict[str, Any]:
        """Write the grid of this step. Returns keys for its line of metrics: `sample_` and a score's name, or
        `sample_failed` with a reason. Collective."""
        weights = engine.weights(ema=self.settings.weights == "ema")
        if weights is None:
            return {}
        failure = ""
        try:
            pixels_NHWC = self._pixels(weights)
            labels_N = self.told["label"].numpy() if "label" in self.told else None
            self._show(pixels_NHWC, labels_N, step, journal)
            scores = self.judge(pixels_NHWC, labels_N) if self.judge is not None else {}
            return {f"sample_{name}": value for name, value in scores.items()}
        except Exception as error:  # a picture is not worth a run
            failure = " ".join(f"{error or type(error).__name__}".split())[:300]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.warned:
            journal.say(f"WARNING: samples at step {step}: {failure}; training goes on")
            self.warned = True
        return {"sample_failed": failure}

    def _pixels(self, weights: Mapping[str, Tensor]) -> np.ndarray:
        """uint8 [N, H, W, C]: the samples of a network with these weights."""
        network = self.build()
        network.load_state_dict(weights)
        x = sample(
            network.eval(),
            self.process,
            self.recipe,
            conditions_N=self.told or None,
            numbers=range(self.settings.num),
            batch_size=BATCH,
            device=self.device,
        )
        if self.decode is None:
            return to_uint8(x)
        return np.concatenate([to_uint8(self.decode(part)) for part in x.split(BATCH)])

    def _show(
        self, pixels_NHWC: np.ndarray, labels_N: np.ndarray | None, step: int, journal: Journal
    ) -> None:
        classes = self.process.conditions.get("label")
        picture = grid_picture(pixels_NHWC, labels_N, classes.facts.names if classes else ())
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step:08d}.png"
        with atomic(path) as partial, partial.open("wb") as file:
            picture.save(file, format="PNG")
        journal.picture("samples", np.asarray(picture), step)


def _requests(parts: Parts, num: int) -> dict[str, Tensor]:
    """What the network is told: its conditions' defaults; of one that sharpens, all that the data hold of the first
    samples, the held-out ones where there are any."""
    told: dict[str, Tensor] = {}
    if not any(isinstance(each, Image) for each in parts.conditions.values()):
        for condition in parts.conditions.values():
            told |= condition.default(range(num))
        return told
    source = parts.held_out or parts.source
    _, arrays = source.read([number % len(source) for number in range(num)])
    for name, condition in parts.conditions.items():
        if isinstance(condition, Augmenting):
            told |= condition.default(range(num))
        else:
            told |= undropped(name, condition).drop(arrays, 0, 0, 0)
    return told


def of(parts: Parts, run: Path, blueprint: nn.Module, judge: Judge | None) -> Preview | None:
    """What draws the grids that `sample.every` asks for; None where it asks for none.

    blueprint: the run's model, on any device. judge: scores pictures of the run's data. Raises ValueError for a cadence
    that cannot be, samples that are no pictures, and requests that the network cannot be told.
    """
    every, log_every = parts.config.sample.every, parts.config.log.every
    if not every:
        return None
    if every % log_every:
        raise ValueError(
            f"sample.every={every} is no multiple of log.every={log_every}, with whose lines scores are written; "
            f"choose {max(1, round(every / log_every)) * log_every}"
        )
    return Preview(parts, run, blueprint, judge)


def _decoder(parts: Parts) -> Callable[[Tensor], Tensor] | None:
    """The way from model space to pictures; None: they are pictures. Raises ValueError where there is none."""
    facts, vae = parts.facts, parts.config.sample.vae
    flat, latents = len(facts.shape) == 3, facts.space.kind == "latents"
    if flat and latents and vae is not None:
        return autoencoder.decoder(facts.space, vae, parts.processes.device)
    if flat and latents:
        by = f" ({facts.space.vae})" if facts.space.vae else ""
        raise ValueError(
            f"sample.every draws pictures, and the data are latents; set sample.vae to the folder of the AutoencoderKL "
            f"that encoded them{by}, or sample.every=0"
        )
    if vae is not None:
        raise ValueError("sample.vae decodes latents of pictures, which the data are not; leave it")
    if not flat or facts.shape[0] not in (1, 3):
        raise ValueError(
            f"sample.every draws pictures, which samples of the shape {list(facts.shape)} are not; set sample.every=0"
        )
    return None


def share_of_training(config: RunConfig) -> float:
    """Forward passes of the grids over those of training, a backward pass counted as two; 0 where there are none."""
    settings = config.sample
    if not settings.every:
        return 0.0
    passes = settings.num * settings.steps * (1 if settings.guidance == 1 else 2)
    return passes / (3 * settings.every * config.train.global_batch)
