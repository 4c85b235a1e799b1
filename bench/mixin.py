"""`_from_hf_w_merged_experts` against NeMo AutoModel's own, and against the least that such a call has to do.

usage: python bench/mixin.py [E D F]

One layer's experts (E=128, D=2048, F=768, bf16, CPU) as tensors per expert become grouped tensors: restow's
class, the installed nemo-automodel's, and two floors on the same bytes. Both floors make zeroed memory, since
new memory has to be made by the system on first touch; then one fills it as `restow.load` fills a model from
tensors per expert (the packed load's own copy: transposed), the other with one straight copy of bytes that
lie right already. The ways take turns, so that a noisy neighbour hits them all, and every turn pays for its
own new memory. Memory is the peak of the process above where it stood when the call began, each way in a
process of its own.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import restow
from _common import child, machine, status, table, verdicts
from restow.state_dict_mixin import MoESplitExpertsStateDictMixin

SECONDS, TURNS = 60.0, 41
AT = "model.layers.0.mlp.experts"
State = dict[str, torch.Tensor]


def state(e: int, d: int, f: int) -> State:
    """The Hugging Face side: every tensor a view of its own storage, touched."""
    out = {}
    for i in range(e):
        for word, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            out[f"{AT}.{i}.{word}_proj.weight"] = torch.randn(shape).to(torch.bfloat16)
    return out


def host(mixin: type, e: int, f: int) -> Any:
    """An adapter of a class, with what it wants to know."""
    made = type("Adapter", (mixin,), {})()
    made.moe_config = SimpleNamespace(
        n_routed_experts=e, moe_inter_dim=f, expert_activation="swiglu", expert_bias=False
    )
    made.config, made.backend = None, SimpleNamespace(experts="gmm", dispatcher="torch")
    made.dtype, made._uses_model_prefix = torch.bfloat16, True
    return made


def nemo() -> type:
    """The installed peer's class."""
    from nemo_automodel.components.moe.state_dict_mixin import MoESplitExpertsStateDictMixin as Theirs

    return Theirs


def ways(e: int, d: int, f: int) -> dict[str, Callable[[State], State]]:
    """What is timed: each takes a state dict that it may consume, and gives the native one."""
    ours, theirs = host(MoESplitExpertsStateDictMixin, e, f), host(nemo(), e, f)
    shapes = {f"{AT}.gate_and_up_projs": (e, d, 2 * f), f"{AT}.down_projs": (e, f, d)}
    straight = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}

    def zeroed() -> State:
        return {name: torch.empty(shape, dtype=torch.bfloat16).zero_() for name, shape in shapes.items()}

    def loaded(given: State) -> State:
        out = zeroed()
        restow.load(given, out, family="qwen3_moe", layout="grouped")
        return out

    def copied(given: State) -> State:
        out = zeroed()
        for name, tensor in out.items():
            tensor.copy_(straight[name])
        return out

    return {
        "restow": ours._from_hf_w_merged_experts,
        "nemo": theirs._from_hf_w_merged_experts,
        "zero + load": loaded,
        "zero + copy": copied,
    }


def timed(e: int, d: int, f: int) -> dict[str, list[float]]:
    given, all_ways = state(e, d, f), ways(e, d, f)
    expected = all_ways["nemo"](dict(given))
    for name in ("restow", "zero + load"):
        found = all_ways[name](dict(given))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    del expected, found
    seconds: dict[str, list[float]] = {name: [] for name in all_ways}
    began = time.perf_counter()
    for _ in range(TURNS):
        for name, way in all_ways.items():
            gc.collect()
            one = dict(given)
            start = time.perf_counter()
            out = way(one)
            seconds[name].append(time.perf_counter() - start)
            del out
        if time.perf_counter() - began > SECONDS:
            break
    return seconds


def peak(which: str, e: int, d: int, f: int) -> int:
    """Bytes by which one call raises the process's peak above its input; the input is the call's to
    consume.
    """
    small, way = state(2, 64, 32), ways(e, d, f)[which]
    host(MoESplitExpertsStateDictMixin, 2, 32)._from_hf_w_merged_experts(dict(small))  # threads, kernels
    given = state(e, d, f)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as reset:  # noqa: PTH123
        reset.write("5")
    before = status("VmRSS")
    way(given)
    return status("VmHWM") - before


def main() -> int:
    if sys.argv[1:2] == ["--peak"]:
        print(f'{{"bytes": {peak(sys.argv[2], *map(int, sys.argv[3:]))}}}')
        return 0
    e, d, f = map(int, sys.argv[1:4]) if len(sys.argv) > 3 else (128, 2048, 768)
    seconds = timed(e, d, f)
    best = {name: statistics.median(times) for name, times in seconds.items()}
    size = 3 * e * d * f * 2
    env = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system, and is not counted
    peaks = {
        name: int(str(child(__file__, "--peak", name, e, d, f, env=env)["bytes"]))
        for name in ("restow", "nemo")
    }
    print(machine())
    print(
        f"E={e} d={d} f={f} bf16: {size / 1e6:.0f} MB, {len(seconds['restow'])} turns, "
        f"{torch.get_num_threads()} threads\n"
    )
    rows = [
        (name, f"{best[name] * 1e3:.0f}", f"{min(seconds[name]) * 1e3:.0f}", f"{size / best[name] / 1e9:.2f}",
         f"{peaks[name] / 1e6:.0f}" if name in peaks else "")
        for name in best
    ]  # fmt: skip
    print(table(("way", "median ms", "best ms", "GB/s", "MB above input"), rows))
    largest = 2 * e * d * f * 2
    lines, good = verdicts([
        ("restow, times nemo's time", best["restow"] / best["nemo"], "<=", 0.5),
        ("restow, times zeroed memory and the packed load's own copy", best["restow"] / best["zero + load"], "<=", 1.5),
        ("restow, largest grouped tensors above the input", peaks["restow"] / largest, "<=", 1.05),
    ])  # fmt: skip
    print("\n" + "\n".join(lines))
    print(
        f"      restow, times zeroed memory and a straight copy: {best['restow'] / best['zero + copy']:.3g}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
