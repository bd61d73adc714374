"""The table of faults names tests: each must exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
LINES = (TESTS / "faults" / "README.md").read_text(encoding="utf-8").splitlines()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in LINES if line[:1] == "|"]
FAULTS = {row[0]: row for row in ROWS if row[0].isdigit()}


def test_there_are_fifty() -> None:
    assert list(FAULTS) == [str(number) for number in range(1, 51)]


def test_every_named_test_exists() -> None:
    """A fault names a test, or says what is missing."""
    absent = []
    for number, (_, _, tests, missing) in FAULTS.items():
        names = re.findall(r"`([^`]+)::([^`]+)`", tests)
        assert names or missing, f"fault {number} has neither a test nor a word on why"
        for file, function in names:
            path = TESTS / file
            tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([])
            if function not in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}:
                absent.append(f"fault {number}: {file}::{function}")
    assert not absent, absent
