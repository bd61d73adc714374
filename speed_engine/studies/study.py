"""A study is a file: what is compared, on what, how often, and by which test, said before anything runs.

Every (setting, method, seed) is a cell, an ordinary run. The same seed means the same initial weights, order of data,
noise and uniform numbers behind t for every method, so that cells of one seed are twins and are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from speed_engine.config import ConfigError, RunConfig, build, merge, parse_overrides
from speed_engine.config.files import find as find_preset
from speed_engine.config.files import read_yaml
from speed_engine.kinds import Section, suggest
from speed_engine.training.assembly import build_table

FOLDER = Path(__file__).parent
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.=+-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME)]  # becomes a folder's name
FEWEST_POINTS = 4  # of a curve
TRAINING_METRICS = ("loss", "mse", "vb")
VALIDATION = "validation_loss"
# What a study decides itself, the same for every cell.
TAKEN = {
    "seed": "seeds",
    "run_dir": "--out",
    "log.every": "cadence",
    "train.steps": "steps",
    "validation": "cadence and samples",
}


class Quick(Section):
    """What --quick changes; what is None stays."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps of every cell")
    cadence: int | None = Field(
        default=None, ge=1, description="steps between two points of a curve"
    )
    seeds: tuple[int, ...] | None = Field(default=None, description="instead of the study's")
    overrides: dict[str, Any] = Field(default={}, description="over the study's own overrides")
    methods: dict[str, dict[str, Any]] = Field(
        default={}, description="over the methods' own overrides"
    )


class Study(Section):
    """The study file."""

    name: Name = Field(description="default: the file's name")
    about: str = Field("", description="a sentence for the report")
    preset: str = Field(description="preset or YAML file that every cell begins from")
    overrides: dict[str, Any] = Field({}, description="sections and keys over the base")
    methods: dict[Name, dict[str, Any]] = Field(
        min_length=2, description="name -> sections and keys over preset, overrides and setting"
    )
    baseline: str | None = Field(None, description="a method's name; default: the first")
    settings: dict[Name, dict[str, Any]] = Field(
        {"base": {}}, min_length=1, description="name -> sections and keys over the overrides"
    )
    seeds: tuple[int, ...] = Field(min_length=2, description="one run each; n is their number")
    steps: int = Field(ge=1, description="optimizer steps of every cell")
    cadence: int = Field(ge=1, description="steps between two points of a curve")
    metric: str = Field(VALIDATION, description="key of metrics.jsonl; lower is better")
    samples: int = Field(256, ge=1, description="that the validation loss is measured on")
    target: float | Literal["baseline"] = Field(
        "baseline",
        description="value to reach; baseline: its own final value, the median over seeds",
    )
    test: Literal["paired"] = Field(
        "paired", description="95 % interval of the ratio, paired over seeds, on logs"
    )
    quick: Quick = Quick()

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        if self.reference not in self.methods:
            known = list(self.methods)
            raise ValueError(
                f"baseline: there is no method {self.reference!r}{suggest(self.reference, known)}; "
                f"there are: {', '.join(known)}"
            )
        for name in self.quick.methods:
            if name not in self.methods:
                raise ValueError(
                    f"quick.methods: there is no method {name!r}{suggest(name, list(self.methods))}"
                )
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("seeds: every seed once, and none below 0")
        if self.steps // self.cadence < FEWEST_POINTS or self.steps % self.cadence:
            raise ValueError(
                f"cadence={self.cadence} does not divide steps={self.steps} into at least "
                f"{FEWEST_POINTS} intervals; choose a divisor of at most {self.steps // FEWEST_POINTS}"
            )
        return self

    @property
    def reference(self) -> str:
        """The baseline's name."""
        return self.baseline or next(iter(self.methods))


@dataclass(frozen=True)
class Cell:
    """One run: its name setting/method/seed, and the tree of its configuration without a run folder."""

    setting: str
    method: str
    seed: int
    tree: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.method}/seed{self.seed}"


def studies() -> list[str]:
    """Names of the studies that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, overrides: Sequence[str] = (), quick: bool = False) -> Study:
    """A shipped study or a YAML file, with overrides, checked. Raises ConfigError: one sentence a mistake."""
    path = _find(name)
    tree = merge({"name": path.stem, **read_yaml(path)}, {})
    tree = merge(tree, parse_overrides(overrides))
    if quick:
        tree = _quick(check(tree))
    study = check(tree)
    return study.model_copy(update={"baseline": study.reference})


def check(tree: dict[str, Any]) -> Study:
    """The study of a nested mapping. Raises ConfigError."""
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def cells(study: Study) -> list[Cell]:
    """Every cell, seed by seed so that pairs are complete early, each configuration checked.

    Raises ConfigError naming the method and the key of a configuration that cannot run.
    """
    base = read_yaml(find_preset(study.preset))
    trees: dict[tuple[str, str], dict[str, Any]] = {}
    for setting, over in study.settings.items():
        for method, own in study.methods.items():
            for where, given in (
                ("overrides", study.overrides),
                (f"settings.{setting}", over),
                (f"methods.{method}", own),
            ):
                _refuse_taken(where, given)
            tree = merge(merge(merge(base, study.overrides), over), own)
            tree = merge(tree, _decided(study))
            try:
                build_table(_for_table(build(tree)))
            except ValueError as error:
                raise ConfigError(f"methods.{method} in settings.{setting}: {error}") from error
            trees[setting, method] = tree
    _check_metric(study)
    return [
        Cell(setting, method, seed, {**tree, "seed": seed})
        for seed in study.seeds
        for (setting, method), tree in trees.items()
    ]


# ------------------------------------------------------------------------------------------------ details


def _find(name: str) -> Path:
    if (FOLDER / f"{name}.yaml").exists():
        return FOLDER / f"{name}.yaml"
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.exists():
        return path
    raise ConfigError(
        f"no study {name!r}{suggest(name, studies())}; studies are: {', '.join(studies())}; "
        "or give the path of a .yaml file"
    )


def _quick(study: Study) -> dict[str, Any]:
    """The study's tree with its `quick` section applied; it gets a name, and so a folder, of its own."""
    quick = study.quick
    tree = study.model_dump(mode="json", exclude={"quick"})
    tree["name"] += "_quick"
    for key in ("steps", "cadence", "seeds"):
        if getattr(quick, key) is not None:
            tree[key] = getattr(quick, key)
    tree["overrides"] = merge(tree["overrides"], quick.overrides)
    for name, over in quick.methods.items():
        tree["methods"][name] = merge(tree["methods"][name], over)
    return tree


def _decided(study: Study) -> dict[str, Any]:
    """What the study sets in every cell."""
    tree: dict[str, Any] = {
        "name": study.name,
        "train": {"steps": study.steps},
        "log": {"every": study.cadence},
    }
    if study.metric.startswith("validation"):
        tree["validation"] = {"every": study.cadence, "samples": study.samples}
    return tree


def _refuse_taken(where: str, given: dict[str, Any]) -> None:
    for key, own in TAKEN.items():
        node: Any = given
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            raise ConfigError(f"{where}: {key} is the same for every cell; set the study's {own}")


def _check_metric(study: Study) -> None:
    """Raises ConfigError for a key that metrics.jsonl will not hold."""
    if study.metric in TRAINING_METRICS or study.metric.startswith("validation"):
        return
    known = [VALIDATION, *TRAINING_METRICS]
    raise ConfigError(
        f"metric: metrics.jsonl holds no {study.metric!r}{suggest(study.metric, known)}; "
        f"choose one of: {', '.join(known)}"
    )


def _for_table(config: RunConfig) -> RunConfig:
    """With a schedule that can be built before the data are seen."""
    if for_shape := getattr(config.schedule, "for_shape", None):
        return config.model_copy(update={"schedule": for_shape((1, 64, 64))})
    return config


def _explain(error: ValidationError) -> str:
    sentences = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = sorted((Quick if item["loc"][0] == "quick" else Study).model_fields)
            hint = suggest(str(item["loc"][-1]), known)
            message = f"the study knows no such key{hint}; it knows: {', '.join(known)}"
        elif item["type"] == "missing":
            message = "this key of the study is missing"
        sentences.append(f"{path}: {message}" if path else message)
    return "; ".join(dict.fromkeys(sentences))
