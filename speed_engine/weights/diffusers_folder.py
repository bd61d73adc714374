"""A network's folder as Hugging Face diffusers has it, whatever the network.

The folder is two plain files, a JSON and a safetensors, so diffusers itself is not needed here. A third file of ours
says what diffusers' JSON cannot, so that a model comes back bit-equal.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from speed_engine.atomic_files import atomic, write_text
from speed_engine.weights.file import (
    checked,
    described,
    read_safetensors,
    without_places,
    write_safetensors,
)
from speed_engine.weights.pickles import read_pt

SIDECAR = "speed_engine.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = ("transformer", "unet")  # of a pipeline, the one that is the network


def adapter_of_model(model: Any) -> ModuleType:
    """The file of this package that exports the network; a network that none can hold is refused there."""
    kind = getattr(getattr(model, "config", None), "kind", None)
    return _adapter("unet_diffusers" if kind == "unet" else "dit_diffusers")


def network_of(folder: Path) -> Path:
    """The part of a pipeline's folder that is the network; another folder is given back as it is."""
    parts = (folder / name for name in PARTS)
    return next((part for part in parts if (part / "config.json").is_file()), folder)


def adapter_of_folder(folder: Path) -> ModuleType:
    """The file of this package that imports the folder. Raises ValueError where it is no folder of diffusers."""
    config = read_json(folder / "config.json")
    unet = isinstance(config, dict) and config.get("_class_name") == "UNet2DModel"
    return _adapter("unet_diffusers" if unet else "dit_diffusers")


def _adapter(name: str) -> ModuleType:
    return importlib.import_module(f"speed_engine.weights.{name}")


def read_json(path: Path) -> Any:
    """Raises ValueError, naming the folder, where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} is no folder of diffusers: {path.name} is missing"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path.parent} has a JSON file that says nothing usable: {error}"
        ) from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors, from safetensors, or from the pickle of older folders (read as data)."""
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)[0]
    old = folder / "diffusion_pytorch_model.bin"
    if old.exists():
        return read_pt(old)
    raise ValueError(f"{folder} has no weights: {WEIGHTS} is missing")


def own_header(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What our third file says, if it is there. Raises ValueError where the weights are not those it was made for."""
    own = folder / SIDECAR
    if not own.exists():
        return None
    cure = f"take another copy of it, or remove {SIDECAR} if the weights were trained on elsewhere"
    return checked(read_json(own), weights, str(folder), cure)


def own_notes(folder: Path) -> dict[str, Any]:
    """What our third file tells of the run (see `weights.file.save`); empty where it is not there or tells nothing."""
    own = folder / SIDECAR
    told = read_json(own) if own.exists() else {}
    notes = told.get("notes") if isinstance(told, dict) else None
    return notes if isinstance(notes, dict) else {}


def write_folder(
    folder: Path | str,
    model: Any,
    theirs: Mapping[str, Tensor],
    description: Mapping[str, Any],
    cautions: Sequence[str],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the three files, and warn of `cautions`, what diffusers will do otherwise than we.

    theirs: tensors by diffusers' names. description: its config.json. notes: as in `weights.file.save`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    told = {"notes": without_places(notes)} if notes else {}
    header = described(model, dict(theirs), cautions=list(cautions), **told)
    with atomic(folder / WEIGHTS) as partial:
        write_safetensors(partial, dict(theirs), {"format": "pt", "checksum": header["checksum"]})
    for name, content in (
        (SIDECAR, header),
        ("config.json", description),  # last: without it the folder is no model
    ):
        write_text(folder / name, json.dumps(content, indent=2) + "\n")
    for caution in cautions:
        warnings.warn(caution, stacklevel=3)
