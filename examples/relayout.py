"""One tensor per expert becomes one grouped tensor per layer, in memory, and comes back as views of it."""

import torch

import restow

EXPERTS, D, F = 4, 8, 6
AT = "model.layers.0.mlp.experts"

split = {}
for e in range(EXPERTS):
    for word in ("gate", "up"):
        split[f"{AT}.{e}.{word}_proj.weight"] = torch.randn(F, D)
    split[f"{AT}.{e}.down_proj.weight"] = torch.randn(D, F)

grouped = restow.relayout(split, src="split", dst="grouped")
for name, tensor in grouped.items():
    print(name, list(tensor.shape))

both = grouped[f"{AT}.gate_and_up_projs"]
assert torch.equal(both[3, :, :F], split[f"{AT}.3.gate_proj.weight"].t())
assert torch.equal(both[3, :, F:], split[f"{AT}.3.up_proj.weight"].t())

back = restow.relayout(grouped, src="grouped", dst="split")
same = all(torch.equal(back[name], tensor) for name, tensor in split.items())
places = {tensor.untyped_storage().data_ptr() for tensor in grouped.values()}
views = sum(tensor.untyped_storage().data_ptr() in places for tensor in back.values())
print(f"back: {len(back)} tensors, equal: {same}, views: {views}")
