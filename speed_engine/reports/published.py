"""What a model card tells of a run: its data, its recipe, and the scores that there are of these very weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_engine.reports.run_folder import Run
from speed_engine.training import metrics_file
from speed_engine.weights.diffusers_pipeline import Published
from speed_engine.weights.file import without_places


def of_run(run: Run, weights: str, scores: Sequence[Path] = ()) -> Published:
    """weights: ema or model. scores: files that `score` wrote. Raises ValueError for those of other weights."""
    config = run.config.model_dump(mode="json")
    notes = {"step": run.step, "weights": weights, "run": config}
    sections = {"Data": dict(_data(run)), "Recipe": dict(_recipe(run, config, weights))}
    told = [*_of_training(run, weights), *(_of_samples(path, run, weights) for path in scores)]
    return Published(notes, without_places(sections), tuple(told))


def _data(run: Run) -> Iterator[tuple[str, Any]]:
    data, space = run.manifest["data"], run.facts.space
    yield "kind", run.config.data.kind
    yield "samples", f"{data['num_samples']:,}" if "num_samples" in data else None
    yield "sample", f"{space.kind} {'x'.join(map(str, run.facts.shape))}"
    if space.kind == "latents":
        yield "latents by", space.vae
        yield "scale, shift", f"{list(space.scale)}, {list(space.shift)}"
    for name, each in run.facts.conditions.items():
        classes = f"{each.num_values} classes" if each.num_values else each.kind
        yield f"told {name}", classes + (", sometimes none" if each.null else "")
    yield "fingerprint", f"`{data.get('fingerprint')}`"


def _recipe(run: Run, config: Mapping[str, Any], weights: str) -> Iterator[tuple[str, Any]]:
    batch = run.config.train.global_batch
    yield "network", config["model"]
    yield "parameters", f"{run.manifest['parameters']:,}" if "parameters" in run.manifest else None
    yield "schedule", config["schedule"]
    yield "objective", config["objective"]
    yield "time steps", config["timesteps"]
    yield "learned variance", run.config.learned_variance
    yield "steps", f"{run.step:,}"
    yield "batch", batch
    yield "images seen", f"{run.step * batch:,}"
    yield "optimizer", config["optim"]
    yield "weights", "averaged (EMA)" if weights == "ema" else "the last ones, not averaged"
    yield "seed", run.config.seed
    yield "versions", run.manifest.get("versions")


def _of_training(run: Run, weights: str) -> Iterator[str]:
    """The last validation loss and score of a grid that the run itself measured, of these weights at this step."""
    path = run.folder / "metrics.jsonl"
    lines = metrics_file.read(path) if path.exists() else []
    last = next((line for line in reversed(lines) if line.get("step") == run.step), {})
    if run.config.validation.weights == weights and last.get("validation_loss") is not None:
        spread = last.get("validation_loss_se")
        error = "" if spread is None else f" ± {spread:.2g} (standard error over samples)"
        yield f"validation loss at step {run.step:,}: {last['validation_loss']:.4g}{error}"
    settings = run.config.sample
    if settings.weights == weights:
        for key, value in last.items():
            if key.startswith("sample_") and isinstance(value, float):
                yield (
                    f"{key.removeprefix('sample_').replace('_', ' ')} of {settings.num} samples while training: "
                    f"{value:.4g} ({settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g})"
                )


def _of_samples(path: Path, run: Run, weights: str) -> str:
    """What `score` found, in one sentence with its recipe."""
    from speed_engine.reports.scores import headline

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        source = report["recipe"]["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--scores {path} is no report of `score` on a folder of samples ({error})"
        ) from error
    found = (source.get("weights"), source.get("step"))
    seed = (source.get("config") or {}).get("seed")
    if found != (weights, run.step) or seed != run.config.seed:
        raise ValueError(
            f"--scores {path} is of the {found[0]} weights of step {found[1]} (seed {seed}), and those exported are "
            f"{weights} of step {run.step} (seed {run.config.seed}); sample and score these"
        )
    recipe = report["recipe"]
    return (
        f"{headline(report)} ({report['num_samples']:,} samples, {recipe['sampler']}, {recipe['steps']} steps, "
        f"guidance {recipe['guidance']:g}, seed {recipe['seed']})"
    )
