"""Weights from wherever they come: our safetensors, a public `.pt`, a folder of diffusers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from speed_engine.weights import diffusers_folder, dit_public
from speed_engine.weights import file as weights_file


@dataclass(frozen=True)
class Found:
    """A network with its weights.

    notes: what the writer told (our files: the step, the run's configuration). remarks: what the file does not say
    and was assumed, one sentence each.
    """

    model: Any
    notes: dict[str, Any]
    remarks: Sequence[str] = ()


def read(
    path: Path,
    trusted: Collection[str] = (),
    *,
    num_classes: int | None = None,
    num_heads: int | None = None,
    frequency_shift: Literal[0, 1] | None = None,
) -> Found:
    """The network in `path`, on the host.

    trusted: outside modules that a file of ours may name. num_classes: of a foreign label table (default: its last row
    is the null label). num_heads: of a `.pt` of no published size. frequency_shift: of a diffusers folder, see
    `dit_diffusers`. Raises ValueError, naming the path, for what is no weights, is damaged, or where an argument is
    not for this format.
    """
    if not path.exists():
        raise ValueError(f"there is no file or folder of weights {path}")
    if path.is_dir():
        if num_heads is not None:
            raise ValueError("a diffusers folder says its number of heads; leave out --num-heads")
        path = diffusers_folder.network_of(path)
        adapter = diffusers_folder.adapter_of_folder(path)
        model = adapter.import_diffusers(path, frequency_shift, num_classes=num_classes)
        ours = (path / diffusers_folder.SIDECAR).exists()  # our own folder leaves nothing open
        remarks = () if ours else dit_public.assumptions(model.facts)
        return Found(model, diffusers_folder.own_notes(path), remarks)
    if frequency_shift is not None:
        raise ValueError("--frequency-shift is for diffusers folders; a .pt has the public one, 0")
    if path.suffix == ".safetensors":
        if num_classes is not None or num_heads is not None:
            raise ValueError(
                f"{path} says its classes and heads; leave out --num-classes and --num-heads"
            )
        return Found(*weights_file.load(path, trusted=trusted))
    model = dit_public.import_pt(path, num_classes=num_classes, num_heads=num_heads)
    return Found(model, {}, dit_public.assumptions(model.facts))
