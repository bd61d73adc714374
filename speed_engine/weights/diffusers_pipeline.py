"""A trained network as a folder that Hugging Face diffusers samples from, with a model card.

    README.md              what it is, how it was trained, lines of code that draw from it, checksums
    model_index.json       only where stock `DiTPipeline` or `DDIMPipeline` draws what `sample --sampler ddim` draws
    transformer/ or unet/  the network, and our file that makes it bit-equal here
    scheduler/             only where diffusers has one for this process
    vae/                   only where one is given

A pipeline that would run and draw something else is worse than none, so where the stock one is not right its index is
left out and the reasons are told; the card's own lines are right in every case.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_engine.atomic_files import sync, write_text
from speed_engine.data import Facts
from speed_engine.data.autoencoder import Vae
from speed_engine.sampling.process import Process
from speed_engine.weights import model_card
from speed_engine.weights.diffusers_folder import adapter_of_model
from speed_engine.weights.diffusers_scheduler import Scheduler, scheduler_of

THEIR_NULL = 1000  # the label that DiTPipeline takes for "none", whatever the network
LICENCE = "README.md has an empty `license`: choose one and fill it in before you publish"


@dataclass(frozen=True)
class Published:
    """What is known of the network; told in the card.

    notes: as in `weights.file.save`. sections: heading -> key -> value, of how it was trained. scores: one sentence
    each.
    """

    notes: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]
    scores: tuple[str, ...] = ()


def export_pipeline(
    out: Path, model: Any, process: Process, published: Published, vae: str | None = None
) -> list[str]:
    """Write the folder `out`, whole or not at all, and return what its user should know, one sentence each.

    model: a DiT or a U-Net, in evaluation mode. vae: folder or hub name of the AutoencoderKL, of which a copy is
    stored. Raises ValueError where `out` holds something, where diffusers cannot hold the network, and for a VAE that
    does not fit.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; choose another --out, or remove it")
    facts, is_unet = model.facts, getattr(model.config, "kind", None) == "unet"
    loaded = None if vae is None else _fitting(facts, vae)
    scheduler = scheduler_of(process, facts.space.kind == "pixels")
    pipeline = "DDIMPipeline" if is_unet else "DiTPipeline"
    wrong = list(
        _reasons_unet(model, scheduler) if is_unet else _reasons_dit(model, scheduler, loaded)
    )
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        network = "unet" if is_unet else "transformer"
        guides = not is_unet and not wrong
        with warnings.catch_warnings(action="ignore"):  # what they warn of is among our reasons
            adapter_of_model(model).export_diffusers(
                partial / network,
                model,
                notes=published.notes,
                **({"null_at": THEIR_NULL} if guides else {}),
            )
        parts = {network: ["diffusers", model_card.CLASSES[network]]}
        if isinstance(scheduler, Scheduler):
            (partial / "scheduler").mkdir()
            content = {"_class_name": scheduler.kind, **scheduler.config}
            write_text(
                partial / "scheduler" / "scheduler_config.json",
                json.dumps(content, indent=2) + "\n",
            )
            parts["scheduler"] = ["diffusers", scheduler.kind]
        if loaded is not None:
            _copy(loaded, partial / "vae", facts)
            parts["vae"] = ["diffusers", "AutoencoderKL"]
        card = model_card.Card(model, network, scheduler, loaded is not None, pipeline, wrong)
        text = card.text(published.sections, published.scores, dict(_checksums(partial)))
        write_text(partial / "README.md", text)
        if not wrong:
            index = {"_class_name": pipeline, **dict(sorted(parts.items())), **_names(facts)}
            write_text(partial / "model_index.json", json.dumps(index, indent=2) + "\n")
        if out.exists():
            out.rmdir()  # empty
        partial.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not wrong:
        return [LICENCE]
    return [
        f"no model_index.json is written, for stock {pipeline} would not draw what `sample` draws: "
        f"{'; '.join(wrong)}; the lines in README.md do",
        LICENCE,
    ]


def _reasons_dit(model: Any, scheduler: Scheduler | str, vae: Vae | None) -> Iterator[str]:
    """Why DiTPipeline would not draw what we draw, one clause each."""
    facts = model.facts
    if facts.space.kind == "pixels":
        yield "it decodes latents, and this network draws pixels"
    elif vae is None:
        yield "it needs the VAE (give --vae)"
    if facts.space.kind == "latents" and _one_scale(facts) is None:
        yield (
            "it divides latents by one number, and these have a shift, or a scale for each channel"
        )
    if getattr(model.config, "frequency_shift", None) == 0:
        yield (
            "its network spaces the time frequencies by 127 steps, and this one was trained with 128 "
            "(model.frequency_shift=1 trains with theirs)"
        )
    label = facts.conditions.get("label")
    if label is not None and not label.null:
        yield "it guides unless told otherwise, and this network has learned no null label"
    elif label is not None and label.num_values > THEIR_NULL:
        yield f"it takes the label {THEIR_NULL} for none, which is a class of this network"
    if isinstance(scheduler, str):
        yield scheduler
    elif scheduler.flow:
        yield f"it asks the scheduler for scale_model_input, which {scheduler.kind} has not"


def _reasons_unet(model: Any, scheduler: Scheduler | str) -> Iterator[str]:
    """Why DDIMPipeline would not draw what we draw, one clause each."""
    facts = model.facts
    if facts.space.kind != "pixels":
        yield "it decodes nothing, and this network draws latents"
    if "label" in facts.conditions:
        yield "it tells the network no class"
    if model.num_outputs != facts.shape[0]:
        yield "it does not leave out the channels of the learned variance"
    if isinstance(scheduler, str):
        yield scheduler
    elif scheduler.flow:
        yield "it makes a DDIMScheduler of every other"


def _one_scale(facts: Facts) -> float | None:
    """The factor of the latents, where it is all there is."""
    scale, shift = facts.space.scale, facts.space.shift
    return scale[0] if len(set(scale)) == 1 and not any(shift) else None


def _fitting(facts: Facts, vae: str) -> Vae:
    """Raises DataError where the autoencoder cannot decode the network's samples."""
    if facts.space.kind == "pixels":
        raise ValueError("the network draws pixels, which need no VAE; leave out --vae")
    loaded = Vae(vae, "cpu")
    if loaded.latent_channels != facts.shape[0]:
        raise ValueError(
            f"the VAE {vae!r} has latents of {loaded.latent_channels} channels, and the samples have "
            f"{facts.shape[0]}; give the one that encoded the data"
        )
    return loaded


def _copy(vae: Vae, folder: Path, facts: Facts) -> None:
    """The autoencoder, its constants replaced by those that the network was trained with, where it has a place."""
    scale = _one_scale(facts)
    if scale is not None:
        vae.model.register_to_config(
            scaling_factor=scale, shift_factor=None, latents_mean=None, latents_std=None
        )
    vae.model.save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a place of this machine
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _names(facts: Facts) -> dict[str, Any]:
    label = facts.conditions.get("label")
    if label is None or not label.names:
        return {}
    return {"id2label": {str(number): name for number, name in enumerate(label.names)}}


def _checksums(folder: Path) -> Iterator[tuple[str, str]]:
    """(place in the folder, SHA-256) of every file of weights."""
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        yield path.relative_to(folder).as_posix(), digest.hexdigest()
