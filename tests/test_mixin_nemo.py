"""The mixin against the peer: NeMo AutoModel's adapters re-based on ours, for the release installed and one
earlier.

The earlier release is fetched as a wheel, unpacked beside the test and imported by processes of their own; it
is no part of this repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import mixin_ranks

LATEST, EARLIER = "0.7.0", "0.6.0"
MESHES = [{"ep_replicate": 1, "ep_shard": 1, "ep": 2}, {"ep_replicate": 1, "ep_shard": 2, "ep": 2}]


@pytest.fixture(scope="module", params=[LATEST, pytest.param(EARLIER, marks=pytest.mark.slow)])
def peer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str], Path]:
    """A release: its version, the environment that imports it, and folders of what its adapters write."""
    release: str = request.param
    try:
        installed = version("nemo-automodel")
    except PackageNotFoundError:
        installed = "none"
    folder = tmp_path_factory.mktemp(f"nemo-{release}")
    env = {}
    if installed != release:
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(fetched(release, folder)), os.environ.get("PYTHONPATH")])
        )
    script = Path(__file__).with_name("mixin_against.py")
    done = subprocess.run(
        [sys.executable, script, release, folder / "hf"],
        capture_output=True, text=True, env={**os.environ, **env}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return release, env, folder / "hf"


def fetched(release: str, folder: Path) -> Path:
    """The unpacked wheel of a release; skips where it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    done = subprocess.run(
        [*command, f"nemo-automodel=={release}", "-d", folder], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"nemo-automodel {release} cannot be had here: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder / "peer")
    return folder / "peer"


def test_plain_tensors_and_the_differences(peer: tuple[str, dict[str, str], Path]) -> None:
    release, _, folder = peer
    assert release in (LATEST, EARLIER)
    assert sorted(path.name for path in folder.iterdir()) == ["deepseek_v3", "nemotron_v3", "qwen3_moe"]


@pytest.mark.parametrize("sizes", MESHES, ids=["plain local split", "ep_shard"])
def test_dtensors_and_dcp(
    peer: tuple[str, dict[str, str], Path], sizes: dict[str, int], tmp_path: Path
) -> None:
    _, env, folder = peer
    for one in folder.iterdir():
        (tmp_path / one.name).symlink_to(one)
    mixin_ranks.run("against", tmp_path, env, **sizes)
