"""Experts placed by load: popular ones on several ranks, each rank with a list of its own, read by number."""

import tempfile

import torch

import restow
from tiny_checkpoint import EXPERTS, LAYERS, D, F, write

PLACEMENT = {0: [0, 7, 1, 2, 3], 1: [4, 5, 6, 7, 8], 2: [9, 10, 11, 0, 7], 3: [12, 13, 14, 15, 7]}

with tempfile.TemporaryDirectory() as folder:
    write(folder)
    copies = [0] * EXPERTS
    for rank, experts in PLACEMENT.items():
        n = len(experts)
        model = {}
        for layer in range(LAYERS):
            at = f"model.layers.{layer}.mlp.experts"
            model[f"{at}.gate_and_up_projs"] = torch.empty(n, D, 2 * F, dtype=torch.bfloat16)
            model[f"{at}.down_projs"] = torch.empty(n, F, D, dtype=torch.bfloat16)
        report = restow.load(folder, model, experts=experts, part=True)  # the rest of the model is elsewhere
        for number in experts:
            copies[number] += 1
        print(f"rank {rank}: experts {experts}, {report.bytes_read:,} bytes read")
    print(f"each expert lies on {min(copies)} to {max(copies)} ranks; expert 7 on {copies[7]}")
