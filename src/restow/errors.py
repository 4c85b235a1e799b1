"""The closed set of failures, all in one form: expected, found, where, what to do.

An error holds its facts as fields and renders them the same way everywhere. It rejects nothing and knows no
other module. Names that come from files are printed through `show`: escaped, and cut to a bounded length, so that
a hostile name can neither move the terminal's cursor nor fill a log.
"""

from __future__ import annotations

from collections.abc import Iterable

LISTED = 20  # names printed in full before a count stands for the rest
NAME_LIMIT = 200  # characters of one name from a file


def show(name: object) -> str:
    """A name from a file as ASCII text without control characters, at most `NAME_LIMIT` characters long."""
    text = str(name).encode("unicode_escape").decode("ascii")
    return text if len(text) <= NAME_LIMIT else text[: NAME_LIMIT - 3] + "..."


def section(label: str, lines: Iterable[str], limit: int = LISTED) -> str:
    """A labelled block of an error's text: the first `limit` lines, then a count."""
    kept = list(lines)
    more = len(kept) - limit
    if more > 0:
        kept = [*kept[:limit], f"... {more} more"]
    return "\n".join(f"  {label if i == 0 else '':<9} {line}" for i, line in enumerate(kept))


class RestowError(Exception):
    """Root of every failure that restow raises on purpose.

    `expected` and `found` are sentence parts ("128 experts in model.layers.3.mlp.experts", "126"); `path` is the file
    or folder; `tensor` the first tensor at fault, as its file spells it; `sections` are (label, lines) printed below
    the first line; `hint` says what to do; `rank` is the rank it happened on.
    """

    def __init__(
        self,
        expected: str,
        found: str,
        *,
        path: object = None,
        tensor: str | None = None,
        sections: Iterable[tuple[str, Iterable[str]]] = (),
        hint: str = "",
        rank: int | None = None,
    ) -> None:
        self.expected = expected
        self.found = found
        self.path = None if path is None else str(path)
        self.tensor = tensor
        self.sections = tuple((label, tuple(lines)) for label, lines in sections)
        self.hint = hint
        self.rank = rank
        super().__init__(expected, found)

    def __str__(self) -> str:
        lines = [f"expected {self.expected}, found {self.found}"]
        if self.tensor is not None and not self.sections:
            lines.append(section("tensor", [show(self.tensor)]))
        lines += [section(label, body) for label, body in self.sections if body]
        if self.path is not None:
            lines.append(section("in", [show(self.path)]))
        if self.rank is not None:
            lines.append(section("rank", [str(self.rank)]))
        if self.hint:
            lines.append(section("try", [self.hint]))
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.expected, self.found, self.__dict__.copy())


def _rebuild(cls: type[RestowError], expected: str, found: str, fields: dict[str, object]) -> RestowError:
    error = cls(expected, found)
    error.__dict__.update(fields)
    return error


# The notation: what a layout's text may say, and what two layouts may be asked.
class NotationError(RestowError):
    """A row that the notation does not admit; the text shows the row with carets."""


class RolesError(RestowError):
    """Two layouts that do not hold the same roles, or a role whose axes differ between them."""


class SizeError(RestowError):
    """An axis without a size, or with two."""


class AmbiguousLayoutError(RestowError):
    """No layout, or more than one, explains the tensors of an experts module."""


class UsageError(RestowError):
    """A call that cannot be meant: an unknown layout name, options that exclude each other."""


# Files.
class NotSafetensorsError(RestowError):
    """A file that is something else than safetensors."""


class TruncatedFileError(RestowError):
    """A file that ends before its contents do."""


class HeaderError(RestowError):
    """A header that breaks a rule of the format."""


class LayoutError(RestowError):
    """Tensors that do not lie in their file as the format demands: holes, overlaps, wrong lengths."""


# Index and folder.
class IndexFileError(RestowError):
    """An index that cannot be read as one."""


class MissingShardError(RestowError):
    """A file that is named and not there."""


class IndexMismatchError(RestowError):
    """An index and its files that disagree."""


class StrayShardError(RestowError):
    """A file beside the checkpoint that does not belong to it."""


class UnsafePathError(RestowError):
    """A name that leads out of the checkpoint, or to no regular file."""


class AmbiguousSourceError(RestowError):
    """Two checkpoints in one folder."""


class UnsafePickleError(RestowError):
    """A format that runs code when it is read."""


# Tensors.
class MissingTensorError(RestowError):
    """A tensor that must be there and is not."""


class MissingExpertsError(MissingTensorError, RuntimeError):
    """Weights of experts that this rank needs; a RuntimeError too, since callers of the mixin catch that."""


class UnexpectedTensorError(RestowError):
    """A tensor that has no place."""


class AmbiguousTensorError(RestowError):
    """One weight in two places."""


class ShapeMismatchError(RestowError):
    """A tensor of another shape than its layout and the config give."""


class ExpertShapeError(ShapeMismatchError, ValueError):
    """A tensor of experts of another shape; a ValueError too, since callers of the mixin catch that."""


class DtypeMismatchError(RestowError):
    """A tensor of another dtype than it may have here."""


class NonFiniteError(RestowError):
    """NaN or infinity among the values."""


class TensorValueError(RestowError):
    """A value that its dtype does not admit."""


class SuspiciousTensorError(RestowError):
    """Values that are possible and unlikely, such as an expert of zeros."""


class PrecisionError(RestowError):
    """A cast that would narrow a tensor that must keep its precision."""


class ConfigError(RestowError):
    """A config that is missing, unreadable or impossible."""


class UnsupportedFamilyError(RestowError):
    """A model family that nobody told us about."""


class QuantizationError(RestowError):
    """Quantised weights and their scales, or their config, that do not fit together."""


class AdapterError(RestowError):
    """An adapter that cannot mean what it says."""


class CoverageError(RestowError):
    """Elements written never, or more than once."""


class IntegrityError(RestowError):
    """Bytes that are not the ones that were recorded."""


# Destinations.
class DestinationError(RestowError):
    """The destination or the machine refused."""


class DestinationExistsError(DestinationError):
    """Something is already there."""


class SamePathError(DestinationError):
    """Source and destination are one place, or one holds the other."""


class NoSpaceError(DestinationError):
    """Not enough room."""


class NotWritableError(DestinationError):
    """No right to write there."""


class BusyError(DestinationError):
    """Somebody else is writing there."""


class DurabilityUncertainError(DestinationError):
    """Published, but a power cut may undo it."""


# Ranks.
class PeerFailedError(RestowError):
    """Another rank failed."""


class PeerTimeoutError(RestowError):
    """Another rank did not answer in time."""
