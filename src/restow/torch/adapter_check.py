"""`restow.lora.check`: will the PEFT that is installed do with this adapter what it was trained to do?

The base is built from its config alone, without memory for weights, PEFT loads the adapter into it, and every module's delta, as
PEFT computes it, is compared with the one that the file means: both are applied to one vector. What differs is dropped,
rescaled by a factor, or misread. It needs transformers and peft; it rejects what `adapter_read` rejects.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from restow.adapter_base import Base, BaseLike, base_of
from restow.adapter_formats import TRANSPOSED, UNMARKED, Faces, parameter
from restow.adapter_orient import Options
from restow.adapter_read import Adapter, read_adapter
from restow.errors import UsageError, show
from restow.family import Family
from restow.torch.adapter_factors import Get, read_block
from restow.torch.adapter_file import AdapterFile

NEAR = 1e-4  # relative: float32 sums in another order


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What PEFT made of an adapter. `refused` is its own error where it raised one; names are modules of the base."""

    peft: str
    modules: int
    refused: str
    dropped: tuple[str, ...]
    rescaled: Mapping[str, float]
    misread: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every module does what the file means."""
        return not (self.refused or self.dropped or self.rescaled or self.misread)

    def __str__(self) -> str:
        what = "does what it was trained to do" if self.ok else "does NOT do what it was trained to do"
        lines = [f"in PEFT {self.peft} this adapter {what}: {self.modules} modules compared"]
        if self.refused:
            lines.append(f"  refused: {show(self.refused)}")
        for word, found in (("dropped", self.dropped), ("misread", self.misread)):
            lines += [f"  {word}: {show(name)}" for name in found[:20]]
            lines += [f"  ... {len(found) - 20} more {word}"] if len(found) > 20 else []
        lines += [
            f"  rescaled by {factor:.6g}: {show(name)}" for name, factor in list(self.rescaled.items())[:20]
        ]
        if not self.ok:
            lines.append('  try: restow.lora.convert(..., to="peft") and check the result')
        return "\n".join(lines)


def check(
    adapter: str | os.PathLike[str],
    base: BaseLike | Base,
    *,
    family: str | Family | None = None,
    faces: Faces | None = None,
    outer: str = "out",
    expert_major: bool | None = None,
) -> CheckReport:
    """Load `adapter` with the installed PEFT into a base without weights and compare every delta with the file's own.

    `base` is the base's folder (its config is enough). Raises `UsageError` where peft or transformers is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError("peft and transformers, which this check runs", "none installed") from error
    with AdapterFile(adapter) as file:
        known = base_of(base, family)
        read = read_adapter(file.shapes, file.config, known, Options(faces, outer, expert_major))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                wrapped = peft.PeftModel.from_pretrained(
                    _model(known), os.fspath(adapter), torch_device="cpu"
                )
            except Exception as error:
                said = f"{type(error).__name__}: {str(error)[:300]}"
                return CheckReport(peft.__version__, 0, said, (), {}, (), _texts(caught))
        theirs = dict(_theirs(wrapped, known))
        dropped, rescaled, misread = list[str](), dict[str, float](), list[str]()
        count = 0
        for name, want in _ours(read, file.get, known):
            count += 1
            found = theirs.pop(_place(known, name), None)
            verdict = _compare(want, found)
            if verdict == 0:
                dropped.append(name)
            elif verdict is None:
                misread.append(name)
            elif verdict != 1:
                rescaled[name] = verdict
        return CheckReport(
            peft.__version__, count, "", tuple(dropped), rescaled, tuple(misread), _texts(caught)
        )


def _texts(caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(w.message)[:300] for w in caught))


def _model(base: Base) -> Any:
    """The base's model on the meta device: shapes and names, no weights, no code from the folder."""
    import transformers

    if base.path is None:
        raise UsageError("a base's folder", "a family alone")
    config = transformers.AutoConfig.from_pretrained(
        base.path, trust_remote_code=False, local_files_only=True
    )
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, transformers.AutoModelForCausalLM)
    build = getattr(cls, "_from_config", None) or cls.from_config
    with torch.device("meta"):
        model = build(config)
    for (
        module
    ) in model.modules():  # PEFT moves what it computes to the base's device: one number, seen everywhere
        for key, weight in list(module._parameters.items()):
            if weight is not None:
                hollow = torch.zeros((), dtype=torch.float32).expand(weight.shape)
                module._parameters[key] = torch.nn.Parameter(hollow, requires_grad=False)
    return model


def _vector(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)


def _ours(read: Adapter, get: Get, base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    """(module or parameter, its delta applied to a vector) as the file means it."""
    config = read.config
    for path, pairs in read.modules.items():
        for role in dict.fromkeys(pair.role for pair in pairs):
            total: torch.Tensor | None = None
            for block in (read_block(pair, get) for pair in pairs if pair.role == role):
                x = _vector(block.a.shape[2])
                h = (block.a.double() @ x) * config.scale(block.rank, block.alpha)  # [e, r]
                if role == "out":
                    total = torch.einsum("eor,er->eo", block.b.double(), h)
                    continue
                y = torch.einsum("epfr,er->epf", block.b.double(), h)
                whole = torch.zeros(y.shape[0], len(base.family.labels), y.shape[2], dtype=y.dtype)
                whole[:, list(block.labels)] = y
                total = whole if total is None else total + whole
            assert total is not None
            if role == "in":
                total = total.flatten(1) if base.family.order[0] == "p" else total.transpose(1, 2).flatten(1)
            yield f"{path}.{parameter(base.family, role)}", total
    for plain in read.plain:
        a, b = (get(name).double() for name in plain.names)
        if "lora_embedding" in plain.names[0] or a.dim() != 2:
            continue
        yield plain.module, (b @ (a @ _vector(a.shape[1]))) * config.scale(plain.rank, plain.alpha)


def _theirs(wrapped: Any, base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    """The same as PEFT computes it, by canonical name."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    turned = any(kind in (*TRANSPOSED, *UNMARKED) for kind in base.family.model_types)
    root = "base_model.model."
    for name, module in wrapped.named_modules():
        if not isinstance(module, LoraLayer) or "default" not in module.lora_A:
            continue
        if not hasattr(module, "get_delta_weight"):
            continue
        delta = module.get_delta_weight("default").detach().double()
        path = name.removeprefix(root)
        if isinstance(module, ParamWrapper):
            path = f"{path}.{module.parameter_name}"
            while ".base_layer." in path:
                path = path.replace(".base_layer.", ".")
        three = delta.dim() == 3
        applied = torch.einsum("eio,i->eo", delta, _vector(delta.shape[1])) if three and turned else (
            delta @ _vector(delta.shape[-1]))  # fmt: skip
        yield _place(base, path.removesuffix(".weight")), applied


def _place(base: Base, name: str) -> str:
    return base.family.canonical(name)


def _compare(want: torch.Tensor, found: torch.Tensor | None) -> float | None:
    """1 if equal, 0 if nothing arrived, a factor if only the scale differs, None for anything else."""
    if found is None or not bool(found.any()):
        return 0.0 if bool(want.any()) else 1.0
    if found.shape != want.shape:
        return None
    factor = float((want * found).sum() / (want * want).sum()) if bool(want.any()) else 0.0
    size = float(found.norm())
    if float((found - want).norm()) <= NEAR * size:
        return 1.0
    if factor and float((found - factor * want).norm()) <= NEAR * size:
        return factor
    return None
