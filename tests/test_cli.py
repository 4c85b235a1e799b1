"""The command line: what it prints in full, its exit codes, its JSON, and what it imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard as Cut
from typer.testing import CliRunner

import moe
import restow
from moe import Model
from restow import terminal
from restow.cli import app
from restow.landing import Wish
from restow.planning import make_plan
from restow.ranks import goes_straight, rank_figures, rank_targets
from restow.terminal import Answer, Line
from restow.torch import read
from restow.torch.onerun import OneRun
from restow.torch.storage import runs_at
from restow.wanted import default_targets
from restow.wording import amount, runs_of

E7 = "model.layers.1.mlp.experts.7.gate_proj.weight"


def run(*words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return Model().written(tmp_path / "good")


def test_inspect_in_full(good: Path) -> None:
    code, out, err = run("inspect", good)
    assert (code, err) == (0, "")
    assert out.isascii()
    assert (
        out
        == f"""\
{good}: qwen3_moe, 53 tensors in 2 files, 6.62 kB
  sizes      e = 8  f = 6  d = 10  L = 2
  dtypes     BF16
  experts    2 modules in hf = split: model.layers.[0-1].mlp.experts
               in   {{e}}.{{p:gate|up}}_proj.weight  f d   32 tensors   BF16   3.84 kB
               out  {{e}}.down_proj.weight         d f   16 tensors   BF16   1.92 kB
  routers    2 tensors: model.layers.[0-1].mlp.gate.weight
               router mlp.gate.weight e d   BF16   320 B
  others     3 tensors, 540 B, BF16
  ignorable  none
  problems   none
"""
    )


def test_plan_in_full(good: Path) -> None:
    code, out, err = run("plan", good, "--ep", "4", "--ep-shard", "2")
    assert (code, err) == (0, "")
    *lines, planned = out.splitlines()
    assert planned.startswith("  planned    in 0.")
    assert planned.endswith(" s a rank; only headers were read")
    assert (
        "\n".join(lines) + "\n"
        == f"""\
{good}: qwen3_moe, 53 tensors, 6.62 kB, 5.76 kB of them experts
  from       hf = split: model.layers.[0-1].mlp.experts
               in   {{e}}.{{p:gate|up}}_proj.weight  f d
               out  {{e}}.down_proj.weight         d f
  into       grouped
               in   gate_and_up_projs  e d (p f)
               out  down_projs         e f d
  mesh       4 parts of e x 2 parts of the next dim; all other tensors whole on every rank

  rank       experts   reads    bytes   of all   straight   in tiles
  0 (0, 0)   0-1          14   2.2 kB   33.2 %      860 B    1.34 kB
  1 (0, 1)   0-1          17   2.2 kB   33.2 %      860 B    1.34 kB
  2 (1, 0)   2-3          17   2.2 kB   33.2 %      860 B    1.34 kB
  3 (1, 1)   2-3          17   2.2 kB   33.2 %      860 B    1.34 kB
  4 (2, 0)   4-5          17   2.2 kB   33.2 %      860 B    1.34 kB
  5 (2, 1)   4-5          17   2.2 kB   33.2 %      860 B    1.34 kB
  6 (3, 0)   6-7          17   2.2 kB   33.2 %      860 B    1.34 kB
  7 (3, 1)   6-7          14   2.2 kB   33.2 %      860 B    1.34 kB

  experts    5.76 kB in the files, read 1.86 times, gaps included, over 8 ranks
  in all     17.6 kB in 130 reads
  amplified  1.39 times what a rank needs, 2.65 times on a node of 8 ranks, 2.65 times over the file system
  order      grouped is not the files' order: its bytes pass through a tile in the cache on their way
  free       hf, fused, stacked, torchtitan, epfd, megatron, megatron_sequential, mlx
"""
    )


def test_a_plan_reads_each_expert_once(good: Path) -> None:
    code, out, _ = run("plan", good, "--ep", "3", "--json")
    assert code == 0
    data = json.loads(out)
    assert [rank["experts"] for rank in data["ranks"]] == [[0, 3], [3, 3], [6, 2]]
    assert data["totals"]["experts_read"] == data["totals"]["wanted"] == data["expert_bytes"] == 5760
    dense = data["bytes"] - data["expert_bytes"]
    for rank in data["ranks"]:
        assert rank["read"] == dense + 5760 * rank["experts"][1] // 8 == rank["straight"] + rank["tiled"]
    assert data["totals"]["read"] == 5760 + 3 * dense
    text = run("plan", good, "--ep", "3")[1]
    assert "5.76 kB in the files, each read once over 3 ranks" in text


def test_amplification_counts_what_ranks_read_again(good: Path) -> None:
    def times(*words: str) -> dict[str, float]:
        found = json.loads(run("plan", good, *words, "--json")[1])
        assert set(found["amplification"]) == {"ranks_per_node", "rank", "node", "file_system"}
        return {**found["amplification"], "bytes": found["bytes"], "experts": found["expert_bytes"]}

    alone = times()
    assert (alone["rank"], alone["node"], alone["file_system"]) == (1, 1, 1) and alone["ranks_per_node"] == 1
    eight = times("--ep", "8")
    again = (eight["experts"] + 8 * (eight["bytes"] - eight["experts"])) / eight["bytes"]
    assert eight["rank"] == 1 and eight["node"] == eight["file_system"] == pytest.approx(again)
    nodes = times("--ep", "8", "--per-node", "2")
    dense = nodes["bytes"] - nodes["experts"]
    part = nodes["experts"] / 4
    assert (
        nodes["node"] == pytest.approx((part + 2 * dense) / (part + dense)) and nodes["ranks_per_node"] == 2
    )
    assert nodes["file_system"] == eight["file_system"]


def test_more_ranks_than_experts(good: Path) -> None:
    code, out, _ = run("plan", good, "--ep", "40")
    assert code == 0
    assert "... 8 more ranks, 860 B to 860 B each" in out
    ranks = json.loads(run("plan", good, "--ep", "40", "--json")[1])["ranks"]
    assert [rank["experts"][1] for rank in ranks] == [1] * 8 + [0] * 32
    assert ranks[-1]["missing"] == []


@pytest.mark.parametrize("layout", ["grouped", "fused", "split", "epfd", "megatron"])
def test_a_layout_of_the_model(good: Path, layout: str) -> None:
    code, out, _ = run("plan", good, "--ep", "2", "--layout", layout, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["totals"]["experts_read"] == 5760
    assert data["totals"]["tiled"] == (5760 if layout == "grouped" else 0)


def test_a_layout_from_a_file(good: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("in  both  e (p f) d\nout  down  e d f\n")
    code, out, _ = run("plan", good, "--layout", f"@{rows}")
    assert code == 0
    assert f"  into       @{rows}\n               in   both  e (p f) d\n" in out
    assert "keeps the files' order: every byte is read into its place" in out
    rows.write_text("in  both  e (p f d\n")
    code, out, err = run("plan", good, "--layout", f"@{rows}")
    assert (code, out) == (1, "")
    assert err == (
        "restow.errors.NotationError: expected ')' after '(', found the end of the row\n"
        "  row       in  both  e (p f d\n"
        "                        ^^^^^^\n"
    )


def written(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    return moe.write(folder, tensors, {**Model().config, **config}, 2)


def without(*names: str) -> moe.Tensors:
    return {name: tensor for name, tensor in Model().spelled("split").items() if name not in names}


def unknown(at: Path) -> Path:
    return written(at, without(), model_type="made_up")


def lacking(at: Path) -> Path:
    return written(at, without(E7))


def misshaped(at: Path) -> Path:
    return written(at, {**without(), E7: torch.ones(6, 9, dtype=torch.bfloat16)})


def twofold(at: Path) -> Path:
    return written(at, {**without(), **Model().spelled("fused")})


BAD = {
    "unknown family": (unknown, "UnsupportedFamilyError", "made_up"),
    "missing expert": (lacking, "MissingTensorError", E7),
    "wrong shape": (misshaped, "ShapeMismatchError", E7),
    "two layouts": (twofold, "AmbiguousTensorError", "model.layers.0.mlp.experts"),
    "no such path": (lambda at: at, "MissingShardError", "no file"),
}


@pytest.mark.parametrize(("build", "error", "word"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("words", [["inspect"], ["plan", "--ep", "2"]], ids=["inspect", "plan"])
def test_bad_input_is_named(tmp_path: Path, words: list[str], build: Any, error: str, word: str) -> None:
    path = build(tmp_path / "bad")
    code, out, err = run(*words, path)
    assert code == 1
    assert f"restow.errors.{error}: expected " in out + err
    assert word in out + err
    assert "Traceback" not in out + err
    code, out, _ = run(*words, path, "--json")
    assert code == 1
    data = json.loads(out)
    assert error in str(data.get("error") or data["problems"])


def test_usage_exits_2(good: Path) -> None:
    for words in (
        ["plan", good, "--layout", "no_such_layout"],
        ["inspect", good, "--layout", "no_such_layout"],
        ["plan", good, "--layout", "@no/such/file"],
        ["plan", good, "--ep", "0"],
        ["plan"],
        ["inspect", good, "--no-such-option"],
        ["no_such_verb"],
        [],
    ):
        code, out, err = run(*words)
        assert code == 2, words
        assert not out or not words
        assert "Traceback" not in err
    err = run("plan", good, "--layout", "no_such_layout")[2]
    assert err.startswith(
        "restow.errors.UsageError: expected a layout name, one of hf, split, fused, grouped, "
    )
    assert err.endswith(", found 'no_such_layout'\n")


def test_inspect_needs_no_config(tmp_path: Path) -> None:
    save_file(Model().spelled("split"), tmp_path / "model.safetensors")
    code, out, _ = run("inspect", tmp_path / "model.safetensors")
    assert code == 0
    assert "unknown family, 53 tensors in 1 file" in out
    told = "restow.errors.ConfigError: expected config.json, which names the model family, found none"
    assert f"  problems   0 fatal, 1 other\n    warning  {told}" in out
    code, out, _ = run("inspect", tmp_path / "model.safetensors", "--json")
    assert (code, [p["fatal"] for p in json.loads(out)["problems"]]) == (0, [False])
    assert run("inspect", tmp_path / "model.safetensors", "--strict")[0] == 1
    code, _, err = run("plan", tmp_path / "model.safetensors")
    assert code == 1
    assert err.startswith("restow.errors.ConfigError: ")
    assert run("plan", tmp_path / "model.safetensors", "--family", "qwen3_moe")[0] == 0
    assert run("inspect", tmp_path / "model.safetensors", "--layout", "split")[0] == 0
    assert run("plan", tmp_path / "model.safetensors", "--family", "made_up")[0] == 1


def test_strict_refuses_warnings(good: Path) -> None:
    index = good / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    index.write_text(json.dumps({**body, "metadata": {"total_size": 1}}))
    code, out, _ = run("inspect", good)
    assert code == 0
    assert "  problems   0 fatal, 1 other\n    warning  restow.errors.IndexMismatchError: expected " in out
    assert run("inspect", good, "--strict")[0] == 1
    assert run("plan", good)[0] == 0
    code, out, err = run("plan", good, "--strict")
    assert (code, out) == (1, "")
    assert err.startswith("restow.errors.IndexMismatchError: expected ")


def test_json_is_one_document(good: Path) -> None:
    data = json.loads(run("inspect", good, "--json")[1])
    assert data["family"] == "qwen3_moe"
    assert data["sizes"] == {"e": 8, "f": 6, "d": 10, "L": 2}
    assert (data["tensors"], data["bytes"], data["files"]) == (53, 6620, 2)
    assert data["experts"][0]["modules"] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert data["experts"][0]["rows"][0]["row"].split() == ["in", "{e}.{p:gate|up}_proj.weight", "f", "d"]
    error = json.loads(run("plan", good, "--layout", "nothing", "--json")[1])["error"]
    assert error["class"] == "restow.errors.UsageError"
    assert error["found"] == "'nothing'"


def test_json_of_a_verification_holds_its_findings(good: Path) -> None:
    """NaN among the values, and an index of another size: JSON has no NaN, and no exceptions."""
    state = load_file(good / "model-00002-of-00002.safetensors")
    name = next(iter(state))
    state[name].view(-1)[0] = float("nan")
    save_file(state, good / "model-00002-of-00002.safetensors", {"format": "pt"})
    index = good / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": {"total_size": 1}}))

    def no_number(text: str) -> None:
        raise AssertionError(text)

    code, out, _ = run("verify", good, "--json")
    data = json.loads(out, parse_constant=no_number)
    found = {p["class"]: (p["fatal"], p.get("tensor")) for p in data["problems"]}
    assert code == 0
    assert found["restow.errors.NonFiniteError"] == (False, name)
    assert found["restow.errors.IndexMismatchError"][0] is False
    code, out, _ = run("verify", Model().written(good.parent / "other"), good, "--json")
    (difference,) = json.loads(out, parse_constant=no_number)["differences"]
    assert code == 4
    assert "nan" in difference["values"]
    assert difference["max_abs"] in ("nan", "inf")


def test_debug_shows_a_traceback(good: Path) -> None:
    code, out, err = run("plan", good, "--layout", "nothing", "--debug")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback (most recent call last):\n")


def process(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, **options)


def test_both_commands_are_the_same(good: Path) -> None:
    script = Path(sys.executable).parent / "restow"
    one, two = process(script, "inspect", good), process(sys.executable, "-m", "restow", "inspect", good)
    assert (one.returncode, one.stdout, one.stderr) == (two.returncode, two.stdout, two.stderr)
    assert one.returncode == 0
    assert process(script, "--version").stdout == f"{restow.__version__}\n"


LOADED = """
import sys
from restow.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(*(n for n in ("torch", "numpy", "safetensors", "rich") if n in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["inspect"], ["plan", "--ep", "4"]], ids=["inspect", "plan"])
def test_looking_imports_neither_torch_nor_numpy_nor_rich(good: Path, words: list[str]) -> None:
    done = process(sys.executable, "-c", LOADED, *words, good)
    assert done.returncode == 0
    assert done.stderr.strip() == ""


def test_the_check_of_imports_can_fail() -> None:
    assert process(sys.executable, "-c", "import numpy\n" + LOADED, "--version").stderr.split() == ["numpy"]


@pytest.mark.parametrize("option", [[], ["--json"]], ids=["text", "json"])
def test_a_full_device_exits_3(good: Path, option: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "restow", "inspect", str(good), *option]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "OSError: [Errno 28] No space left on device\n"


def test_a_reader_that_had_enough_is_no_failure(good: Path) -> None:
    ends = os.pipe()
    os.close(ends[0])
    command = [sys.executable, "-m", "restow", "inspect", str(good)]
    done = subprocess.run(command, stdout=ends[1], stderr=subprocess.PIPE, text=True, check=False)
    os.close(ends[1])
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
    ids=lambda n: str(n),
)
def test_a_signal_cleans_up_and_has_its_code(tmp_path: Path, number: signal.Signals, code: int) -> None:
    here = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "restow", "demo"]
    with subprocess.Popen(
        command, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert list(tmp_path.iterdir())
        time.sleep(0.2)
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_comes_before_signals_wait_does_not_leave_them_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = signal.pthread_sigmask
    before = real(signal.SIG_BLOCK, ())

    def mask(how: int, numbers: Iterable[int]) -> Any:
        """Handlers of what had come run at the end of the call, whatever it does."""
        found = real(how, numbers)
        if how == signal.SIG_BLOCK and numbers:
            raise terminal.Signalled(signal.SIGTERM)
        return found

    monkeypatch.setattr(signal, "pthread_sigmask", mask)
    try:
        with pytest.raises(terminal.Signalled), terminal.held():
            pytest.fail("it was raised before")
        assert real(signal.SIG_BLOCK, ()) == before
    finally:
        real(signal.SIG_SETMASK, before)


def test_exit_codes_by_error() -> None:
    class Full(restow.errors.DestinationError):
        pass

    refused = restow.errors
    codes = {
        refused.MissingTensorError("a", "b"): 1,
        refused.UsageError("a", "b"): 2,
        Full("a", "b"): 3,
        OSError(28, "full"): 3,
        MemoryError(): 3,
        KeyboardInterrupt(): 130,
        terminal.Signalled(15): 143,
    }
    assert [terminal.code_of(error) for error in codes] == list(codes.values())
    assert terminal.failure_text(MemoryError()) == "MemoryError"
    assert terminal.failure_text(restow.errors.UsageError("\xe4", "b")).isascii()


def test_what_was_noted_with_an_error_is_shown() -> None:
    error = restow.errors.UsageError("a", "b")
    error.add_note("removed \xe4")
    assert terminal.failure_text(error) == "restow.errors.UsageError: expected a, found b\nremoved \\xe4"
    assert terminal.failure(error) == {
        "class": "restow.errors.UsageError", "text": "expected a, found b", "expected": "a", "found": "b",
        "notes": ["removed \xe4"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        ),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_what_means_too_little_memory_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:  # X12
    def verb() -> terminal.Answer:
        raise error

    assert terminal.run(verb) == 3
    assert capsys.readouterr().err == f"MemoryError: {error}\n"


def test_other_errors_of_python_are_defects() -> None:
    def verb() -> terminal.Answer:
        raise ImportError("No module named 'made_up'")

    with pytest.raises(ImportError):
        terminal.run(verb)


def test_a_terminal_gets_colour_and_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    def shown() -> str:
        parent, child = pty.openpty()
        with os.fdopen(child, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            terminal._rich.cache_clear()
            terminal.say(Line("  a [b] {e} " + "x" * 200, "bad"))
            stream.flush()
            monkeypatch.undo()
            return os.read(parent, 4096).decode()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown()
    assert "\x1b[31m" in text
    assert "a [b] {e} " + "x" * 200 in text, "neither wrapped nor read as markup"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == "  a [b] {e} " + "x" * 200 + "\r\n"


def test_verbs_are_those_of_the_design() -> None:
    names = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {"inspect", "plan", "demo"} <= names
    assert names <= {"inspect", "plan", "convert", "verify", "lora", "merge", "demo", "families", "layouts"}


def test_lines_that_come_late_are_closed_early() -> None:
    seen = []

    def lines() -> Any:
        try:
            yield Line("one")
            raise OSError(5, "bad disk")
        finally:
            seen.append("closed")

    assert terminal.run(lambda: Answer({}, lines())) == 3
    assert seen == ["closed"]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (3, 2), (8, 4), (16, 3)], ids=str)
def test_a_rank_holds_what_a_dtensor_would(good: Path, mesh: tuple[int, int]) -> None:
    opened = restow.open(good)
    for place in product(*map(range, mesh)):
        for target in rank_targets(opened, "grouped", mesh, place):
            cuts = [Cut(0), Cut(1)] if ".experts." in target.name else []
            wanted = runs_at(target.name, cuts, mesh[: len(cuts)], place[: len(cuts)], target.shape)
            assert target.runs == wanted, (target.name, place)


class Spied:
    """Which way the executor took for each read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ways: set[tuple[str, int]] = set()
        for way in ("_straight", "_tiled"):
            monkeypatch.setattr(read._Worker, way, self.spy(way, getattr(read._Worker, way)))
        rows = read._Worker._whole_rows

        def whole_rows(worker: Any, job: Any) -> int:
            done = rows(worker, job)
            for copy in (*job.copies, *job.beside) if done else ():
                self.ways.add(("_tiled", worker._plan.parts[copy.source].begin + 2 * copy.at))
            return done

        monkeypatch.setattr(read._Worker, "_whole_rows", whole_rows)
        places = OneRun.places

        def straight(run: OneRun, *job: Any) -> tuple[int, memoryview]:
            found = places(run, *job)
            self.ways.add(("_straight", found[0]))
            return found

        monkeypatch.setattr(OneRun, "places", straight)

    def spy(self, way: str, method: Any) -> Any:
        def called(worker: Any, source: Any, *rest: Any) -> Any:
            self.ways.add((way, next(one for one in rest if isinstance(one, int))))  # the first byte
            return method(worker, source, *rest)

        return called


@pytest.mark.parametrize("layout", ["grouped", "fused", "split", "epfd", "mlx", "fused_in_major"])
@pytest.mark.parametrize("source", ["split", "fused", "grouped"])
def test_straight_means_what_the_executor_does(
    tmp_path: Path, source: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spied = Spied(monkeypatch)
    big = Model(e=2, f=48, d=80, layers=1)
    opened = restow.open(big.written(tmp_path, source, files=1))
    made = make_plan(opened, default_targets(opened, layout, Wish(layout)), Wish(layout))
    into = {t.name: torch.empty(t.shape, dtype=torch.bfloat16) for t in made.targets}
    read.run_plan(made, into, root=opened.path, threads=1)
    said = set()
    for batch in made.batches():
        part = made.parts[batch[0].source]
        said.add(("_straight" if goes_straight(made, batch) else "_tiled", part.begin + 2 * batch[0].at))
    assert spied.ways == said


def test_the_figures_are_the_plans(good: Path) -> None:
    opened = restow.open(good)
    figures = rank_figures(opened, "grouped", ep=4, rank=1)
    into = [restow.Shard("e", 1, 4)]
    assert figures.read == restow.plan(good, shard=into[0]).bytes
    assert figures.reads == len(restow.plan(good, shard=into[0]).reads)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a.0.b", "a.1.b", "a.2.b", "a.5.b"], ["a.[0-2,5].b"]),
        (["a.0.1", "a.0.2", "a.3.1", "a.3.2"], ["a.[0,3].[1-2]"]),
        (["a.0.1", "a.3.2"], ["a.[0,3].[1-2] (2 of these)"]),
        (["a.b", "a.07.b"], ["a.b", "a.07.b"]),
        (["a\x1b.1"], ["a\\x1b.1"]),
        ([], []),
    ],
)
def test_names_in_short(names: list[str], text: list[str]) -> None:
    assert runs_of(names) == text


def test_amounts() -> None:
    sizes = (0, 999, 1000, 61064245248, 999_600, 5 * 10**15)
    assert [amount(n) for n in sizes] == ["0 B", "999 B", "1 kB", "61.1 GB", "1 MB", "5e+03 TB"]


def test_families_are_listed_and_shown() -> None:
    code, out, _ = run("families")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split("  ")[0] == "model type"
    assert [line.split()[0] for line in lines[1:]] == sorted(restow.families)
    code, out, _ = run("families", "--json")
    assert [f["model_type"] for f in json.loads(out)["families"]] == sorted(restow.families)
    code, out, _ = run("families", "zaya")
    assert code == 0
    assert out == (
        "zaya\n"
        "  sizes      e = num_experts|num_local_experts; f = moe_intermediate_size; d = hidden_size;"
        " e@router = num_experts + 1; r = router_hidden_size; L = num_hidden_layers\n"
        "  spelling   hf = fused, below mlp.experts\n"
        "               in   gate_up_proj  e (p f) d\n"
        "               out  down_proj     e d f\n"
        "  router     router mlp.gate.router_mlp.out_proj.weight e r\n"
        "  router     router.bias mlp.gate.balancing_biases e exact\n"
        "  ignorable  *.rotary_emb.inv_freq\n"
        "  required   model.embed_tokens.weight model.norm.weight ?lm_head.weight\n"
    )


def test_an_unknown_family_is_a_usage_error_with_near_names() -> None:
    code, out, err = run("families", "qwen3_5_mo")
    assert (code, out) == (2, "")
    assert "qwen3_5_moe" in err


def test_layouts_are_listed_as_a_family_means_them() -> None:
    code, out, _ = run("layouts", "--json")
    assert code == 0
    assert json.loads(out)["layouts"]["grouped"] == ["in gate_and_up_projs e d (p f)", "out down_projs e f d"]
    code, out, _ = run("layouts", "--family", "gpt_oss")
    assert code == 0
    assert "in gate_and_up_projs e d (f p)" in [" ".join(line.split()) for line in out.splitlines()]
    for wrong in (("layouts", "--family", "nope"), ("families", "nope")):
        code, out, err = run(*wrong)
        assert (code, out) == (2, "")
        assert err == (
            "restow.errors.UsageError: expected a model type of the catalogue, found 'nope'\n"
            "  try       restow families lists them; docs/adding-a-family.md says how to add one\n"
        )
