"""`python -m speed_engine keys`: every key of the configuration with its type, range, default and meaning.

Read from the classes that check a configuration, so that the list cannot differ from what is accepted.
`KEYS.md` beside DESIGN.md is `keys --markdown`, kept true by a test.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from speed_engine.config import DEFAULTS, RunConfig, presets
from speed_engine.engines import optimizer
from speed_engine.kinds import SECTIONS, ConfigError, config_class, find, names, suggest
from speed_engine.progress import wrapped

BOUNDS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))
KINDS = {section: section for section in SECTIONS if section in RunConfig.model_fields}


@dataclass(frozen=True)
class Key:
    """One line: the dotted name as it is typed, what it takes, what it is when nobody says, and what for."""

    name: str
    takes: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """The keys of a section, or of one kind of it; `title` is `section` or `section.kind=kind`."""

    title: str
    about: str
    keys: tuple[Key, ...]


def groups(section: str | None = None, kind: str | None = None) -> list[Group]:
    """All groups, those of a section, or the one of a kind. Raises ConfigError for names that do not exist."""
    everything = list(_everything())
    known = list(dict.fromkeys(group.title.split(".")[0] for group in everything))
    if section is None:
        return everything
    if section not in known:
        raise ConfigError(
            f"there is no section {section!r}{suggest(section, known)}; there are: {', '.join(known)}"
        )
    chosen = [group for group in everything if group.title.split(".")[0] == section]
    if kind is None:
        return chosen
    if section not in (*KINDS, "conditions"):
        raise ConfigError(f"{section} has no kinds; ask for `keys {section}`")
    config_class(section, kind)  # one sentence with the closest name
    return [group for group in chosen if group.title.endswith(f".kind={kind}")]


def as_text(found: list[Group]) -> str:
    """For a terminal: a group's name, then its keys, their meaning indented below them."""
    lines = []
    for group in found:
        lines += [group.title + (f"   {group.about}" if group.about else "")]
        for key in group.keys:
            default = f" (default {key.default})" if key.default else " (must be given)"
            lines += [f"  {key.name} = {key.takes}{default}", f"      {key.meaning}"]
        lines += [] if group.keys else ["  (no settings)"]
        lines += [""]
    return "\n".join(wrapped(line, " " * 6) for line in lines).rstrip()


def as_markdown() -> str:
    """The page KEYS.md."""
    lines = [
        "# Keys",
        "",
        "Every key of a configuration file, which is `section.key=value` on the command line. Made by "
        "`python -m speed_engine keys --markdown`.",
        f"Presets: {', '.join(f'`{name}`' for name in presets())}.",
        "",
    ]
    for group in groups():
        lines += [f"## `{group.title}`", ""] + ([group.about, ""] if group.about else [])
        if group.keys:
            lines += ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
        for key in group.keys:
            cells = (f"`{key.name}`", key.takes, key.default and f"`{key.default}`", key.meaning)
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]
        lines += [""] if group.keys else ["No settings.", ""]
    return "\n".join(lines)


def _everything() -> Iterator[Group]:
    fields = RunConfig.model_fields
    plain = {
        name: field
        for name, field in fields.items()
        if name not in KINDS and not _section(field) and name not in ("optim", "conditions")
    }
    yield Group(
        "run", "at the top of the file, with no section's name before them", _keys("", plain)
    )
    for section in KINDS:
        yield from _kinds(section, f"{section}.")
    yield Group("optim", _about(optimizer.Config), _keys("optim.", optimizer.Config.model_fields))
    yield from _kinds("conditions", "conditions.NAME.")
    for name, field in fields.items():
        if config := _section(field):
            yield Group(name, _about(config), _keys(f"{name}.", config.model_fields))


def _kinds(section: str, prefix: str) -> Iterator[Group]:
    for kind in names(section):
        config = config_class(section, kind)
        chosen = " (the default)" if DEFAULTS.get(section) == kind else ""
        about = _first_sentence(find(section, kind).__doc__) + chosen
        yield Group(f"{section}.kind={kind}", about.strip(), _keys(prefix, config.model_fields))


def _section(field: FieldInfo) -> type[BaseModel] | None:
    of = field.annotation
    return (
        of if isinstance(of, type) and issubclass(of, BaseModel) and of is not BaseModel else None
    )


def _about(config: type[BaseModel]) -> str:
    """What the class says of itself, up to its first full stop."""
    return _first_sentence(config.__dict__.get("__doc__"))


def _first_sentence(text: str | None) -> str:
    words = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"(?<!\bal)(?<!\beq)\. (?=[A-Z`])", words)[0].rstrip(".")


def _keys(prefix: str, fields: dict[str, FieldInfo]) -> tuple[Key, ...]:
    return tuple(
        Key(
            prefix + name,
            _takes(field),
            "" if field.is_required() else _shown(field.get_default(call_default_factory=True)),
            field.description or "",
        )
        for name, field in fields.items()
        if name != "kind"
    )


def _takes(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {_bound(getattr(each, attribute))}"
        for each in field.metadata
        for bound, attribute, sign in BOUNDS
        if isinstance(each, bound)
    ]
    return " ".join([_type(field.annotation), ", ".join(bounds)]).strip()


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) and value < 2**30 else f"{value:g}"


def _type(of: Any) -> str:
    """A type in the words of a YAML file."""
    origin, inner = typing.get_origin(of), typing.get_args(of)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " | ".join(_shown(value) for value in inner)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(each) for each in inner)
    if origin in (tuple, list):
        return "[" + ", ".join("..." if each is ... else _type(each) for each in inner) + "]"
    if origin is dict:
        return "mapping"
    if isinstance(of, type) and issubclass(of, BaseModel):
        return "section"
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true | false",
        type(None): "null",
    }
    return names.get(of, getattr(of, "__name__", str(of)))


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        return _shown(value.model_dump(mode="json"))
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(each)}" for key, each in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
