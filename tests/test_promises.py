"""docs/reliability.md names tests that exist, one a promise; every staged situation has a test that says so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="ascii")
ROW = re.compile(r"^\| (?P<promise>.+) \| `(?P<test>[^`]+)` \|$", re.MULTILINE)


def missing(page: str) -> list[str]:
    """The tests that a page names and that are not there."""
    lost = []
    for row in ROW.finditer(page):
        file, _, name = row["test"].partition("::")
        path = ROOT / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if name not in names if name else not any(one.startswith("test_") for one in names):
            lost.append(row["test"])
    return lost


def test_every_promise_has_its_test() -> None:
    assert missing(PAGE) == []
    tables = [
        line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")
    ]
    assert len(tables) == len(list(ROW.finditer(PAGE))) > 30, "a row of another form would not be looked at"


@pytest.mark.parametrize("test", ["tests/test_corpus.py::test_nothing", "tests/nowhere.py", "tests/moe.py"])
def test_the_check_can_fail(test: str) -> None:
    assert missing(f"| a promise | `{test}` |\n") == [test]


def test_the_security_page_leads_here() -> None:
    assert "docs/reliability.md" in (ROOT / "SECURITY.md").read_text(encoding="ascii")


def test_every_staged_situation_has_a_test() -> None:
    """Destinations D01 to D20 and time X01 to X14, written behind the head of the test that builds them."""
    heads = re.compile(r"-> None:  # ([DX]\d\d(?:, [DX]\d\d)*)$", re.MULTILINE)
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    there = {one for text in texts for found in heads.findall(text) for one in found.split(", ")}
    wanted = {f"D{i:02}" for i in range(1, 21)} | {f"X{i:02}" for i in range(1, 15)}
    assert sorted(wanted - there) == []
