"""The inputs of `compare`: given arrays, or randomly generated ones.

Generated arrays follow the inputs that an ONNX side declares. Dimensions of the same name have the
same size within a case; sizes differ from case to case, and the second case has 1 for all of them.
The meaning of an input is inferred from its name (`MEANINGS`), and every assumption is reported. A
cache is computed by the model from random tokens: random numbers would not be realistic, and cause
ten times the rounding error in SmolLM2-135M.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from zipfile import ZipFile

import numpy as np

from loradeploy.bundle.manifest import TensorSpec
from loradeploy.bundle.names import ATTENTION_MASK, INPUT_IDS, PAST, POSITION_IDS, present_of
from loradeploy.errors import DataError, UsageError, first_line, listed_names
from loradeploy.files import MAX_TEXT_BYTES, check_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.parity.compare.sides import Given

Feed = dict[str, "NDArray[Any]"]
FeedsPlace = str | os.PathLike[str] | Sequence[Mapping[str, Any]]

# Ids stay below this if the size of the vocabulary is unknown.
UNKNOWN_VOCABULARY: Final = 64
_LARGEST: Final = 24  # the largest random size
_BATCHES: Final = 4
# Sizes of the first cases: (batch, other dimensions, cache). Those of later cases are random.
_FIRST: Final = ((2, (7, 5, 3), 3), (1, (1,), 0), (1, (16, 9), 16), (3, (1,), 9))


@dataclass(frozen=True, eq=False)
class Fed:
    """The feeds of every case. `source`: where they come from; `notes`: assumptions about them."""

    cases: tuple[Feed, ...]
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Making:
    """What generators of arrays need besides the shape."""

    random: np.random.Generator
    vocabulary: int
    past: int


_Maker = Callable[[tuple[int, ...], _Making], "NDArray[Any]"]


@dataclass(frozen=True)
class Meaning:
    """Generates values for the inputs it applies to. `assumption`: what they assume, or None."""

    applies: Callable[[TensorSpec], bool]
    make: _Maker
    assumption: str | None = None


def _positions(shape: tuple[int, ...], making: _Making) -> NDArray[Any]:
    return np.broadcast_to(np.arange(shape[-1]) + making.past, shape)


def _ids(shape: tuple[int, ...], making: _Making) -> NDArray[Any]:
    return making.random.integers(0, making.vocabulary, shape)


# The first that applies is used.
MEANINGS: Final[tuple[Meaning, ...]] = (
    Meaning(lambda s: "mask" in s.name, lambda shape, _: np.ones(shape), "nothing masked"),
    Meaning(lambda s: s.name == POSITION_IDS, _positions),
    Meaning(lambda s: "token_type" in s.name, lambda shape, _: np.zeros(shape)),
    Meaning(
        lambda s: _kind(s) in "iu" and ("ids" in s.name or "token" in s.name),
        _ids,
        "ids below {vocabulary}",
    ),
    Meaning(
        lambda s: _kind(s) in "iu",
        lambda shape, making: making.random.integers(0, 2, shape),
        "integers 0 and 1",
    ),
    Meaning(lambda s: _kind(s) == "b", lambda shape, _: np.ones(shape), "true throughout"),
    Meaning(lambda s: True, lambda shape, making: making.random.standard_normal(shape)),
)


def read_feeds(given: FeedsPlace) -> Fed:
    """Read feeds from an .npz file, a directory of them (a case each), or a sequence of mappings.

    Raises:
        DataError: a file is missing, not an .npz file or contains pickled objects; the directory
            has no .npz file.
        UsageError: a feed is not a mapping of names to arrays, or the sequence is empty.
    """
    if not isinstance(given, str | os.PathLike):
        if isinstance(given, Mapping) or not all(isinstance(feed, Mapping) for feed in given):
            raise UsageError("inputs are a sequence of feeds, each a mapping of names to arrays")
        cases = tuple({str(n): np.asarray(v) for n, v in feed.items()} for feed in given)
        if not cases:
            raise UsageError("no inputs are given")
        return Fed(cases, "given inputs")
    path = Path(given)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no .npz files")
    return Fed(tuple(map(_read, files)), os.fspath(given))


def make_feeds(
    specs: Sequence[TensorSpec],
    *,
    count: int,
    seed: int,
    vocabulary: int | None,
    run: Callable[[Feed], Given],
) -> Fed:
    """Generate `count` cases for the inputs `specs`; `run` runs the model, to compute a cache.

    Raises:
        UsageError: a count below 1, or an input whose values cannot be generated.
    """
    if count < 1:
        raise UsageError(f"{count} cases: give 1 or more")
    unmade = [spec.name for spec in specs if _kind(spec) not in "biuf"]
    if unmade:
        raise UsageError(f"values for {listed_names(unmade)} cannot be generated: give inputs")
    random = np.random.default_rng(seed)
    below = UNKNOWN_VOCABULARY if vocabulary is None else vocabulary
    cases, assumed = [], {}
    for number in range(count):
        sizes = _sizes(specs, number, random)
        feed = _feed(specs, sizes, _Making(random, below, sizes.past))
        if sizes.past:
            before = _feed(specs, sizes.before(specs), _Making(random, below, 0))
            feed |= _cache(feed, before, run)
        cases.append(feed)
    for spec in specs:
        meaning = _meaning(spec)
        if meaning.assumption is not None and (vocabulary is None or meaning.make is not _ids):
            assumed[spec.name] = meaning.assumption.format(vocabulary=below)
    notes = tuple(f"assumed for {name}: {assumption}" for name, assumption in assumed.items())
    return Fed(tuple(cases), f"generated from the inputs' shapes, seed {seed}", notes)


def _meaning(spec: TensorSpec) -> Meaning:
    return next(meaning for meaning in MEANINGS if meaning.applies(spec))


def _feed(specs: Sequence[TensorSpec], sizes: _Sizes, making: _Making) -> Feed:
    return {
        spec.name: np.asarray(_meaning(spec).make(sizes.shape(spec), making)).astype(spec.dtype)
        for spec in specs
    }


def _cache(feed: Feed, before: Feed, run: Callable[[Feed], Given]) -> Feed:
    """Return the cache for `feed`, as the model returns it for `before`; empty if it does not."""
    try:
        given = run(before)
    except Exception:  # the check itself reports it
        return {}
    if not isinstance(given, dict):
        return {}
    presents = {name: given.get(present_of(name)) for name in feed}
    return {
        name: values
        for name, values in presents.items()
        if name.startswith(PAST) and values is not None and values.shape == feed[name].shape
    }


def shapes(feed: Mapping[str, NDArray[Any]]) -> str:
    """Return a short text of the shapes of a case, with one entry for all tensors of a cache."""
    tensors = [f"{name} {list(v.shape)}" for name, v in feed.items() if not name.startswith(PAST)]
    cache = [f"past {list(v.shape)}" for name, v in feed.items() if name.startswith(PAST)]
    return ", ".join(tensors + cache[:1])


def _read(file: Path) -> Feed:
    if not file.exists():
        raise DataError(f"{file} does not exist: give an .npz file or a directory of them")
    check_file(file, error=DataError, limit=MAX_TEXT_BYTES)
    try:
        with ZipFile(file) as entries:
            unpacked = sum(entry.file_size for entry in entries.infolist())
        if unpacked > MAX_TEXT_BYTES:
            raise ValueError(f"unpacked it has {unpacked:,} bytes, more than are read")
        with np.load(file, allow_pickle=False) as arrays:
            feed = {name: arrays[name] for name in arrays.files}
    except Exception as problem:  # zipfile, zlib and numpy have their own exception classes
        raise DataError(f"{file} is not readable as .npz: {first_line(problem)}") from None
    if not feed:
        raise DataError(f"{file} has no arrays")
    return feed


# -- sizes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """The sizes of one case, by symbol. `past`: length of the cache; `new`: count of new tokens."""

    of: Mapping[str, int]
    past: int
    new: int

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        return tuple(self._size(spec, axis) for axis in range(len(spec.shape)))

    def before(self, specs: Sequence[TensorSpec]) -> _Sizes:
        """Return the sizes of the run that computes the cache: `past` new tokens, no cache."""
        pasts = _symbols(spec.shape[2:3] for spec in specs if _is_past(spec))
        news = _symbols(spec.shape[1:2] for spec in specs if spec.name == INPUT_IDS)
        of = {**self.of, **dict.fromkeys(pasts, 0), **dict.fromkeys(news, self.past)}
        return _Sizes(of, 0, self.past)

    def _size(self, spec: TensorSpec, axis: int) -> int:
        dimension = spec.shape[axis]
        if isinstance(dimension, int):
            return dimension
        if spec.name == ATTENTION_MASK and axis == 1 and self.new:
            return self.past + self.new  # whatever the symbol of this dimension is
        parts = [part.strip() for part in dimension.split("+")]
        return sum(int(part) if part.isdigit() else self.of[part] for part in parts)


def _sizes(specs: Sequence[TensorSpec], number: int, random: np.random.Generator) -> _Sizes:
    """Return the sizes of the case `number`; in the second, number 1, the cache is empty."""
    batches = _symbols(spec.shape[:1] for spec in specs)
    pasts = _symbols(spec.shape[2:3] for spec in specs if _is_past(spec))
    others = [s for s in _symbols(spec.shape[1:] for spec in specs) if s not in batches]
    if number < len(_FIRST):
        batch, cycle, past = _FIRST[number]
        rest = [cycle[number % len(cycle)] for number in range(len(others))]
    else:
        batch = int(random.integers(1, _BATCHES + 1))
        rest = random.integers(1, _LARGEST + 1, len(others)).tolist()
        past = int(random.integers(1, _LARGEST + 1))
    of = {**dict.fromkeys(batches, batch), **dict(zip(others, rest, strict=True))}
    of |= dict.fromkeys(pasts, past)
    past = past if pasts else 0
    sizes = _Sizes(of, past, 0)
    new = [sizes.shape(s)[1] for s in specs if s.name == INPUT_IDS and len(s.shape) == 2]
    return dataclasses.replace(sizes, new=new[0] if new else 0)


def _symbols(shapes: Iterable[Sequence[int | str]]) -> list[str]:
    """Return the distinct symbols in shapes; a dimension may be a sum, as "past + sequence"."""
    parts = [
        part.strip()
        for shape in shapes
        for dimension in shape
        if isinstance(dimension, str)
        for part in dimension.split("+")
    ]
    return [part for part in dict.fromkeys(parts) if not part.isdigit()]


def _is_past(spec: TensorSpec) -> bool:
    return spec.name.startswith(PAST) and len(spec.shape) == 4


def _kind(spec: TensorSpec) -> str:
    """Return numpy's kind of the dtype; "V" for dtypes that numpy does not have."""
    try:
        return np.dtype(spec.dtype).kind
    except TypeError:
        return "V"
