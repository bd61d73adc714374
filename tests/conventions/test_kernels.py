"""The rules of the kernel library: an op is a folder that knows no other op's."""

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "kernels" / "speed_kernels"
OPS = sorted(path.parent.name for path in LIBRARY.glob("*/op.py"))


def ops_in(source: str, module: str) -> set[str]:
    """The ops whose folders a module of ours imports from, absolutely or relatively, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{start}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {
        part[1] for part in parts if part[0] == "speed_kernels" and part[1:2] and part[1] in OPS
    }


@pytest.mark.parametrize(
    "line",
    [
        "import speed_kernels.noise.op",
        "from speed_kernels import noise",
        "from speed_kernels.noise import op",
        "from ..noise import op",
        "from .. import noise",
        "def late():\n    from speed_kernels.noise.op import noise",
    ],
)
def test_every_way_to_import_an_op_is_seen(line: str) -> None:
    assert ops_in(line, "speed_kernels.loss.op") == {"noise"}


@pytest.mark.parametrize("line", ["from . import reference", "from ..loss.op import loss_op"])
def test_an_op_may_import_itself(line: str) -> None:
    assert ops_in(line, "speed_kernels.loss.op") == {"loss"}


def test_what_the_ops_share_is_no_op() -> None:
    line = "from speed_kernels import build, cpp, launch, philox, table"
    assert ops_in(line, "speed_kernels.loss.op") == set()


@pytest.mark.parametrize(
    "path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(LIBRARY))
)
def test_no_op_imports_another_op(path: Path) -> None:
    """What several need lies beside the folders, and imports from none of them."""
    relative = path.relative_to(LIBRARY)
    module = ".".join(["speed_kernels", *relative.with_suffix("").parts])
    own = {relative.parts[0]} if len(relative.parts) > 1 else set()
    assert ops_in(path.read_text(encoding="utf-8"), module) <= own


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_a_package_that_imports_nothing(op: str) -> None:
    """One line that says what it is: importing an op's file must not load its backends."""
    tree = ast.parse((LIBRARY / op / "__init__.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert len(tree.body) == 1 and docstring and len(docstring.splitlines()) == 1
