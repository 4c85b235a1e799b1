"""State dict adapters over the mixin, for models with NeMo AutoModel's native names: Qwen3-MoE, DeepSeek-V3,
Nemotron-H.

What a family's experts are called, and whether they are gated, is the catalogue's to say; an adapter adds
only the names in which a native model differs from the hub's. `to_hf`, `from_hf` and
`convert_single_tensor_to_hf` are what trainers, savers and refitters call. DeepSeek-V3 is the dense form:
quantised checkpoints are `restow.load`'s to read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from restow.errors import QuantizationError
from restow.known import FAMILIES
from restow.segments import replace_run
from restow.torch.mixin import MoESplitExpertsStateDictMixin

Pairs = list[tuple[str, Any]]
OUTER = "base_model.model."  # what PEFT puts before a model's own names


class Adapter(MoESplitExpertsStateDictMixin):
    """What the adapters share. A subclass names its `family`, a model type of the catalogue."""

    family: ClassVar[str]
    _supports_low_memory_dcp_load = True

    def __init__(
        self, config: Any, moe_config: Any, backend: Any, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.moe_config, self.backend, self.dtype = config, moe_config, backend, dtype
        self._uses_model_prefix = True

    @property
    def _expert_path_segment(self) -> str:
        return FAMILIES[self.family].containers[0][0]

    @property
    def _is_gated_moe(self) -> bool:
        return len(FAMILIES[self.family].labels) > 1

    def to_hf(
        self, state_dict: dict[str, Any], exclude_key_regex: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """A native state dict by Hugging Face's names, for this rank's experts; see
        `convert_single_tensor_to_hf`.
        """
        pairs = (self.convert_single_tensor_to_hf(fqn, value, exclude_key_regex=exclude_key_regex, **kwargs)
                 for fqn, value in state_dict.items())  # fmt: skip
        return {name: value for one in pairs for name, value in one}

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **kwargs: Any) -> Pairs:
        """One native tensor as (name, tensor) pairs; names that `exclude_key_regex` matches from the start
        are left out.

        Shapes, views and errors are those of `_convert_single_merged_expert_to_hf_split_experts`; what is not
        an expert's stays as it is.
        """
        pairs = None
        if self.moe_config is not None:
            pairs = self._convert_single_merged_expert_to_hf_split_experts(fqn, tensor, **kwargs)
        return _kept([(fqn, tensor)] if pairs is None else pairs, kwargs.get("exclude_key_regex"))

    def from_hf(
        self, hf_state_dict: dict[str, Any], device_mesh: DeviceMesh | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Hugging Face's state dict as native, experts grouped; see `_from_hf_w_merged_experts`, which
        raises.

        Names without `model.` are noted, so that `to_hf` writes them so again.
        """
        self._note_prefix(hf_state_dict)
        return self._from_hf_w_merged_experts(hf_state_dict, device_mesh)

    def _note_prefix(self, names: Iterable[str]) -> None:
        first = next(
            (n for n in names if f".{self._expert_path_segment}." in n and n.endswith(".weight")), None
        )
        if first is not None:
            self._uses_model_prefix = first.startswith("model.")


class Qwen3MoeAdapter(Adapter):
    """Qwen3-MoE: native names are the hub's; LoRA goes to PEFT's ParamWrapper unless `v4_compatible=True`."""

    family = "qwen3_moe"

    @property
    def _v5_peft_target_parameters(self) -> tuple[str, ...]:
        return "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class DeepSeekV3Adapter(Adapter):
    """DeepSeek-V3 in a dense dtype. Raises `QuantizationError` where fp8 templates are asked for."""

    family = "deepseek_v3"

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **kwargs: Any) -> Pairs:
        if kwargs.get("quantization", False):
            raise QuantizationError(
                "a dense checkpoint", "quantization=True", tensor=fqn,
                hint="restow.load reads fp8 checkpoints into the model itself; or convert the checkpoint first",
            )  # fmt: skip
        return super().convert_single_tensor_to_hf(fqn, tensor, **kwargs)


class NemotronHAdapter(Adapter):
    """Nemotron-H: other names for embedding and norm, Mamba's fp32 parameters in a holder, and an `mtp.`
    namespace.
    """

    family = "nemotron_h"
    BELOW_ROOT = (
        ("norm", "norm_f"),
        ("embed_tokens", "embeddings"),
        ("embed_tokens", "embedding"),
    )  # native, hub
    HELD = ("A_log", "dt_bias", "D")  # in fp32, and natively below mixer._fp32_params
    ROOT = "model"

    def __init__(
        self, config: Any, moe_config: Any, backend: Any, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(config, moe_config, backend, dtype)
        self._uses_model_prefix = False

    @property
    def _hub_root(self) -> str:
        return FAMILIES[self.family].renames[0][0].removeprefix("^")

    @property
    def _hf_prefix(self) -> str:
        return f"{self.ROOT if self._uses_model_prefix else self._hub_root}."

    @property
    def _v5_peft_target_parameters(self) -> tuple[str, ...]:
        return "mixer.experts.up_proj", "mixer.experts.down_proj"

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **kwargs: Any) -> Pairs:
        mtp = fqn.startswith("mtp.")
        pairs = None
        if self.moe_config is not None:
            more = {"prefix_override": "mtp."} if mtp else {}
            pairs = self._convert_single_merged_expert_to_hf_split_experts(fqn, tensor, **more, **kwargs)
        root = (
            self.ROOT if ".lora_" in fqn and not kwargs.get("v4_compatible", False) else self._hf_prefix[:-1]
        )
        named = [(self._hub(name, root), value) for name, value in pairs or [(fqn, tensor)]]
        return _kept(
            [(name, self._precise(name, value)) for name, value in named], kwargs.get("exclude_key_regex")
        )

    def from_hf(
        self, hf_state_dict: dict[str, Any], device_mesh: DeviceMesh | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As every adapter's; layers past `config.num_hidden_layers` are left out, `mtp.` is a namespace of
        its own.
        """
        self._note_prefix(hf_state_dict)
        last = getattr(self.config, "num_hidden_layers", 0) or 0
        spaces: dict[str, dict[str, Any]] = {"": {}, "mtp.": {}}
        for hub in list(hf_state_dict):
            value, space = hf_state_dict.pop(hub), "mtp." if hub.startswith("mtp.") else ""
            name = self._native(hub.removeprefix(space))
            layer = name.removeprefix(f"{self.ROOT}.layers.").partition(".")[0]
            if space or not last or not (name.startswith(f"{self.ROOT}.layers.") and int(layer) >= last):
                spaces[space][name] = self._precise(name, value)
        if self.moe_config is None:
            return {space + name: value for space, state in spaces.items() for name, value in state.items()}
        out = self._from_hf_w_merged_experts(spaces[""], device_mesh)
        before = self.view_loaded_native_keys
        if spaces["mtp."]:
            mtp = self._from_hf_w_merged_experts(spaces["mtp."], device_mesh, reset_view_loaded_keys=False)
            out.update({f"mtp.{name}": value for name, value in mtp.items()})
            self._view_loaded_native_keys = before | {
                f"mtp.{n}" for n in self.view_loaded_native_keys - before
            }
        return out

    def _note_prefix(self, names: Iterable[str]) -> None:
        for name in (name.removeprefix(OUTER) for name in names if ".lora_" not in name):
            if name.startswith((f"{self._hub_root}.", f"{self.ROOT}.")):
                self._uses_model_prefix = name.startswith(f"{self.ROOT}.")
                return

    def _hub(self, name: str, root: str) -> str:
        for word in self.HELD:
            name = replace_run(name, f"mixer._fp32_params.{word}", f"mixer.{word}")
        outer, rest = (OUTER, name[len(OUTER) :]) if name.startswith(OUTER) else ("", name)
        for native, hub in self.BELOW_ROOT:
            rest = rest if outer else replace_run(rest, f"^{self.ROOT}.{native}", f"{root}.{hub}")
        return outer + replace_run(rest, f"^{self.ROOT}", root)

    def _native(self, name: str) -> str:
        outer, rest = (OUTER, name[len(OUTER) :]) if name.startswith(OUTER) else ("", name)
        rest = replace_run(rest, f"^{self._hub_root}", self.ROOT)
        for native, hub in self.BELOW_ROOT:
            rest = replace_run(rest, f"^{self.ROOT}.{hub}", f"{self.ROOT}.{native}")
        for word in self.HELD:
            if rest.endswith(f".mixer.{word}"):
                rest = replace_run(rest, f"mixer.{word}", f"mixer._fp32_params.{word}")
        return outer + rest

    def _precise(self, name: str, value: Any) -> Any:
        held = ".mixer." in name and name.rpartition(".")[2] in self.HELD
        return value.to(torch.float32) if held and value.dtype.is_floating_point else value


def _kept(pairs: Pairs, exclude: str | None) -> Pairs:
    return [pair for pair in pairs if not exclude or not re.match(exclude, pair[0])]
