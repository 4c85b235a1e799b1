"""`MoESplitExpertsStateDictMixin`: the class that NeMo AutoModel's MoE adapters inherit, as a thin face of
the core.

Names, signatures and meaning are theirs; the storage orders are the rows of `mixin_rows` and the moves
between them. Shapes below: E experts (e of them on this rank), D model, I expert hidden, G = 2 I for gated
experts, else I, r rank. What upstream did in silence and wrong raises here; docs/coming-from-nemo.md lists
every difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from restow.errors import AmbiguousTensorError, ExpertShapeError, UsageError, show
from restow.notation import Row
from restow.torch.mixin_host import Facts, facts_of, gated, is_parameter, needed, output_dtype
from restow.torch.mixin_load import Load
from restow.torch.mixin_peft import Pairs, PeftMembers
from restow.torch.mixin_record import Record
from restow.torch.mixin_rows import GROUPED, LORA, row_named
from restow.torch.mixin_split import grouped, split, split_any
from restow.torch.storage import unwrapped


class MoESplitExpertsStateDictMixin(PeftMembers):
    """Conversion between Hugging Face's tensors per expert and grouped experts. Inherit it, and set in
    `__init__`:

    `config`, `moe_config` (with `n_routed_experts`, `moe_inter_dim`, `expert_activation`), `backend`
    (`experts` and `dispatcher` are read), `dtype` and `_uses_model_prefix`: the protocol
    `restow.torch.mixin_host.Host`. A member that misses one raises `UsageError`. Names are matched by their
    ends: any prefix is converted, and kept.
    """

    # Places to override.

    @property
    def _is_gated_moe(self) -> bool:
        """Whether experts have a gate (SwiGLU, quick-GEGLU) or only an up projection (ReLU2), by their
        activation.
        """
        config = needed(self, "moe_config", "its experts' configuration")
        return gated(getattr(config, "expert_activation", None))

    @property
    def _hf_prefix(self) -> str:
        """What Hugging Face's names have before `layers.`: `model.` or nothing, by `_uses_model_prefix`."""
        return "model." if needed(self, "_uses_model_prefix", "whether names begin with 'model.'") else ""

    @property
    def _expert_path_segment(self) -> str:
        """The run of segments that is the experts module, e.g. `mlp.experts` or `mixer.experts`."""
        return "mlp.experts"

    # The record of what was loaded in place.

    @property
    def view_loaded_native_keys(self) -> set[str]:
        """Native names that the last `from_hf` left out since their data came through views into the model's
        memory.

        They are no missing keys. Reset by `_from_hf_w_merged_experts(reset_view_loaded_keys=True)`.
        """
        return getattr(self, "_view_loaded_native_keys", None) or set()

    def _register_inplace_loaded_key(self, fqn: str, prefix_override: str | None) -> None:
        """Note that native `fqn` is loaded through views; the next `_from_hf_w_merged_experts` leaves it out.

        Without `prefix_override`, if the name begins with it and it ends in a dot, since a second namespace
        (`mtp.`) is converted with its prefix taken off. A name that the converter registers counts only while
        the values given back are still views of the memory it lent: a save, or a cast in between, leaves
        nothing behind.
        """
        self._registered().add(_tracked(fqn, prefix_override))

    # Native to Hugging Face.

    def _split_experts_weights(self, weight: torch.Tensor, n_experts: int) -> list[torch.Tensor]:
        """A grouped tensor [E, ...] as views [...], one per expert of this rank, in order; any dtype.

        Of a DTensor the local experts, by DTensor's own ranges (uneven ones too): plain tensors where no mesh
        dim of several ranks is left, else DTensors on those dims. Raises `ExpertShapeError` (a ValueError)
        where the global first dim is not `n_experts`. Unlike upstream it leaves no `_last_expert_ids` behind.
        """
        if weight.ndim == 0 or weight.shape[0] != n_experts:
            raise ExpertShapeError(f"{n_experts} experts as the first dim", f"shape {list(weight.shape)}")
        return split_any(weight, n_experts)

    def _convert_single_merged_expert_to_hf_split_experts(
        self, fqn: str, tensor: torch.Tensor, *, prefix_override: str | None = None, **kwargs: Any
    ) -> Pairs | None:
        """One native tensor as (name, tensor) pairs for Hugging Face, or None if it is none of the experts'.

        `gate_and_up_projs` [E, D, G] gives gate and up [I, D] per expert, `down_projs` [E, I, D] gives [D,
        I]; biases and LoRA alike; dtypes stay. Only experts of this rank. Of a DTensor whose local experts
        are plain the pairs are strided views of its memory, whoever calls, and the name is registered: save
        them through `materialized`. Else they are contiguous: plain tensors, DTensors that cut one expert
        (ep_shard > 1; DTensors again), meta tensors, `quantization=True` (the caller casts them), backends
        whose grouped tensors are copies. `for_checkpoint_load=True` asks for views of plain tensors too.
        `prefix_override` replaces `_hf_prefix`; `v4_compatible=True` writes LoRA per expert,
        `legacy_paramwrapper_layout=True` as PEFT 0.18; other kwargs are absorbed. Raises `ExpertShapeError`
        for a shape that the sizes do not give (upstream let `down_projs` through unconverted), `UsageError`
        for a name without `layers.` or placements that cut `(p f)`.
        """
        place = self._place(fqn)
        if place is None:
            return None
        facts, path, row = place
        if row in LORA.rows:
            if kwargs.get("v4_compatible", False) or not self._v5_peft_target_parameters:
                return self._convert_lora_expert_to_hf(
                    fqn, tensor, facts.experts, facts.hidden, facts.segment
                )
            return self._convert_lora_to_paramwrapper(
                fqn, tensor, kwargs.get("legacy_paramwrapper_layout", False)
            )
        source = grouped(fqn, tensor, row, facts.sizes)
        prefix = self._hf_prefix if prefix_override is None else prefix_override
        own = is_parameter(self, row.base) and not kwargs.get("quantization", False)
        asked = bool(kwargs.get("for_checkpoint_load", False)) and source.spread.mesh is None
        device = source.local.device.type
        alias = device != "meta" and own and (source.plain_split or asked)
        pairs = split(source, facts.pairs[0][1].row(row.role), alias=alias)
        if (alias and (source.plain_split or device != "cpu")) or not source.experts:
            self._register_inplace_loaded_key(fqn, prefix_override)
            other = prefix_override is not None
            self._record().lend(_tracked(fqn, prefix_override), source.local, source.experts, other)
        base = prefix + path
        return [(f"{base}.{name}", value) for name, value in pairs.items()]

    def _to_hf_w_split_experts(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """A native state dict for Hugging Face: experts as above, every other value as it is, under its own
        name.

        `kwargs` go to `_convert_single_merged_expert_to_hf_split_experts`. Raises `AmbiguousTensorError`
        where two native tensors become one name, of which upstream kept the last.
        """
        out: dict[str, Any] = {}
        for fqn, tensor in state_dict.items():
            pairs = self._convert_single_merged_expert_to_hf_split_experts(fqn, tensor, **kwargs)
            for name, value in [(fqn, tensor)] if pairs is None else pairs:
                if name in out:
                    raise AmbiguousTensorError(
                        f"one native tensor for {show(name)}", "a second one", tensor=name,
                        sections=[("second", [show(fqn)])], hint="prefix_override keeps namespaces apart",
                    )  # fmt: skip
                out[name] = value
        return out

    # Hugging Face to native.

    def _validate_expert_availability(
        self, hf_state_dict: Mapping[str, Any], n_experts: int, device_mesh: DeviceMesh | None = None
    ) -> None:
        """Check that each experts module in the dict has every projection of every expert that this rank
        needs.

        Rank-local, names only; with `device_mesh` the experts of its `ep` dim. A dict without any expert
        passes. Raises `MissingExpertsError` (a RuntimeError) that names what is missing.
        """
        self._load(facts_of(self)._replace(experts=n_experts), hf_state_dict, device_mesh).check_complete()

    def _from_hf_w_merged_experts(
        self,
        hf_state_dict: dict[str, Any],
        device_mesh: DeviceMesh | None = None,
        reset_view_loaded_keys: bool = True,
    ) -> dict[str, Any]:
        """A state dict from Hugging Face as native: experts grouped in `self.dtype`, LoRA too, all else as it
        is.

        gate and up [I, D] of each expert become `gate_and_up_projs` [E, D, G], down [D, I] `down_projs` [E,
        I, D], biases [E, G] and [E, D]; on a mesh as DTensors of these global shapes: experts over `ep`, dim
        1 over `ep_shard`, copies over `ep_replicate`. Values are whole plain tensors, or DTensors that hold
        this rank's part. The dict is consumed: sources go as soon as their group is filled, so the peak is
        one group beyond the input. Groups that came through views are left out and listed in
        `view_loaded_native_keys`, which this call empties first unless `reset_view_loaded_keys` is False (a
        second namespace of the same load).

        Raises before it takes anything: `MissingExpertsError` (a RuntimeError), `UnexpectedTensorError` for
        tensors of single experts that have no place (upstream dropped or passed them), `QuantizationError`
        for values that were not dequantised (upstream dropped their scales), `ExpertShapeError`,
        `AdapterError`, and those of LoRA.
        """
        if reset_view_loaded_keys:
            self._view_loaded_native_keys = set()
        facts = facts_of(self)
        self._validate_expert_availability(hf_state_dict, facts.experts, device_mesh)
        load = self._load(facts, hf_state_dict, device_mesh)
        out, loaded = load.run(hf_state_dict, output_dtype(self), other=not reset_view_loaded_keys)
        self._view_loaded_native_keys = self.view_loaded_native_keys | loaded
        return self._convert_paramwrapper_to_native(self._recombine_lora_expert_keys(out))

    def _concatenate_expert_weights(
        self, expert_weights_by_layer: dict[str, Any], n_experts: int
    ) -> torch.Tensor | None:
        """The first complete set of {layer: {name: {expert: [...]}}} as one tensor [n_experts, ...]; None
        while none is.

        The set is taken out of the dict. Raises `ExpertShapeError` where its numbers are not 0 to n_experts -
        1.
        """
        for layer, names in expert_weights_by_layer.items():
            for name, experts in names.items():
                if len(experts) != n_experts:
                    continue
                if sorted(experts) != list(range(n_experts)):
                    raise ExpertShapeError(
                        f"experts 0 to {n_experts - 1} of {show(name)}", f"{sorted(experts)}"
                    )
                stacked = torch.stack([experts[i] for i in range(n_experts)])
                del names[name]
                if not names:
                    del expert_weights_by_layer[layer]
                return stacked
        return None

    # Inside.

    def _load(self, facts: Facts, state: Mapping[str, Any], mesh: DeviceMesh | None) -> Load:
        return Load(facts, state, mesh, self._record(), self._registered())

    def _registered(self) -> set[str]:
        found: set[str] | None = getattr(self, "_inplace_loaded_native_keys", None)
        if found is None:
            found = set()
            self._inplace_loaded_native_keys: set[str] | None = found
        return found

    def _record(self) -> Record:
        found: Record | None = self.__dict__.get("_restow_record")
        if found is None:
            found = self.__dict__["_restow_record"] = Record()
        return found

    def _place(self, fqn: str) -> tuple[Facts, str, Row] | None:
        """(facts, the path from `layers.` on, the row) of a native name; None for names that are not the
        experts'.
        """
        path, _, last = unwrapped(fqn).rpartition(".")
        row = row_named(GROUPED, last) or row_named(LORA, last)
        if row is None or not f".{path}".endswith(f".{self._expert_path_segment}"):
            return None
        at = f".{path}".find(".layers.")
        if at < 0:
            raise UsageError(f"'layers.' and a number in {show(fqn)}", "none", tensor=fqn)
        return facts_of(self), path[at:], row


def _tracked(fqn: str, prefix: str | None) -> str:
    return fqn.removeprefix(prefix) if prefix is not None and prefix.endswith(".") else fqn


def materialized(state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` with contiguous copies in place of views, as savers need them; the same dict, changed in
    place.
    """
    for name, value in state_dict.items():
        if isinstance(value, torch.Tensor) and not value.is_contiguous():
            state_dict[name] = value.contiguous()
    return state_dict
