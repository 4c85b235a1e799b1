"""What ranks of eight would read, from the headers alone: no data, no process group, no model."""

import tempfile

import restow
from tiny_checkpoint import write

with tempfile.TemporaryDirectory() as folder:
    write(folder)
    whole = restow.plan(folder)  # into grouped tensors, in one process
    for rank in (0, 3, 7):
        plan = restow.plan(folder, shard=restow.Shard("e", rank=rank, of=8))
        names = [part.name for part in plan.parts if ".layers.0.mlp.experts." in part.name]
        experts = sorted({int(name.split(".")[5]) for name in names})
        print(f"rank {rank}: experts {experts} of a layer, {plan.bytes:,} of {whole.bytes:,} bytes")
    again = restow.Plan.from_json(plan.to_json())
    print(f"a plan is a value: {again == plan}")
