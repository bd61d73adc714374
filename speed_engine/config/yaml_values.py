"""YAML as people mean it: the core schema of YAML 1.2, no key twice, nothing that is larger than it looks.

By YAML 1.1, which PyYAML speaks, 1e3 is a text, 010 is eight, 1:30 is ninety and `on` is true. Here 1e3 is a number,
010 is ten, and words are words.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from speed_engine.kinds import ConfigError

MOST_VALUES = 10_000  # of one document, every alias counted as what it stands for
TAG = "tag:yaml.org,2002:"
# Tag, form, and the characters it can begin with; the first that fits counts.
CORE = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ConfigError in one sentence that begins with `where`."""
    loader = _Loader(text)
    loader.where = where
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        told = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise ConfigError(f"{where} is not valid YAML: {told}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} nests too deeply; make it flatter") from error
    except ValueError as error:
        raise (
            error if isinstance(error, ConfigError) else ConfigError(f"{where}: {error}")
        ) from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012  as PyYAML has it
        first: [
            (TAG + name, re.compile(rf"(?:{form})\Z"))
            for name, form, firsts in CORE
            if first in firsts
        ]
        for first in {first for _, _, firsts in CORE for first in firsts}
    }
    where = ""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._size(node, {}, set())
        return node

    def _size(self, node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
        """Values below a node, itself included, as if every alias were written out."""
        if id(node) in above:
            raise ConfigError(f"{self._at(node)} contains itself; remove the alias")
        if id(node) not in known:
            above.add(id(node))
            children: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                children = node.value
            elif isinstance(node, yaml.MappingNode):
                children = [each for pair in node.value for each in pair]
            known[id(node)] = 1 + sum(self._size(child, known, above) for child in children)
            above.remove(id(node))
        if known[id(node)] > MOST_VALUES:
            raise ConfigError(
                f"{self._at(node)} stands for more than {MOST_VALUES} values; write less, or fewer aliases"
            )
        return known[id(node)]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == TAG + "merge":
                continue
            if key.tag != TAG + "str":
                given = f"{key.value!r} " if isinstance(key, yaml.ScalarNode) else ""
                raise ConfigError(f"{self._at(key)}: the key {given}is not a word; write one")
            if key.value in seen:
                raise ConfigError(
                    f"{self._at(key)}: the key {key.value!r} appears twice; remove one"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

    def _at(self, node: yaml.Node) -> str:
        return f"{self.where}, line {node.start_mark.line + 1}"


_Loader.add_constructor(TAG + "int", _Loader.construct_yaml_int)
