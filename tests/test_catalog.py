"""The catalogue against transformers: what its tables say of names, shapes, routers and halves, models show.

Nothing here takes a fact from the tables: names come from saved files and state dicts, the pairs of the two
by equal bytes, gate and up by calling the experts. Each oracle is shown to notice a table that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from einops import rearrange
from safetensors.torch import load_file

import tiny
from restow import catalog
from restow.checkpoint import Checkpoint, survey
from restow.entries import Entry, Piece
from restow.errors import AmbiguousLayoutError, ConfigError, ShapeMismatchError
from restow.family import Family, parse_family
from restow.known import FAMILIES
from restow.layout import Layout, shape_of
from restow.named import FORMS
from restow.opening import open_checkpoint

Tensors = dict[str, torch.Tensor]

IDS = [
    pytest.param(family_id, marks=pytest.mark.slow if family.slow else ())
    for family_id, family in tiny.FAMILIES.items()
]
FORM = pytest.mark.parametrize("hub", [True, False], ids=["hub", "runtime"])
SIZE = pytest.mark.parametrize("sizes", tiny.SIZES)
UNGATED = {"nemotron_h", "nemotron_h-latent"}
EXPERTS_BELOW = {  # what an experts module is called below its layer: in transformers' hub form, in memory
    "mixtral": ("block_sparse_moe.experts", "mlp.experts"),
    "minimax_m2": ("block_sparse_moe.experts", "mlp.experts"),
    "jamba": ("feed_forward.experts", "feed_forward.experts"),
    "llama4_text": ("feed_forward.experts", "feed_forward.experts"),
    "llama4": ("feed_forward.experts", "feed_forward.experts"),
    "granitemoe": ("block_sparse_moe", "block_sparse_moe.experts"),
    "step3p7": ("moe", "mlp.experts"),
    "dbrx": ("ffn.experts.mlp", "ffn.experts.mlp"),
    "gemma4_text": ("experts", "experts"),
    "gemma4": ("experts", "experts"),
    "nemotron_h": ("mixer.experts", "mixer.experts"),
    "nemotron_h-latent": ("mixer.experts", "mixer.experts"),
}
CALLED = {  # what the layout of the two forms is called
    "qwen3_5_moe_text": (("split",), ("hf", "fused")),
    "qwen3_5_moe": (("split",), ("hf", "fused")),
    "qwen3_vl_moe": (("fused",), ("fused",)),
    "gpt_oss": (("hf", "interleaved_in_major"),) * 2,
    "llama4_text": (("hf", "fused_in_major"),) * 2,
    "llama4": (("hf", "fused_in_major"),) * 2,
    "granitemoe": (("hf",), ("fused",)),
    "step3p7": (("hf", "stacked_linear"), ("fused",)),
    "dbrx": (("hf", "flat"),) * 2,
    "gemma4_text": (("hf", "fused"),) * 2,
    "gemma4": (("hf", "fused"),) * 2,
    "aria_text": (("hf",), ("fused_in_major",)),
    "aria": (("hf",), ("fused_in_major",)),
}
ROUTERS = {  # router tensors of a layer with experts; one where it is not said
    "minimax_m2": 2, "deepseek_v3": 2, "deepseek_v3-deep": 2, "glm4_moe": 2, "gpt_oss": 2, "step3p7": 2,
    "gemma4_text": 2, "gemma4": 2, "nemotron_h": 2, "nemotron_h-latent": 2,
}  # fmt: skip


@cache
def state(family_id: str) -> Tensors:
    return dict(tiny.build(family_id).state_dict())


@cache
def expert_layers(family_id: str) -> tuple[str, ...]:
    """The layers that have experts, as the model in memory calls them."""
    below = EXPERTS_BELOW.get(family_id, ("", "mlp.experts"))[1]
    modules = dict(tiny.build(family_id).named_modules())
    return tuple(path.removesuffix(f".{below}") for path in modules if path.endswith(f".{below}"))


def read(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def family_of(family_id: str) -> Family:
    return FAMILIES[tiny.config(family_id).model_type]


def entries(tensors: Mapping[str, torch.Tensor] | Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Names and shapes as a checkpoint's tensors."""
    found = {}
    for name, tensor in tensors.items():
        shape = tuple(getattr(tensor, "shape", tensor))
        found[name] = Entry("F32", shape, (Piece(tuple((0, n) for n in shape), "memory", 0, 0),))
    return found


# Structure.


def test_the_catalogue_is_tables_only() -> None:
    for path in Path(catalog.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(def|if|for|class|lambda)\b", text, re.M), path
        assert text.isascii()


def test_every_model_type_stands_once() -> None:
    types = [name for table in catalog.TABLES for name in parse_family(table).model_types]
    assert len(set(types)) == len(types) == len(FAMILIES)
    assert {tiny.config(family_id).model_type for family_id in tiny.FAMILIES} <= set(types)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_table_is_whole(model_type: str) -> None:
    family = FAMILIES[model_type]
    assert family.spellings[0].names[0] == "hf"
    layered = () if model_type in ("nllb-moe", "switch_transformers") else ("L",)  # an encoder and a decoder
    assert {"e", "f", "d", *layered} <= {line.key for line in family.sizes}
    assert family.routers
    assert len([name for name in family.required if not name.startswith("?")]) == 2
    assert len([name for name in family.required if name.startswith("?")]) == 1
    for spelling in family.spellings:
        assert spelling.container in family.containers[0]
        assert Layout.parse(str(spelling.layout)) == spelling.layout
    for name in family.form_names():
        layout = family.form(name)
        assert Layout.parse("\n".join(map(str, layout.rows))).rows == layout.rows
        assert {"in", "out"} <= set(layout.roles)
    sizes = {"e": 3, "E": 3, "f": 4, "f@in2": 5, "f@out2": 5, "d": 6, "p": len(family.labels)}
    for name in ("hf", *FORMS):  # one count of elements, however they are laid out
        count = sum(torch.Size(s).numel() for s in family.form(name).shapes(sizes).values())
        assert count == sum(torch.Size(s).numel() for s in family.form("grouped").shapes(sizes).values())


def test_what_forms_are_in_a_familys_order() -> None:
    assert "in gate_and_up_projs e d (f p)" in map(str, FAMILIES["gpt_oss"].form("grouped").rows)
    assert "in.bias gate_up_proj_bias e (f p)" in map(str, FAMILIES["gpt_oss"].form("fused").rows)
    assert "in gate_up_proj e (p f) d" in map(str, FAMILIES["llama4"].form("fused").rows)
    assert "in {e}.{p:up}_proj.weight f d" in map(str, FAMILIES["nemotron_h"].form("split").rows)
    assert "in {p:up}_proj e f d" in map(str, FAMILIES["nemotron_h"].form("fused").rows)
    assert "in {e}.w{p:1|3}.weight f d" in map(str, FAMILIES["mixtral"].form("split").rows)


# Against transformers.


@FORM
@SIZE
@pytest.mark.parametrize("family_id", IDS)
def test_every_experts_module_is_found(family_id: str, sizes: str, hub: bool) -> None:
    found = open_checkpoint(tiny.saved(family_id, hub, sizes))
    check_modules(found, family_id, sizes, hub)
    names = set(read(tiny.saved(family_id, hub, sizes)))
    assert set(found.expert_tensors) == {name for name in names if is_expert(name, family_id, hub)}


def check_modules(found: Checkpoint, family_id: str, sizes: str, hub: bool) -> None:
    assert not found.problems, [str(problem.error) for problem in found.problems]
    below = EXPERTS_BELOW.get(family_id, ("mlp.experts", "mlp.experts"))[not hub]
    called = CALLED.get(family_id, (("hf", "split"), ("fused",)))[not hub]
    renamed = {layer: layer for layer in expert_layers(family_id)}
    if hub:
        renamed = {layer: on_the_hub(family_id, layer) for layer in renamed}
    assert set(found.modules) == {f"{layer}.{below}" for layer in renamed.values()}
    wanted = {"e": tiny.EXPERTS, "p": 1 if family_id in UNGATED else 2, **tiny.SIZES[sizes]}
    for module in found.modules.values():
        assert module.names == called
        assert {axis: module.sizes[axis] for axis in wanted} == wanted
    assert found.sizes["L"] == tiny.FAMILIES[family_id].layers
    assert len(found.routers) == ROUTERS.get(family_id, 1) * len(renamed)
    for name, row in found.routers.items():
        assert found.tensors[name].shape == shape_of(row, found.sizes)


def on_the_hub(family_id: str, layer: str) -> str:
    """A layer's path in the hub form: the one that holds the same attention or norm, found by its bytes."""
    pairs = hub_names(family_id)
    inside = next(name for name in state(family_id) if name.startswith(f"{layer}.") and "norm" in name)
    tail = inside.removeprefix(layer)
    assert pairs[inside].endswith(tail)
    return pairs[inside].removesuffix(tail)


@cache
def hub_names(family_id: str) -> dict[str, str]:
    """A tensor's name in memory -> its name in the hub form, where shape and bytes are the same."""
    by_bytes = {
        (tuple(t.shape), t.numpy().tobytes()): name for name, t in read(tiny.saved(family_id)).items()
    }
    tied = tiny.build(family_id).all_tied_weights_keys  # a tied head is the embedding under another name
    untied = {name: tensor for name, tensor in state(family_id).items() if name not in tied}
    keys = {name: (tuple(t.shape), t.contiguous().numpy().tobytes()) for name, t in untied.items()}
    return {name: by_bytes[key] for name, key in keys.items() if key in by_bytes}


def is_expert(name: str, family_id: str, hub: bool) -> bool:
    """Whether a saved tensor is an expert weight, by its name alone and without a table."""
    if family_id == "granitemoe" and hub:
        return bool(re.search(r"block_sparse_moe\.(in|out)put_linear\.weight$", name))
    if family_id == "step3p7" and hub:
        return bool(re.search(r"\.moe\.(gate|up|down)_proj\.weight$", name))
    return bool(re.search(r"\.experts\.", name))


@pytest.mark.parametrize("family_id", IDS)
def test_detection_needs_no_file(family_id: str) -> None:
    """A state dict and its config give the same modules as the file that holds them."""
    config = tiny.config(family_id).to_dict()
    found = survey(entries(state(family_id)), family=family_of(family_id), config=config)
    check_modules(found, family_id, "plain", hub=False)


VISION_IN_PROJ = re.compile(r"vision_model\.transformer\.resblocks\.\d+\.attn\.in_proj_(weight|bias)")


@pytest.mark.parametrize("family_id", IDS)
def test_names_on_the_hub_lead_to_names_in_memory(family_id: str) -> None:
    check_names(family_of(family_id), family_id)


def check_names(family: Family, family_id: str) -> None:
    pairs = hub_names(family_id)
    others = [name for name in read(tiny.saved(family_id)) if not is_expert(name, family_id, True)]
    unpaired = [name for name in others if name not in pairs.values()]
    assert all(VISION_IN_PROJ.fullmatch(name) for name in unpaired), unpaired  # fused and permuted: no rename
    for memory, hub in pairs.items():
        if not is_expert(memory, family_id, False):
            assert family.canonical(hub) == family.canonical(memory)
    for memory in state(family_id):
        assert family.canonical(memory) == memory
    hub_paths = sorted(open_checkpoint(tiny.saved(family_id), family=family).modules)
    memory_paths = sorted(open_checkpoint(tiny.saved(family_id, False), family=family).modules)
    assert [family.place(path) for path in hub_paths] == [family.place(path) for path in memory_paths]
    assert len({family.place(path) for path in hub_paths}) == len(expert_layers(family_id))
    for path in hub_paths:
        assert not is_expert(f"{family.layer(path)}.x", family_id, True)


@pytest.mark.parametrize("family_id", IDS)
def test_required_and_tied_names(family_id: str) -> None:
    """The required names are there; the head goes exactly where the family says that its config ties it."""
    family = family_of(family_id)
    head = next(name[1:] for name in family.required if name.startswith("?"))
    for tie in (None, True, False):
        if family_id == "dbrx" and tie:
            continue  # its config refuses that
        config = tiny.config(family_id, tie=tie).to_dict()
        for original in (True, False):
            names = {family.canonical(name) for name in saved_names(family_id, tie, original)}
            for name in family.required:
                if not name.startswith("?"):
                    assert family.canonical(name) in names
            assert (family.canonical(head) not in names) == family.ties(config)


@cache
def saved_names(family_id: str, tie: bool | None, original: bool) -> frozenset[str]:
    if tie is None:
        return frozenset(read(tiny.saved(family_id, original)))
    folder = tiny.saved(family_id).parent / f"{family_id}-{tie}-{original}"
    return frozenset(read(tiny.save(tiny.build(family_id, tie=tie), folder, original)))


BY_META = [
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "flex_olmo",
    "granitemoeshared",
    "granitemoehybrid",
]


@pytest.mark.parametrize("model_type", BY_META)
def test_model_types_that_share_a_table(model_type: str) -> None:
    """Real configs cut to four layers, on the meta device: modules, sizes, routers and required names."""
    config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=4)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    family = FAMILIES[model_type]
    found = survey(entries(model.state_dict()), family=family, config=config.to_dict())
    assert not found.problems, [str(problem.error) for problem in found.problems]
    assert len(found.modules) == sum(path.endswith(".experts") for path, _ in model.named_modules()) > 0
    assert {module.names for module in found.modules.values()} == {("fused",)}
    biases = [name for name, _ in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(found.routers) == len(found.modules) + len(biases)
    assert {name.lstrip("?") for name in family.required} <= set(model.state_dict())
    for path, module in found.modules.items():
        up, down = model.get_submodule(path).gate_up_proj.shape, model.get_submodule(path).down_proj.shape
        assert up == (module.sizes["e"], 2 * module.sizes["f"], module.sizes["d"])
        assert down == (module.sizes["e"], module.sizes["d"], module.sizes["f"])


TIE_RULES = [  # top-level key, text config's key, tied: as transformers 5.23 ties what it builds from them
    ("qwen3_5_moe", True, False, True), ("qwen3_5_moe", False, True, False),
    ("qwen3_5_moe", None, True, False), ("qwen3_vl_moe", None, True, False),
    ("aria", None, True, False), ("step3p7", None, True, False),
    ("gemma4", None, False, True), ("gemma4", False, True, False), ("gemma4", True, False, True),
    ("llama4", True, False, False), ("llama4", False, True, True), ("llama4", None, None, False),
    ("nemotron_h", True, None, False), ("gemma4_text", None, None, True), ("mixtral", None, None, False),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "top", "text", "tied"), TIE_RULES)
def test_which_key_ties(model_type: str, top: bool | None, text: bool | None, tied: bool) -> None:
    config: dict[str, Any] = {} if top is None else {"tie_word_embeddings": top}
    if text is not None:
        config["text_config"] = {"tie_word_embeddings": text}
    assert FAMILIES[model_type].ties(config) is tied


# What the numbers mean: the layouts' axes, by values.


def logical(found: Checkpoint, tensors: Tensors, role: str) -> dict[object, torch.Tensor]:
    """Each module's weights of a role as [e, p, f, d] (`in`) or [e, d, f] (`out`), by its rows and einops."""
    out = {}
    assert found.family is not None
    order = "e p f d" if role == "in" else "e d f"
    for path, module in found.modules.items():
        row = module.layout.row(role)
        names = module.tensors[role]
        lengths = {axis: module.sizes[axis] for axis in row.name_axes}
        whole = torch.stack([tensors[name] for name in names if name is not None])
        if row.name_axes == ("e", "p"):
            whole = rearrange(whole, "(e p) ... -> e p ...", e=lengths["e"])
        held = " ".join([*row.name_axes] if row.name_axes else ["1"])
        dims = " ".join(map(str, row.dims))
        lengths |= {axis: module.sizes[axis] for axis in "epfd" if re.search(rf"\b{axis}\b", dims)}
        target = order.replace("p", "p" if re.search(r"\bp\b", f"{held} {dims}") else "1")
        out[found.family.place(path)] = rearrange(whole, f"{held} {dims} -> {target}", **lengths)
    return out


@pytest.mark.parametrize("family_id", IDS)
def test_both_forms_hold_the_same_weights(family_id: str) -> None:
    check_weights(family_of(family_id), family_id)


def check_weights(family: Family, family_id: str) -> None:
    folders = [tiny.saved(family_id, hub) for hub in (True, False)]
    for role in ("in", "out"):
        a, b = (logical(open_checkpoint(f, family=family), read(f), role) for f in folders)
        assert a.keys() == b.keys()
        for place, weights in a.items():
            assert torch.equal(weights, b[place]), (place, role)


@pytest.mark.parametrize("family_id", IDS)
def test_halves_and_experts_do_what_the_rows_say(family_id: str) -> None:
    check_meaning(family_of(family_id), family_id)


def check_meaning(family: Family, family_id: str) -> None:
    """An expert's output is linear in up and not in gate; an expert's `in` and `out` belong to one expert.

    Scaling by powers of two is exact. Without a gate the activation squares; gpt_oss adds one to up, so there
    zeros (biases too) do what scaling does elsewhere.
    """
    bench = Bench(family, family_id)
    every, half = range(tiny.EXPERTS), range(1, tiny.EXPERTS, 2)
    original = bench.output({}, ())
    assert original.any()
    if family_id == "gpt_oss":
        assert not bench.output({("in", 0): 0.0}, every).any()
        assert bench.output({("in", 1): 0.0}, every).any()
        pair = [({("in", 0): 0.0}, half), ({("out", 0): 0.0}, half)]
    elif family_id in UNGATED:
        pair = [({("in", 0): 2.0}, half), ({("out", 0): 4.0}, half)]
    else:
        assert torch.equal(bench.output({("in", 1): 2.0}, every), 2 * original)
        assert not torch.equal(bench.output({("in", 0): 2.0}, every), 2 * original)
        pair = [({("in", 1): 2.0}, half), ({("out", 0): 2.0}, half)]
    by_in, by_out = (bench.output(factors, experts) for factors, experts in pair)
    assert torch.equal(by_in, by_out)
    assert not torch.equal(by_in, original)


class Bench:
    """The first experts module of a model, run with some of its weights scaled, found by its layout."""

    def __init__(self, family: Family, family_id: str) -> None:
        self.model = tiny.build(family_id)
        found = survey(entries(state(family_id)), family=family, config=tiny.config(family_id).to_dict())
        path, self.module = next(iter(found.modules.items()))
        self.experts = self.model.get_submodule(path.removesuffix(".mlp") if family_id == "dbrx" else path)
        self.held = dict(self.model.named_parameters())
        if "out.bias" in self.module.layout.roles:
            self.held[f"{path}.down_proj_bias"].data.zero_()

    def output(self, factors: Mapping[tuple[str, int], float], experts: Iterable[int]) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        kept = {
            name: self.held[name].detach().clone() for names in self.module.tensors.values() for name in names
        }
        for (role, label), factor in factors.items():
            for each in (role, f"{role}.bias"):
                if each in self.module.layout.roles:
                    for expert in experts:
                        self._part(each, label, expert).mul_(factor)
        hook = self.experts.register_forward_hook(lambda _module, _input, output: seen.append(output.clone()))
        tiny.logits(self.model)
        hook.remove()
        for name, tensor in kept.items():
            self.held[name].data.copy_(tensor)
        return seen[0].detach()

    def _part(self, role: str, label: int, expert: int) -> torch.Tensor:
        """A view of one expert's matrix (or bias) of one label."""
        row, names = self.module.layout.row(role), self.module.tensors[role]
        dims = " ".join(map(str, row.dims))
        inside = [axis for axis in "epfd" if re.search(rf"\b{axis}\b", dims)]
        sizes = {"e": tiny.EXPERTS} | ({"p": self.module.sizes["p"]} if "p" in inside else {})
        name = names[label if "p" in row.name_axes else 0]
        assert name is not None
        view = rearrange(self.held[name].data, f"{dims} -> {' '.join(inside)}", **sizes)[expert]
        return view[label] if "p" in inside else view


# The oracles can fail: tables with one mistake each.


def table_of(model_type: str) -> str:
    return next(table for table in catalog.TABLES if model_type in parse_family(table).model_types)


def wrong(model_type: str, old: str, new: str) -> Family:
    table = table_of(model_type)
    assert table.count(old) == 1, old
    return parse_family(table.replace(old, new))


@pytest.mark.parametrize(
    ("family_id", "old", "new", "check"),
    [
        ("mixtral", "w{p:1|3}", "w{p:3|1}", check_weights),
        ("mixtral", "rename    block_sparse_moe mlp", "rename    block_sparse_moe moe", check_names),
        ("granitemoe", "rename    block_sparse_moe.router.layer block_sparse_moe.router", "", check_names),
        ("granitemoe", "input_linear.weight    e (p f) d", "input_linear.weight    e (f p) d", check_weights),
        ("dbrx", "{p:w1|v1}", "{p:v1|w1}", check_meaning),
        ("dbrx", "w2          (e f) d", "w2          (f e) d", check_meaning),
        ("llama4", "e d (p f)", "e d (f p)", check_meaning),
        ("gpt_oss", "gate_up_proj        e d (f p)", "gate_up_proj        e d (p f)", check_meaning),
        ("step3p7", "rename    share_expert mlp.shared_experts", "", check_names),
        ("step3p7", "{p:gate|up}_proj.weight", "{p:up|gate}_proj.weight", check_weights),
        ("nemotron_h", "^backbone model", "^backbone network", check_names),
        ("aria", "^language_model.model model", "language_model model", check_names),
    ],
)
def test_a_wrong_table_is_noticed(
    family_id: str, old: str, new: str, check: Callable[[Family, str], None]
) -> None:
    check(family_of(family_id), family_id)
    with pytest.raises((AssertionError, StopIteration)):
        check(wrong(family_id, old, new), family_id)


@pytest.mark.parametrize(
    ("family_id", "old", "new"),
    [
        ("mixtral", "block_sparse_moe.gate.weight", "block_sparse_moe.router.weight"),
        ("deepseek_v3", "router.bias   mlp.gate.e_score_correction_bias   e    exact", ""),
        ("qwen2_moe", "moe_intermediate_size", "intermediate_size"),
        ("jamba", "num_hidden_layers", "mamba_d_state"),
        ("nemotron_h-latent", "moe_latent_size|hidden_size", "hidden_size"),
        ("nemotron_h-latent", "mixer.gate.weight                    e h", "mixer.gate.weight e d"),
    ],
)
def test_a_wrong_size_or_router_is_noticed(family_id: str, old: str, new: str) -> None:
    family = wrong(tiny.config(family_id).model_type, old, new)
    found = open_checkpoint(tiny.saved(family_id), family=family)
    with pytest.raises(AssertionError):
        check_modules(found, family_id, "plain", hub=True)


# Traps.


def vendor_vl(d: int, f: int) -> dict[str, tuple[int, ...]]:
    """Qwen3-VL-MoE as its vendor stores it; transformers 5.23 writes the other orientation so called."""
    at = "model.language_model.layers.0.mlp."
    return {
        f"{at}gate.weight": (12, d),
        f"{at}experts.gate_up_proj": (12, d, 2 * f),
        f"{at}experts.down_proj": (12, f, d),
        "model.language_model.embed_tokens.weight": (56, d),
        "model.language_model.norm.weight": (d,),
        "lm_head.weight": (56, d),
    }


def text_config(d: int | None, f: int | None) -> dict[str, Any]:
    text = {"num_experts": 12, "hidden_size": d, "moe_intermediate_size": f, "num_hidden_layers": 1}
    return {"model_type": "qwen3_vl_moe", "text_config": text}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("d", "f"), [(32, 24), (32, 16), (32, 32)])
def test_two_orientations_under_one_name(d: int, f: int, known: bool) -> None:
    """Both projections together decide, with a config or without: a square gate_up is not looked at alone."""
    config = text_config(d, f) if known else {"model_type": "qwen3_vl_moe"}
    family, shapes = FAMILIES["qwen3_vl_moe"], vendor_vl(d, f)
    vendor = survey(entries(shapes), family=family, config=config)
    at = "model.language_model.layers.0.mlp.experts"
    assert not [p for p in vendor.problems if p.fatal], [str(p.error) for p in vendor.problems]
    assert vendor.modules[at].names == ("hf", "fused_in_major")
    turned = {n: (12, s[2], s[1]) if ".experts." in n else s for n, s in shapes.items()}
    saved = survey(entries(turned), family=family, config=config)
    assert saved.modules[at].names == ("fused",)
    assert [saved.modules[at].sizes[axis] for axis in "efd"] == [12, f, d]


def test_one_projection_turned_is_refused() -> None:
    shapes = {**vendor_vl(32, 24), "model.language_model.layers.0.mlp.experts.down_proj": (12, 32, 24)}
    found = survey(entries(shapes), family=FAMILIES["qwen3_vl_moe"], config=text_config(32, 24))
    fatal = [p.error for p in found.problems if p.fatal]
    assert [type(error) for error in fatal] == [ShapeMismatchError]
    assert "hf/fused_in_major" in str(fatal[0])
    assert "fused" in str(fatal[0])


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("d", [32, 48])
def test_gpt_oss_with_a_square_down(d: int, quantised: bool) -> None:
    """Down is square, as in the released models: gate_up tells which orientation it is."""
    at = "model.layers.0.mlp.experts"
    biases = {f"{at}.gate_up_proj_bias": (12, 2 * d), f"{at}.down_proj_bias": (12, d)}
    config = {"num_local_experts": 12, "intermediate_size": d, "hidden_size": d}
    in_major = {f"{at}.gate_up_proj": (12, d, 2 * d), f"{at}.down_proj": (12, d, d), **biases}
    out_major = {f"{at}.gate_up_proj": (12, 2 * d, d), f"{at}.down_proj": (12, d, d), **biases}
    found = survey(entries(out_major if quantised else in_major), family=FAMILIES["gpt_oss"], config=config)
    called = ("fused",) if quantised else ("hf", "interleaved_in_major")
    assert found.modules[at].names == called


UNDECIDABLE = """
    family    made_up
    size      e = num_experts
    order     up p f
    module    mlp.experts
    spelling  hf
              in    {p:up}_proj   e d f
              out   down_proj     e f d
    spelling  turned
              in    {p:up}_proj   e f d
              out   down_proj     e d f
"""


def test_two_layouts_that_fit_are_listed() -> None:
    """Ungated and square, both orientations fit: an error, and no guess."""
    shapes = {"l.0.mlp.experts.up_proj": (12, 32, 32), "l.0.mlp.experts.down_proj": (12, 32, 32)}
    found = survey(entries(shapes), family=parse_family(UNDECIDABLE), config={"num_experts": 12})
    errors = [p.error for p in found.problems if isinstance(p.error, AmbiguousLayoutError)]
    assert len(errors) == 1
    assert str(errors[0]) == (
        "expected one layout for l.0.mlp.experts, found 2 that fit its names and shapes\n"
        "  layouts   hf: in   {p:up}_proj  e d f; out  down_proj    e f d\n"
        "            turned: in   {p:up}_proj  e f d; out  down_proj    e d f\n"
        "  tensors   l.0.mlp.experts.down_proj [12, 32, 32]\n"
        "            l.0.mlp.experts.up_proj [12, 32, 32]\n"
        "  try       say which one with layout=NAME (on the command line --layout NAME)"
    )
    assert not found.modules
    oblong = {"l.0.mlp.experts.up_proj": (12, 32, 24), "l.0.mlp.experts.down_proj": (12, 24, 32)}
    both = survey(entries(oblong), family=parse_family(UNDECIDABLE), config={"num_experts": 12})
    assert [type(p.error) for p in both.problems if p.fatal] == [AmbiguousLayoutError]  # no size says which
    sized = parse_family(UNDECIDABLE + "    size d = hidden_size\n")
    one = survey(entries(oblong), family=sized, config={"num_experts": 12, "hidden_size": 32})
    assert one.modules["l.0.mlp.experts"].names == ("hf",)


def test_one_layer_that_fits_another_order_of_dims_is_not_believed() -> None:
    """down_proj of one layer transposed, where gate and up are square: it fits the layout of other files."""
    config = {"num_local_experts": 12, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3}
    shapes = {f"model.layers.{i}.mlp.experts.gate_up_proj": (12, 32, 32) for i in range(3)}
    shapes |= {f"model.layers.{i}.mlp.experts.down_proj": (12, 16, 32) for i in range(3)}
    shapes |= {
        f"model.layers.{i}.mlp.experts.{n}_proj_bias": (12, 32) for i in range(3) for n in ("gate_up", "down")
    }
    good = survey(entries(shapes), family=FAMILIES["gpt_oss"], config=config)
    assert not good.problems
    assert len(good.modules) == 3
    shapes["model.layers.1.mlp.experts.down_proj"] = (12, 32, 16)
    (problem,) = survey(entries(shapes), family=FAMILIES["gpt_oss"], config=config).problems
    assert problem.fatal
    assert isinstance(problem.error, AmbiguousLayoutError)
    assert str(problem.error) == (
        "expected experts of one order of dims, as model.layers.0.mlp.experts has, found another in "
        "model.layers.1.mlp.experts\n"
        "  tensors   model.layers.1.mlp.experts.gate_up_proj [12, 32, 32]\n"
        "            model.layers.1.mlp.experts.down_proj [12, 32, 16]\n"
        "            model.layers.1.mlp.experts.gate_up_proj_bias [12, 32]\n"
        "            model.layers.1.mlp.experts.down_proj_bias [12, 32]\n"
        "  fit       in        gate_up_proj       e (f p) d\n"
        "            out       down_proj          e d f\n"
        "            in.bias   gate_up_proj_bias  e (f p)\n"
        "            out.bias  down_proj_bias     e d\n"
        "  usual     in        gate_up_proj       e d (f p)\n"
        "            out       down_proj          e f d\n"
        "            in.bias   gate_up_proj_bias  e (f p)\n"
        "            out.bias  down_proj_bias     e d\n"
        "  try       one of them was transposed: get the file again; layout=NAME (--layout NAME) says how all are read"
    )


def test_layers_counted_by_a_list() -> None:
    family = FAMILIES["nemotron_h"]
    assert family.read_sizes({"layers_block_type": ["moe"] * 7})["L"] == 7
    assert family.read_sizes({"hybrid_override_pattern": "MEM*E"})["L"] == 5
    assert family.read_sizes({"num_hidden_layers": 9, "hybrid_override_pattern": "MEM*E"})["L"] == 9
    assert "L" not in family.read_sizes({})
    with pytest.raises(ConfigError, match="layers_block_type"):
        family.read_sizes({"layers_block_type": 0})


def test_prediction_blocks_may_be_in_another_layout() -> None:
    """Qwen3.5's files: a stacked trunk, and a block past it with one tensor per expert."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.language_model.layers.0.mlp.experts.gate_up_proj": (4, 16, 32),
        "model.language_model.layers.0.mlp.experts.down_proj": (4, 32, 8),
    }
    for e in range(4):
        at = f"mtp.layers.0.mlp.experts.{e}"
        shapes |= {f"{at}.{p}_proj.weight": (8, 32) for p in ("gate", "up")} | {
            f"{at}.down_proj.weight": (32, 8)
        }
    text = {"num_experts": 4, "hidden_size": 32, "moe_intermediate_size": 8}
    found = survey(entries(shapes), family=FAMILIES["qwen3_5_moe"], config={"text_config": text})
    assert {path: module.names for path, module in found.modules.items()} == {
        "model.language_model.layers.0.mlp.experts": ("hf", "fused"),
        "mtp.layers.0.mlp.experts": ("split",),
    }
    assert found.ignorable("mtp.layers.0.mlp.experts.3.up_proj.weight")
    assert not found.ignorable("model.language_model.layers.0.mlp.experts.down_proj")


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2", "glm4_moe", "step3p7"])
def test_layers_past_the_last_are_prediction_blocks(model_type: str) -> None:
    config = {"n_routed_experts": 4, "num_hidden_layers": 61}
    found = survey({}, family=FAMILIES[model_type], config=config)
    assert found.ignorable("model.layers.61.mlp.gate.weight")
    assert found.ignorable("model.layers.62.eh_proj.weight")
    assert not found.ignorable("model.layers.60.mlp.gate.weight")
