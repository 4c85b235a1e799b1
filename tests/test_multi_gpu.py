"""The bench of many GPUs, on four processes of a CPU: every step, every check but those of speed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "multi_gpu.py"
SPOILT = """
import sys
sys.path.insert(0, {folder!r})
sys.argv = ["multi_gpu.py", *sys.argv[1:]]
text = open({path!r}).read().replace("        good = exact(state, where, model)",
    "        local(next(iter(state.values())))[0, 0, 0] += 1\\n        good = exact(state, where, model)")
exec(compile(text, sys.argv[0], "exec"))
"""


@pytest.mark.slow
def test_all_steps_run_on_the_cpu() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), "--cpu"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout and done.stdout.count("pass  ") == 15
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")][1:7] == [
        "EP=4", "EP=2 x FSDP=2", "HSDP 2 x EP=2", "save from EP=4, synced", "that save into EP=2 x FSDP=2",
        "torch DCP's reader, 4 threads, experts alone",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_wrong_value_fails_it(tmp_path: Path) -> None:
    script = tmp_path / "multi_gpu.py"
    script.write_text(SPOILT.format(folder=str(BENCH.parent), path=str(BENCH)))
    done = subprocess.run(
        [sys.executable, str(script), "--cpu"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1 and "FAIL  EP=4: exact on all ranks: 0" in done.stdout, (
        done.stdout + done.stderr
    )
