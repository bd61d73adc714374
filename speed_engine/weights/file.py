"""Our weights file: one safetensors file whose header describes the network, so that the file alone is the model.

The header, JSON under `speed_engine` in the file's metadata:

    format      2; a file without the number is of the first format, and is read as well
    model       kind, config (without what only says how to compute), num_outputs
    facts       what the network was told of the data (`speed_engine.data.Facts`)
    notes       whatever the writer wanted to tell; no place of its machine
    checksum    SHA-256 over all of the above and over names, dtypes, shapes and bytes of all tensors

A file may come from anywhere. It is data, never code: it can name the networks of `speed_engine/models`, and a module
from outside only if the person who reads it trusts that module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speed_engine import kinds
from speed_engine.atomic_files import atomic
from speed_engine.conditions import label
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models import refuse_unknown_conditions
from speed_engine.weights.fit import filled, merged

FORMAT = 2
METADATA_KEY = "speed_engine"


def save(
    path: Path | str,
    model: nn.Module,
    weights: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as one safetensors file; the file appears whole or not at all.

    `weights` (an EMA, say) replaces the model's own tensors of the same names, all of them if the
    model is on the meta device. `notes` is anything that JSON can hold (the run's configuration,
    the step); `load` gives it back, of paths only their last names. Raises ValueError for weights
    that do not fit or are not finite, OSError where the disk refuses.
    """
    tensors = merged(model, weights)
    header = described(model, tensors, notes=without_places(notes or {}))
    metadata = {"format": "pt", METADATA_KEY: json.dumps(header, sort_keys=True)}
    with atomic(Path(path)) as partial:
        write_safetensors(partial, tensors, metadata)


def load(
    path: Path | str, device: torch.device | str = "cpu", trusted: Collection[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """The model of a file written by `save`, and the notes.

    trusted: modules from outside that the file may name. Raises ValueError, naming the file, where
    it is damaged, of another format, or describes a network that it does not hold.
    """
    weights, metadata = read_safetensors(path)
    try:
        header = json.loads(metadata[METADATA_KEY])
        _, notes = header["model"], header["notes"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} was not written by speed-engine: it describes no model"
        ) from error
    header = checked(header, weights, str(path))
    model = filled(lambda on: build(header, str(path), on, trusted), weights, str(path), device)
    return model, notes


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError where it is damaged.

    A header that claims more than the file holds is refused by the reader, before it allocates.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Raises OSError where the disk refuses (a full disk is an error of safetensors' own otherwise)."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write weights into {path.parent}: {error}") from error


# ------------------------------------------------------------------------------------------ the header


def described(model: Any, tensors: Mapping[str, Tensor], **more: Any) -> dict[str, Any]:
    """The header for this model with these tensors, ready for JSON; `more` goes into it, too."""
    compute_keys = set(getattr(kinds.home(model.config), "COMPUTE_KEYS", ()))
    settings = model.config.model_dump(mode="json", exclude={"kind", *compute_keys})
    facts = model.facts.to_json()
    facts["space"] = without_places(facts["space"])  # the autoencoder may lie in a folder
    header = {
        "format": FORMAT,
        "model": {
            "kind": model.config.kind,
            "config": settings,
            "num_outputs": model.num_outputs,
        },
        "facts": facts,
        **more,
    }
    header = json.loads(json.dumps(header))  # as it will be read
    return header | {"checksum": checksum(header, tensors)}


def checked(
    header: Any,
    tensors: Mapping[str, Tensor],
    source: str,
    cure: str = "take another copy of it",
) -> dict[str, Any]:
    """The header as this version writes it, from one of any version.

    Raises ValueError, naming `source`, for an unknown format, and where header and tensors are not
    those that were written.
    """
    if not isinstance(header, dict):
        raise ValueError(f"{source} has a description of its model that is no mapping")
    if "format" not in header:
        return _of_first_format(header, source)
    if header["format"] != FORMAT:
        raise ValueError(
            f"{source} is of format {header['format']}, and this version of speed-engine reads formats 1 and {FORMAT};"
            " read it with the version that wrote it"
        )
    if header.get("checksum") != checksum(header, tensors):
        raise ValueError(f"{source} is damaged: its checksum is that of another content; {cure}")
    return header


def build(
    header: Mapping[str, Any],
    source: str,
    device: torch.device | str,
    trusted: Collection[str] = (),
) -> nn.Module:
    """The freshly initialised model of a header. Raises ValueError, naming `source`."""
    try:
        model, facts = header["model"], Facts.from_json(header["facts"])
        settings = {**model["config"], "kind": model["kind"]}
        config = kinds.config_of("model", settings, trusted)
        module = kinds.home(config)
        refuse_unknown_conditions(module, facts, model["kind"])
        return module.build(config, facts, model["num_outputs"], device=device)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'model'}: {each['msg']}"
            for each in error.errors()
        )
        raise ValueError(
            f"{source} has a description of its model that does not fit: {wrong}"
        ) from error
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(source) else f"{source}: {text}") from error
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{source} has a description of its model that does not fit: {text}"
        ) from error


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, over the header but its checksum and over all of the tensors."""
    told = {key: value for key, value in header.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        line = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(line.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def without_places(value: Any) -> Any:
    """A copy in which paths from the root, from home or from above are only their last names.

    Weights are given away, and nobody else needs to know whose folder they lay in.
    """
    if isinstance(value, Mapping):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(each) for each in value]
    if isinstance(value, (str, PurePath)) and str(value).startswith(("/", "~", "..")):
        return PurePath(value).name
    return value


def _of_first_format(header: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A header of the first format, which knew square images and class labels, as one of today."""
    try:
        old, notes = header["model"], header.get("notes", {})
        config = dict(old["config"])
        kind, dropout = config.pop("kind"), config.pop("label_dropout", 0.1)
        channels, size, classes = old["channels"], old["sample_size"], old["num_classes"]
        if not 0 < channels <= 10_000:
            raise ValueError(f"{channels} channels")
        space, data = Space.pixels(channels), notes.get("data", {})
        if data.get("space") == "latents":
            space = Space("latents", (data["scale"],) * channels, (data["shift"],) * channels)
        told = {"label": label.described(classes, null=dropout > 0)} if classes else {}
        return {
            "format": FORMAT,
            "model": {
                "kind": kind,
                "config": config,
                "num_outputs": channels * (2 if old["learned_variance"] else 1),
            },
            "facts": Facts((channels, size, size), space, told).to_json(),
            "notes": notes,
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{source} has a description of its model that does not fit: {error}"
        ) from error
