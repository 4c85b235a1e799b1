"""Two banks of experts in one numbering (ERNIE-4.5-VL): leaves of their own, widths of their own, with a config or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import restow
from moe import Tensors, differing
from restow.checkpoint import survey
from restow.entries import Entry

E, D, WIDTHS = 12, 10, (7, 5)
AT = "model.layers.{}.mlp.experts"


@pytest.fixture
def tensors() -> Tensors:
    numbers = torch.arange(1 << 16).mul(2654435761).bitwise_and(0x3FFF).sub(0x2000).div(64).bfloat16()
    found: Tensors = {}
    used = 0

    def put(name: str, *shape: int) -> None:
        nonlocal used
        count = torch.Size(shape).numel()
        found[name], used = numbers[used : used + count].view(shape).clone(), used + count

    for layer in range(2):
        for e in range(2 * E):
            f = WIDTHS[e // E]
            put(f"{AT.format(layer)}.{e}.gate_proj.weight", f, D)
            put(f"{AT.format(layer)}.{e}.up_proj.weight", f, D)
            put(f"{AT.format(layer)}.{e}.down_proj.weight", D, f)
        put(f"model.layers.{layer}.mlp.gate.weight", D, E)
        put(f"model.layers.{layer}.mlp.gate.weight_1", D, E)
    put("model.embed_tokens.weight", 13, D)
    put("model.norm.weight", D)
    put("lm_head.weight", 13, D)
    return found


@pytest.fixture
def folder(tensors: Tensors, tmp_path: Path) -> Path:
    text = {"moe_num_experts": [E, E], "moe_intermediate_size": list(WIDTHS), "hidden_size": D}
    config = {"model_type": "ernie4_5_vl_moe", "tie_word_embeddings": False,
              "text_config": {**text, "num_hidden_layers": 2, "tie_word_embeddings": False}}  # fmt: skip
    (tmp_path / "vl").mkdir()
    save_file(tensors, tmp_path / "vl" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "vl" / "config.json").write_text(json.dumps(config))
    return tmp_path / "vl"


def loaded(folder: Path) -> Tensors:
    state = {
        t.name: torch.full(t.shape, -1, dtype=torch.bfloat16) for t in restow.plan(folder).targets
    }  # grouped
    assert restow.load(folder, state, check=True, strict=True).warnings == ()
    return state


def test_a_load_of_both_banks_is_proved(folder: Path, tensors: Tensors) -> None:
    state = loaded(folder)
    for layer in range(2):
        second = state[f"{AT.format(layer)}.bank2.gate_and_up_projs"]
        for e in range(E):
            gate, up = (tensors[f"{AT.format(layer)}.{E + e}.{p}_proj.weight"] for p in ("gate", "up"))
            assert torch.equal(second[e], torch.cat([gate, up]).t())


def test_each_bank_has_numbers_of_its_own(folder: Path) -> None:
    state = loaded(folder)
    wanted = restow.fingerprint(folder)
    experts = [key for key in wanted if ".experts." in key]
    assert len(experts) == 2 * 2 * E * 3 and sum(".bank2." in key for key in experts) == 2 * E * 3
    assert restow.fingerprint(state, family="ernie4_5_vl_moe") == wanted
    state[f"{AT.format(1)}.bank2.down_projs"][3, 2, 1] += 1
    found = restow.fingerprint(state, family="ernie4_5_vl_moe")
    assert [key.split("layers.")[1] for key in wanted if found[key] != wanted[key]] == [
        "1.experts.bank2.3.down"
    ]


def test_widths_follow_from_the_shapes_where_no_config_tells(folder: Path, tensors: Tensors) -> None:
    state = loaded(folder)
    back = restow.relayout(state, dst="hf", family="ernie4_5_vl_moe")
    assert differing({n: t.contiguous() for n, t in back.items()}, tensors) == []
    state[f"{AT.format(0)}.bank2.down_projs"] = torch.ones(E, WIDTHS[1] + 1, D, dtype=torch.bfloat16)
    with pytest.raises(restow.errors.ShapeMismatchError) as caught:
        restow.relayout(state, dst="hf", family="ernie4_5_vl_moe")
    assert f"bank2.down_projs [{E}, {WIDTHS[1] + 1}, {D}], expected [{E}, {WIDTHS[1]}, {D}]" in str(
        caught.value
    )


@pytest.mark.parametrize("chosen", [[2, 0, 5, 1], [3, 3], list(range(E))[::-1]])
def test_chosen_experts_are_numbered_anew_in_both_banks(
    chosen: list[int], folder: Path, tensors: Tensors, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["moe_num_experts"] = E  # one number for both, as transformers writes it
    (folder / "config.json").write_text(json.dumps(config))
    restow.convert(folder, tmp_path / "cut", to="hf", experts=chosen)
    found = load_file(tmp_path / "cut" / "model.safetensors")
    wanted = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    for layer in range(2):
        wanted |= {
            f"{AT.format(layer)}.{bank * len(chosen) + new}.{p}_proj.weight":
                tensors[f"{AT.format(layer)}.{bank * E + old}.{p}_proj.weight"]
            for bank in range(2) for new, old in enumerate(chosen) for p in ("gate", "up", "down")
        }  # fmt: skip
        names = [f"model.layers.{layer}.mlp.gate.weight{end}" for end in ("", "_1")]
        wanted |= {name: tensors[name][:, chosen] for name in names}
    assert differing(found, wanted) == []
    assert restow.open(tmp_path / "cut").problems == ()
    whole = {n: t for n, t in loaded(folder).items() if ".experts." in n}
    state = loaded(tmp_path / "cut")
    assert all(torch.equal(state[name], tensor[chosen]) for name, tensor in whole.items())


STACKED = """
    in      a.up_down        e (p f) d
    out     a.down           e d f
    wide    b.up_down        e (p f) d
    narrow  b.down           e d f
"""
TURNED = """
    in      {e}.{p:gate|up}   f d
    out     {e}.down          d f
    wide    w{e}.{p:gate|up}  f d
    narrow  w{e}.down         d f
"""
OWN = "f@wide = widths.1\nf@narrow = widths.1\n"


def banks_of(widths: tuple[int, int]) -> Tensors:
    shapes = {"a.up_down": (3, 14, 4), "a.down": (3, 4, 7),
              "b.up_down": (3, 2 * widths[0], 4), "b.down": (3, 4, widths[1])}  # fmt: skip
    return {f"x.experts.{name}": torch.randn(shape) for name, shape in shapes.items()}


def test_a_layouts_own_lines_say_which_roles_have_widths_of_their_own() -> None:
    state = banks_of((5, 5))
    out = restow.relayout(state, src=restow.Layout.parse(STACKED + OWN), dst=restow.Layout.parse(TURNED))
    assert torch.equal(out["x.experts.w2.up"], state["x.experts.b.up_down"][2, 5:])
    assert torch.equal(out["x.experts.w2.down"], state["x.experts.b.down"][2])


@pytest.mark.parametrize(
    ("lines", "widths", "expected"),
    [
        ("", (5, 5), "b.up_down [3, 10, 4], expected [3, 14, 4]"),
        (OWN, (5, 6), "b.down [3, 4, 6], expected [3, 4, 5]"),
        (OWN.replace("f@narrow = widths.1", "f@narrow = widths.0"), (5, 6), ""),
    ],
    ids=["no role has one", "one for both", "one each"],
)
def test_widths_are_one_where_their_lines_say_the_same(
    lines: str, widths: tuple[int, int], expected: str
) -> None:
    layout = restow.Layout.parse(STACKED + lines)
    found = survey({n: Entry("F32", tuple(t.shape), ()) for n, t in banks_of(widths).items()}, layout=layout)
    assert (expected in str(found.problems[0].error)) if expected else found.problems == ()


def test_digests_of_leaves_are_alike_in_both_layouts(folder: Path, tmp_path: Path) -> None:
    for name, to in (("grouped", "grouped"), ("hf", "hf")):
        restow.convert(folder, tmp_path / name, to=to)
        assert restow.verify(folder, tmp_path / name).equal
    found = [
        json.loads((tmp_path / name / "checkpoint.manifest.json").read_text())["leaves"]
        for name in ("grouped", "hf")
    ]
    assert found[0] == found[1] and sum(".bank2." in key for key in found[0]) == 2 * E * 3


def test_an_expert_of_zeros_is_told_in_either_bank(folder: Path, tensors: Tensors, tmp_path: Path) -> None:
    empty = [
        f"{AT.format(1)}.{e}.{word}_proj.weight" for e, word in ((3, "up"), (E + 3, "up"), (E + 4, "down"))
    ]
    for name in empty:
        tensors[name].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = restow.convert(folder, tmp_path / "out", to="grouped")
    (told,) = report.warnings
    assert [name for name in tensors if f"{name}: only zeros" in told] == empty
    (told,) = restow.verify(folder).warnings
    assert [name for name in tensors if f"{name}: only zeros" in told] == empty
