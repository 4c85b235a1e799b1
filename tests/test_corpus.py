"""Every bad input through every door: open, plan, load, convert, verify and the command line; and the good ones.

A case says which error is wanted and whether it is fatal. A fatal one is raised by whoever needs what it concerns, and
then nothing is written; another is told, and refused under `strict`. Only a digest or a second copy shows the hidden
ones. `test_the_count` counts which case is told by which door.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import corpus_quant
import corpus_tensors  # noqa: F401  its cases come into the table
import corpus_values
import restow
from corpus import CASES, Case, says
from corpus_bytes import CONFIG, good, write
from faults import tree
from restow import errors
from restow.cli import app
from restow.errors import RestowError
from restow.folder import open_folder

LEVELS = {"F": 39, "I": 21, "T": 24, "C": 12, "Q": 13, "L": 10, "P": 1, "R": 7}  # 127 bad inputs
CONTROLS = ["I06", "G00", "G01", "G02", "G03", "G04", "G05", "G06", "G07", "G09"]  # and G08, an adapter
DATA = {**{n: (e, h, False) for n, (e, h) in corpus_values.ODD.items()}, **corpus_quant.BY_DATA}
# config.json is not needed to look at files, nor to check them by themselves.
NO_CONFIG = {"C01_no_config", "C02_config_not_json", "C03_unknown_family", "C09_remote_code"}
# What the files alone cannot tell: the one who knows the tensor's whole shape is the one who loads it.
BY_SHAPE = {"R02_last_rank_missing"}
BAD = [c for c in CASES.values() if (c.error is not None or c.id in DATA) and c.id not in BY_SHAPE]
GOOD = [
    c for c in CASES.values() if c.error is None and c.id not in DATA and c.id not in corpus_values.HIDDEN
]
CODED = {"G06_fp8", "Q16_attention_in_fp8"}


class Timeout(BaseException):
    """A case that hangs."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Timeout(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with limit(180):
        yield


def built(case: Case, folder: Path) -> Path:
    """The case's input, in a folder of its own."""
    return case.build(folder / case.id) or folder / case.id


def wanted(case: Case) -> tuple[type[RestowError], tuple[str, ...], bool]:
    """The error that is wanted, the words that it holds, and whether it is fatal."""
    if case.id in DATA:
        return DATA[case.id]
    assert case.error is not None
    return case.error, case.holds, case.fatal


def model(root: Path, extra: Path | None = None) -> dict[str, torch.Tensor]:
    """What the config of a checkpoint describes, painted; the good model's where the config cannot say it."""
    config = dict(CONFIG)
    try:
        found = json.loads((root / "config.json").read_text())
        for key in ("num_experts", "num_hidden_layers", "hidden_size"):
            if type(found.get(key)) is int and 0 < found[key] < 100:
                config[key] = found[key]
        config["tie_word_embeddings"] = found.get("tie_word_embeddings", False)
    except (OSError, ValueError):
        pass
    d, n = config["hidden_size"], config["num_experts"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32, d), "model.norm.weight": (d,), "lm_head.weight": (32, d),
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {
            at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,),
            at + "self_attn.q_proj.weight": (16, d), at + "self_attn.k_proj.weight": (8, d),
            at + "self_attn.v_proj.weight": (8, d), at + "self_attn.o_proj.weight": (d, 16),
            at + "self_attn.q_norm.weight": (8,), at + "self_attn.k_norm.weight": (8,),
            at + "mlp.gate.weight": (n, d), at + "mlp.experts.gate_and_up_projs": (n, d, 16),
            at + "mlp.experts.down_projs": (n, 8, d),
        }  # fmt: skip
    state = {name: torch.full(shape, 7.5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    if extra is not None and "flags" in (extra.name):
        state |= {f"model.layers.{i}.flags": torch.zeros(4, dtype=torch.bool) for i in (0, 1)}
    return state


def painted(state: dict[str, torch.Tensor]) -> bool:
    return all(bool((t == 7.5).all()) for t in state.values() if t.is_floating_point())


def placed(error: RestowError, root: Path) -> bool:
    """Whether an error says where, by a path in what was opened or the folder itself, and what to do."""
    return error.path is not None and Path(error.path).is_relative_to(root) and bool(error.hint)


def all_of(error: BaseException) -> str:
    return f"{type(error).__name__} {error}"


def test_the_count() -> None:
    """127 bad inputs by the table's ids; the adapters' are judged by the adapters' tests."""
    for level, count in LEVELS.items():
        wanted_ids = {f"{level}{i:02}" for i in range(1, count + 1)}
        there = {name[:3] for name in CASES}
        if level == "L":
            continue
        if level == "I":
            wanted_ids.remove("I06")  # a control
            wanted_ids |= {"I22"}
        assert wanted_ids <= there, sorted(wanted_ids - there)
    assert sum(LEVELS.values()) == 127
    table = {name[:3] for name in CASES if int(name[1:3]) <= LEVELS.get(name[0], 0)} | {"I22"}
    values, shape, hidden = ({name[:3] for name in names} for names in (DATA, BY_SHAPE, corpus_values.HIDDEN))
    opened = {case.id[:3] for case in BAD} - values
    counts = [len(table & ids) for ids in (opened, values, shape, hidden)]
    assert (counts, sum(counts) + LEVELS["L"]) == ([105, 7, 1, 4], 127), "docs/reliability.md says so"
    assert {f"G0{i}" for i in range(8)} <= {name[:3] for name in CASES}


# Open.


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_open(case: Case, tmp_path: Path) -> None:
    path = built(case, tmp_path)
    kind, holds, fatal = wanted(case)
    before = tree(tmp_path)
    try:
        found = restow.open(path)
    except RestowError as error:
        assert fatal
        assert isinstance(error, kind)
        assert all(says(str(error), part) for part in holds)
        assert placed(error, path), error
    else:
        if case.id in DATA:
            assert not found.problems
            return
        assert all(placed(p.error, path) for p in found.problems), found.problems
        told = [p for p in found.problems if isinstance(p.error, kind)]
        assert told, [all_of(p.error) for p in found.problems]
        assert all(says(str(told[0].error), part) for part in holds)
        assert told[0].fatal == fatal
    assert tree(tmp_path) == before


# Load, into what the config describes.


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_load(case: Case, tmp_path: Path) -> None:
    path = built(case, tmp_path)
    kind, _, fatal = wanted(case)
    state = model(path, tmp_path / "flags" if "F34" in case.id else None)
    if case.id.startswith("R"):
        state = {"w": torch.full((32, 4), 7.5)}
    by_data = case.id in DATA
    try:
        report = restow.load(path, state, check=by_data)
    except RestowError as error:
        assert painted(state) or by_data, "a refusal comes before the first byte"
        if fatal:
            # The config's model in place of the files': what it lacks is told as that, or as another shape.
            near = errors.MissingTensorError | errors.UnexpectedTensorError | errors.ShapeMismatchError
            assert isinstance(error, kind | near), all_of(error)
        else:
            # What is told to some is in the way of this model: names without their prefix, tensors without a place.
            assert isinstance(error, kind | errors.UnexpectedTensorError | errors.QuantizationError), all_of(
                error
            )
    else:
        assert not fatal or by_data
        assert report.warnings, "told"
        with pytest.raises(RestowError):
            restow.load(path, state, strict=True)


def test_load_knows_the_last_rank(tmp_path: Path) -> None:
    path = built(CASES["R02_last_rank_missing"], tmp_path)
    opened = restow.open(path, layout="grouped")
    state = {"w": torch.full((32, 4), 7.5)}
    with pytest.raises(errors.CoverageError) as caught:
        restow.load(opened, state)
    assert "w" in str(caught.value)
    assert "24" in str(caught.value)
    assert painted(state)
    with pytest.raises(errors.CoverageError):
        open_folder(path, shapes={"w": (32, 4)})


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_plan(case: Case, tmp_path: Path) -> None:
    """A plan reads no values and needs no config's names, so what concerns neither may pass; nothing else does."""
    path = built(case, tmp_path)
    kind, _, fatal = wanted(case)
    passes = {errors.MissingTensorError, errors.UnexpectedTensorError, errors.ShapeMismatchError}
    try:
        made = restow.plan(path, {n: t.to("meta") for n, t in model(path).items()})
    except RestowError as error:
        assert isinstance(error, (kind, *passes, errors.QuantizationError)), all_of(error)
    else:
        assert not fatal or case.id in DATA or made.missing or made.unused, "a plan of a bad input"


LAYERS = """\
expected 3 layers below model.layers, as num_hidden_layers says, found 2
  missing   model.layers.2.*
  in        {0}
  try       get the checkpoint again, or the config.json that belongs to it"""


def test_what_concerns_nothing_here_is_told_and_strict_refuses_it(tmp_path: Path) -> None:
    """A layer that the config announces and neither files nor model have."""
    path, state = built(CASES["C06_more_layers"], tmp_path), model(tmp_path)
    for act in (restow.load, restow.plan):
        with pytest.raises(errors.MissingTensorError) as caught:
            act(path, state, strict=True)
        assert str(caught.value) == LAYERS.format(path)
    assert painted(state)
    assert not restow.plan(path, state).missing
    assert restow.load(path, state).warnings == (LAYERS.format(path),)
    assert not painted(state)


@pytest.mark.parametrize(
    "name", ["C06_more_layers", "C08_family_disagrees", "T22_head_missing", "T24_router_missing"]
)
def test_a_plan_on_the_command_line_is_of_a_whole_checkpoint(name: str, tmp_path: Path) -> None:
    code, text = invoke("plan", str(built(CASES[name], tmp_path)))
    assert code == 1
    assert text.startswith("restow.errors.MissingTensorError: expected ")
    assert all(says(text, part) for part in CASES[name].holds)


# Convert.


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_convert(case: Case, tmp_path: Path) -> None:
    path = built(case, tmp_path)
    kind, holds, fatal = wanted(case)
    before = tree(tmp_path)
    target = tmp_path / "out"
    try:
        report = restow.convert(path, target, to="grouped")
    except RestowError as error:
        assert isinstance(error, kind | errors.QuantizationError), all_of(error)
        assert fatal or isinstance(error, errors.QuantizationError), "only told"
        assert fatal is False or case.id in DATA or all(says(str(error), part) for part in holds)
        assert tree(tmp_path) == before, "nothing is written"
        return
    assert not fatal
    text = "\n".join(report.warnings)
    assert all(says(text, part) for part in holds if not part.startswith("2 other"))
    with pytest.raises(kind) as caught:
        restow.convert(path, tmp_path / "strict", to="grouped", strict=True)
    assert placed(caught.value, path), caught.value
    assert not (tmp_path / "strict").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# Verify.


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_verify(case: Case, tmp_path: Path) -> None:
    path = built(case, tmp_path)
    kind, holds, fatal = wanted(case)
    before = tree(tmp_path)
    try:
        report = restow.verify(path)
    except RestowError as error:
        assert fatal
        assert isinstance(error, kind), all_of(error)
        assert all(says(str(error), part) for part in holds)
        assert placed(error, path), error
    else:
        assert not fatal or case.id in NO_CONFIG
        assert any(isinstance(p.error, kind) for p in report.problems), report
        assert all(placed(p.error, path) for p in report.problems), report
        text = str(report)
        assert all(says(text, part) for part in holds)
        if not fatal:
            with pytest.raises(kind):
                restow.verify(path, strict=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["Q01_scale_missing", "Q02_scale_transposed", "Q06_fp8_unannounced", "Q08_block_zero",
                                  "Q09_block_other", "Q13_unknown_method"])  # fmt: skip
@pytest.mark.parametrize("order", [1, -1])
def test_codes_without_values_are_not_compared(name: str, order: int, tmp_path: Path) -> None:
    """What is wrong with them is said, as when the checkpoint is opened; nothing is decoded by a wrong scale."""
    good, bad = built(CASES["G06_fp8"], tmp_path), built(CASES[name], tmp_path)
    told = restow.open(bad).problems[0].error
    with pytest.raises(type(told)) as caught:
        restow.verify(*(good, bad)[::order])
    assert str(caught.value) == str(told)
    done = CliRunner().invoke(app, ["verify", *map(str, (good, bad)[::order])])
    assert (done.exit_code, done.stderr) == (1, f"restow.errors.{type(told).__name__}: {told}\n")


@pytest.mark.parametrize("to", ["split", "fused", "grouped"])
@pytest.mark.parametrize("name", corpus_values.HIDDEN)
def test_what_only_another_copy_tells(name: str, to: str, tmp_path: Path) -> None:
    """Against a good copy in any layout, and against the manifest that a conversion wrote."""
    bad, first = built(CASES[name], tmp_path), built(CASES["G00_good"], tmp_path)
    assert not restow.open(bad).problems
    restow.convert(first, tmp_path / to, to=to)
    report = restow.verify(tmp_path / to, bad)
    assert not report.equal
    leaf = [d for d in report.differences if d.leaf is not None]
    assert leaf
    if name.startswith("T"):
        where, why = corpus_values.HIDDEN[name]
        assert where in [d.name for d in report.differences]
        assert why in str(report)
    done = CliRunner().invoke(app, ["verify", str(tmp_path / to), str(bad)])
    assert done.exit_code == 4


@pytest.mark.parametrize("name", corpus_values.HIDDEN)
def test_what_only_the_manifest_tells(name: str, tmp_path: Path) -> None:
    """The good checkpoint, restowed in its own layout, then damaged as the case says: its manifest knows better."""
    first, bad = built(CASES["G00_good"], tmp_path), built(CASES[name], tmp_path)
    ours = tmp_path / "ours"
    restow.convert(first, ours, to="split", max_shard_bytes=10_000)
    assert restow.verify(ours).equal
    wrong = {n: t for n, t in _stored(bad).items() if t != _stored(first)[n]}
    for file in sorted(ours.glob("*.safetensors")):
        header = _header(file)
        data = bytearray(file.read_bytes())
        for key in header.keys() & wrong.keys():
            begin = len(data) - _data_size(header) + header[key]["data_offsets"][0]
            data[begin : begin + len(wrong[key])] = wrong[key]
        file.write_bytes(data)
    report = restow.verify(ours)
    assert not report.equal
    assert {d.kind for d in report.differences} == {"digest"}
    assert {d.name for d in report.differences} == set(wrong)
    assert all(d.leaf is not None and ".safetensors" in d.why for d in report.differences)
    if name.startswith("T"):
        assert all(word in str(report) for word in corpus_values.HIDDEN[name])
    done = CliRunner().invoke(app, ["verify", str(ours)])
    assert done.exit_code == 4


def _header(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    found = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found.pop("__metadata__", None)
    return found  # type: ignore[no-any-return]


def _data_size(header: dict[str, Any]) -> int:
    return max(int(row["data_offsets"][1]) for row in header.values())


def _stored(root: Path) -> dict[str, bytes]:
    found = {}
    for file in root.glob("*.safetensors"):
        header, raw = _header(file), file.read_bytes()
        start = len(raw) - _data_size(header)
        for name, row in header.items():
            begin, end = row["data_offsets"]
            found[name] = raw[start + begin : start + end]
    return found


# The command line.


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output + done.stderr


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_command_line(case: Case, tmp_path: Path) -> None:
    path = built(case, tmp_path)
    kind, holds, fatal = wanted(case)
    before = tree(tmp_path)
    code, text = invoke("inspect", str(path))
    assert code == (1 if fatal and case.id not in DATA and case.id != "C01_no_config" else 0)
    assert case.id in DATA or kind.__name__ in text
    code, text = invoke("verify", str(path))
    assert code == (1 if fatal and case.id not in NO_CONFIG else 0), text
    assert all(says(text, part) for part in holds) or case.id in NO_CONFIG
    assert "Traceback" not in text
    code, _ = invoke("verify", str(path), "--strict")
    assert code == 1
    if fatal:
        code, text = invoke("convert", str(path), str(tmp_path / "out"), "--to", "grouped")
        assert code == 1
        assert kind.__name__ in text
    code, text = invoke("convert", str(path), str(tmp_path / "out"), "--to", "grouped", "--strict")
    assert code == 1
    assert kind.__name__ in text
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["F03_lfs_pointer", "F36_shard_is_fifo", "I14_dotdot", "T22_head_missing",
                                  "C07_hidden_size", "Q01_scale_missing", "P01_pickle_only", "R03_overlap"])  # fmt: skip
@pytest.mark.parametrize("verb", ["inspect", "convert", "verify"])
def test_inputs_are_judged_before_torch_is_imported(name: str, verb: str, tmp_path: Path) -> None:
    path = built(CASES[name], tmp_path)
    more = [str(tmp_path / "out"), "--to", "grouped"] if verb == "convert" else []
    code = f"""
import sys
from restow.cli import app
try:
    app({[verb, str(path), *more]!r}, prog_name="restow")
except SystemExit as end:
    print("code", end.code)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-2:] == ["code 1", "False"], done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


# The controls.


def g09_f32(root: Path) -> None:
    write(root, good("F32"))


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.id)
def test_controls_are_accepted(case: Case, tmp_path: Path) -> None:
    path = built(case, tmp_path)
    if case.id.startswith("G07"):
        opened = restow.open(path, layout="grouped")
        state = {"w": torch.zeros(32, 4)}
        restow.load(opened, state)
        assert [float(row[0]) != 0 for row in state["w"]] == [True] * 32
        assert restow.verify(opened).equal
        return
    assert not restow.open(path).problems
    assert invoke("inspect", str(path), "--strict")[0] == 0
    assert invoke("verify", str(path), "--strict")[0] == 0
    if case.id == "Q16_attention_in_fp8":
        return  # decoded outside the experts only with their own tensors: the tests of quantised weights do that
    restow.convert(path, tmp_path / "out", to="grouped", strict=True)
    state = model(path)
    restow.load(path, state, strict=True)
    restow.load(path, state, check=True, strict=case.id not in CODED)
    assert not painted(state)
    assert restow.verify(tmp_path / "out", strict=True).equal
    if case.id not in CODED:
        assert restow.verify(path, tmp_path / "out").equal


def test_control_f32(tmp_path: Path) -> None:
    g09_f32(tmp_path / "f32")
    built(CASES["G00_good"], tmp_path)
    assert not restow.open(tmp_path / "f32").problems
    report = restow.verify(tmp_path / "G00_good", tmp_path / "f32")
    assert report.equal
    assert report.notes


# The oracles can fail.


def test_the_time_limit_can_fail() -> None:
    with pytest.raises(Timeout), limit(0.05):
        signal.pause()


@pytest.mark.parametrize("check", [test_open, test_convert, test_verify, test_command_line])
@pytest.mark.parametrize("name", ["F09_cut_in_data", "T06_one_shape", "T10_nan"])
def test_the_oracle_can_fail(name: str, check: Callable[[Case, Path], None], tmp_path: Path) -> None:
    """A good checkpoint, or another error, in place of the case."""
    import dataclasses

    if check is test_open and name == "T10_nan":
        return
    case = CASES[name]
    for i, other in enumerate(("G00_good", "T22_head_missing")):
        wrong = dataclasses.replace(case, build=CASES[other].build)
        (tmp_path / str(i)).mkdir()
        with pytest.raises(BaseException) as caught:
            check(wrong, tmp_path / str(i))
        assert type(caught.value).__name__ in ("AssertionError", "Failed")
