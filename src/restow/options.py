"""The options that several verbs of the command line share, and what the text of one stands for.

Rejected, as `UsageError`: a file that holds no rows or no expert numbers, a dtype that is none of three.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from restow.errors import UsageError
from restow.terminal import held

if TYPE_CHECKING:
    from restow.layout import Layout

PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="A checkpoint's folder, or one safetensors file.")
]
SourceArgument = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint's folder or file.")]
TargetArgument = Annotated[str, typer.Argument(metavar="DST", help="A folder that does not exist yet.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=256, help="Reading threads.")]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Replace what restow wrote there before.")]
FacesOption = Annotated[
    Literal["input", "output"] | None, typer.Option(help="Which side lora_A of fused tensors faces.")
]
OuterOption = Annotated[
    Literal["out", "in"], typer.Option(help="The projection that was registered last: out is down.")
]
OrderOption = Annotated[
    bool | None, typer.Option("--expert-major/--rank-major", help="How lora_B was folded.")
]
LayoutOption = Annotated[
    str | None, typer.Option(metavar="NAME|@FILE", help="A layout's name, or a file with its rows.")
]
FamilyOption = Annotated[
    str | None, typer.Option(metavar="MODEL_TYPE", help="The family, where config.json does not say it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse what would only be a warning.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]


def layout_option(text: str | None) -> str | Layout | None:
    """A layout's name as it is; `@file` as the layout that the file holds."""
    if text is None or not text.startswith("@"):
        return text
    from restow.layout import Layout

    try:
        return Layout.parse(Path(text[1:]).read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else "text that is not ASCII"
        raise UsageError("a file with a layout's rows after '@'", f"{what}", path=text[1:]) from error


def experts_option(file: Path | None) -> list[int] | dict[str, list[int]] | None:
    """Expert numbers from a JSON file: a list for all experts modules, or an object of lists by module path."""
    if file is None:
        return None
    import json

    try:
        numbers = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError("a JSON file with expert numbers", str(error), path=file) from error
    lists = list(numbers.values()) if isinstance(numbers, dict) else [numbers]
    if not all(isinstance(one, list) and all(type(n) is int for n in one) for one in lists):
        raise UsageError("a list of expert numbers, or lists by module path", "something else", path=file)
    return numbers  # type: ignore[no-any-return]


def dtype_option(name: str | None) -> Any:
    """A torch dtype by its short name."""
    if name is None:
        return None
    words = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    if name not in words:
        raise UsageError(f"a dtype, one of {', '.join(words)}", f"'{name}'")
    with held():
        import torch

    return getattr(torch, words[name])
