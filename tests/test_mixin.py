"""The mixin's members on plain tensors: both directions, every prefix, the record, LoRA, and what each
refuses.
"""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import restow
from mixin_host import Host, Tensors, expected, lora, native, numbered, same
from restow.errors import (
    AdapterError,
    AmbiguousTensorError,
    MissingExpertsError,
    QuantizationError,
    ShapeMismatchError,
    UnexpectedTensorError,
    UsageError,
)
from restow.state_dict_mixin import MoESplitExpertsStateDictMixin, materialized

E, D, F, R = 4, 10, 6, 3
AT = "model.layers.0.mlp.experts"


class Mixer(Host):
    """A subclass that overrides every place."""

    _hf_prefix = "backbone."
    _expert_path_segment = "mixer.experts"
    _is_gated_moe = False


class Wrapped(Host):
    _v5_peft_target_parameters = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def test_the_class_is_where_the_page_says_with_its_signatures() -> None:
    wanted = {
        "_concatenate_expert_weights": ["expert_weights_by_layer", "n_experts"],
        "_convert_lora_expert_to_hf": ["fqn", "tensor", "n_experts", "inter_dim", "expert_segment"],
        "_convert_single_merged_expert_to_hf_split_experts": ["fqn", "tensor", "prefix_override", "kwargs"],
        "_from_hf_w_merged_experts": ["hf_state_dict", "device_mesh", "reset_view_loaded_keys"],
        "_recombine_lora_expert_keys": ["state_dict"],
        "_register_inplace_loaded_key": ["fqn", "prefix_override"],
        "_split_experts_weights": ["weight", "n_experts"],
        "_to_hf_w_split_experts": ["state_dict", "kwargs"],
        "_validate_expert_availability": ["hf_state_dict", "n_experts", "device_mesh"],
    }
    assert MoESplitExpertsStateDictMixin.__module__ == "restow.torch.mixin"
    for name, parameters in wanted.items():
        member = getattr(MoESplitExpertsStateDictMixin, name)
        assert [*inspect.signature(member).parameters][1:] == parameters
        assert inspect.getdoc(member)
    for name in ("_is_gated_moe", "_hf_prefix", "_expert_path_segment", "view_loaded_native_keys"):
        assert isinstance(inspect.getattr_static(MoESplitExpertsStateDictMixin, name), property)
    assert MoESplitExpertsStateDictMixin() is not None


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_directions(gated: bool, dtype: torch.dtype) -> None:
    host = Host(E, F, gated, dtype=dtype)
    state = {n: t.to(dtype) for n, t in native(E, D, F, gated).items()}
    hf = host._to_hf_w_split_experts(state)
    assert same(hf, expected(state, F, gated)) == []
    assert all(t.is_contiguous() for t in hf.values())
    assert hf["model.embed_tokens.weight"] is state["model.embed_tokens.weight"]
    given = dict(hf)
    back = host._from_hf_w_merged_experts(given)
    assert same(back, state) == []
    assert given == {}
    assert all(t.is_contiguous() for t in back.values())


def test_square_sizes_are_decided_by_rows() -> None:
    host, state = Host(6, 6), native(6, 6, 6)
    assert same(host._to_hf_w_split_experts(state), expected(state, 6)) == []
    assert same(host._from_hf_w_merged_experts(expected(state, 6)), state) == []


@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "geglu", "swigluoai", "relu2"])
def test_activations(activation: str) -> None:
    host = Host()
    host.moe_config.expert_activation = activation
    assert host._is_gated_moe == (activation != "relu2")


def test_the_result_has_the_dtype_of_the_host() -> None:
    state = native(E, D, F)
    back = Host(E, F, dtype=torch.bfloat16)._from_hf_w_merged_experts(expected(state, F))
    wanted = {n: t.to(torch.bfloat16) if ".experts." in n else t for n, t in state.items()}
    assert same(back, wanted) == []


@pytest.mark.parametrize(
    "prefix", ["model.", "language_model.", "model.language_model.", "", "mtp.", "a.b.c."]
)
@pytest.mark.parametrize("flag", [True, False])
def test_every_prefix_is_converted_and_kept(prefix: str, flag: bool) -> None:
    state = {n.replace("model.", prefix, 1): t for n, t in native(E, D, F).items()}
    host = Host(E, F, prefix=flag)
    back = host._from_hf_w_merged_experts(expected(state, F))
    assert same(back, state) == []
    host._validate_expert_availability(expected(state, F), E)


def test_prefixes_of_names_for_hugging_face() -> None:
    tensor = numbered(E, F, D)
    name = "model.layers.7.mlp.experts.down_projs"

    def first(host: Host, fqn: str = name, **kwargs: Any) -> str:
        pairs = host._convert_single_merged_expert_to_hf_split_experts(fqn, tensor, **kwargs)
        assert pairs is not None
        return pairs[0][0]

    assert first(Host()) == "model.layers.7.mlp.experts.0.down_proj.weight"
    assert first(Host(prefix=False)) == "layers.7.mlp.experts.0.down_proj.weight"
    assert first(Host(), prefix_override="mtp.") == "mtp.layers.7.mlp.experts.0.down_proj.weight"
    assert first(Host(), exclude_key_regex=".*", quantization=True, device_mesh=None, anything=1)
    assert first(Host(), name.replace("layers.7.", "layers.7._orig_mod.")) == first(Host())
    mixer = name.replace("mlp", "mixer")
    assert first(Mixer(), mixer) == "backbone.layers.7.mixer.experts.0.down_proj.weight"


@pytest.mark.parametrize(
    "fqn",
    [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_experts.down_projs",
        "model.layers.0.mixer.experts.down_projs",
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "down_projs",
    ],
)
def test_what_is_no_expert_is_none(fqn: str) -> None:
    assert Host()._convert_single_merged_expert_to_hf_split_experts(fqn, numbered(E, F, D)) is None


def test_biases_are_converted_too() -> None:
    host, state = Host(E, F), native(E, D, F, layers=1)
    state[f"{AT}.gate_up_proj_bias"] = numbered(E, 2 * F)
    state[f"{AT}.down_proj_bias"] = numbered(E, D)
    hf = host._to_hf_w_split_experts(state)
    assert torch.equal(hf[f"{AT}.2.up_proj.bias"], state[f"{AT}.gate_up_proj_bias"][2, F:])
    assert same(host._from_hf_w_merged_experts(hf), state) == []


def test_meta_tensors_give_meta_tensors() -> None:
    host, state = Host(E, F), {n: t.to("meta") for n, t in native(E, D, F).items()}
    hf = host._to_hf_w_split_experts(state, for_checkpoint_load=True)
    assert {n: tuple(t.shape) for n, t in hf.items()} == {
        n: tuple(t.shape) for n, t in expected(native(E, D, F), F).items()
    }
    assert all(t.is_meta for t in hf.values())
    assert not host._registered()
    assert all(t.is_meta for t in host._from_hf_w_merged_experts(hf).values())


def test_parameters_and_any_strides_are_sources() -> None:
    host, state = Host(E, F), native(E, D, F, layers=1)
    odd = {n: torch.nn.Parameter(t.transpose(0, -1).contiguous().transpose(0, -1)) for n, t in state.items()}
    hf = host._to_hf_w_split_experts(odd)
    assert not any(t.requires_grad for n, t in hf.items() if ".experts." in n)
    assert same(hf, {**expected(state, F), **{n: t for n, t in odd.items() if ".experts." not in n}}) == []
    twisted = {n: t.t().contiguous().t() for n, t in expected(state, F).items()}
    assert same(host._from_hf_w_merged_experts(twisted), state) == []


def test_splitting() -> None:
    whole = numbered(E, 2, 3, 5).to(torch.float16)
    parts = Host()._split_experts_weights(whole, E)
    assert all(torch.equal(a, b) and a.data_ptr() == b.data_ptr() for a, b in zip(parts, whole, strict=True))
    assert [t.tolist() for t in Host()._split_experts_weights(torch.arange(3), 3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"expected 5 experts as the first dim, found shape \[4, 2, 3, 5\]"):
        Host()._split_experts_weights(whole, 5)


def test_concatenating() -> None:
    parts = {i: numbered(2, 3, start=i) for i in (2, 0, 1)}
    by_layer: dict[str, Any] = {"0": {"down": {0: parts[0]}, "up": dict(parts)}}
    found = Host()._concatenate_expert_weights(by_layer, 3)
    assert found is not None
    assert torch.equal(found, torch.stack([parts[i] for i in range(3)]))
    assert by_layer == {"0": {"down": {0: parts[0]}}}
    assert Host()._concatenate_expert_weights(by_layer, 3) is None
    assert Host()._concatenate_expert_weights({}, 3) is None
    with pytest.raises(ValueError, match="experts 0 to 1 of up"):
        Host()._concatenate_expert_weights({"0": {"up": {0: parts[0], 7: parts[1]}}}, 2)


# What is missing, and what has no place.


def test_missing_experts_are_named() -> None:
    hf = expected(native(E, D, F), F)
    del hf[f"{AT}.2.up_proj.weight"], hf["model.layers.1.mlp.experts.0.down_proj.weight"]
    before = dict(hf)
    for call in (
        lambda: Host(E, F)._validate_expert_availability(hf, E),
        lambda: Host(E, F)._from_hf_w_merged_experts(hf),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert isinstance(caught.value, MissingExpertsError)
        assert str(caught.value) == (
            "expected 24 tensors of single experts, found 2 of them missing\n"
            "  missing   model.layers.0.mlp.experts.2.up_proj.weight\n"
            "            model.layers.1.mlp.experts.0.down_proj.weight\n"
            "  fact      Expert weights missing from checkpoint: 2/24 required\n"
            "  try       nothing is filled in their place: get the checkpoint, or the rest of it, again"
        )
    assert hf == before
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), RuntimeError)


def test_a_dict_without_experts_passes() -> None:
    Host()._validate_expert_availability({}, E)
    fused = {"model.layers.0.mlp.experts.gate_up_proj": numbered(2), "x": numbered(1)}
    Host()._validate_expert_availability(fused, E)
    assert Host()._from_hf_w_merged_experts(dict(fused)).keys() == fused.keys()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (f"{AT}.0.gate_proj.weight_scale_inv", QuantizationError),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", QuantizationError),
        (f"{AT}.{E}.gate_proj.weight", UnexpectedTensorError),
        (f"{AT}.0.w1.weight", UnexpectedTensorError),
        (f"{AT}.0.gate_proj.weight_scale", UnexpectedTensorError),
        (f"{AT}.00.gate_proj.weight", UnexpectedTensorError),
    ],
)
def test_what_would_be_lost_is_refused(name: str, error: type[Exception]) -> None:
    hf = {**expected(native(E, D, F), F), name: numbered(F, D)}
    with pytest.raises(error, match=name.replace(".", r"\.")):
        Host(E, F)._from_hf_w_merged_experts(hf)
    assert len(hf) == 27


def test_a_gate_has_no_place_in_experts_without_one() -> None:
    with pytest.raises(UnexpectedTensorError, match="gate_proj"):
        Host(E, F, gated=False)._from_hf_w_merged_experts(expected(native(E, D, F), F))


def test_values_that_were_not_dequantised_are_refused() -> None:
    hf = {
        n: t.to(torch.float8_e4m3fn) if ".experts." in n else t
        for n, t in expected(native(E, D, F), F).items()
    }
    with pytest.raises(QuantizationError, match="float8_e4m3fn"):
        Host(E, F)._from_hf_w_merged_experts(hf)


def test_shapes_that_the_sizes_do_not_give_are_refused() -> None:
    hf = expected(native(E, D, F), F)
    hf[f"{AT}.1.gate_proj.weight"] = numbered(F, D + 1)
    with pytest.raises(
        ShapeMismatchError, match=r"shape 'f d' of model.layers.0.mlp.experts.1.gate_proj.weight"
    ):
        Host(E, F)._from_hf_w_merged_experts(hf)
    for tensor in (numbered(E, F + 1, D), numbered(E + 1, F, D), numbered(F, D)):
        with pytest.raises(ShapeMismatchError, match=r"row       out down_projs e f d"):
            Host(E, F)._convert_single_merged_expert_to_hf_split_experts(f"{AT}.down_projs", tensor)


def test_two_native_tensors_of_one_name_are_refused() -> None:
    state = {
        "model.layers.0.mlp.experts.down_projs": numbered(E, F, D),
        "mtp.layers.0.mlp.experts.down_projs": numbered(E, F, D),
    }
    with pytest.raises(AmbiguousTensorError, match=r"mtp\.layers\.0"):
        Host(E, F)._to_hf_w_split_experts(state)


# The protocol.


@pytest.mark.parametrize("name", ["moe_config", "dtype", "_uses_model_prefix"])
def test_attributes_that_are_not_set_are_named(name: str) -> None:
    host = Host(E, F)
    delattr(host, name)
    with pytest.raises(UsageError, match=f"Host.{name}"):
        host._to_hf_w_split_experts(native(E, D, F))
        host._from_hf_w_merged_experts(expected(native(E, D, F), F))


@pytest.mark.parametrize("bad", [None, 0, -1, 2.0, "8", True])
def test_sizes_that_are_none_are_named(bad: object) -> None:
    host = Host(E, F)
    host.moe_config.n_routed_experts = bad
    with pytest.raises(UsageError, match=r"moe_config\.n_routed_experts"):
        host._from_hf_w_merged_experts({})
    host.moe_config = None
    with pytest.raises(UsageError, match="moe_config"):
        host._from_hf_w_merged_experts({})


def test_an_unknown_activation_and_dtype_are_named() -> None:
    host = Host(E, F)
    host.moe_config.expert_activation = "tanh"
    with pytest.raises(UsageError, match="override _is_gated_moe"):
        host._from_hf_w_merged_experts({})
    host = Host(E, F, dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"a torch\.dtype as Host\.dtype"):
        host._from_hf_w_merged_experts({})


# The record.


def test_views_of_plain_tensors_where_they_are_asked_for() -> None:
    host, state = Host(E, F), native(E, D, F)
    hf = host._to_hf_w_split_experts(state, for_checkpoint_load=True)
    views = {n: t for n, t in hf.items() if ".experts." in n}
    assert not any(t.is_contiguous() for t in views.values())
    assert same(hf, expected(state, F)) == []
    views[f"{AT}.1.up_proj.weight"].fill_(-3)
    assert bool((state[f"{AT}.gate_and_up_projs"][1, :, F:] == -3).all())
    assert host.view_loaded_native_keys == set()
    assert materialized(hf) is hf
    assert all(t.is_contiguous() for t in hf.values())


def test_backends_whose_tensors_are_copies_get_none() -> None:
    host, state = Host(E, F), native(E, D, F)
    host.backend = SimpleNamespace(experts="te", dispatcher="deepep")
    hf = host._to_hf_w_split_experts(state, for_checkpoint_load=True)
    assert all(t.is_contiguous() for t in hf.values())
    host.backend = SimpleNamespace(experts="gmm", dispatcher="mok")
    hf = host._to_hf_w_split_experts(state, for_checkpoint_load=True)
    assert [n for n, t in hf.items() if not t.is_contiguous()] == [
        n for n in hf if "mlp.experts" in n and "down" in n
    ]


def test_a_name_registered_by_hand_is_left_out_once() -> None:
    host, state = Host(E, F), native(E, D, F, layers=1)
    host._register_inplace_loaded_key(f"mtp.{AT}.down_projs", "mtp.")
    assert host._inplace_loaded_native_keys == {f"{AT}.down_projs"}
    first = host._from_hf_w_merged_experts(expected(state, F))
    assert f"{AT}.down_projs" not in first
    assert f"{AT}.gate_and_up_projs" in first
    assert host.view_loaded_native_keys == {f"{AT}.down_projs"}
    assert host._inplace_loaded_native_keys == set()
    host._from_hf_w_merged_experts({}, reset_view_loaded_keys=False)
    assert host.view_loaded_native_keys == {f"{AT}.down_projs"}
    assert same(host._from_hf_w_merged_experts(expected(state, F)), state) == []
    assert host.view_loaded_native_keys == set()


def test_the_record_keeps_no_memory_and_no_copy_believes_it() -> None:
    host, state = Host(E, F), native(E, D, F, layers=1)
    name = f"{AT}.down_projs"
    host._register_inplace_loaded_key(name, None)
    host._record().lend(name, state[name], (0, 1), False)
    for other in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert same(other._from_hf_w_merged_experts(expected(state, F)), state) == []
    views = {n: t for n, t in expected(state, F).items() if ".experts." in n}
    host._record().lend(f"{AT}.gate_and_up_projs", state[f"{AT}.gate_and_up_projs"], (), False)
    host._register_inplace_loaded_key(f"{AT}.gate_and_up_projs", None)
    assert host._from_hf_w_merged_experts(views) == {}  # still views of the memory that was lent
    held = host._record()
    tensor = torch.zeros(9)
    held.lend("a", tensor, (0,), False)
    lent = held._lent["a"][0].storage
    del tensor
    gc.collect()
    assert lent.expired()


# LoRA.


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_lora_per_expert(gated: bool) -> None:
    host, state = Host(E, F, gated), lora(E, D, F, R, gated)
    hf = host._to_hf_w_split_experts(state)
    path = "base_model.model.model.layers.0.mlp.experts"
    words = ("gate", "up") if gated else ("up",)
    for i in range(E):
        for j, word in enumerate(words):
            assert torch.equal(
                hf[f"{path}.{i}.{word}_proj.lora_A.weight"], state[f"{path}.lora_gate_and_up_A"][i].T
            )
            b = state[f"{path}.lora_gate_and_up_B"][i][:, j * F : (j + 1) * F]
            assert torch.equal(hf[f"{path}.{i}.{word}_proj.lora_B.weight"], b.T)
        assert torch.equal(hf[f"{path}.{i}.down_proj.lora_A.weight"], state[f"{path}.lora_down_A"][i].T)
        assert torch.equal(hf[f"{path}.{i}.down_proj.lora_B.weight"], state[f"{path}.lora_down_B"][i].T)
    assert len(hf) == E * 2 * (len(words) + 1)
    assert len({t.data_ptr() for t in hf.values()}) == len(hf)
    assert same(host._recombine_lora_expert_keys(hf), state) == []
    assert len(hf) == E * 2 * (len(words) + 1), "the dict is not consumed"
    named = host._convert_lora_expert_to_hf(
        f"{path}.lora_down_A", state[f"{path}.lora_down_A"], E, F, "mlp.experts"
    )
    assert [n for n, _ in named] == [f"{path}.{i}.down_proj.lora_A.weight" for i in range(E)]
    with pytest.raises(UsageError, match="lora_gate_and_up_A"):
        host._convert_lora_expert_to_hf(
            f"{path}.down_projs", state[f"{path}.lora_down_A"], E, F, "mlp.experts"
        )


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.", "base_model.model.model.", "x.y."])
def test_any_prefix_of_lora_is_kept(prefix: str) -> None:
    state = {n.replace("base_model.model.model.", prefix): t for n, t in lora(E, D, F, R).items()}
    rest = {"other": numbered(3)}
    hf = Host(E, F)._to_hf_w_split_experts({**state, **rest})
    assert all(name.startswith(prefix) for name in hf if name != "other")
    assert same(Host(E, F)._from_hf_w_merged_experts(hf), {**state, **rest}) == []


def test_incomplete_lora_is_named() -> None:
    hf = Host(E, F)._to_hf_w_split_experts(lora(E, D, F, R))
    lost = [n for n in hf if ".2.up_proj.lora_B" in n or ".1.down_proj.lora_A" in n]
    with pytest.raises(RuntimeError, match=rf"(?s){lost[0]}.*{lost[1]}"):
        Host(E, F)._recombine_lora_expert_keys({n: t for n, t in hf.items() if n not in lost})
    one_side = {n: t for n, t in hf.items() if "down_proj" in n}
    assert len(Host(E, F)._recombine_lora_expert_keys(one_side)) == 2


def test_gate_and_up_with_a_s_of_their_own_are_refused() -> None:
    hf = Host(E, F)._to_hf_w_split_experts(lora(E, D, F, R))
    name = next(n for n in hf if ".3.up_proj.lora_A" in n)
    hf[name] = hf[name] + 1
    with pytest.raises(AdapterError) as caught:
        Host(E, F)._from_hf_w_merged_experts(hf)
    assert str(caught.value) == (
        "expected one A for gate and up of each expert, as grouped experts have it, "
        "found 1 experts in base_model.model.model.layers.0.mlp.experts with two\n"
        f"  differ    {name}\n"
        "  try       restow.lora.convert(adapter, target, to='grouped') holds both exactly, at twice the rank"
    )


@pytest.mark.parametrize("legacy", [False, True], ids=["0.19.1", "0.18"])
def test_peft_param_wrapper(legacy: bool) -> None:
    host, state = Wrapped(E, F), lora(E, D, F, R)
    hf = host._to_hf_w_split_experts(state, legacy_paramwrapper_layout=legacy)
    path = "base_model.model.model.layers.0.mlp.experts"
    up_a, up_b = state[f"{path}.lora_gate_and_up_A"], state[f"{path}.lora_gate_and_up_B"]
    a, b = hf[f"{path}.base_layer.lora_A.weight"], hf[f"{path}.base_layer.lora_B.weight"]
    for i in range(E):  # PEFT: A holds an expert's ranks together, B its experts fastest
        delta = b.reshape(b.shape[0], R, E)[:, :, i] @ a.reshape(E, R, -1)[i]
        assert torch.equal(delta if legacy else delta.T, up_a[i] @ up_b[i])
    assert same(host._from_hf_w_merged_experts(hf), state) == []


def test_a_wrapper_that_both_versions_admit_needs_a_stamp() -> None:
    host, state = Wrapped(E, F), lora(E, F, F, R)
    down = {n: t for n, t in state.items() if "down" in n}
    hf = host._to_hf_w_split_experts(down)
    with pytest.raises(AdapterError, match="tensors that both admit"):
        host._from_hf_w_merged_experts(dict(hf))
    host._paramwrapper_layout_hint = "peft-0.19.1"  # type: ignore[attr-defined]
    assert same(host._from_hf_w_merged_experts(dict(hf)), down) == []
    hf = host._to_hf_w_split_experts(lora(E, D, F, R))
    host._paramwrapper_layout_hint = "peft-0.18"  # type: ignore[attr-defined]
    with pytest.raises(AdapterError, match="as stamped"):
        host._from_hf_w_merged_experts(hf)


def test_lora_rows_convert_both_ways_by_rows_alone() -> None:
    from restow.torch.mixin_rows import LORA, LORA_SPLIT, LORA_WRAPPED

    for layout in (LORA_SPLIT, *LORA_WRAPPED.values()):
        assert sorted(layout.roles) == sorted(LORA.roles)
        assert restow.Layout.parse(str(layout)) == layout


def test_the_face_names_no_storage_order() -> None:
    from restow.torch import mixin, mixin_load, mixin_merge, mixin_peft, mixin_split

    for module in (mixin, mixin_load, mixin_merge, mixin_peft, mixin_split):
        source = inspect.getsource(module)
        words = (
            ".transpose(",
            ".permute(",
            ".reshape(",
            "torch.cat(",
            ".T\n",
            "import re\n",
            ".swapaxes(",
            ".mT",
        )
        assert not [word for word in words if word in source], module.__name__


def test_results_are_tensors_of_their_own() -> None:
    state: Tensors = native(E, D, F)
    hf = expected(state, F)
    copies = {n: t.clone() for n, t in hf.items()}
    back = Host(E, F)._from_hf_w_merged_experts(dict(copies))
    for name, tensor in copies.items():
        if ".experts." in name:
            tensor.zero_()
    assert same(back, state) == []
