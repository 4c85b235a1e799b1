"""Every block in README.md, CONTRIBUTING.md and docs/ does what the page says.

`python`: runs, and prints what the `text` block below it holds, or raises it. `rows`: every row is accepted.
`refused`: refused with the text below it. `console`: lines after `$ restow` print what follows them. Run this
file as a program to write what is true into the pages; read the difference before you keep it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from restow.cli import app
from restow.errors import RestowError
from restow.layout import parse_size
from restow.listing import families_page
from restow.notation import parse_row
from restow.terminal import failure_text
from restow.torch import demo_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def true_page(page: str) -> str:
    """The page with the outputs that its blocks really have. Runs in the current folder."""
    space: dict[str, object] = {}
    expected: str | None = None  # what the next block must hold, if it is a `text`

    def block(match: re.Match[str]) -> str:
        nonlocal expected
        kind, body = match[1], match[2]
        wanted, expected = expected, None
        if kind == "python":
            expected = _python(body, space)
        elif kind == "rows":
            for row in body.splitlines():
                _row(row)
        elif kind == "refused":
            expected = _refused(body)
        elif kind == "console":
            body = _console(body)
        elif kind == "text" and wanted is not None:
            body = wanted
        return f"```{kind}\n{body}```"

    return FENCE.sub(block, page)


def _python(code: str, space: dict[str, object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(code, "<page>", "exec"), space)
        except RestowError as error:
            print(failure_text(error))
    return out.getvalue()


def _row(text: str) -> None:
    value = parse_size(text) if "=" in text else parse_row(text)
    assert str(value).split() == text.split(), "a row is its text"


def _refused(body: str) -> str:
    try:
        _row(body.rstrip("\n"))
    except RestowError as error:
        return failure_text(error) + "\n"
    raise AssertionError(f"the page says that this is refused, and it is not: {body}")


def _console(body: str) -> str:
    parts = re.split(r"^(?=\$ )", body, flags=re.MULTILINE)
    return "".join(_command(part) for part in parts)


def _command(part: str) -> str:
    line, _, _ = part.partition("\n")
    words = line.split()
    if words[:2] != ["$", "restow"] or words[2] == "demo":
        return part
    done = CliRunner().invoke(app, words[2:])
    return f"{line}\n{done.output}"


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """A folder with what the pages speak of: `checkpoint`, and `broken`, which lacks one tensor."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            demo_model.write_checkpoint(Path("checkpoint"))
            demo_model.copy_headers(Path("checkpoint"), Path("broken"), demo_model.LOST)
            yield
        finally:
            os.chdir(before)


@pytest.fixture(scope="module")
def place() -> Iterator[None]:
    with workplace():
        yield


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_what_is_true(page: Path, place: None) -> None:
    text = page.read_text()
    assert text.isascii()
    assert true_page(text) == text, "python tests/test_docs.py writes what is true"


def test_the_check_of_pages_can_fail() -> None:
    assert (
        true_page("```python\nprint(1)\n```\n\n```text\n2\n```\n")
        == "```python\nprint(1)\n```\n\n```text\n1\n```\n"
    )
    with pytest.raises(AssertionError, match="it is not"):
        true_page("```refused\nin x f\n```\n")
    with pytest.raises(RestowError):
        true_page("```rows\nin x\n```\n")


def test_every_construct_is_shown_accepted_and_refused() -> None:
    text = (ROOT / "docs" / "notation.md").read_text()
    constructs = re.split(r"^## (?=\d\. )", text, flags=re.MULTILINE)[1:]
    assert [construct[0] for construct in constructs] == list("12345678")
    for construct in constructs:
        kinds = [match[1] for match in FENCE.finditer(construct)]
        assert kinds[0] == "rows"
        assert kinds[-2:] in (["refused", "text"], ["python", "text"]), construct


def test_the_readme_is_short_and_its_tree_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    tree = next(match[2] for match in FENCE.finditer(text) if match[2].startswith("src/restow/"))
    words = set(re.findall(r"[a-z_*]+\.py", tree))
    found = [path for path in (ROOT / "src" / "restow").rglob("*.py") if path.parent.name != "catalog"]
    files = {path.name for path in found} - {"__init__.py"}
    assert [name for name in files if not any(map(partial(fnmatchcase, name), words))] == []
    assert [word for word in words if not any(fnmatchcase(name, word) for name in files)] == []


def test_ci_runs_the_second_command_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    first, second = [line for line in text.splitlines() if line.startswith("python3 -m venv")]
    assert "restow demo" in first
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == second
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_constraints_pin_what_is_installed() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    have = dict(line.partition("+")[0].split("==") for line in listed.splitlines() if "==" in line)
    have = {name.lower().replace("_", "-"): version for name, version in have.items()}
    wrong = {n: v for n, v in pins.items() if have.get(n.lower().replace("_", "-"), v) != v}
    assert wrong == {}


def test_the_page_of_families_is_the_catalogue() -> None:
    assert (ROOT / "docs" / "families.md").read_text() == families_page(), (
        "python tests/test_docs.py writes it"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "families.md").write_text(families_page())
    with workplace():
        pages = {page: true_page(page.read_text()) for page in PAGES}
    for page, text in pages.items():
        if page.read_text() != text:
            page.write_text(text)
            print(f"wrote {page.relative_to(ROOT)}")
