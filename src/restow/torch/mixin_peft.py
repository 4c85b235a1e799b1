"""The LoRA members of the mixin, and what loaders of later releases ask of it. The storage orders are
`mixin_rows`.

E experts, D model, I expert hidden, G = 2 I for gated experts, else I, r rank. The attributes are those of
`mixin_host.Host`; members raise `UsageError` where one is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from restow.errors import UsageError, show
from restow.torch.mixin_host import Facts, facts_of, is_parameter, needed
from restow.torch.mixin_lora import recombined, to_experts, unwrapped_native, wrapped
from restow.torch.mixin_rows import LORA, row_named

Pairs = list[tuple[str, torch.Tensor]]


class PeftMembers:
    """LoRA of grouped experts, per expert and in PEFT's ParamWrapper; and which memory DCP can read into."""

    config: Any
    moe_config: Any
    backend: Any
    dtype: torch.dtype
    _uses_model_prefix: bool

    if TYPE_CHECKING:  # properties of the class that inherits this

        @property
        def _hf_prefix(self) -> str: ...
        @property
        def _is_gated_moe(self) -> bool: ...
        @property
        def _expert_path_segment(self) -> str: ...

    @property
    def _v5_peft_target_parameters(self) -> tuple[str, ...]:
        """The stacked parameters that PEFT's ParamWrapper targets; none: LoRA is written per expert."""
        return ()

    def _convert_lora_expert_to_hf(
        self, fqn: str, tensor: torch.Tensor, n_experts: int, inter_dim: int, expert_segment: str
    ) -> Pairs:
        """A grouped LoRA tensor as PEFT's per-expert ones, contiguous, below the same prefix.

        `lora_gate_and_up_A` [E, D, r] gives lora_A [r, D] for gate and for up, `_B` [E, r, G] lora_B [I, r]
        of each; `lora_down_A` [E, I, r] gives [r, I], `_B` [E, r, D] [D, r]. Of a DTensor the experts of this
        rank. Raises `UsageError` for another name, `ExpertShapeError`.
        """
        path, _, last = fqn.rpartition(".")
        row = row_named(LORA, last)
        if row is None or not f".{path}".endswith(f".{expert_segment}"):
            names = ", ".join("".join(map(str, one.name)) for one in LORA.rows)
            raise UsageError(f"{expert_segment}. and one of {names}", show(fqn), tensor=fqn)
        facts = Facts(n_experts, inter_dim, self._is_gated_moe, expert_segment)
        return [(f"{path}.{name}", value) for name, value in to_experts(fqn, tensor, row, facts).items()]

    def _recombine_lora_expert_keys(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Per-expert LoRA as grouped LoRA below the same prefix, dtypes kept; every other entry as it is.

        The inverse of `_convert_lora_expert_to_hf`. Raises `MissingExpertsError` for incomplete sets
        (upstream passed them through) and `AdapterError` where gate and up differ in A (upstream dropped
        up's).
        """
        return recombined(state_dict, facts_of(self))

    def _convert_lora_to_paramwrapper(
        self, fqn: str, tensor: torch.Tensor, legacy_layout: bool = False
    ) -> Pairs:
        """A grouped LoRA tensor as PEFT's ParamWrapper has it (0.19.1 and later, or 0.18 if `legacy_layout`).

        `lora_A.weight` [E r, in] and `lora_B.weight` [out, r E], below `base_layer.` for gate and up. Raises
        `AdapterError` for a part of a tensor.
        """
        path, _, last = fqn.rpartition(".")
        row = row_named(LORA, last)
        facts = facts_of(self)
        if row is None or not f".{path}".endswith(f".{facts.segment}"):
            return [(fqn, tensor)]
        name, value = wrapped(fqn, tensor, row, facts, "peft-0.18" if legacy_layout else "peft-0.19.1")
        above = path[: len(path) - len(facts.segment)]
        return [(f"{above}{self._v5_peft_hf_expert_path_segment()}.{name}", value)]

    def _convert_paramwrapper_to_native(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """PEFT's ParamWrapper LoRA as grouped LoRA; `_paramwrapper_layout_hint`, where set, is its stamp.

        Raises `AdapterError` where shapes and stamp do not settle which version wrote it.
        """
        hint = getattr(self, "_paramwrapper_layout_hint", None)
        d = getattr(needed(self, "moe_config", "its experts' configuration"), "dim", None)
        segment = self._v5_peft_hf_expert_path_segment()
        return unwrapped_native(state_dict, facts_of(self), segment, hint, d if isinstance(d, int) else None)

    def _v5_peft_hf_expert_path_segment(self) -> str:
        """The module that owns the parameters of `_v5_peft_target_parameters`. Raises `UsageError` for
        several.
        """
        owners = {target.rpartition(".")[0] for target in self._v5_peft_target_parameters}
        if len(owners) > 1:
            raise UsageError("target parameters of one module", ", ".join(sorted(owners)))
        return owners.pop() if owners else self._expert_path_segment

    # What the loaders of later releases ask.

    @property
    def supports_low_memory_dcp_load(self) -> bool:
        """Whether DCP can read straight into the experts' own memory, if the adapter says so of all else."""
        flag = bool(getattr(self, "_supports_low_memory_dcp_load", False))
        if not flag or getattr(self, "moe_config", None) is None:
            return flag
        return self._expert_checkpoint_tensors_use_model_storage and not getattr(
            self.moe_config, "expert_bias", False
        )

    @property
    def _expert_checkpoint_tensors_use_model_storage(self) -> bool:
        """Whether every grouped tensor of a state dict is the model's own memory."""
        return is_parameter(self, "in") and is_parameter(self, "out")
