"""Every example runs on its own, offline, and prints what it says here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

PRINTED = {
    "relayout": """
model.layers.0.mlp.experts.gate_and_up_projs [4, 8, 12]
model.layers.0.mlp.experts.down_projs [4, 6, 8]
back: 12 tensors, equal: True, views: 12
""",
    "plan_a_rank": """
rank 0: experts [0, 1] of a layer, 28,736 of 157,760 bytes
rank 3: experts [6, 7] of a layer, 28,736 of 157,760 bytes
rank 7: experts [14, 15] of a layer, 28,736 of 157,760 bytes
a plan is a value: True
""",
    "load_on_a_mesh": """
rank 0: 8 experts a layer, 84,032 bytes read, 9 tensors in place, 0 staged
rank 1: 8 experts a layer, 84,032 bytes read, 9 tensors in place, 0 staged
""",
    "convert_and_verify": """
model.layers.0.mlp.experts.gate_and_up_projs [16, 32, 48]
model.layers.0.mlp.experts.down_projs [16, 24, 32]
grouped equals hub: True
back to the byte: True
""",
    "replicated_experts": """
rank 0: experts [0, 7, 1, 2, 3], 46,080 bytes read
rank 1: experts [4, 5, 6, 7, 8], 46,080 bytes read
rank 2: experts [9, 10, 11, 0, 7], 46,080 bytes read
rank 3: experts [12, 13, 14, 15, 7], 46,080 bytes read
each expert lies on 1 to 4 ranks; expert 7 on 4
""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_says(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED[name].lstrip("\n")
    assert list(tmp_path.iterdir()) == [], "what it makes is gone with it"


def test_examples_are_short_and_all_run() -> None:
    files = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert files.keys() == {*PRINTED, "tiny_checkpoint"}
    assert all(text.isascii() and len(text.splitlines()) <= 40 for text in files.values())
