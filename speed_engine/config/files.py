"""Where a configuration is written: presets, YAML files and the overrides of a command line become one mapping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_engine.config.yaml_values import parse
from speed_engine.kinds import ConfigError, suggest

# The sections whose `kind` decides their type.
KINDS = ("model", "data", "schedule", "objective", "timesteps", "engine")
PRESETS = Path(__file__).parents[1] / "presets"


def presets() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file as a mapping, with at most one `base:` (a preset or a path) merged beneath.

    above: the files whose base this one is, to refuse a circle.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path} is its own base, through {above[-1]}; remove one `base:`")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    tree = parse(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return merge(read_yaml(find(str(base)), (*above, path.resolve())), tree)


def find(name: str) -> Path:
    """A preset's name or a path to a YAML file -> the file. Raises ConfigError with the list."""
    if (PRESETS / f"{name}.yaml").exists():
        return PRESETS / f"{name}.yaml"
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.exists():
        return path
    hint = suggest(name, presets())
    raise ConfigError(
        f"no configuration {name!r}{hint}; presets are: {', '.join(presets())}; "
        "or give the path of a .yaml file"
    )


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`. A section that changes its `kind` starts afresh: the other kind's keys do
    not apply to it."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if key in KINDS:
            old = {"kind": old} if isinstance(old, str) else old
            value = {"kind": value} if isinstance(value, str) else value
        if isinstance(old, dict) and isinstance(value, dict):
            if "kind" in value and value["kind"] != old.get("kind"):
                old = {}
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["optim.lr=2e-4", "engine=torch"]` -> a nested mapping. Values are YAML."""
    tree: dict[str, Any] = {}
    seen: set[str] = set()
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"cannot read the override {text!r}; write it as section.key=value")
        if key in seen:
            raise ConfigError(f"the override {key} is given twice; remove one")
        seen.add(key)
        value = parse(raw, f"the override {text if len(text) < 80 else key!r}")
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            if isinstance(node.get(section), str) and section in KINDS:  # `engine=torch engine.x=1`
                node[section] = {"kind": node[section]}
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"the override {text!r} goes below a value that is not a section")
        if isinstance(node.get(last), dict) and isinstance(value, str) and key in KINDS:
            node[last]["kind"] = value
        else:
            node[last] = value
    return tree
