"""Weights to and from the outside: our own files and public DiT checkpoints.

Our file is one safetensors file with the model's configuration as JSON in its metadata, so the file
alone is the model. Foreign files are data, never code: pickles are read by torch's weights-only
reader, which refuses everything but tensors, and nothing named in a file is imported except a model
of `speed_engine/models`. Whatever is read is compared with the model, key by key, before a single
weight is copied.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speed_engine.atomic_files import atomic
from speed_engine.data import Facts
from speed_engine.models import dit

METADATA_KEY = "speed_engine"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The parts of a model's configuration that say how to compute, not what was learned.
NOT_LEARNED = {"attention", "residual", "recompute", "products"}


def describe(model: nn.Module) -> dict[str, Any]:
    """What `build` needs to make this model again, ready for JSON."""
    config: Any = model.config
    facts: Any = model.facts
    return {
        "config": config.model_dump(mode="json", exclude=NOT_LEARNED),
        "facts": facts.to_json(),
        "num_outputs": model.num_outputs,
    }


def rebuild(description: Mapping[str, Any], source: str, device: torch.device | str) -> nn.Module:
    """The freshly initialised model of a description. Raises ValueError, naming `source`."""
    try:
        kind = description["config"]["kind"]
        # A file may come from anywhere: it can name our models, no other module.
        if not re.fullmatch(r"[a-z][a-z0-9_]*", kind) or not importlib.util.find_spec(
            f"speed_engine.models.{kind}"
        ):
            raise ValueError(
                f"{source} asks for a model {kind!r}, which speed-engine does not have"
            )
        module = importlib.import_module(f"speed_engine.models.{kind}")
        config = module.Config(**description["config"])
        facts = Facts.from_json(description["facts"])
        return module.build(config, facts, description["num_outputs"], device=device)
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError(
            f"{source} has a description of its model that does not fit: {error}"
        ) from error


def save(
    path: Path | str,
    model: nn.Module,
    weights: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as one safetensors file; the file appears whole or not at all.

    `weights` (an EMA, say) replaces the model's own tensors of the same names, all of them if the
    model is on the meta device. `notes` is anything that JSON can hold (the run's configuration,
    the step); `load` gives it back. Raises ValueError for weights that do not fit or are not
    finite, OSError where the disk refuses.
    """
    tensors = merged(model, weights)
    header = {"model": describe(model), "notes": dict(notes or {})}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(header, sort_keys=True)}
    with atomic(Path(path)) as partial:
        save_file(tensors, partial, metadata)


def load(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model of a file written by `save`, and the notes. Raises ValueError, naming the file."""
    weights, metadata = read_safetensors(path)
    try:
        header = json.loads(metadata[METADATA_KEY])
        description, notes = header["model"], header["notes"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} was not written by speed-engine: it describes no model"
        ) from error
    model = rebuild(description, str(path), device)
    load_into(model, weights, str(path))
    return model, notes


@torch.no_grad()
def load_into(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model (any float dtype into the model's), all or nothing.

    Raises ValueError, naming `source` and the keys, where a key is missing, unknown, of another
    shape, not floating-point or not finite.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    common = [key for key in own if key in weights]
    shapes = [
        f"{key} is {list(weights[key].shape)} instead of {list(own[key].shape)}"
        for key in common
        if weights[key].shape != own[key].shape
    ]
    if isinstance(model, dit.DiT) and (missing or unknown or shapes):
        found, wanted = _dit_name(weights), _dit_name(own)
        if found is not None and found != wanted:
            raise ValueError(f"{source} holds {found}, but the model is {wanted}")
    complaints = [
        f"{what}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for what, keys in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", shapes),
            ("not floating-point", [k for k in common if weights[k].dtype not in FLOATS]),
        )
        if keys
    ]
    if complaints:
        raise ValueError(f"{source} does not fit the model ({'; '.join(complaints)})")
    for key in common:
        if not torch.isfinite(weights[key]).all():
            raise ValueError(
                f"{source} has weights that are NaN or infinite in {key}; it is not used"
            )
    for key in common:
        own[key].copy_(weights[key])


def merged(model: nn.Module, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The model's tensors with `weights` in their place, on the host, contiguous, none shared."""
    tensors = dict(model.state_dict())
    for key, value in (weights or {}).items():
        if key not in tensors or tensors[key].shape != value.shape:
            raise ValueError(f"the weights to save have {key} {list(value.shape)}, the model not")
        tensors[key] = value
    for key, value in tensors.items():
        if value.is_meta:
            raise ValueError(f"the weights to save lack {key}, and the model is on the meta device")
        if not torch.isfinite(value).all():
            raise ValueError(f"the weights to save are NaN or infinite in {key}")
        tensors[key] = value.detach().cpu().contiguous().clone()
    return tensors


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error


def read_pt(path: Path | str, which: Literal["auto", "ema", "model"] = "auto") -> dict[str, Tensor]:
    """The weights of a torch checkpoint, without the prefixes of DDP and torch.compile.

    Layouts: the tensors themselves, or a dictionary with them under `ema` and `model` (`auto`
    takes the EMA where there is one). Nothing in the file is executed: a file with objects other
    than tensors and plain values is refused with ValueError.
    """
    try:
        # DiT's own training script stores its arguments, a Namespace: a plain bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{path} was not loaded, because it holds more than tensors: {reason}"
        ) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # what the reader stumbles over in a damaged file can be anything
        raise ValueError(f"{path} is not a sound torch checkpoint: {error}") from error
    if isinstance(content, Mapping):
        if which == "auto":
            which = "ema" if "ema" in content else "model"
        weights = content.get(which, content)
        if isinstance(weights, Mapping) and all(isinstance(t, Tensor) for t in weights.values()):
            return {_plain(key): tensor.detach() for key, tensor in weights.items()}
    keys = f"the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else ""
    raise ValueError(
        f"{path} has no weights where expected; it has {keys or type(content).__name__}"
    )


def _plain(key: str) -> str:
    """A parameter's name as the bare model has it."""
    return re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", ""))


def import_pt(
    path: Path | str,
    config: dit.Config | None = None,
    which: Literal["auto", "ema", "model"] = "auto",
    device: torch.device | str = "cpu",
) -> dit.DiT:
    """The model of a public DiT checkpoint (`DiT-XL-2-256x256.pt`) or of one with its layout.

    Everything is read from the shapes, except the number of heads: without `config` it is that of
    the published size. Raises ValueError, naming the file.
    """
    weights = read_pt(path, which)
    keys = ("x_embedder.proj.weight", "final_layer.linear.weight", "pos_embed")
    absent = [key for key in keys if key not in weights]
    if absent:
        raise ValueError(f"{path} holds no DiT: {', '.join(absent)} is missing")
    projection, last, places = (weights[key] for key in keys)
    hidden, channels, patch, _ = projection.shape
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    if config is None:
        config = named_config(hidden, depth, None, patch)
        if config is None:
            raise ValueError(
                f"{path} holds {_dit_name(weights)}, which is no published size: give the model's"
                " configuration, because its number of heads cannot be read from weights"
            )
    table = weights.get("y_embedder.embedding_table.weight")
    num_classes = 0 if table is None else len(table) - (config.label_dropout > 0)
    model = dit.build(
        config,
        channels=channels,
        sample_size=math.isqrt(places.shape[1]) * config.resolved().patch_size,
        num_classes=num_classes,
        learned_variance=len(last) == 2 * channels * patch**2,
        device=device,
    )
    load_into(model, weights, str(path))
    return model


def named_config(hidden: int, depth: int, num_heads: int | None, patch: int) -> dit.Config | None:
    """The published configuration of these numbers, or None. num_heads None: any."""
    for name, size in dit.SIZES.items():
        if size == (hidden, depth, num_heads or size.num_heads, patch):
            return dit.Config(size=name)
    return None


def _dit_name(weights: Mapping[str, Tensor]) -> str | None:
    """The size of a DiT for a message, from its weights: `DiT-XL/2 (hidden size 1152, ...)`."""
    projection = weights.get("x_embedder.proj.weight")
    if projection is None or projection.ndim != 4:
        return None
    hidden, _, patch, _ = projection.shape
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    config = named_config(hidden, depth, None, patch)
    name = f"a DiT-{config.size}" if config else "a DiT of its own size"
    return f"{name} (hidden size {hidden}, {depth} blocks, patch {patch})"
