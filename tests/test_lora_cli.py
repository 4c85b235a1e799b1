"""`restow lora` and `restow merge` as they are typed: what is printed, and the exit code of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora_adapters as adapters
import restow.lora
from restow.terminal import BAD_INPUT, DIFFERENT, DONE, USAGE
from test_cli import run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
tmp_path = adapters.tmp_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    adapters.make(tmp_path / "a", "qwen3_moe")
    return tmp_path


def test_to_every_format_and_back(root: Path) -> None:
    base = adapters.base("qwen3_moe")
    for to in restow.lora.formats:
        code, out, err = run("lora", root / "a", root / to, "--to", to, "--base", base)
        if to == "vllm-shared-outer":  # experts of their own have no place in it
            assert (code, out) == (BAD_INPUT, "")
            assert "one A for all experts of model.layers.1.mlp.experts" in err
            continue
        assert (code, err) == (DONE, "")
        assert out.startswith(f"converted to {to}")
        assert "2 experts modules, 8 tensors converted, 6 taken along" in out
        assert "which side lora_A faces was decided by shapes" in out
        code, out, err = run("lora", root / to, root / f"{to}b", "--to", "peft", "--base", base)
        assert (code, err) == (DONE, "")
        adapters.same(root / "a", root / f"{to}b")


def test_convert_and_check_at_once(root: Path) -> None:
    base = adapters.base("qwen3_moe")
    code, out, _ = run("lora", root / "a", root / "b", "--to", "peft", "--base", base, "--check")
    assert code == DONE
    assert "converted to peft, for PEFT" in out
    assert "does what it was trained to do: 7 modules compared" in out
    code, out, _ = run("lora", root / "a", root / "g", "--to", "grouped", "--base", base, "--json")
    assert (code, json.loads(out)["tensors"]) == (DONE, 14)
    code, out, _ = run("lora", root / "g", "--check", "--base", base)
    assert code == DIFFERENT
    assert "dropped: model.layers.2.mlp.experts.down_proj" in out


def test_merge_says_what_was_kept(root: Path) -> None:
    code, out, err = run("merge", adapters.base("qwen3_moe"), root / "a", root / "m")
    assert (code, err) == (DONE, "")
    lines = out.splitlines()
    assert lines[0].startswith("merged 75 deltas into 75 tensors")
    assert lines[1:] == [
        "  in: 48 deltas, 100.0% of their norm kept",
        "  out: 24 deltas, 100.0% of their norm kept",
        "  q_proj: 3 deltas, 100.0% of their norm kept",
    ]


WRONG: list[tuple[list[str], int, str]] = [
    (["lora", "a", "x", "--to", "made_up", "--base", "B"], USAGE, "an adapter format, one of grouped, peft, "),
    (["lora", "a", "x", "--base", "B"], USAGE, "found DST alone"),
    (["lora", "a", "--to", "peft", "--base", "B"], USAGE, "found --to alone"),
    (["lora", "a"], USAGE, "found neither"),
    (["lora", "a", "--check"], USAGE, "expected --base with --check"),
    (["lora", "a", "x", "--to", "vllm", "--base", "B", "--check"], USAGE, "a format that PEFT reads with --check"),
    (["lora", "a", "x", "--to", "peft", "--base", "B", "--outer", "up"], USAGE, "--outer"),
    (["lora", "a", "x", "--to", "peft", "--base", "B", "--family", "made_up"], BAD_INPUT, "made_up"),
    (["lora", "a", "x", "--to", "peft"], BAD_INPUT, "say base= (--base)"),
    (["lora", "a", "x", "--to", "peft", "--base", "nowhere"], BAD_INPUT, "nowhere"),
    (["lora", "a", "x", "--to", "peft", "--base", "MIXTRAL"], BAD_INPUT, "trained on qwen3_moe (auto_mapping)"),
    (["lora", "a", "x", "--to", "peft", "--base", "SMALL"], BAD_INPUT, "p = 2, e = 12, f = 16, d = 32; rank 3"),
    (["lora", "a", "x", "--to", "peft", "--base", "B", "--faces", "output"], BAD_INPUT, "shapes decide here"),
    (["lora", "nowhere", "x", "--to", "peft", "--base", "B"], BAD_INPUT, "adapter_config.json"),
    (["lora", "B", "x", "--to", "peft", "--base", "B"], BAD_INPUT, "an adapter is a folder of adapter_config.json"),
    (["merge", "MIXTRAL", "a", "x"], BAD_INPUT, "trained on qwen3_moe (auto_mapping)"),
    (["merge", "SMALL", "a", "x"], BAD_INPUT, "model.layers.1.mlp.experts"),
    (["merge", "a", "B", "x"], BAD_INPUT, "expected"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "text"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_what_is_wrong_is_told(root: Path, words: list[str], code: int, text: str) -> None:
    known = {"B": adapters.base("qwen3_moe"), "MIXTRAL": adapters.base("mixtral"),
             "SMALL": adapters.base("qwen3_moe", "2f == d"), "a": root / "a", "x": root / "x", "nowhere": root / "nowhere"}  # fmt: skip
    found, out, err = run(*(known.get(word, word) for word in words))
    assert (found, out) == (code, "")
    assert text in err
    assert "Traceback" not in err
    assert not (root / "x").exists()


def test_another_family_by_its_names_alone(root: Path) -> None:
    """Without auto_mapping the modules tell it."""
    config = adapters.config(root / "a")
    del config["auto_mapping"]
    adapters.write(root / "a", adapters.tensors(root / "a"), **config)
    code, _, err = run("lora", root / "a", root / "x", "--to", "peft", "--base", adapters.base("mixtral"))
    assert code == BAD_INPUT
    assert "model.layers.2.mlp.experts, which it lacks" in err


def test_a_base_that_lies_elsewhere_is_named(root: Path) -> None:
    config = {**adapters.config(root / "a"), "base_model_name_or_path": "Qwen/Qwen3-30B-A3B"}
    adapters.write(root / "a", adapters.tensors(root / "a"), **config)
    code, _, err = run("lora", root / "a", root / "x", "--to", "peft")
    assert code == BAD_INPUT
    assert "found Qwen/Qwen3-30B-A3B, which is no folder here" in err
    config["base_model_name_or_path"] = str(adapters.base("qwen3_moe"))
    adapters.write(root / "a", adapters.tensors(root / "a"), **config)
    assert run("lora", root / "a", root / "x", "--to", "peft")[0] == DONE
