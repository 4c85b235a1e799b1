"""The command line, `restow` and `python -m restow`: options in, one `Answer` out. Each verb is a few lines.

Options (those that verbs share are in `options`) are judged here and nothing else is: a verb calls the library and
renders what it gave. Exit codes are those of `terminal`. Imports stand inside the verbs, so that `inspect` needs
neither torch nor numpy; signals wait for those of torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from restow.errors import UsageError
from restow.options import (
    DebugOption,
    FacesOption,
    FamilyOption,
    JsonOption,
    LayoutOption,
    OrderOption,
    OuterOption,
    PathArgument,
    ReplaceOption,
    SourceArgument,
    StrictOption,
    TargetArgument,
    ThreadsOption,
    dtype_option,
    experts_option,
    layout_option,
)
from restow.terminal import Answer, Signalled, code_of, held, run, signals

if TYPE_CHECKING:
    from restow.adapter_base import Base
    from restow.adapter_orient import Options

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Re-stow the weights of Mixture-of-Experts models between checkpoint layouts and memory layouts.",
)


def verb(function: Callable[..., Answer]) -> Callable[..., None]:
    """A function that answers as a command: its answer is shown, its failures become exit codes."""

    @functools.wraps(function)
    def command(**options: Any) -> None:
        shown = {"as_json": options.get("json_", False), "debug": options.pop("debug", False)}
        raise typer.Exit(run(lambda: function(**options), **shown))

    app.command(name=function.__name__)(command)
    return command


@verb
def inspect(
    path: PathArgument,
    layout: LayoutOption = None,
    family: FamilyOption = None,
    strict: StrictOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Show what a checkpoint holds: family, sizes, experts and their layouts, problems."""
    from restow.explain import inspection
    from restow.opening import open_checkpoint

    return inspection(open_checkpoint(path, layout=layout_option(layout), family=family), strict=strict)


@verb
def plan(
    path: PathArgument,
    ep: Annotated[int, typer.Option(min=1, max=1 << 20, help="Parts of the experts.")] = 1,
    ep_shard: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Parts of the next dim of every expert tensor.")
    ] = 1,
    per_node: Annotated[int, typer.Option(min=1, max=1 << 20, help="Ranks of one machine.")] = 8,
    layout: LayoutOption = None,
    family: FamilyOption = None,
    strict: StrictOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Show what every rank of an expert-parallel mesh would read; the layout is the model's (grouped)."""
    from restow.explain_plan import rank_plans
    from restow.landing import layout_of
    from restow.opening import open_checkpoint
    from restow.prepare import refuse
    from restow.ranks import free_layouts, node_figures

    opened = open_checkpoint(path, family=family)
    refuse(opened, strict)
    wanted = layout_option(layout) or "grouped"
    to = layout_of(wanted, opened.family)
    assert to is not None
    every = range(ep * ep_shard)
    nodes = [
        node_figures(opened, to, ep=ep, ep_shard=ep_shard, ranks=every[first : first + per_node])
        for first in every[::per_node]
    ]
    name = wanted if isinstance(wanted, str) else str(layout)
    return rank_plans(opened, to, name, nodes, (ep, ep_shard), free_layouts(opened))


@verb
def convert(
    source: SourceArgument,
    target: TargetArgument,
    to: Annotated[str, typer.Option(metavar="LAYOUT|@FILE", help="A layout, hf (the vendor's) or source.")],
    keep_experts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Expert numbers to keep, in this order (JSON).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="bf16, f16 or f32 for weights.")] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="NAME", help="Encode the experts: fp8, mxfp4, mxfp8 or nf4.")
    ] = None,
    keep_quantized: Annotated[
        bool, typer.Option("--keep-quantized", help="Carry codes and scales as they are.")
    ] = False,
    max_shard_bytes: Annotated[int, typer.Option(min=1, help="Bytes of data in one file.")] = 5 * 2**30,
    sha256: Annotated[bool, typer.Option("--sha256", help="Record the SHA-256 of every file.")] = False,
    layout: LayoutOption = None,
    family: FamilyOption = None,
    threads: ThreadsOption = None,
    replace: ReplaceOption = False,
    strict: StrictOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Write a checkpoint in another layout; checked before, published at once, undone with --to source."""
    from restow.answers import converted
    from restow.encodings import encoding_of
    from restow.landing import layout_of
    from restow.opening import open_checkpoint
    from restow.prepare import refuse

    opened = open_checkpoint(source, layout=layout_option(layout), family=family)
    wanted = layout_option(to)
    assert wanted is not None
    if wanted not in ("hf", "source"):
        layout_of(wanted, opened.family)  # an unknown name ends here, before torch is imported
    if quantize is not None:
        encoding_of(quantize)
    refuse(opened, strict)  # and so does a bad input
    with held():
        from restow.torch.convert import convert as do

    report = do(
        opened, target, to=wanted, experts=experts_option(keep_experts), dtype=dtype_option(dtype), quantize=quantize,
        keep_quantized=keep_quantized, max_shard_bytes=max_shard_bytes, threads=threads, replace=replace, sha256=sha256,
        strict=strict, progress=not json_ and sys.stderr.isatty(),
    )  # fmt: skip
    return converted(report, source, like=keep_experts is None and not report.narrowed)


@verb
def verify(
    a: SourceArgument,
    b: Annotated[str | None, typer.Argument(metavar="B", help="What should hold the same weights.")] = None,
    experts_only: Annotated[bool, typer.Option("--experts-only", help="Compare the experts alone.")] = False,
    sample: Annotated[
        float | None, typer.Option(metavar="PART", help="Compare a part of the leaves: 0.05.")
    ] = None,
    layout: LayoutOption = None,
    family: FamilyOption = None,
    threads: ThreadsOption = None,
    strict: StrictOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Compare two checkpoints expert by expert, whatever their layouts; or one with its manifest."""
    from restow.answers import verified
    from restow.judge import undecodable
    from restow.opening import open_checkpoint
    from restow.prepare import refuse
    from restow.problems import merged

    sides = [open_checkpoint(p, layout=layout_option(layout), family=family) for p in (a, b) if p is not None]
    if b is None and sides[0].family is not None:  # all of it before torch is imported
        refuse(sides[0], strict)
    for side in sides if b is not None else ():
        if errors := [problem.error for problem in side.problems] if strict else undecodable(side):
            raise merged(errors)
    with held():
        from restow.torch.verify import verify as do

    return verified(do(*sides, experts_only=experts_only, sample=sample, threads=threads, strict=strict))


@verb
def lora(
    source: Annotated[str, typer.Argument(metavar="SRC", help="An adapter's folder.")],
    target: Annotated[
        str | None, typer.Argument(metavar="DST", help="A folder that does not exist yet.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="peft, grouped, vllm, sglang, ...; ? lists all.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="The base model's folder; its config is enough.")
    ] = None,
    family: FamilyOption = None,
    faces: FacesOption = None,
    outer: OuterOption = "out",
    expert_major: OrderOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Does the installed PEFT do what DST (or SRC) means?")
    ] = False,
    replace: ReplaceOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Write an adapter in another format; with --check see in PEFT whether it does what was trained."""
    from restow.adapter_formats import judge_name
    from restow.adapter_open import judge_adapter
    from restow.adapter_orient import Options
    from restow.answers import adapted

    if to is not None:
        judge_name(to, checkable=check)  # an unknown name ends here, before torch is imported
    if check and base is None:
        raise UsageError("--base with --check, since PEFT needs a model to load it into", "none")
    if (target is None or to is None) and not (check and target is None and to is None):
        given = "--to alone" if to is not None else "DST alone" if target is not None else "neither"
        raise UsageError("DST and --to FORMAT, or --check with --base", given)
    options = Options(faces, outer, expert_major)
    known = judge_adapter(source, base, family, options)  # and so does a bad input
    if target is None or to is None:
        return _checked(source, known, family, options)
    with held():
        from restow.torch.adapter_convert import convert as do

    done = adapted(do(source, target, to=to, base=known, family=family, faces=faces, outer=outer,
                      expert_major=expert_major, replace=replace))  # fmt: skip
    if not check:
        return done
    said = _checked(target, known, family, Options())
    return Answer({**done.data, "check": said.data}, [*done.lines, *said.lines], said.code)


def _checked(folder: str, base: Base, family: str | None, options: Options) -> Answer:
    """What the installed PEFT makes of an adapter."""
    from restow.answers import checked

    with held():
        from restow.torch.adapter_check import check

    faces, outer, expert_major = options
    return checked(check(folder, base, family=family, faces=faces, outer=outer, expert_major=expert_major))


@verb
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model's folder.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")],
    target: TargetArgument,
    family: FamilyOption = None,
    faces: FacesOption = None,
    outer: OuterOption = "out",
    expert_major: OrderOption = None,
    replace: ReplaceOption = False,
    strict: StrictOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Write a base plus an adapter's deltas, in the base's own layout, files and precision."""
    from restow.adapter_open import judge_adapter
    from restow.adapter_orient import Options
    from restow.answers import adapted
    from restow.opening import open_checkpoint
    from restow.prepare import refuse

    opened = open_checkpoint(base, family=family)
    refuse(opened, strict)  # before torch is imported
    judge_adapter(adapter, opened, family, Options(faces, outer, expert_major))
    with held():
        from restow.torch.adapter_merge import merge as do

    return adapted(do(opened, adapter, target, family=family, faces=faces, outer=outer, expert_major=expert_major,
                      replace=replace, strict=strict))  # fmt: skip


@verb
def families(
    model_type: Annotated[
        str | None, typer.Argument(metavar="[MODEL_TYPE]", help="One of them, in full.")
    ] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """List the model families that restow knows, or show one with all its rows."""
    from restow.listing import families_answer

    return families_answer(model_type)


@verb
def layouts(
    family: FamilyOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """List the named layouts and their rows, or what each name means in a family."""
    from restow.listing import layouts_answer

    return layouts_answer(family)


@verb
def demo(
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the checkpoint and what was loaded here.")
    ] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Make a small checkpoint, load it whole and on two ranks, check every value, and show one refusal."""
    with held():
        from restow.torch.demo import demonstrate

    return demonstrate(keep)


@app.callback(invoke_without_command=True)
def program(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    if version:
        from restow import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """The command `restow`."""
    try:
        with signals():
            app(prog_name="restow")
    except Signalled as error:  # before a verb began, or after it ended
        sys.exit(code_of(error))
