"""Run under another PEFT (PYTHONPATH): write an adapter of a tiny model, or merge one; see test_lora_peft.

    python lora_old_peft.py make FOLDER FAMILY SIZES     python lora_old_peft.py merge FOLDER FAMILY SIZES OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import lora_adapters
import peft
from safetensors.torch import save_file


def main() -> None:
    verb, folder, family, sizes, *rest = sys.argv[1:]
    if verb == "make":
        lora_adapters.make(Path(folder), family, sizes)
        merged = lora_adapters.merged(Path(folder), family, sizes)
        save_file({k: v.contiguous().clone() for k, v in merged.items()}, Path(folder) / "merged.safetensors")
    else:
        merged = lora_adapters.merged(Path(folder), family, sizes)
        save_file({k: v.contiguous().clone() for k, v in merged.items()}, rest[0])
    print(peft.__version__)


main()
