"""The one place that finds a member of a folder by its name: `timesteps.kind: speed` is `timesteps/speed.py`.

No registry: a member is a file that holds a class `Config` whose `kind` is the file's name; a new file is found the
moment it exists. A dotted path (`my_lab.mine`) reaches a module outside the repository, in every section, and stays the
`kind` of the checked configuration, so that whatever is saved finds the module again.

Importing a module runs it. What a person wrote on the command line or in a configuration may name any module; what
comes with files (a run's manifest, a weights file) may name outside modules only if the person says so (`trusted`).
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import reprlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError

# Section -> the package whose files are its kinds.
SECTIONS = {
    "model": "speed_engine.models",
    "data": "speed_engine.data",
    "schedule": "speed_engine.schedules",
    "objective": "speed_engine.objectives",
    "timesteps": "speed_engine.timesteps",
    "engine": "speed_engine.engines",
    "conditions": "speed_engine.conditions",
    "sampling": "speed_engine.sampling",
}
# The functions that a section's modules must offer, beside `Config`.
FUNCTIONS = {
    "model": ("build", "macs_per_sample"),
    "engine": ("open_engine",),
}


class ConfigError(ValueError):
    """A mistake in a configuration, told in one sentence."""


class Section(BaseModel):
    """Base of all sections: nothing can be changed later, nothing unknown is accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def names(section: str) -> list[str]:
    """The names that a section's `kind` may have; none where the package is not there."""
    return sorted(path.stem for path in _files(section, "*") if _is_kind(path))


def _files(section: str, name: str) -> list[Path]:
    spec = importlib.util.find_spec(SECTIONS[section])
    places = [] if spec is None else spec.submodule_search_locations or []
    return [path for place in places for path in Path(place).glob(f"{name}.py")]


def _is_kind(path: Path) -> bool:
    return _holds_kind(path, path.stat().st_mtime_ns)


@functools.cache
def _holds_kind(path: Path, changed: int) -> bool:
    """Whether the file, as it was at that time, holds a class `Config` whose `kind` is the file's own name.

    It is read, not imported.
    """
    name = path.stem
    text = path.read_text(encoding="utf-8")
    if f'"{name}"' not in text:
        return False
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            return any(
                isinstance(line.target, ast.Name)
                and line.target.id == "kind"
                and ast.unparse(line.annotation) == f"Literal['{name}']"
                for line in lines
            )
    return False


def find(section: str, kind: str, trusted: Collection[str] | None = None) -> ModuleType:
    """The module that implements `kind`, a name of the section's folder or a dotted path.

    trusted: the outside modules that may be imported; None where the person who runs this named `kind`. Raises
    ConfigError: no such name (with the closest), a path that cannot be imported or is not trusted, a module that
    lacks a part of its contract.
    """
    if "." not in kind:
        # The one file alone: to read all of them takes a quarter of a second.
        if not (kind.isidentifier() and any(map(_is_kind, _files(section, kind)))):
            known = names(section)
            raise ConfigError(
                f"{section}.kind: there is no {kind!r}{suggest(kind, known)}; "
                f"there are: {', '.join(known)}"
            )
        return importlib.import_module(f"{SECTIONS[section]}.{kind}")
    if not all(part.isidentifier() for part in kind.split(".")):
        raise ConfigError(
            f"{section}.kind: {kind!r} is no module's name; write it as package.module"
        )
    if trusted is not None and kind not in trusted:
        raise ConfigError(
            f"{section}.kind names the outside module {kind}, which would be run; "
            f"if it is yours, add --trust {kind}"
        )
    try:
        module = importlib.import_module(kind)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"{section}.kind: cannot import {kind!r}: {error}") from error
    if not _is_config(getattr(module, "Config", None)):
        raise ConfigError(
            f"{section}.kind: the module {kind} has no class Config of its settings; "
            "add one that derives from speed_engine.kinds.Section"
        )
    for function in FUNCTIONS.get(section, ("build",)):
        if not callable(getattr(module, function, None)):
            raise ConfigError(
                f"{section}.kind: the module {kind} has no function {function}; "
                f"add it, as the files of {SECTIONS[section]} have it"
            )
    return module


def config_of(
    section: str,
    value: Any,
    trusted: Collection[str] | None = None,
    place: str | int | None = None,
) -> Any:
    """One section checked against the `Config` of its kind, an instance of `Section`.

    value: a mapping with a `kind`, or the bare kind; a checked section is given back. trusted: see `find`. place: the
    name or number of this one among several, for the errors. Raises ConfigError for the kind, pydantic's
    ValidationError (a ValueError, too) for what lies below it.
    """
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ConfigError(f"{section}.kind is missing; choose one of: {', '.join(names(section))}")
    config = config_class(section, value["kind"], trusted)
    try:
        return config.model_validate(value, context={"trusted": trusted})
    except ValidationError as error:
        raise error if place is None else _under(place, error) from error


def asked(section: str, value: Any) -> Any:
    """`config_of` for a caller in Python: every mistake is a ConfigError of one sentence."""
    try:
        return config_of(section, value)
    except ValidationError as error:
        told = []
        for item in error.errors():
            key = ".".join([section, *map(str, item["loc"])])
            if item["type"] == "extra_forbidden":
                known = config_class(section, value["kind"]).model_fields
                found = suggest(str(item["loc"][-1]), sorted(known))
                told.append(f"unknown key {key}{found}; known here: {', '.join(sorted(known))}")
            else:
                said = item["msg"].removeprefix("Value error, ")
                told.append(f"{key}: {said} (given: {reprlib.repr(item['input'])})")
        raise ConfigError("; ".join(told)) from error


def _under(place: str | int, error: ValidationError) -> ValidationError:
    """The same mistakes, of a section that lies at `place` in another: pydantic knows only its own fields."""
    found = [
        InitErrorDetails(
            type=PydanticCustomError("value_error", "{said}", {"said": item["msg"]})
            if item["type"] == "value_error"
            else item["type"],
            loc=(place, *item["loc"]),
            input=item["input"],
            ctx=item.get("ctx", {}),
        )
        for item in error.errors()
    ]
    return ValidationError.from_exception_data(error.title, found)


def config_class(
    section: str, kind: str, trusted: Collection[str] | None = None
) -> type[BaseModel]:
    """The class of the settings of a kind. Raises ConfigError as `find` does."""
    module = find(section, kind, trusted)
    return _reached_by(module, section, kind) if "." in kind else module.Config


def trusted_by(info: ValidationInfo) -> Collection[str] | None:
    """For a validator of a section that holds further kinds: the `trusted` of the call above it."""
    return (info.context or {}).get("trusted")


def home(config: BaseModel) -> ModuleType:
    """The module whose settings these are."""
    return sys.modules[type(config).__module__]


def suggest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'speed'?` where a known word is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_config(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


@functools.cache
def _reached_by(module: ModuleType, section: str, path: str) -> type[BaseModel]:
    """An outside module's `Config` whose `kind` is the path it is reached by, frozen and strict like our own.

    The module need not know that path. What every member of the section can be told (`MemberConfig` of the section's
    package) it can be told as well. One class a path, so that equal settings are equal.
    """
    common = getattr(importlib.import_module(SECTIONS[section]), "MemberConfig", Section)
    bases = (module.Config,) if issubclass(module.Config, common) else (module.Config, common)
    kind: Any = (Literal[path], path)
    return create_model(
        "Config",
        __base__=bases,
        __module__=module.__name__,  # so that `home` is the outside module
        __doc__=module.Config.__doc__,
        kind=kind,
    )
