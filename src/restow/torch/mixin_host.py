"""What the mixin asks of the class that inherits it: a documented protocol, and the facts that it gives,
checked.

Raises `UsageError` where an attribute is missing or is nothing that the experts can have; nothing is asked
for before it is needed, so that a model without experts can leave `moe_config` None as long as it has no
expert tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from restow.errors import UsageError, show
from restow.layout import Layout
from restow.torch.mixin_rows import GROUPED, LORA, LORA_SPLIT, SPLIT, with_labels

GATED = ("swiglu", "swigluoai", "quick_geglu", "geglu")  # activations of two projections
UNGATED = ("relu2",)
EP_DISPATCHERS = ("deepep", "hybridep", "uccl_ep")
ALIASING = (
    "gmm",
    "torch_mm",
    "torch_mm_mxfp8",
)  # backends whose grouped tensors are the parameters themselves


class MoEConfig(Protocol):
    """What is read of `self.moe_config`."""

    n_routed_experts: int  # e: experts of one layer, over all ranks
    moe_inter_dim: int  # f: hidden size of one expert
    expert_activation: str  # of GATED or UNGATED; not read where `_is_gated_moe` is overridden


class Host(Protocol):
    """What a subclass sets in its `__init__`, and may override.

    `config` (the model's, not read here), `moe_config`, `backend` (its `experts` and `dispatcher` say whether
    grouped tensors are the parameters themselves; None means yes), `dtype` (of the tensors that `from_hf`
    makes), and `_uses_model_prefix` (whether names for Hugging Face begin with `model.`; not read where
    `_hf_prefix` is overridden).
    """

    config: Any
    moe_config: MoEConfig
    backend: Any
    dtype: torch.dtype
    _uses_model_prefix: bool

    @property
    def _hf_prefix(self) -> str: ...
    @property
    def _expert_path_segment(self) -> str: ...
    @property
    def _is_gated_moe(self) -> bool: ...


class Facts(NamedTuple):
    """Sizes and spelling of a model's experts. `d` and `r` come from the tensors."""

    experts: int
    hidden: int
    gated: bool
    segment: str

    @property
    def sizes(self) -> dict[str, int]:
        return {"e": self.experts, "p": 2 if self.gated else 1, "f": self.hidden}

    @property
    def pairs(self) -> tuple[tuple[Layout, Layout], ...]:
        """(grouped, per expert) layouts of weights and of LoRA."""
        return (GROUPED, with_labels(SPLIT, self.gated)), (LORA, with_labels(LORA_SPLIT, self.gated))


def facts_of(host: Host) -> Facts:
    """The facts of a host. Raises `UsageError` for what is missing or no number of experts or hidden
    units.
    """
    config = needed(host, "moe_config", "its experts' configuration")
    if config is None:
        raise UsageError(
            f"a configuration of experts in {type(host).__name__}.moe_config", "None",
            hint="a model without experts must not call the expert members",
        )  # fmt: skip
    return Facts(
        _count(host, config, "n_routed_experts"),
        _count(host, config, "moe_inter_dim"),
        bool(host._is_gated_moe),
        host._expert_path_segment,
    )


def needed(host: object, name: str, meaning: str) -> Any:
    """An attribute that a subclass sets. Raises `UsageError` where it did not."""
    try:
        return getattr(host, name)
    except AttributeError as error:
        raise UsageError(
            f"{type(host).__name__}.{name}, {meaning}",
            "no such attribute",
            hint="set config, moe_config, backend, dtype and _uses_model_prefix in __init__ before converting",
        ) from error


def gated(activation: object) -> bool:
    """Whether experts of this activation have a gate. Raises `UsageError` for one that is not known."""
    if activation in GATED or activation in UNGATED:
        return activation in GATED
    raise UsageError(
        f"expert_activation as one of {', '.join((*GATED, *UNGATED))}",
        show(repr(activation)),
        hint="override _is_gated_moe where the activation is your own",
    )


def output_dtype(host: object) -> torch.dtype:
    """The dtype of the tensors that are made. Raises `UsageError` where it is none."""
    dtype = needed(host, "dtype", "the dtype of the tensors that from_hf makes")
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"a torch.dtype as {type(host).__name__}.dtype", show(repr(dtype)))
    return dtype


def is_parameter(host: object, role: str) -> bool:
    """Whether the grouped tensor of a role, in a state dict, is the model's own memory, as its backend keeps
    it.

    TransformerEngine's experts show copies; MoK's show a copy for gate and up. As NeMo AutoModel 0.7 has it.
    """
    backend = getattr(host, "backend", None)
    experts, dispatcher = getattr(backend, "experts", None), getattr(backend, "dispatcher", None)
    if experts == "te":
        return False
    if dispatcher == "mok":
        return role != "in"
    if dispatcher not in EP_DISPATCHERS or not torch.distributed.is_initialized():
        return True
    return torch.distributed.get_world_size() == 1 or experts in ALIASING


def _count(host: object, config: object, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = "none" if value is None else show(repr(value))
        raise UsageError(f"{type(host).__name__}.moe_config.{name} as a whole number of at least 1", found)
    return value
