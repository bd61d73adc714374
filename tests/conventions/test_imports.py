"""Who may import whom: the layers of the packages, no circle among the modules, one home for each heavy package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted([*ROOT.glob("speed_engine/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(part for part in parts if part != "__init__")


TYPES_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
MODULES = {module_of(path): path for path in CODE}

# Part -> what of ours it may import. A part's rule is the one with the longest prefix; "=package" allows the package's
# own file and nothing below it. From the leaves up; every module needs a rule.
LEAVES = [
    "speed_engine.errors",
    "speed_engine.atomic_files",
    "speed_engine.kinds",
    "speed_engine.progress",
]
FACTS = ["=speed_engine.data", "speed_engine.data.space"]  # what a data set says of itself
TABLE = [
    *LEAVES,
    "speed_engine.schedules",
    "speed_engine.objectives",
    "speed_engine.timesteps",
    "speed_engine.step_table",
    "speed_kernels",
]
BELOW_TRAINING = [
    *TABLE,
    "speed_engine.config",
    "speed_engine.conditions",
    "speed_engine.data",
    "speed_engine.distributed",
    "speed_engine.engines",
    "speed_engine.models",
    "speed_engine.sampling",
    "speed_engine.weights",
]
ANYTHING = ["speed_engine", "speed_kernels"]
MAY_IMPORT = {
    "speed_kernels": ["speed_kernels"],
    # One place turns refusals into a sentence that fits the terminal, and two of them are the kernel library's.
    "speed_engine.errors": [
        "speed_kernels.build",
        "speed_kernels.contract",
        "speed_engine.progress",
    ],
    "speed_engine.atomic_files": [],
    "speed_engine.kinds": [],
    "speed_engine.progress": [],
    "speed_engine.distributed": [*LEAVES, "speed_engine.distributed"],
    "speed_engine.schedules": [*LEAVES, "speed_engine.schedules"],
    # `optim` is the one section without a kind: its type lies beside the optimizers.
    "speed_engine.config": [*LEAVES, "speed_engine.config", "speed_engine.engines.optimizer"],
    "speed_engine.objectives": [*LEAVES, "speed_engine.objectives", "speed_engine.schedules"],
    "speed_engine.timesteps": [*LEAVES, "speed_engine.timesteps", "speed_engine.schedules"],
    "speed_engine.step_table": TABLE,
    "speed_engine.diffusion_step": [*TABLE, *FACTS],
    "speed_engine": ["speed_engine.step_table", "speed_engine.diffusion_step"],  # the library
    "speed_engine.conditions": [
        *LEAVES,
        *FACTS,
        "speed_engine.conditions",
        "speed_kernels.philox",
    ],
    "speed_engine.data": [
        *LEAVES,
        "speed_engine.conditions",
        "speed_engine.data",
        "speed_engine.distributed",
        "speed_kernels",
    ],
    "speed_engine.data.order": ["speed_kernels.philox", "speed_kernels.noise"],
    "speed_engine.models": [*LEAVES, *FACTS, "speed_engine.models", "speed_kernels"],
    "speed_engine.engines": [
        *LEAVES,
        "speed_engine.distributed",
        "speed_engine.engines",
        "speed_engine.models",
        "speed_kernels",
    ],
    "speed_engine.engines.optimizer": ["speed_engine.kinds", "speed_kernels"],
    "speed_engine.sampling": BELOW_TRAINING,
    "speed_engine.weights": BELOW_TRAINING,
    "speed_engine.training": [
        *BELOW_TRAINING,
        "speed_engine.diffusion_step",
        "speed_engine.training",
    ],
    "speed_engine.reports": [*BELOW_TRAINING, "speed_engine.training", "speed_engine.reports"],
    "speed_engine.studies": [
        *BELOW_TRAINING,
        "speed_engine.training",
        "speed_engine.reports.style",
        "speed_engine.studies",
    ],
    "speed_engine.commands": ANYTHING,
    "speed_engine.__main__": ANYTHING,
    "speed_engine.train": ANYTHING,
}
# Outside package -> the only files that may import it.
ONLY_IN = {
    "apex": r"speed_engine/engines/optimizer\.py",
    "deepspeed": r"speed_engine/engines/deepspeed(_json)?\.py",
    "diffusers": r"speed_engine/(sampling/\w+|data/autoencoder|weights/\w+)\.py",
    "fsspec": r"speed_engine/data/storage/fetch\.py",
    "matplotlib": r"speed_engine/(reports/\w+|studies/pictures|data/glyph_pictures)\.py",
    "pyarrow": r"speed_engine/data/storage/tables\.py",
    "tensorboard": r"speed_engine/training/boards\.py",
    "torch.utils.tensorboard": r"speed_engine/training/boards\.py",
    "timm": r"never",
    "torch_fidelity": r"speed_engine/reports/scores/inception\.py",
    "torchvision": r"never",
    "transformers": r"speed_engine/conditions/clip\.py",
    "triton": r"kernels/speed_kernels/(\w+/)?(triton_\w+|ahead_of_time)\.py",
    "wandb": r"speed_engine/training/boards\.py",
    "webdataset": r"speed_engine/data/storage/\w+\.py",
    "xformers": r"kernels/speed_kernels/attention/xformers_gpu\.py",
}


def nodes_of(tree: ast.AST, types_only: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, in functions too, and whether only a type checker ever comes by."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in TYPES_ONLY:
            for part, only in ((node.body, True), (node.orelse, types_only)):
                yield from nodes_of(ast.Module(part, []), only)
        else:
            yield node, types_only
            yield from nodes_of(node, types_only)


def imports_of(
    source: str, module: str, is_package: bool = False, *, when_running: bool = False
) -> set[str]:
    """Full names of what a module imports: `import a.b`, `from ..a import b`, `import_module("a.b")` and
    `import_module(f"a.{b}")`, at its top or in a function. A name is a module's where there is one (of ours), else
    that of the package or module it is taken from. when_running: without what only a type checker imports.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: set[str] = set()
    for node, types_only in nodes_of(ast.parse(source)):
        if types_only and when_running:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else origin for name in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= set(filter(None, [_constant_start(node.args[0])]))
    return found


def _constant_start(argument: ast.expr) -> str:
    """The module that a constant names, or the package that an f-string begins with; or nothing."""
    if isinstance(argument, ast.JoinedStr):
        first = argument.values[0]
        text = _constant_start(first) if isinstance(first, ast.Constant) else ""
        return text.rpartition(".")[0]
    value = argument.value if isinstance(argument, ast.Constant) else None
    return value if isinstance(value, str) else ""


def read(module: str, *, when_running: bool = False) -> set[str]:
    path = MODULES[module]
    source = path.read_text(encoding="utf-8")
    return imports_of(source, module, path.stem == "__init__", when_running=when_running)


def within(module: str, package: str) -> bool:
    if package.startswith("="):
        return module == package[1:]
    return module == package or module.startswith(package + ".")


def ours(modules: set[str]) -> set[str]:
    return {m for m in modules if within(m, "speed_engine") or within(m, "speed_kernels")}


# ------------------------------------------------------------------------------------ the reader of imports


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import speed_engine.data.order", "speed_engine.data.order"),
        ("from speed_engine.data import order", "speed_engine.data.order"),
        ("from speed_engine.data.order import Order", "speed_engine.data.order"),
        ("from . import order", "speed_engine.data.order"),
        ("from .order import Order", "speed_engine.data.order"),
        ("from . import DataError", "speed_engine.data"),
        ("from ..engines import optimizer as o", "speed_engine.engines.optimizer"),
        ("from .. import config", "speed_engine.config"),
        ("def f():\n    from .storage import index", "speed_engine.data.storage.index"),
        ("try:\n    import torch\nexcept ImportError:\n    pass", "torch"),
        ("import_module('speed_engine.models.dit')", "speed_engine.models.dit"),
        ("x = importlib.import_module(f'speed_engine.models.{kind}')", "speed_engine.models"),
        ("if TYPE_CHECKING:\n    from . import order", "speed_engine.data.order"),
    ],
)
def test_every_form_of_import_is_seen(line: str, expected: str) -> None:
    assert imports_of(line, "speed_engine.data.loader") == {expected}


def test_relative_imports_of_a_package_start_in_it() -> None:
    line = "from .order import Order\nfrom .. import config"
    found = imports_of(line, "speed_engine.data", is_package=True)
    assert found == {"speed_engine.data.order", "speed_engine.config"}


def test_what_only_a_type_checker_imports_is_told_apart() -> None:
    lines = "if TYPE_CHECKING:\n    import numpy\nelse:\n    import torch\nif A or TYPE_CHECKING:\n    import yaml"
    assert imports_of(lines, "speed_engine.x") == {"numpy", "torch", "yaml"}
    assert imports_of(lines, "speed_engine.x", when_running=True) == {"torch", "yaml"}


# --------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    rules = [part for part in MAY_IMPORT if part != "speed_engine" and within(module, part)]
    if module == "speed_engine":
        rules = ["speed_engine"]
    assert rules, f"{module} lies in no layer; give its part a line in MAY_IMPORT"
    allowed = MAY_IMPORT[max(rules, key=len)]
    wrong = [name for name in ours(read(module)) if not any(within(name, a) for a in allowed)]
    assert not wrong, f"{module} may import {allowed}, not {wrong}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_have_one_home(module: str) -> None:
    name = MODULES[module].relative_to(ROOT).as_posix()
    for package, home in ONLY_IN.items():
        if any(within(found, package) for found in read(module)):
            assert re.fullmatch(home, name), f"{name} imports {package}; its home is {home}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a directed graph, its first node repeated at the end; [] where there is none."""
    left = {node: set(targets) & set(graph) for node, targets in graph.items()}
    while done := {node for node, targets in left.items() if not targets}:
        left = {node: targets - done for node, targets in left.items() if node not in done}
    if not left:
        return []
    path = [min(left)]
    while path[-1] not in path[:-1]:  # every node left has a target that is left
        path.append(min(left[path[-1]]))
    return path[path.index(path[-1]) :]


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]
    assert circle({"a": {"a"}}) == ["a", "a"]
    assert circle({"a": {"b", "x"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other() -> None:
    """At the top and in functions. Importing a.b.c runs the packages a and a.b first, so they count as well, unless
    the importing module lies in them itself.
    """
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        targets = set()
        for name in ours(read(module, when_running=True)):
            targets.add(name)
            parts = name.split(".")
            packages = {".".join(parts[:length]) for length in range(1, len(parts))}
            targets |= {package for package in packages if not within(module, package)}
        graph[module] = targets
    assert not (found := circle(graph)), " -> ".join(found)
