"""An adapter's headers as pairs of factors: every name, shape and rank judged against the config and the base.

Which tensors make a pair is decided here; `adapter_pair` judges the pair. A `Plain` is the pair of an ordinary module.
Findings are raised together, each an `AdapterError` that names the tensor and both numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from restow.adapter_base import Base
from restow.adapter_config import AdapterConfig, Number
from restow.adapter_faults import exchanged, other_family, other_rank, other_shape, two_scales
from restow.adapter_formats import ROLES, Faces, one_label, parameter, per_expert
from restow.adapter_keys import Found, Sorted, Spelled, half, module_of, sort_names
from restow.adapter_orient import Options, Wrappers, decide_faces, stored, wrapped_roles, wrapper_rows
from restow.adapter_pair import Names, Pair, Stored, judged
from restow.adapter_scope import judge_scope
from restow.errors import AdapterError, RestowError, show
from restow.known import FAMILIES
from restow.layout import name_of
from restow.module import Shapes
from restow.notation import Row
from restow.problems import merged
from restow.segments import ends

PLAIN = Options()


@dataclass(frozen=True)
class Plain:
    """The pair of an ordinary module: an nn.Linear, a router, an embedding."""

    module: str
    names: tuple[str, str]
    rank: int
    alpha: Number


@dataclass(frozen=True)
class Adapter:
    """A judged adapter: pairs by experts module, ordinary modules, tensors that go along, and what was decided how."""

    config: AdapterConfig
    pairs: tuple[Pair, ...]
    plain: tuple[Plain, ...]
    others: tuple[str, ...]
    kinds: Mapping[str, Spelled]
    faces: Mapping[str, tuple[Faces, str]]

    @property
    def modules(self) -> dict[str, list[Pair]]:
        """The pairs of each experts module, in the order of roles and projections."""
        found: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault(pair.path, []).append(pair)
        return found


def read_adapter(shapes: Shapes, config: AdapterConfig, base: Base, options: Options = PLAIN) -> Adapter:
    """Judge the tensors of an adapter (name -> shape). Raises `AdapterError`: all findings in one."""
    options.judge()
    _judge_family(config, base)
    by_name = sort_names(shapes, base.family, config.path)
    reader = _Reader(shapes, config, base, options)
    reader.errors += judge_scope(by_name, shapes, config, base)
    plain = reader.plain(by_name)
    pairs = reader.experts(by_name)
    if reader.errors:
        raise merged(reader.errors)
    kinds = {path: found[0].spelled for path, found in by_name.experts.items()} | reader.apart
    return Adapter(config, tuple(pairs), tuple(plain), tuple(by_name.others), kinds, reader.faces)


def _judge_family(config: AdapterConfig, base: Base) -> None:
    """Raise `AdapterError` where PEFT wrote down that the adapter was trained on a model of another known family.

    It names the module of transformers, which may hold several model types: `llama4` has llama4_text too.
    """
    mapping = config.raw.get("auto_mapping")
    library = str(mapping.get("parent_library")) if isinstance(mapping, Mapping) else ""
    kind = library.removeprefix("transformers.models.").partition(".")[0]
    ours = any(known == kind or known.startswith(f"{kind}_") for known in base.family.model_types)
    if library.startswith("transformers.models.") and kind in FAMILIES and not ours:
        raise other_family(config.path, base.family.model_types[0], kind)


class _Reader:
    """What one call of `read_adapter` gathers."""

    def __init__(self, shapes: Shapes, config: AdapterConfig, base: Base, options: Options) -> None:
        self.shapes, self.config, self.base, self.options = shapes, config, base, options
        self.errors: list[RestowError] = []
        self.faces: Mapping[str, tuple[Faces, str]] = {}
        self.apart: dict[str, Spelled] = {}  # modules whose gate and up have wrappers of their own
        marker = config.raw.get("lora_B_layout")
        said = options.expert_major
        self.expert_major = said if said is not None else marker == "grouped_by_expert"

    def plain(self, by_name: Sorted) -> list[Plain]:
        found = []
        for module, factors in by_name.pairs.items():
            words = sorted(factors)
            a, b = factors[words[0]], factors[words[1]]
            embedding = words[0].startswith("lora_embedding")
            rank, alpha = self.config.of(asked_name(self.config, module))
            try:
                self._judge_plain(module, a, b, rank, embedding)
            except RestowError as error:
                self.errors.append(error)
                continue
            found.append(Plain(module, (a, b), rank, alpha))
        return found

    def _judge_plain(self, module: str, a: str, b: str, rank: int, embedding: bool) -> None:
        base = self.base.shape(f"{module}.weight")
        have = (self.shapes[a], self.shapes[b])
        dims = 2 if base is None and all(len(shape) == 2 for shape in have) else len(base or have[0])
        if any(len(shape) != dims for shape in have) or dims < 2:  # a convolution's factors have its dims
            wrong = next((name for name, shape in zip((a, b), have, strict=True) if len(shape) != dims), a)
            there = (rank, "in") if wrong == a else ("out", rank)
            raise other_shape(self.config.path, self.shapes, module, wrong, there)
        ranks = (have[0][0], have[1][1])
        io = None if base is None else (base[1], base[0])
        if io is not None and (embedding or self.config.raw.get("fan_in_fan_out")):
            io = (io[1], io[0])
        path = self.config.path
        if ranks != (rank, rank):
            if (have[0][1], have[1][0]) == (rank, rank):
                raise exchanged(path, self.shapes, a, b)
            found = ranks[0] if ranks[0] != rank else ranks[1]
            raise other_rank(path, self.shapes, module, (a, b), rank, found)
        if io is not None and (have[0][1], have[1][0]) != io:
            name, want = (a, (rank, io[0])) if have[0][1] != io[0] else (b, (io[1], rank))
            raise other_shape(path, self.shapes, module, name, want)

    def experts(self, by_name: Sorted) -> list[Pair]:
        pairs: list[Pair] = []
        wrappers: list[Wrappers] = []
        sizes: dict[str, Mapping[str, int]] = {}
        for path, found in by_name.experts.items():
            try:
                module = self.base.experts(path)
                known = {**self.base.sizes, **(module.sizes if module is not None else {})}
                sizes[path] = {
                    axis: n for axis, n in known.items() if axis.partition("@")[0] in ("e", "d", "f", "p")
                }
                if found[0].spelled.kind == "wrapper":
                    wrappers.append(wrapped_roles(path, found, self.config, self.base.family, self.shapes,
                                                  sizes[path], self.options))  # fmt: skip
                else:
                    pairs += self._named(found[0], sizes[path])
            except RestowError as error:
                self.errors.append(error)
        try:
            self.faces = decide_faces(
                wrappers, self.config, self.base.family, self.shapes, sizes, self.options
            )
            for m in wrappers:
                pairs += self._wrapped(m, sizes[m.path])
                if m.kind == "apart":
                    self.apart[m.path] = Spelled("apart")
        except RestowError as error:
            self.errors.append(error)
        return pairs

    def _wrapped(self, module: Wrappers, sizes: Mapping[str, int]) -> list[Pair]:
        faces = self.faces[module.path][0]
        pairs = []
        known = dict(sizes)
        for unit, names in module.names.items():
            role, label = unit
            table = wrapper_rows(module, unit, faces, self.base.family, self.expert_major)
            two = table[f"{role}.A"], table[f"{role}.B"]
            a: Names = {(): stored(names, "A", faces)}
            b: Names = {(): stored(names, "B", faces)}
            said = self.config.of(module.parameters[unit])
            pairs.append(self._judged(Stored(module.path, role, label, two, (a, b), *said), known))
            known = {**{axis: n for axis, n in pairs[-1].sizes.items() if axis not in ("r", "p")}, **known}
        return pairs

    def _judged(self, one: Stored, sizes: Mapping[str, int]) -> Pair:
        return judged(one, sizes, len(self.base.family.labels), self.shapes, self.config.path)

    def _named(self, found: Found, sizes: Mapping[str, int]) -> list[Pair]:
        """The pairs of a kind whose names say the roles."""
        pairs = []
        known = dict(sizes)
        shared = found.spelled.kind in ("outer", "stacked")
        free = self.config.free and found.spelled.kind == "native"
        for role in ROLES:
            a, b = found.names.get(f"{role}.A", {}), found.names.get(f"{role}.B", {})
            if not a and not b:
                continue
            rows = found.rows[f"{role}.A"], found.rows[f"{role}.B"]
            self._whole(found, role, a, b)
            labels = range(len(rows[0].labels["p"])) if "p" in rows[0].labels else [None]
            for label in labels:
                ours = _only(rows[0], a, label), _only(rows[1], b, label)
                if not ours[0]:
                    continue
                two = rows if label is None else (one_label(rows[0], label), one_label(rows[1], label))
                rank, alpha = self._ranks(found, role, label, ours[0])
                if "e" in rows[0].name_axes:
                    known.setdefault("e", 1 + max(i for i, *_ in ours[0]))
                one = Stored(found.path, role, label, two, ours, rank, alpha, shared, free)
                pairs.append(self._judged(one, known))
                known = {**{axis: n for axis, n in pairs[-1].sizes.items() if axis != "r"}, **known}
        return pairs

    def _whole(self, found: Found, role: str, a: Names, b: Names) -> None:
        """Raise `AdapterError` for a factor without its partner."""
        for index in a.keys() ^ b.keys():
            one = (a if index in a else b)[index]
            if found.spelled.kind == "native":
                other = name_of(found.rows[f"{role}.{'B' if index in a else 'A'}"], (), {})
                raise AdapterError(
                    "both factors of every module", f"{show(one)} alone", path=self.config.path, tensor=one,
                    sections=[("missing", [f"{show(found.path)}.{other}"])],
                )  # fmt: skip
            word = "lora_A" if "lora_A" in one else "lora_B"
            raise half(module_of(one), {word: one}, self.config.path)[0]

    def _ranks(self, found: Found, role: str, label: int | None, names: Names) -> tuple[int, Number]:
        """The config's rank and alpha for a role: one for all its experts."""
        if found.spelled.kind in ("expert", "expert_fused"):
            said = {self.config.of(module): module for module in map(module_of, names.values())}
            if len(said) > 1:
                raise two_scales(self.config.path, found.path, said)
            return next(iter(said))
        labels = (label,) if label is not None else None
        return self.config.of_any(alias_names(found.path, role, labels, self.base))


def asked_name(config: AdapterConfig, module: str) -> str:
    """What PEFT asks patterns about for an ordinary module: its weight's name where that is a target parameter."""
    weight = f"{module}.weight"
    named = any(ends(weight, t) for t in config.names("target_parameters"))
    return weight if named else module


def alias_names(path: str, role: str, labels: Sequence[int] | None, base: Base) -> list[str]:
    """The names by which patterns may mean a role: the runtime's parameter first, then the first expert's modules."""
    row = per_expert(base.family)[role]
    names = [f"{path}.{parameter(base.family, role)}"]
    for choice in labels if labels is not None else range(len(row.labels.get("p", ("",)))):
        index = [0 if axis == "e" else choice for axis in row.name_axes]
        names.append(f"{path}.{name_of(row, tuple(index), {})}".removesuffix(".weight"))
    return names


def _only(row: Row, names: Names, label: int | None) -> Names:
    """The names of one projection, its index made 0."""
    if label is None:
        return names
    at = row.name_axes.index("p")
    return {(*i[:at], 0, *i[at + 1 :]): name for i, name in names.items() if i[at] == label}
