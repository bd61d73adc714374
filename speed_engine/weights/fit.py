"""Weights against a network, key by key: nothing is copied before everything fits.

Generic over networks: a network is what its `state_dict` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Build = Callable[[torch.device | str], nn.Module]


def filled(
    build: Build, weights: Mapping[str, Tensor], source: str, device: torch.device | str
) -> Any:
    """The network of `build(device)` with these weights; nothing is allocated for weights that do not fit.

    Raises ValueError, naming `source`, as `load_into` does.
    """
    compare(blueprint(build, weights, source), weights, source)
    model = build(device)
    load_into(model, weights, source)
    return model


def blueprint(build: Build, weights: Mapping[str, Tensor], source: str) -> Any:
    """The network of `build("meta")`, which takes no memory, built no further than `weights` can fill.

    What a file says of its network can be anything, a million blocks as well. Raises ValueError,
    naming `source`.
    """
    count, limit = 0, 4 * len(weights) + 1000

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise ValueError(
                f"{source} describes a model of far more parts than the file has weights for"
            )

    handle = register_module_parameter_registration_hook(counted)
    try:
        return build("meta")
    finally:
        handle.remove()


@torch.no_grad()
def load_into(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model (any float dtype into the model's), all or nothing.

    Raises ValueError, naming `source` and the keys, where a key is missing, unknown, of another
    shape, not floating-point or not finite.
    """
    compare(model, weights, source)
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{source} has weights that are NaN or infinite in {key}; it is not used"
            )
    for key, own in model.state_dict().items():
        own.copy_(weights[key])


def compare(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError, naming `source` and the keys, where names, shapes or types do not fit."""
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    common = [key for key in own if key in weights]
    shapes = [
        f"{key} is {list(weights[key].shape)} instead of {list(own[key].shape)}"
        for key in common
        if weights[key].shape != own[key].shape
    ]
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


def merged(model: nn.Module, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The model's tensors with `weights` in their place, on the host, contiguous, none shared.

    Raises ValueError for weights of other names or shapes, or that are not finite, and where the
    model is on the meta device and `weights` lack something.
    """
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
