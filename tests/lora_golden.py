"""What other PEFT versions write, and what it means to them, recorded once: names, shapes, config, merged weights.

    PYTHONPATH=<folder of that version>:src:tests python tests/lora_golden.py

adds the version that it runs under to `lora_golden.json`. Values are numbers that follow from a name, and bases are zeros,
so that a merged weight is a delta; of the last layer's merged weights a few elements are kept.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).parent / "lora_golden.json"
SAMPLES = 8
PREFIX = "base_model.model."


def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values from -1 to 1 by whole-number arithmetic alone, the same with every torch."""
    count = torch.Size(shape).numel()
    found = (torch.arange(count, dtype=torch.int64) * 7919 + zlib.crc32(name.encode())) % 2003 - 1001
    return (found.double() / 1001).float().reshape(shape)


def samples(tensor: torch.Tensor) -> list[float]:
    """A few elements, from all over."""
    flat = tensor.flatten()
    return [float(f"{float(flat[(k * 2654435761) % flat.numel()]):.7g}") for k in range(1, SAMPLES + 1)]


def record(family: str, sizes: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """One model under the PEFT that runs: (what is kept of it, its whole config)."""
    import peft

    import lora_adapters as adapters

    settings = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[], target_parameters=adapters.parameters(family)
    )
    model = adapters.model(family, sizes)
    for parameter in model.parameters():
        parameter.data.zero_()
    shapes = {
        n: list(p.shape)
        for n, p in model.named_parameters()
        if n.endswith(tuple(adapters.parameters(family)))
    }
    with adapters.quiet(), tempfile.TemporaryDirectory() as folder:
        wrapped = peft.get_peft_model(model, settings)
        wrapped.save_pretrained(folder)
        files = adapters.tensors(Path(folder))
        config = adapters.config(Path(folder))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(numbers(name.replace(".default", ""), tuple(parameter.shape)))
        merged = wrapped.merge_and_unload().state_dict()
    config.pop("auto_mapping")
    targets = config.pop("target_parameters")
    paths = sorted({name.rpartition(".")[0] for name in shapes})
    below = [{n.removeprefix(f"{PREFIX}{path}."): list(t.shape) for n, t in sorted(files.items()) if path in n}
             for path in paths]  # fmt: skip
    assert all(one == below[0] for one in below)
    assert len(files) == len(paths) * len(below[0])
    kept = {
        "targets": sorted(targets),
        "paths": paths,
        "files": below[0],
        "merged": {
            n: [shape, samples(merged[n])] for n, shape in sorted(shapes.items()) if n.startswith(paths[-1])
        },
    }
    return kept, config


def main() -> None:
    import peft

    import lora_adapters as adapters
    import tiny

    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    cases, config = {}, {}
    for family in adapters.FAMILIES:
        for sizes in tiny.SIZES:
            cases[f"{family}|{sizes}"], config = record(family, sizes)
    known[peft.__version__] = {"config": config, "cases": cases}
    lines = []
    for version, body in sorted(known.items()):
        inner = ",\n".join(f"{json.dumps(key)}: {json.dumps(case)}" for key, case in body["cases"].items())
        lines.append(
            f'{json.dumps(version)}: {{"config": {json.dumps(body["config"])}, "cases": {{\n{inner}}}}}'
        )
    FILE.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
