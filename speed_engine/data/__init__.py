"""Where training samples come from: one file a kind of data (`data.kind: digits` is `digits.py`).

A file offers `Config` and `build(config) -> Source`. A source is a plain table of samples: it knows
neither order nor randomness. The loader decides the indices, the flips and the posterior's normals
(all of them addressed random numbers) and hands them in. A class written from this text alone
trains. The sub-folder `storage` holds the shard format that the kinds share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from speed_engine.data.space import Space


class DataError(ValueError):
    """Something is wrong with the data; the text is one sentence with the place and the cure."""


@dataclass(frozen=True)
class ArrayFacts:
    """One named array that is stored for each sample, beside x."""

    shape: tuple[int, ...]
    dtype: str  # numpy's name: int64, float16, float32 ...


@dataclass(frozen=True)
class ConditionFacts:
    """What a set of samples holds for one condition (a file of `speed_engine/conditions`).

    kind: the condition's file, or the dotted path of one outside. arrays: name -> what is stored a
    sample. num_values and names: of a label, the number of classes and what they are called. null:
    whether training replaces it now and then by nothing, so that a model has to know "none" (this
    the configuration decides; a set says False). details: what only the condition's own file reads, JSON-able.
    """

    kind: str
    arrays: dict[str, ArrayFacts]
    num_values: int = 0
    names: tuple[str, ...] = ()
    null: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What a model, a manifest and a weights file are told of the data.

    shape: [C, *space] of a sample in model space, channels first, any number of further dimensions.
    flips: whether a mirrored sample (its last dimension turned around) can be read.
    """

    shape: tuple[int, ...]
    space: Space
    conditions: dict[str, ConditionFacts] = field(default_factory=dict)
    flips: bool = False

    def with_conditions(self, conditions: Mapping[str, ConditionFacts]) -> Facts:
        """The same data with other conditions."""
        return replace(self, conditions=dict(conditions))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, from which `from_json` makes an equal object."""
        conditions = {
            name: {
                "kind": each.kind,
                "arrays": {
                    key: {"shape": list(array.shape), "dtype": array.dtype}
                    for key, array in each.arrays.items()
                },
                "num_values": each.num_values,
                "names": list(each.names),
                "null": each.null,
                **({"details": dict(each.details)} if each.details else {}),
            }
            for name, each in self.conditions.items()
        }
        return {
            "shape": list(self.shape),
            "space": self.space.to_json(),
            "conditions": conditions,
            "flips": self.flips,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Facts:
        """The facts that `to_json` wrote. Raises KeyError or TypeError for something else."""
        conditions = {
            name: ConditionFacts(
                each["kind"],
                {
                    key: ArrayFacts(tuple(array["shape"]), array["dtype"])
                    for key, array in each["arrays"].items()
                },
                each["num_values"],
                tuple(each["names"]),
                each["null"],
                each.get("details", {}),
            )
            for name, each in value["conditions"].items()
        }
        shape, space = tuple(value["shape"]), Space.from_json(value["space"])
        return Facts(shape, space, conditions, value["flips"])


class Source(Protocol):
    """A finite table of samples, safe to read from many threads.

    A source may also offer `remarks`, sentences about the data that `train` and `plan` show.
    """

    @property
    def facts(self) -> Facts:
        """What the samples are."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal text that changes with any change of the data."""
        ...

    def __len__(self) -> int: ...

    def read(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        flips: Sequence[bool] | np.ndarray | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(stored x [B, C or 2C, *space], the conditions' arrays by name: [B, ...]), on the host.

        indices: B integers in [0, len). flips: B booleans, true = mirrored; only where
        `facts.flips`. Names and types are those of the conditions' `arrays`; integers may come
        as int64, too. Raises DataError, naming the place and the sample.
        """
        ...

    def decode(self, stored: Tensor, normals: Tensor | None = None) -> Tensor:
        """Stored values, already on the training device, to model space: float32 [B, C, *space].

        normals: float32 [B, C, *space], where `facts.space.posterior`; without them the posterior's
        mean. Mostly `facts.space.to_model`. One that takes a further `dtype`, as that does, can be
        trained on with `train.latents=bf16`.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process, from the loader to the loss. All on the training device."""

    x0: Tensor  # [B, C, *space], model space; float32, or what `train.latents` says
    conditions: dict[str, Tensor]  # the model's keywords -> [B, ...], dropout applied
    address: Tensor  # int64 [2]: (step, first global slot)
