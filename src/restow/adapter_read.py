"""An adapter's headers as pairs of factors: every name, shape and rank judged against the config and the base.

A `Pair` is A and B of one role of one experts module (of one projection, where projections are stored apart), with the
rows and sizes that say where its elements lie; a `Plain` is the pair of an ordinary module. Findings are raised
together, each an `AdapterError` that names the tensor and both numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from restow.adapter_base import Base
from restow.adapter_config import AdapterConfig, Number
from restow.adapter_formats import ROLES, Faces, one_label, parameter, per_expert
from restow.adapter_keys import PREFIX, Found, Sorted, Spelled, half, sort_names
from restow.adapter_orient import Options, Wrappers, decide_faces, stored, wrapped_roles, wrapper_rows
from restow.errors import AdapterError, RestowError, show
from restow.known import FAMILIES
from restow.layout import axis_size, name_of, shape_of, solve_sizes
from restow.notation import Row
from restow.problems import merged
from restow.segments import ends

Shapes = Mapping[str, tuple[int, ...]]
PLAIN = Options()


@dataclass(frozen=True)
class Factor:
    """One factor of a pair: its row, its sizes (`e` is 1 where all experts share it), its tensors in the row's order.

    None stands for an expert that is not in the adapter.
    """

    row: Row
    sizes: Mapping[str, int]
    names: tuple[str | None, ...]


@dataclass(frozen=True)
class Pair:
    """A and B of one role: `labels` are the projections (of `in`) that they serve, `experts` those that are there."""

    path: str
    role: str
    labels: tuple[int, ...]
    a: Factor
    b: Factor
    sizes: Mapping[str, int]
    experts: tuple[int, ...]
    rank: int
    alpha: Number


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
        raise AdapterError(
            f"an adapter for the base's family, {base.family.model_types[0]}",
            f"one that was trained on {kind} (auto_mapping)",
            path=config.path,
            hint="choose the base that it was trained on; remove auto_mapping from the config if it is wrong",
        )


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
        if any(len(shape) != 2 for shape in have):
            return  # a convolution: goes along
        ranks = (have[0][0], have[1][1])
        io = None if base is None or len(base) != 2 else (base[1], base[0])
        if io is not None and (embedding or self.config.raw.get("fan_in_fan_out")):
            io = (io[1], io[0])
        if ranks != (rank, rank):
            if (have[0][1], have[1][0]) == (rank, rank):
                raise self._exchanged(a, b)
            raise self._rank(module, a, b, rank, ranks[0] if ranks[0] != rank else ranks[1])
        if io is not None and (have[0][1], have[1][0]) != io:
            raise self._shape(*((a, [rank, io[0]]) if have[0][1] != io[0] else (b, [io[1], rank])), module)

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
            a, b = stored(names, "A", faces), stored(names, "B", faces)
            rank, alpha = self.config.of(module.parameters[unit])
            pair = self._pair(module.path, role, label, table, {(): a}, {(): b}, known, rank, alpha)
            known = {**{axis: n for axis, n in pair.sizes.items() if axis not in ("r", "p")}, **known}
            pairs.append(pair)
        return pairs

    def _named(self, found: Found, sizes: Mapping[str, int]) -> list[Pair]:
        """The pairs of a kind whose names say the roles."""
        pairs = []
        known = dict(sizes)
        for role in ROLES:
            a, b = found.names.get(f"{role}.A", {}), found.names.get(f"{role}.B", {})
            if not a and not b:
                continue
            row = found.rows[f"{role}.A"]
            self._half(found, role, a, b)
            labels = range(len(row.labels["p"])) if "p" in row.labels else [None]
            for label in labels:
                table = dict(found.rows)
                if label is not None:
                    table = {r: one_label(row, label) for r, row in found.rows.items()}
                ours = [_only(found.rows[f"{role}.{x}"], names, label) for x, names in (("A", a), ("B", b))]
                if not ours[0]:
                    continue
                rank, alpha = self._ranks(found, role, label, ours[0])
                if "e" in row.name_axes:
                    known.setdefault("e", 1 + max(i for i, *_ in ours[0]))
                pair = self._pair(
                    found.path, role, label, table, ours[0], ours[1], known, rank, alpha, found.spelled
                )
                known = {**{axis: n for axis, n in pair.sizes.items() if axis != "r"}, **known}
                pairs.append(pair)
        return pairs

    def _half(
        self, found: Found, role: str, a: Mapping[tuple[int, ...], str], b: Mapping[tuple[int, ...], str]
    ) -> None:
        for index in a.keys() ^ b.keys():
            one = (a if index in a else b)[index]
            word = "lora_A" if "lora_A" in one else "lora_B"
            module = one.removeprefix(PREFIX).rpartition(f".{word}")[0]
            if found.spelled.kind == "native":
                other = name_of(found.rows[f"{role}.{'B' if index in a else 'A'}"], (), {})
                raise AdapterError(
                    "both factors of every module", f"{show(one)} alone", path=self.config.path, tensor=one,
                    sections=[("missing", [f"{show(found.path)}.{other}"])],
                )  # fmt: skip
            raise half(module, {word: one}, self.config.path)[0]

    def _ranks(
        self, found: Found, role: str, label: int | None, names: Mapping[tuple[int, ...], str]
    ) -> tuple[int, Number]:
        """The config's rank and alpha for a role: one for all its experts."""
        if found.spelled.kind in ("expert", "expert_fused"):
            modules = [name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in names.values()]
            said = {self.config.of(module): module for module in modules}
            if len(said) > 1:
                raise AdapterError(
                    f"one rank and alpha for all experts of {show(found.path)}",
                    ", ".join(f"{show(m)}: r {r}, alpha {a}" for (r, a), m in list(said.items())[:3]),
                    path=self.config.path,
                    hint="give the patterns for all experts at once",
                )
            return next(iter(said))
        return self.config.of_any(
            alias_names(found.path, role, (label,) if label is not None else None, self.base)
        )

    def _pair(
        self, path: str, role: str, label: int | None, table: Mapping[str, Row],
        a: Mapping[tuple[int, ...], str], b: Mapping[tuple[int, ...], str],
        sizes: Mapping[str, int], rank: int, alpha: Number, spelled: Spelled | None = None,
    ) -> Pair:  # fmt: skip
        """One pair, its shapes solved and judged: the rank of the tensors, the sizes of the base."""
        known = {**sizes, **({"p": 1} if label is not None else {})}
        row_a, row_b = table[f"{role}.A"], table[f"{role}.B"]
        limit = known.get(f"e@{role}", known.get("e"))
        for (i, *_), name in a.items() if "e" in row_a.name_axes else ():
            if limit is not None and i >= limit:
                raise self._no_expert(name, i, limit)
        first_a, first_b = next(iter(a.values())), next(iter(b.values()))
        outer = {f: self._shared(spelled, row, self.shapes[n], known)
                 for f, row, n in (("A", row_a, first_a), ("B", row_b, first_b))}  # fmt: skip
        sizes_a = self._solved(row_a, first_a, {**known, **outer["A"]}, rank)
        sizes_b = self._solved(
            row_b, first_b, {**{k: v for k, v in sizes_a.items() if k != "e"}, **known, **outer["B"]}, rank
        )
        sizes_a, sizes_b = {**sizes_b, **sizes_a}, {**sizes_a, **sizes_b}
        found_rank = sizes_a["r"]
        if found_rank != rank and not (self.config.free and spelled is not None and spelled.kind == "native"):
            module = first_a.removeprefix(PREFIX).rpartition(".lora_")[0]
            raise self._rank(module, first_a, first_b, rank, found_rank)
        for row, names, of in ((row_a, a, sizes_a), (row_b, b, sizes_b)):
            want = shape_of(row, of)
            for name in names.values():
                if self.shapes[name] != want:
                    module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
                    raise self._wrong(name, row, want, module, rank)
        whole = (
            {**sizes_a, "e": max(sizes_a["e"], sizes_b["e"])}
            if not known.get("e")
            else {**sizes_a, "e": known["e"]}
        )
        labels = (
            ()
            if role == "out"
            else (label,)
            if label is not None
            else tuple(range(len(self.base.family.labels)))
        )
        if f"e@{role}" in known:
            whole["e"] = known[f"e@{role}"]
        experts = tuple(sorted({i for i, *_ in a})) if "e" in row_a.name_axes else tuple(range(whole["e"]))
        return Pair(path, role, labels, Factor(row_a, sizes_a, _in_order(row_a, a, sizes_a)),
                    Factor(row_b, sizes_b, _in_order(row_b, b, sizes_b)), whole, experts, found_rank, alpha)  # fmt: skip

    def _shared(
        self, spelled: Spelled | None, row: Row, shape: tuple[int, ...], known: Mapping[str, int]
    ) -> dict[str, int]:
        """`e` is 1 in a factor that all experts share."""
        if spelled is None or spelled.kind not in ("outer", "stacked") or not shape or shape[0] != 1:
            return {}
        return {"e": 1}

    def _solved(self, row: Row, name: str, known: Mapping[str, int], rank: int) -> dict[str, int]:
        shape = self.shapes[name]
        of = dict(known)
        if (
            "e" not in of
            and f"e@{row.base}" not in of
            and any(len(d.factors) == 2 and "e" in str(d) for d in row.dims)
        ):
            of["r"] = rank
        fresh = solve_sizes(row, shape, of)
        if fresh is None:
            module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
            guess = {**of, "r": of.get("r", rank)}
            raise self._wrong(name, row, self._expected(row, guess), module, rank)
        return {**of, **fresh}

    def _expected(self, row: Row, sizes: Mapping[str, int]) -> tuple[object, ...]:
        out: list[object] = []
        for dim in row.dims:
            try:
                out.append(prod(axis_size(row, f.axis, sizes) for f in dim.factors))
            except RestowError:
                out.append(str(dim))
        return tuple(out)

    def _wrong(self, name: str, row: Row, want: Sequence[object], module: str, rank: int) -> AdapterError:
        """A shape that is wrong: exchanged factors are told from other sizes."""
        shape = self.shapes[name]
        word = "lora_A" if "lora_A" in name else "lora_B"
        partner = name.replace(word, "lora_B" if word == "lora_A" else "lora_A")
        other = self.shapes.get(partner)
        if len(shape) == 2 and other is not None and len(other) == 2:
            a, b = (shape, other) if word == "lora_A" else (other, shape)
            if (a[0], b[1]) != (rank, rank) and (a[1], b[0]) == (rank, rank):
                return self._exchanged(*((name, partner) if word == "lora_A" else (partner, name)))
            if a[0] == b[1] != rank and "e" in row.name_axes:
                return self._rank(module, name, partner, rank, a[0])
        return self._shape(name, list(want), module)

    def _no_expert(self, name: str, number: int, limit: int) -> AdapterError:
        return AdapterError(
            f"adapters for experts 0 to {limit - 1}, which the base has",
            f"expert {number} in {show(name)}",
            path=self.config.path,
            tensor=name,
            hint="this adapter was trained on a base with more experts",
        )

    def _exchanged(self, a: str, b: str) -> AdapterError:
        module = a.removeprefix(PREFIX).rpartition(".lora_")[0]
        return AdapterError(
            f"lora_A [rank, in] and lora_B [out, rank] of {show(module)}",
            f"the two exchanged: {list(self.shapes[a])} and {list(self.shapes[b])}",
            path=self.config.path,
            tensor=a,
            sections=[("tensors", [show(a), show(b)])],
            hint="exchange the names in the program that wrote this adapter",
        )

    def _rank(self, module: str, a: str, b: str, rank: int, found: int) -> AdapterError:
        return AdapterError(
            f"rank {rank} for {show(module)}, as the config says",
            f"tensors of rank {found}",
            path=self.config.path,
            tensor=a,
            sections=[("tensors", (f"{show(n)} {list(self.shapes[n])}" for n in (a, b)))],
            hint="the scale is alpha / r: correct r or rank_pattern in the config, or the file is another adapter's",
        )

    def _shape(self, name: str, want: Sequence[object], module: str) -> AdapterError:
        return AdapterError(
            f"shape [{', '.join(map(str, want))}] for {show(name)}, which the base gives",
            f"{list(self.shapes[name])}",
            path=self.config.path,
            tensor=name,
            sections=[("tensor", [show(name)]), ("module", [show(module)])],
            hint="this adapter was trained on a base of other sizes",
        )


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


def _only(row: Row, names: Mapping[tuple[int, ...], str], label: int | None) -> dict[tuple[int, ...], str]:
    """The names of one projection, its index made 0."""
    if label is None:
        return dict(names)
    at = row.name_axes.index("p")
    return {(*i[:at], 0, *i[at + 1 :]): name for i, name in names.items() if i[at] == label}


def _in_order(
    row: Row, names: Mapping[tuple[int, ...], str], sizes: Mapping[str, int]
) -> tuple[str | None, ...]:
    lengths = [axis_size(row, axis, sizes) for axis in row.name_axes]
    return tuple(names.get(index) for index in product(*map(range, lengths)))


__all__ = ["Adapter", "Factor", "Options", "Pair", "Plain", "alias_names", "asked_name", "read_adapter"]
