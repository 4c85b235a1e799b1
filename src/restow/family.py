"""A model family as a record: what it is called, where its experts lie, how they are spelled, what must be there.

Families are text tables (`restow.catalog`) parsed into frozen values; nothing about a family is code. It rejects
tables that contradict themselves. The lines of a table:

    family    model types
    size      AXIS[@ROLE] = config path [| path] [+ ...]; `#path`: the length of a list or text; `path.1`: an item of
              a list; L: layers
    order     labels of p in order, then the order of p and f: `gate|up p f`, `up p f`, `gate|up f p`
    module    containers of the experts module: the vendor's, then transformers' runtime, then others
    rename    run of segments on the hub, the same in transformers' runtime (`^run`: only where a name begins, `run$`
              where it ends; `{l}` a number, `{l+1}` one more)
    alias     run of segments met on disk, the same on the hub: read, and never written
    spelling  names [@ container], then one row a line; the first is the vendor's, and is called hf
    router    rows of tensors outside the experts that have an `e` axis, their names below the layer, as on the hub;
              a second `router` line begins the rows of another form of the same
    beside    names that are no expert weights, though they are called so or lie below an experts module
    optional  names that some layers lack though all their like have them
    ignore    names that a destination need not have: `*` any run of segments, `{l+L}` a layer number of at least L
    foreign   names in transformers' runtime that the hub's files hold in a form that no rename brings about
    require   names that a whole checkpoint must hold; the head after `?`, since a config may tie it
    tie       the config's key that ties the head, then `yes` if an absent key ties too; or `never`; without this
              line the key is the top-level `tie_word_embeddings`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from restow.codecs import Codec
from restow.errors import ConfigError, NotationError, UsageError, show
from restow.forms import form_of
from restow.layout import Layout, SizeLine, parse_size
from restow.named import FORMS, NAMED
from restow.naming import fits
from restow.notation import Row
from restow.segments import ends, replace_run

WORDS = frozenset(
    "family size order module rename alias beside optional ignore foreign require tie".split()  # noqa: SIM905
)
CONFIG_LIMIT = 2**31
COUNT_LIMIT = 2**16  # of experts, of layers: what names are counted out for


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way in which a family's experts are met: the names it answers to, its container and its rows."""

    names: tuple[str, ...]
    container: str
    layout: Layout
    codec: Codec | None = None


@dataclass(frozen=True)
class Family:
    """A record of what a family's checkpoints look like. See the module's text for each field's meaning."""

    model_types: tuple[str, ...]
    sizes: tuple[SizeLine, ...]
    order: tuple[str, ...]  # ("p", "f") or ("f", "p")
    labels: tuple[str, ...]  # ("gate", "up"), ("up",)
    containers: tuple[tuple[str, ...], ...]  # by place: the vendor's container, then the runtime's
    renames: tuple[tuple[str, str], ...]
    spellings: tuple[Spelling, ...]
    routers: tuple[Row, ...]
    ignorable: tuple[str, ...]
    required: tuple[str, ...]
    foreign: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    beside: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    tie: str = "tie_word_embeddings"  # "" where the head is never tied
    tied: bool = False  # what holds where the config lacks that key

    def ties(self, config: Mapping[str, object] | None) -> bool:
        """Whether a config ties the head to the embedding, so that a checkpoint need not hold it."""
        if not self.tie:
            return False
        value = _lookup(config or {}, self.tie)
        return value if isinstance(value, bool) else self.tied

    def form(self, name: str) -> Layout:
        """What a layout's name means in this family: its own spelling, else its form of a named layout.

        Raises `UsageError` for a name that neither knows.
        """
        for spelling in self.spellings:
            if name in spelling.names:
                return spelling.layout
        if name not in NAMED:
            raise UsageError(f"a layout name, one of {', '.join(self.form_names())}", f"'{show(name)}'")
        if name not in FORMS:
            return NAMED[name]
        biased = any("in.bias" in spelling.layout.roles for spelling in self.spellings)
        return form_of(NAMED[name], self.order, self.labels, self.spellings[0].layout, biased)

    def form_names(self) -> tuple[str, ...]:
        """Every layout name that means something here, the vendor's first."""
        own = [name for spelling in self.spellings for name in spelling.names]
        return tuple(dict.fromkeys([*own, *NAMED]))

    def candidates(self) -> tuple[Spelling, ...]:
        """The spellings and forms among which a layout is found, each rows once; a form has no fixed container."""
        return self._candidates

    @cached_property
    def _candidates(self) -> tuple[Spelling, ...]:
        forms = {name: self.form(name) for name in FORMS}
        known = {layout: spelling.names for spelling in self.spellings for layout in [spelling.layout]}
        own = [s for s in self.spellings if s.layout not in forms.values()]
        return (*own, *(Spelling(known.get(layout, (name,)), "", layout) for name, layout in forms.items()))

    def canonical(self, name: str) -> str:
        """A tensor's or module's name with the hub's runs replaced by the runtime's."""
        for hub, runtime in (*self.aliases, *self.renames):
            name = replace_run(name, hub, runtime)
        return name

    def on_hub(self, name: str) -> str:
        """A runtime name as the hub spells it: the renames the other way round, last first.

        Raises `UsageError` where that does not lead back, since then the table does not say it.
        """
        found = name
        for hub, runtime in reversed(self.renames):
            anchor = "^" if hub.startswith("^") else ""
            end = "$" if hub.endswith("$") else ""
            found = replace_run(found, anchor + runtime.lstrip("^") + end, hub.lstrip("^").rstrip("$"))
        if self.canonical(found) != self.canonical(name):
            raise UsageError(f"a hub name for {show(name)} in the family's table", f"{show(found)}")
        return found

    def passes_over(self, name: str) -> bool:
        """Whether a name is no expert weight, whatever it is called."""
        return any(fits(pattern, name, {}) for pattern in self.beside)

    def place(self, path: str) -> tuple[str, int]:
        """An experts module's canonical layer prefix, and which of the layer's places it is, however it is spelled;
        -1 for one that is none."""
        layer, container = self._parted(path)
        places = (i for i, line in enumerate(self.containers) if container in line)
        return self.canonical(layer), next(places, -1)

    def layer(self, path: str) -> str:
        """The layer prefix of an experts module: its path without the container, as spelled."""
        return self._parted(path)[0]

    def _parted(self, path: str) -> tuple[str, str]:
        """The layer prefix and the container of an experts module; the path and nothing where none is known."""
        known = [container for line in self.containers for container in line]
        for container in sorted(known, key=len, reverse=True):
            if ends(path, container):
                return path[: -len(container)].rstrip("."), container
        return path, ""

    def key_of(self, axis: str, config: Mapping[str, object]) -> str:
        """The config's key that gives an axis its size: the first that is there, for people to look at."""
        terms = [term for line in self.sizes if line.key == axis for term in line.terms]
        paths = [path.lstrip("#") for term in terms for path in term.split("|")]
        parts = (config, config.get("text_config"))
        return next((p for p in paths if any(_lookup(part, p) is not None for part in parts)), axis)

    def read_sizes(self, config: Mapping[str, object]) -> dict[str, int]:
        """Sizes by axis from a config. Raises `ConfigError` for what is no size; absent paths give no size."""
        found = {}
        for line in self.sizes:
            limit = COUNT_LIMIT if line.axis in ("e", "L") else CONFIG_LIMIT
            least = 1 if len(line.terms) == 1 else 0  # a term of a sum may be none at all
            terms = [_term(term, config, limit, least) for term in line.terms]
            known = [term for term in terms if term is not None]
            if len(known) == len(terms):
                found[line.key] = sum(known)
        return found


def _term(term: str, config: Mapping[str, object], limit: int, least: int) -> int | None:
    if term.isdecimal():
        return int(term)
    for path in term.split("|"):
        for start in (config, config.get("text_config")):
            value = _lookup(start, path.lstrip("#"))
            if value is None:
                continue
            if path.startswith("#") and isinstance(value, list | str):
                return len(value)
            if isinstance(value, list) and value:  # one entry a bank; which bank is the family's to say
                value = value[0]
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
                raise ConfigError(
                    f"{path.lstrip('#')} as a whole number from {least} to {limit}",
                    f"{show(repr(value))}",
                    path="config.json",
                    hint="get the config.json that belongs to these files",
                )
            return value
    return None


def _lookup(config: object, path: str) -> object:
    """The value at a dotted path, or None."""
    for word in path.split("."):
        if isinstance(config, list) and word.isdecimal():
            config = config[int(word)] if int(word) < len(config) else None
        else:
            config = config.get(word) if isinstance(config, Mapping) else None
    return config


def _pairs(lines: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((old, new) for old, new in (line.split() for line in lines))


def parse_family(text: str) -> Family:
    """Parse one family's table. Raises `NotationError` for lines it does not know."""
    lines: dict[str, list[str]] = {}
    spellings: list[tuple[str, list[str]]] = []
    routers: list[list[str]] = []
    rows: list[str] = []  # where lines that begin with none of our words go
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "spelling":
            rows = []
            spellings.append((rest.strip(), rows))
        elif word == "router" and (not routers or rest.split()[0] == "router"):
            rows = [rest.strip()]
            routers.append(rows)
        elif word in WORDS:
            lines.setdefault(word, []).append(rest.strip())
        elif spellings:
            rows.append(line.strip())
        else:
            found = f"'{word}'"
            raise NotationError("a line of a family's table", found, sections=[("line", [line.strip()])])
    tie, *tied = lines["tie"][0].split() if "tie" in lines else ["tie_word_embeddings"]
    labels, *order = (lines.get("order") or ["gate|up p f"])[0].split()
    containers = tuple(tuple(line.split()) for line in lines["module"])
    built = []
    for head, body in spellings:
        names, _, container = head.partition("@")
        built.append(
            Spelling(
                tuple(names.split()), container.strip() or containers[0][0], Layout.parse("\n".join(body))
            )
        )
    return Family(
        model_types=tuple(" ".join(lines["family"]).split()),
        sizes=tuple(map(parse_size, lines.get("size", ()))),
        order=tuple(order),
        labels=tuple(labels.split("|")),
        containers=containers,
        renames=_pairs(lines.get("rename", ())),
        spellings=tuple(built),
        routers=tuple(row for body in routers for row in Layout.parse("\n".join(body)).rows),
        ignorable=tuple(" ".join(lines.get("ignore", ())).split()),
        required=tuple(" ".join(lines.get("require", ())).split()),
        foreign=tuple(" ".join(lines.get("foreign", ())).split()),
        aliases=_pairs(lines.get("alias", ())),
        beside=tuple(" ".join(lines.get("beside", ())).split()),
        optional=tuple(" ".join(lines.get("optional", ())).split()),
        tie="" if tie == "never" else tie,
        tied=tied == ["yes"],
    )
