"""A hub checkpoint with its experts grouped, on disk, and back to the byte; verify says what is equal."""

import tempfile
from pathlib import Path

import restow
from tiny_checkpoint import write

with tempfile.TemporaryDirectory() as work:
    hub, grouped, back = (Path(work) / name for name in ("hub", "grouped", "back"))
    hub.mkdir()
    write(hub)
    restow.convert(hub, grouped, to="grouped")
    opened = restow.open(grouped)
    for name in [name for name in opened.tensors if "layers.0.mlp.experts" in name]:
        print(name, list(opened.tensors[name].shape))
    print(f"grouped equals hub: {restow.verify(hub, grouped).equal}")

    restow.convert(grouped, back, to="source")
    same = (hub / "model.safetensors").read_bytes() == (back / "model.safetensors").read_bytes()
    print(f"back to the byte: {same}")
