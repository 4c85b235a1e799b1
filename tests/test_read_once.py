"""Gate and up that lie in one row of the source are read once, however small the pieces in which they are filled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import restow
from moe import Model, differing
from restow.torch import convert as converting
from restow.torch import verify as verifying
from restow.torch import verify_report as reporting

MODEL = Model(e=8, f=6, d=10)
DATA = sum(t.nbytes for t in MODEL.spelled("split").values())
PIECE = 1024  # less than one layer's gate, more than an expert of it


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (converting, verifying, reporting):
        monkeypatch.setattr(module, "CHUNK", PIECE)


@pytest.mark.parametrize("to", ["stacked", "split", "mlx", "torchtitan", "epfd"])
@pytest.mark.parametrize("files", [1, 3])
def test_conversions_read_each_byte_once(to: str, files: int, tmp_path: Path) -> None:
    source = MODEL.written(tmp_path / "source", "grouped")
    report = restow.convert(source, tmp_path / "made", to=to, max_shard_bytes=DATA // files + 1)
    assert report.bytes_read == DATA
    made = {n: t for file in (tmp_path / "made").glob("*.safetensors") for n, t in load_file(file).items()}
    assert differing(made, MODEL.spelled(to)) == []
    assert restow.verify(tmp_path / "made").equal  # digests were made piece by piece
    assert restow.verify(source, tmp_path / "made").bytes_read == 2 * DATA


def test_sums_of_files_are_made_in_their_order(tmp_path: Path) -> None:
    source = MODEL.written(tmp_path / "source", "grouped")
    restow.convert(source, tmp_path / "made", to="stacked", sha256=True)
    assert restow.verify(tmp_path / "made").equal
    listed = json.loads((tmp_path / "made" / "checkpoint.manifest.json").read_text())["files"]
    data = (tmp_path / "made" / "model.safetensors").read_bytes()
    assert listed["model.safetensors"]["sha256"] == hashlib.sha256(data).hexdigest()
