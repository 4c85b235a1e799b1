"""The law of imports, names and files, read from the source and from fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import restow
from moe import Model

ROOT = Path(restow.__file__).parent
TEXTS = {
    "restow" + "".join(f".{part}" for part in path.relative_to(ROOT).with_suffix("").parts): path.read_text()
    for path in sorted(ROOT.rglob("*.py"))
}
SOURCES = {name.removesuffix(".__init__"): text for name, text in TEXTS.items()}
PACKAGES = {name.removesuffix(".__init__") for name in TEXTS if name.endswith(".__init__")}
HEAVY = ("torch", "numpy")
FACES = {"restow.dcp", "restow.state_dict_mixin"}  # two lines each, over what lies in restow.torch


def inside(module: str) -> bool:
    """Whether a module may need torch."""
    return module == "restow.torch" or module.startswith("restow.torch.")


def imports(module: str, text: str, *, deferred: bool = False) -> Iterator[str]:
    """What a module imports when it is imported; with `deferred`, what its functions import later as well."""
    package = module if module in PACKAGES else module.rpartition(".")[0]

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not deferred:
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], base]
                ).strip(".")
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(text))


def graph(sources: Mapping[str, str], *, deferred: bool = False) -> dict[str, set[str]]:
    return {name: {to for to in imports(name, text, deferred=deferred) if to in sources and to != name}
            for name, text in sources.items()}  # fmt: skip


def cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """A cycle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for to in sorted(edges[name]):
            found = visit(to, [*trail, name])
            if found:
                return found
        done.add(name)
        return []

    for name in sorted(edges):
        if found := visit(name, []):
            return found
    return []


def test_no_module_imports_itself_through_others() -> None:
    assert cycle(graph(SOURCES)) == []
    assert cycle(graph(SOURCES, deferred=True)) == [], "an import inside a function hides a cycle"


def test_the_check_for_cycles_can_fail() -> None:
    made = {**SOURCES, "restow.errors": SOURCES["restow.errors"] + "\nfrom restow.layout import Layout\n"}
    assert cycle(graph(made))[0] == cycle(graph(made))[-1]
    hidden = SOURCES["restow.errors"] + "\ndef f():\n    import restow.layout\n"
    assert cycle(graph({**SOURCES, "restow.errors": hidden})) == []
    assert cycle(graph({**SOURCES, "restow.errors": hidden}, deferred=True))


def heavy(module: str, text: str) -> list[str]:
    return [name for name in imports(module, text) if name.split(".")[0] in HEAVY]


@pytest.mark.parametrize("module", [name for name in SOURCES if not inside(name)])
def test_only_restow_torch_needs_torch(module: str) -> None:
    found = heavy(module, SOURCES[module])
    assert found == []
    below = [name for name in imports(module, SOURCES[module]) if inside(name)]
    assert below == [] or module in FACES, "torch would come in through restow.torch"


def test_the_check_for_torch_can_fail() -> None:
    assert heavy("restow.plans", "import torch") == ["torch"]
    assert heavy("restow.plans", "try:\n    from numpy import array\nexcept ImportError:\n    pass") == [
        "numpy"
    ]
    assert heavy("restow.plans", "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch") == []
    assert list(imports("restow.torch.read", "from . import tiles\nfrom ..plans import Plan")) == [
        "restow.torch.tiles", "restow.plans",
    ]  # fmt: skip


def layers() -> dict[str, int]:
    """The longest way down from each module: what it imports lies lower."""
    edges, found = graph(SOURCES), {}

    def depth(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((depth(to) for to in edges[name]), default=-1)
        return found[name]

    return {name: depth(name) for name in SOURCES}


def test_the_core_lies_below_files_and_torch() -> None:
    """Layouts and moves know no files; plans know no tensors; nothing imports the package's face."""
    edges = graph(SOURCES)

    def below(name: str) -> set[str]:
        return {name}.union(*(below(to) for to in edges[name]))

    core = below("restow.moves") | below("restow.match") | below("restow.targets")
    assert core == {
        f"restow.{n}" for n in ("moves", "proof", "boxes", "layout", "notation", "errors", "match", "targets")
    }
    assert not any(inside(name) for name in below("restow.planning"))
    assert not any("restow" in to for to in edges.values()), "the package imports its parts, not they it"
    assert layers()["restow.errors"] == 0


def test_the_catalogue_holds_tables_only() -> None:
    tables = [name for name in SOURCES if name.startswith("restow.catalog")]
    assert len(tables) > 1
    for name in tables:
        kinds = {type(node).__name__ for node in ast.walk(ast.parse(SOURCES[name]))}
        code = {
            "FunctionDef",
            "AsyncFunctionDef",
            "ClassDef",
            "Lambda",
            "If",
            "IfExp",
            "For",
            "While",
            "ListComp",
        }
        assert not kinds & code, name


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


LOADED = "import sys; print(' '.join(n for n in ('torch', 'numpy', 'safetensors') if n in sys.modules))"


@pytest.mark.parametrize(
    "code",
    [
        "import restow",
        "import restow; restow.Layout.parse('in x f'); restow.layouts['split']; restow.errors.RestowError",
        "import restow; list(restow.families.items()); restow.Shard('e', 0, 2); dir(restow)",
        "import restow; restow.open(sys.argv[1]).layouts; restow.open(sys.argv[1]).problems",
        "import restow\ntry: restow.open('/nowhere/at/all')\nexcept restow.errors.RestowError: pass",
        "import restow; restow.Plan",
        "import restow.planning, restow.opening",
    ],
    ids=["import", "layouts", "families", "open", "open nothing", "Plan", "planning"],
)
def test_what_needs_no_torch_does_not_import_it(code: str, tmp_path: Path) -> None:
    Model().written(tmp_path)
    assert python(f"import sys; {code}\n{LOADED}", str(tmp_path)) == ""


def test_the_check_for_what_is_loaded_can_fail() -> None:
    assert python(f"import restow; restow.load\n{LOADED}") == "torch numpy"


def test_public_names_are_there() -> None:
    wanted = {
        "open", "plan", "load", "relayout", "Checkpoint", "Plan", "LoadReport", "Layout", "Family", "Shard",
        "layouts", "families", "errors",
    }  # fmt: skip
    assert wanted <= set(restow.__all__)
    for name in restow.__all__:
        assert getattr(restow, name) is not None
    assert {"split", "fused", "grouped", "stacked"} <= set(restow.layouts)
    assert "qwen3_moe" in restow.families
    assert set(restow.__all__) <= set(dir(restow))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError) as caught:
        restow.does_not_exist  # noqa: B018
    assert str(caught.value) == "module 'restow' has no attribute 'does_not_exist'"


def test_every_error_is_a_restow_error_and_travels() -> None:
    import pickle

    for name, kind in vars(restow.errors).items():
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert issubclass(kind, restow.errors.RestowError), name
            error = kind("this", "that", path="a", tensor="t", sections=[("also", ["x"])], hint="h", rank=3)
            again = pickle.loads(pickle.dumps(error))
            assert type(again) is kind
            assert str(again) == str(error)


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_short_ascii_and_finished(module: str) -> None:
    text = SOURCES[module]
    count = len(text.splitlines())
    assert text.isascii()
    assert count <= 500
    assert "TODO" not in text
    assert "FIXME" not in text
    assert ast.get_docstring(ast.parse(text)), "a module says what it is for"
    if count > 300:
        warnings.warn(f"{module} has {count} lines", LongModule, stacklevel=1)


class LongModule(UserWarning):
    """A module of more than 300 lines, which is worth a look and no error."""


pytestmark = pytest.mark.filterwarnings("default::test_architecture.LongModule")
