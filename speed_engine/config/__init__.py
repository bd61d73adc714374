"""The typed, frozen configuration: presets, files and dotted overrides become one checked tree.

Sections with a `kind` (model, data, schedule, objective, timesteps, engine) are typed by the file of that name:
`timesteps.kind: speed` is checked by `speed_engine/timesteps/speed.py`'s `Config`. A dotted path (`my_lab.methods`)
reaches a module outside the repository. Every mistake becomes one sentence with the key, the line and the cure.
"""

from __future__ import annotations

import importlib
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from speed_engine.config.files import (
    KINDS,
    find,
    merge,
    parse_overrides,
    presets,
    read_yaml,
)
from speed_engine.config.train import Train
from speed_engine.kinds import ConfigError, Section, config_class, config_of, suggest, trusted_by

__all__ = [
    "KINDS",
    "ConfigError",
    "RunConfig",
    "build",
    "load",
    "merge",
    "parse_overrides",
    "presets",
]

# A section whose type is decided by its `kind` at run time.
if TYPE_CHECKING:
    Kind: TypeAlias = Any
else:
    Kind = SerializeAsAny[BaseModel]

# What an absent section, or one that names no kind, is; `data` and `model` have no default.
DEFAULTS = {
    "schedule": "linear",
    "objective": "epsilon",
    "timesteps": "uniform",
    "engine": "deepspeed",
}
SECTIONS = (
    *KINDS,
    "optim",
    "conditions",
    "train",
    "kernels",
    "checkpoint",
    "validation",
    "sample",
    "log",
)


class Kernels(Section):
    """Which implementation of the fused ops runs."""

    backend: Literal["auto", "reference", "cpp", "triton"] = Field(
        default="auto", description="auto takes the fastest that runs on the device"
    )
    strict: bool = Field(default=False, description="a fallback to a slower backend is an error")


class Checkpoint(Section):
    """What is kept on disk to continue the run."""

    every: int = Field(default=5000, ge=1, description="steps between two checkpoints")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept")
    pin_every: int | None = Field(
        default=None,
        ge=1,
        description="checkpoints at multiples of this many steps are never deleted",
    )
    on_error: Literal["end", "go_on"] = Field(
        default="end",
        description="when a checkpoint cannot be written (a full disk): end the run, or warn and train on; the last "
        "one of a run must be written",
    )
    asynchronous: bool = Field(
        default=False,
        description="a thread writes a copy of the state while training goes on; takes the state's size of host memory",
    )
    resume: Literal["auto", "must", "never"] = Field(
        default="auto", description="auto continues if the run folder holds a checkpoint"
    )


class Validation(Section):
    """The loss on samples that are never trained on, at fixed time steps and noise."""

    every: int = Field(
        default=0,
        ge=0,
        description="steps between two measurements, a multiple of log.every; 0: off",
    )
    samples: int = Field(
        default=1024, ge=2, description="how many samples are held out of the data, and judged by"
    )
    rows: int = Field(
        default=8, ge=1, le=256, description="time steps a sample is put to the network at"
    )
    weights: Literal["ema", "model"] = Field(
        default="ema", description="the averaged weights, or those of the last step"
    )


class Sample(Section):
    """Pictures that are drawn while training runs, always of the same noise and the same requests."""

    every: int = Field(
        default=0, ge=0, description="steps between two grids, a multiple of log.every; 0: none"
    )
    num: int = Field(
        default=64, ge=1, le=2**16, description="samples in a grid; of classes in turn"
    )
    sampler: str = Field(default="ddim", description="ddpm, ddim, dpmpp, heun, or a module")
    steps: int = Field(default=50, ge=1, description="noise levels that are visited")
    guidance: float = Field(default=1.0, ge=0, description="1 = off")
    guidance_power: float = Field(
        default=0.0,
        ge=0,
        description="above 0: guidance grows from 1 at pure noise to its whole value (MDT: 4)",
    )
    clip: bool = Field(
        default=True,
        description="clamp what the network says of pixels to what they can be; never of latents",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the samples' noise")
    weights: Literal["ema", "model"] = Field(
        default="ema", description="the averaged weights, or those of the last step"
    )
    vae: str | None = Field(
        default=None,
        description="folder or hub name of the AutoencoderKL that decodes latents",
    )


class Log(Section):
    """What is written while training."""

    every: int = Field(default=50, ge=1, description="steps between two lines of metrics.jsonl")
    tensorboard: bool = Field(
        default=False, description="the same numbers for TensorBoard, in the run folder"
    )
    wandb: bool = Field(default=False, description="the same numbers for Weights & Biases")
    wandb_project: str | None = Field(default=None, description="the project there; default: W&B's")
    wandb_group: str | None = Field(
        default=None, description="the group there, for runs that belong together"
    )
    wandb_name: str | None = Field(
        default=None, description="the run's name there; default: that of the run folder"
    )


class RunConfig(Section):
    """The whole run."""

    name: str = Field(default="run", description="default: the name of the preset or file")
    run_dir: str | None = Field(
        default=None,
        description="everything the run writes goes here; default: runs/NAME-HASH, where the hash "
        "is of all settings that change the result, so that each run has a folder of its own",
    )
    seed: int = Field(default=0, ge=0, lt=2**62, description="the one seed of all randomness")
    model: Kind
    data: Kind
    schedule: Kind
    objective: Kind
    timesteps: Kind
    engine: Kind
    optim: Kind
    conditions: dict[str, Kind | None] = Field(
        default={},
        description="what the network is told beside the time: by the data's names, each with settings of its own; "
        "null leaves one out; default: all that the data hold",
    )
    learned_variance: bool = Field(
        default=True, description="the network also predicts the variance (2C output channels)"
    )
    train: Train = Train()
    kernels: Kernels = Kernels()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    sample: Sample = Sample()
    log: Log = Log()

    @field_validator(*KINDS, mode="before")
    @classmethod
    def _typed_by_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Replace a raw mapping by the `Config` of the file its `kind` names."""
        assert info.field_name is not None
        return config_of(info.field_name, value, trusted_by(info))

    @field_validator("optim", mode="before")
    @classmethod
    def _typed_optim(cls, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        return importlib.import_module("speed_engine.engines.optimizer").Config.model_validate(
            value or {}
        )

    @field_validator("conditions", mode="before")
    @classmethod
    def _typed_conditions(cls, value: Any, info: ValidationInfo) -> Any:
        """Each by the file that its `kind` names, by default the condition's own name."""
        if not isinstance(value, dict):
            raise ValueError("conditions must be a mapping of names to settings")
        return {
            name: None
            if each is None
            else config_of(
                "conditions",
                {"kind": name, **each} if isinstance(each, dict) else each,
                trusted_by(info),
                name,
            )
            for name, each in value.items()
        }

    @model_validator(mode="before")
    @classmethod
    def _default_sections(cls, value: Any) -> Any:
        """Absent sections get the plainest member of their folder."""
        if isinstance(value, dict):
            # A section with nothing in it is an absent one.
            value = {k: v for k, v in value.items() if v is not None or k not in SECTIONS}
            for section, kind in DEFAULTS.items():
                given = value.get(section, {})
                value[section] = {"kind": kind, **given} if isinstance(given, dict) else given
            value.setdefault("optim", {})
        return value


def load(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A preset or file with dotted overrides, checked. Raises ConfigError."""
    try:
        tree = {"name": Path(name).stem, **read_yaml(find(name))}
        return build(merge(tree, parse_overrides(overrides)))
    except RecursionError as error:
        raise ConfigError(f"the configuration {name} nests too deeply; make it flatter") from error


def build(tree: dict[str, Any], trusted: Collection[str] | None = None) -> RunConfig:
    """Check a nested mapping. Raises ConfigError: one sentence for each mistake.

    trusted: the outside modules that a tree from a file of somebody else's may name; None: the
    tree is the user's own and may name any.
    """
    try:
        return RunConfig.model_validate(tree, context={"trusted": trusted})
    except ValidationError as error:
        raise ConfigError(explain(error, tree, trusted)) from error


# ---------------------------------------------------------------------------------------------- errors


def explain(
    error: ValidationError, tree: dict[str, Any], trusted: Collection[str] | None = None
) -> str:
    """pydantic's report in the words of the configuration file."""
    sentences = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _keys_at(item["loc"][:-1], tree, trusted)
            sentences.append(
                f"unknown key {path}{suggest(str(item['loc'][-1]), known)}"
                + (f"; known here: {', '.join(known)}" if known else "; take it out")
            )
        elif item["type"] == "missing":
            sentences.append(f"the key {path} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "int_parsing_size":
                message = "Input is far too large a number"
            plain = (
                isinstance(item["input"], (str, int, float, list)) and item["type"] != "value_error"
            )
            given = f" (given: {reprlib.repr(item['input'])})" if plain else ""
            named = not path or message.startswith(path)
            sentences.append(f"{message}{given}" if named else f"{path}: {message}{given}")
    return "; ".join(dict.fromkeys(sentences))


def _keys_at(
    location: Sequence[Any], tree: dict[str, Any], trusted: Collection[str] | None
) -> list[str]:
    """The keys that the section at `location` knows."""
    model: Any = RunConfig
    value: Any = tree
    section = location[0] if location else ""
    for part in location:
        value = value[part] if isinstance(value, list) else (value or {}).get(part)
        if isinstance(value, list) or part == "conditions":
            continue  # of several, each of a kind of its own
        own = part if section == "conditions" else DEFAULTS.get(part)  # where no kind is named
        kind = value.get("kind", own) if isinstance(value, dict) else value or own
        if section in SECTIONS and isinstance(kind, str):
            model = config_class(section, kind, trusted)
        elif part == "optim":
            model = importlib.import_module("speed_engine.engines.optimizer").Config
        else:
            field = model.model_fields.get(str(part))
            model = field.annotation if field is not None else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return sorted(model.model_fields)
