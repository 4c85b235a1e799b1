"""Run under another PEFT (PYTHONPATH): write an adapter of a tiny model and what it makes of it, or merge a given one.

    python lora_old_peft.py FOLDER FAMILY SIZES [given]

The merged weights go to FOLDER/merged.safetensors. Tensors are put into the wrappers by name, since the conversions of
PEFT 0.19 do not run with the transformers of today.
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft
from safetensors.torch import load_file, save_file

import lora_adapters


def main() -> None:
    folder, family, sizes, *given = sys.argv[1:]
    path = Path(folder)
    if not given:
        lora_adapters.make(path, family, sizes)
    with lora_adapters.quiet():
        config = peft.LoraConfig.from_pretrained(folder)
        wrapped = peft.get_peft_model(lora_adapters.model(family, sizes), config)
    state = load_file(path / "adapter_model.safetensors")
    wanted = {
        n.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): t
        for n, t in state.items()
    }
    lost = wrapped.load_state_dict(wanted, strict=False)
    assert not lost.unexpected_keys, lost.unexpected_keys
    assert not [name for name in lost.missing_keys if "lora_" in name], lost.missing_keys
    merged = wrapped.merge_and_unload().state_dict()
    save_file({k: v.detach().contiguous().clone() for k, v in merged.items()}, path / "merged.safetensors")
    print(peft.__version__)


main()
