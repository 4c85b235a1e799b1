"""What a verb of the command line hands back, how it is shown, and which exit code a failure has.

An `Answer` is one value with two faces: `data` for `--json`, `lines` for people. Text is plain ASCII and
never cut or wrapped; on a terminal, and only there, rich colours it. It rejects nothing, and knows no tensors
or layouts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TextIO

from restow.errors import DestinationError, RestowError, UsageError
from restow.problems import Problem

DONE, BAD_INPUT, USAGE, MACHINE, DIFFERENT, PIPE = 0, 1, 2, 3, 4, 128 + 13


class Line(NamedTuple):
    """A line of text and what it is: "", "head", "good", "warn" or "bad"."""

    text: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verb says, and its exit code.

    `lines` may come one by one, as the work is done; `data` is complete once they all came.
    """

    data: Mapping[str, Any]
    lines: Iterable[Line] = field(default=())
    code: int = DONE


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signalled(BaseException):
    """SIGINT, SIGTERM or SIGHUP, as an exception: so that what was begun is cleaned up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def signals() -> Iterator[None]:
    """Inside, each of `STOPS` raises `Signalled`; one that was ignored (nohup) stays so."""

    def raise_it(number: int, frame: object) -> None:
        raise Signalled(number)

    caught = [s for s in STOPS if signal.getsignal(s) != signal.SIG_IGN]
    before = {number: signal.signal(number, raise_it) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Inside, `STOPS` wait. For imports of torch: while it imports numpy it drops whatever is raised, and goes on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # which raises what came just before
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(verb: Callable[[], Answer], *, as_json: bool = False, debug: bool = False) -> int:
    """Do `verb`, show its answer, give the exit code. Failures on purpose are shown; others are defects."""
    try:
        answer = _out_of_memory(verb)
        _tell(answer.lines, quiet=as_json)
        if as_json:
            show_json(answer.data)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader had enough (`| head`): nothing to tell, and nobody to tell it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except (RestowError, OSError, MemoryError, KeyboardInterrupt, Signalled) as error:
        if debug:
            traceback.print_exc()
        elif not isinstance(error, KeyboardInterrupt | Signalled):
            print(failure_text(error), file=sys.stderr)
        if as_json and isinstance(error, Exception):
            with suppress(OSError):  # stdout may be what failed
                show_json({"error": failure(error)})
        return code_of(error)
    return answer.code


_NO_MEMORY = (
    "allocate memory",
    "can't start new thread",
    "failed to map segment",
)  # torch's, Python's, the loader's


def _out_of_memory(verb: Callable[[], Answer]) -> Answer:
    """What `verb` answers; failures to get memory that only their text tells from others, as what they are."""
    try:
        return verb()
    except (RuntimeError, ImportError) as error:
        if not any(text in str(error) for text in _NO_MEMORY):
            raise
        raise MemoryError(str(error).strip().splitlines()[0]) from error


def _tell(lines: Iterable[Line], *, quiet: bool) -> None:
    try:
        for line in lines:
            if not quiet:
                say(line)
    finally:
        if isinstance(lines, Generator):
            lines.close()  # now, not when it is collected: what it began is cleaned up on the way out


def code_of(error: BaseException) -> int:
    """The exit code of a failure: 1 input, 2 usage, 3 the destination or the machine, 128 + n a signal."""
    if isinstance(error, Signalled):
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, UsageError):
        return USAGE
    return MACHINE if isinstance(error, DestinationError | OSError | MemoryError) else BAD_INPUT


def failure_text(error: BaseException) -> str:
    """`restow.errors.Class: text` and its notes, as Python itself would end a traceback, in ASCII."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = f"{name}: {error}" if str(error) else name
    return "\n".join([text, *notes_of(error)]).encode("ascii", "backslashreplace").decode()


def notes_of(error: BaseException) -> tuple[str, ...]:
    """What was noted with an error on its way: what was swept, kept, or could not be tidied up."""
    return tuple(getattr(error, "__notes__", ()))


def failure(error: BaseException) -> dict[str, Any]:
    """A failure as plain values."""
    known = {n: getattr(error, n, None) for n in ("expected", "found", "tensor", "path", "hint", "rank")}
    kind = failure_text(error).partition(":")[0]
    facts = {"class": kind, "text": str(error), **{n: v for n, v in known.items() if v not in (None, "")}}
    return {**facts, "notes": list(notes)} if (notes := notes_of(error)) else facts


def finding(problem: Problem) -> dict[str, Any]:
    """A finding about a checkpoint as plain values."""
    return {"fatal": problem.fatal, **failure(problem.error)}


def show_json(data: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def say(line: Line) -> None:
    """One line on stdout; what the stream cannot spell, of a path that was typed, is escaped."""
    code = sys.stdout.encoding or "ascii"
    line = line._replace(text=line.text.encode(code, "backslashreplace").decode(code))
    if _coloured(sys.stdout):
        console, text = _rich()
        console.print(text(line.text, style=_STYLES.get(line.kind, "")), soft_wrap=True)
    else:
        sys.stdout.write(line.text + "\n")
        sys.stdout.flush()


_STYLES = {"head": "bold", "good": "green", "warn": "yellow", "bad": "red"}


def _coloured(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


@cache
def _rich() -> tuple[Any, Any]:
    from rich.console import Console  # 60 ms that a pipe need not pay
    from rich.text import Text

    return Console(highlight=False), Text
