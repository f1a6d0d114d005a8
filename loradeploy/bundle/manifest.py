"""The manifest of a bundle: what its graph takes, gives, and can be adapted at."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar, get_args

from loradeploy.adapter.adapter import Kind
from loradeploy.adapter.renamings import Submodel
from loradeploy.adapter.tasks import TASKS
from loradeploy.bundle.names import (
    ADAPTER_IDS,
    ADAPTER_MODE,
    CERTIFICATE_NAME,
    LAYOUTS,
    LEFT,
    MANIFEST_NAME,
    NO_PADDING,
    RIGHT,
    ROWS,
    SIGNATURE_NAME,
    SLOTS,
)
from loradeploy.errors import BundleError, shortened, shown
from loradeploy.files import plain, read_json

FORMAT: Final = "loradeploy-bundle"
FORMAT_VERSION: Final = 2
# The largest size, and product of a shape's sizes, that is not a mistake.
_LARGEST: Final = 2**31 - 1
_LARGEST_SHAPE: Final = 2**48

# The symbols of side inputs' dynamic dimensions.
ADAPTERS: Final = "adapters"
RANK: Final = "rank"

Mode = Literal["side-inputs", "merged"]
BaseKind = Literal["checkpoint", "onnx"]
Noun = TypeVar("Noun")


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: numpy's name of its dtype, symbols for its dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight's numbers are in model.onnx.data; `dtype` is numpy's name of theirs."""

    offset: int
    length: int
    dtype: str


@dataclass(frozen=True)
class LoraTarget:
    """A layer of the graph that takes low-rank side inputs.

    `lora_A`, `lora_B`: names of the side inputs, [adapters, in, rank] and [adapters, rank, out].
    `weight`: the initializer, held as [in, out], or as [out, in] where `transposed`.
    `slice`: the module's range of the product's outputs where the weight is of several modules.
    `found_by`: the evidence by which the graph's node was taken for this module.
    `kind`: "linear", or "embedding", whose inputs are its vocabulary. ("conv2d" is found in no
    bundle: a convolution is merged.)
    `stored`: where the weight can be read without the graph, which DoRA needs.
    """

    module: str
    in_features: int
    out_features: int
    lora_A: str
    lora_B: str
    weight: str
    transposed: bool
    found_by: str
    slice: tuple[int, int] | None = None
    kind: Kind = "linear"
    stored: StoredWeight | None = None

    @property
    def factors(self) -> tuple[str, str]:
        """The names of both side inputs."""
        return self.lora_A, self.lora_B


@dataclass(frozen=True)
class SavedTarget:
    """A whole parameter that an adapter may replace (modules_to_save).

    `input`: the side input, [adapters, *shape]; it is the last two axes swapped where `transposed`.
    `shape`: the parameter's shape in the checkpoint's orientation.
    `lacking`: the checkpoint has no values for it (a head that was never trained): it is zeros
    until an adapter brings it, and an adapter that does not means nothing.
    """

    parameter: str
    input: str
    shape: tuple[int, ...]
    transposed: bool
    lacking: bool = False

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """The shape of one slot of the side input."""
        if not self.transposed:
            return self.shape
        *outer, rows, columns = self.shape
        return (*outer, columns, rows)


@dataclass(frozen=True)
class OutputTarget:
    """A layer whose output y an adapter may change: scale ⊙ y + offset, for every row its own.

    `scale`, `offset`: names of the side inputs, [adapters, size]; None where the graph has none.
    They default to ones and to zeros. DoRA takes both, a trained bias the second.
    """

    module: str
    size: int
    scale: str | None = None
    offset: str | None = None


@dataclass(frozen=True)
class BaseIdentity:
    """The base model: a name for people, and the digest of its weights.

    `kind` tells of what the digest is: a checkpoint's tensors, or an ONNX file's initializers.
    Only digests of one kind can be compared.
    """

    name: str
    digest: str | None
    kind: BaseKind


@dataclass(frozen=True)
class AdapterText:
    """What an adapter brings for its texts, where that is not what the base has.

    `files`: digests of the files in its directory that tell it, by name.
    `chat_template`: the source of its template. `eos_token_ids`: the tokens that end its texts.
    `generation`: settings of its generation_config.json that change a text.
    """

    files: Mapping[str, str]
    chat_template: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter that came with the export; `path` is relative to the bundle, None once merged.

    `native_digest`: of its .onnx_adapter file, where that alone holds what is computed from
    weights that the bundle has packed.
    `text`: what it brings for its texts; None where all of that is the base's.
    """

    digest: str
    path: str | None = None
    native_digest: str | None = None
    text: AdapterText | None = None


@dataclass(frozen=True)
class MergeLoss:
    """What rounding left of a merged update: the share that is `kept`, and `noise` besides.

    Both are relative to the size of the update; 1 and 0 are no loss (see export/merge_error.py).
    """

    kept: float
    noise: float


@dataclass(frozen=True)
class Manifest:
    """All that a reader of the bundle must know about its graph.

    `adapters`: the adapters inside a side-input bundle, by name.
    `merged_adapter`: the one adapter folded into a merged bundle's weights.
    `factor_dtype`: numpy's name of the side inputs' dtype.
    `graph_digest`: digest of model.onnx, `data_digest` of model.onnx.data; `data_fingerprint`: of
    that too, for a check that takes no time (fingerprint.py).
    `changed`: the layers whose outputs take a scale or an offset.
    `layout`: of the side inputs: "slots", which `adapter_ids` names for each row, or "rows", where
    slot i belongs to row i and there is no `adapter_ids`.
    `branches`: whether the base has a branch of the graph to itself, which `adapter_mode` chooses.
    `merge_loss`: what the merged graph's precision did to the adapter.
    `requantized`: whether the merge was into weights that were packed already, and packed again.
    `padding`: the side on which the graph wants the rows of a batch filled up, as the export found
    by running it: "left", "right", or "none" where rows of one length alone may share a batch. In
    an encoder's bundle anything but "none" is right.
    `cache_in_place`: whether one buffer may be both the past and the present of its cache.
    `files`: every file that the export wrote, but for the manifest; an export replaces no other.
    `sentence`: digests of the files that tell how an encoder's states become a text's vector, by
    name (modules.json and what it names); none where the base has no such files.
    `own_weights`: digests of the base's embeddings and output head, by parameter, so that copies of
    them in an adapter's file are known (`adapter.settle.values_digest`).
    `submodels`: the transformers models in the base, where module paths in some of them have been
    renamed; `base_prefix`: what the base model's own paths begin with there.
    """

    task: str
    mode: Mode
    base: BaseIdentity
    precision: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    targets: tuple[LoraTarget, ...] = ()
    saved: tuple[SavedTarget, ...] = ()
    adapters: Mapping[str, AdapterEntry] = field(default_factory=dict)
    merged_adapter: AdapterEntry | None = None
    factor_dtype: str = "float32"
    graph_digest: str | None = None
    data_digest: str | None = None
    data_fingerprint: str | None = None
    changed: tuple[OutputTarget, ...] = ()
    layout: str = SLOTS
    branches: bool = False
    padding: str = LEFT
    cache_in_place: bool = False
    merge_loss: MergeLoss | None = None
    requantized: bool = False
    files: tuple[str, ...] = ()
    sentence: Mapping[str, str] = field(default_factory=dict)
    own_weights: Mapping[str, str] = field(default_factory=dict)
    submodels: tuple[Submodel, ...] = ()
    base_prefix: str = ""

    @property
    def factors(self) -> tuple[str, ...]:
        """The names of the low-rank side inputs, in the order of the targets."""
        return tuple(name for target in self.targets for name in target.factors)

    def side_inputs(self) -> tuple[TensorSpec, ...]:
        """What the graph takes beside its inputs, every one optional.

        One slot of `adapters` is one adapter: `M.lora_A` [adapters, in, rank], `M.lora_B`
        [adapters, rank, out], saved parameters [adapters, …], and `M.scale` and `M.offset`
        [adapters, out]; then which slot is whose, and the choice of the graph's branch.
        """
        shapes: dict[str, tuple[int | str, ...]] = {}
        for target in self.targets:
            shapes[target.lora_A] = (ADAPTERS, target.in_features, RANK)
            shapes[target.lora_B] = (ADAPTERS, RANK, target.out_features)
        for saved in self.saved:
            shapes[saved.input] = (ADAPTERS, *saved.slot_shape)
        for output in self.changed:
            names = filter(None, (output.scale, output.offset))
            shapes.update(dict.fromkeys(names, (ADAPTERS, output.size)))
        specs = [TensorSpec(name, self.factor_dtype, shape) for name, shape in shapes.items()]
        if specs and self.layout != ROWS:
            specs.append(TensorSpec(ADAPTER_IDS, "int64", ("rows",)))
        if self.branches:
            specs.append(TensorSpec(ADAPTER_MODE, "int64", (1,)))
        return tuple(specs)

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return {**head, **plain(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """The manifest in a JSON object.

        Raises:
            BundleError: a field is missing, unknown or of the wrong type, or the format is newer.
        """
        rest = dict(values)
        if rest.pop("format", None) != FORMAT:
            raise BundleError(f"{MANIFEST_NAME}: the field 'format' is not {FORMAT!r}")
        version = rest.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST_NAME}: format version {shown(version)}, this loradeploy reads"
                f" {FORMAT_VERSION}: export the bundle again or upgrade loradeploy"
            )
        nested: dict[str, Any] = {
            "base": lambda value: _noun(BaseIdentity, value, "base"),
            "inputs": lambda value: _nouns(TensorSpec, value, "inputs"),
            "outputs": lambda value: _nouns(TensorSpec, value, "outputs"),
            "targets": lambda value: _lora_targets(value),
            "changed": lambda value: _nouns(OutputTarget, value, "changed"),
            "saved": lambda value: _nouns(SavedTarget, value, "saved"),
            "adapters": lambda value: MappingProxyType(
                {
                    name: _adapter_entry(entry, f"adapters.{name}")
                    for name, entry in _object(value, "adapters").items()
                }
            ),
            "submodels": lambda value: _nouns(Submodel, value, "submodels"),
            "own_weights": lambda value: _digests(value, "own_weights"),
            "merge_loss": lambda value: (
                None if value is None else _noun(MergeLoss, value, "merge_loss")
            ),
            "merged_adapter": lambda value: (
                None if value is None else _adapter_entry(value, "merged_adapter")
            ),
            "sentence": lambda value: _digests(value, "sentence"),
        }
        for name, read in nested.items():
            if name in rest:
                rest[name] = read(rest[name])
        manifest = _noun(cls, rest, "")
        _check(manifest)
        return manifest


def read_manifest(bundle: str | os.PathLike[str]) -> Manifest:
    """The manifest of the bundle in the directory `bundle`.

    Raises:
        BundleError: the directory is missing or no bundle, or its manifest is broken.
    """
    place = Path(bundle)
    if not place.is_dir():
        raise BundleError(f"{place} does not exist: give a directory that loradeploy export wrote")
    if not (place / MANIFEST_NAME).exists():
        raise BundleError(f"{place} is no bundle: it holds no {MANIFEST_NAME}")
    try:
        return Manifest.from_json(read_json(place / MANIFEST_NAME, error=BundleError))
    except BundleError as problem:
        raise BundleError(f"{place}: {problem}") from None


def own_files(bundle: Path) -> frozenset[str]:
    """The files in the directory `bundle` that loradeploy wrote there, by its manifest.

    They are what an export may replace. A manifest that cannot be read names none.
    """
    try:
        named = read_json(bundle / MANIFEST_NAME, error=BundleError).get("files")
    except BundleError:
        named = None
    files = named if isinstance(named, list) else []
    return frozenset(
        [*(name for name in files if isinstance(name, str)), CERTIFICATE_NAME, SIGNATURE_NAME]
    )


# The annotations are strings (PEP 563); each names one of these checks.
_CHECKS: Final[Mapping[str, Any]] = {
    "str": lambda v: isinstance(v, str),
    "str | None": lambda v: v is None or isinstance(v, str),
    "int": lambda v: _is_whole(v),
    "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "tuple[int | str, ...]": lambda v: (
        isinstance(v, tuple) and all(isinstance(d, str) or _is_size(d) for d in v)
    ),
    "tuple[int, ...]": lambda v: isinstance(v, tuple) and all(_is_size(d) for d in v),
    "tuple[str, ...]": lambda v: _all(v, str),
    "tuple[int, int] | None": lambda v: (
        v is None or (isinstance(v, tuple) and len(v) == 2 and all(_is_size(d) for d in v))
    ),
    "Mapping[str, Any]": lambda v: isinstance(v, Mapping),
    "Mode": lambda v: v in get_args(Mode),
    "BaseKind": lambda v: v in get_args(BaseKind),
    "Kind": lambda v: v in get_args(Kind),
}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return _is_whole(value) and 0 <= value <= _LARGEST  # type: ignore[operator]


def _all(value: object, kind: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kind) for item in value)


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BundleError(f"{MANIFEST_NAME}: {where} is not an object")
    return value


def _nouns(kind: type[Noun], value: object, where: str) -> tuple[Noun, ...]:
    if not isinstance(value, list):
        raise BundleError(f"{MANIFEST_NAME}: {where} is not a list")
    return tuple(_noun(kind, item, f"{where}[{index}]") for index, item in enumerate(value))


def _lora_targets(value: object) -> tuple[LoraTarget, ...]:
    targets = _nouns(LoraTarget, value, "targets")
    return tuple(
        target
        if target.stored is None
        else dataclasses.replace(
            target, stored=_noun(StoredWeight, target.stored, f"targets[{index}].stored")
        )
        for index, target in enumerate(targets)
    )


def _adapter_entry(value: object, where: str) -> AdapterEntry:
    entry = _noun(AdapterEntry, value, where)
    if entry.text is None:
        return entry
    text = _noun(AdapterText, entry.text, f"{where}.text")
    files = _digests(text.files, f"{where}.text.files")
    return dataclasses.replace(entry, text=dataclasses.replace(text, files=files))


def _digests(value: object, where: str) -> Mapping[str, str]:
    digests = _object(value, where)
    if not all(isinstance(digest, str) for digest in digests.values()):
        raise BundleError(f"{MANIFEST_NAME}: {where} is no object of digests")
    return MappingProxyType(dict(digests))


def _noun(kind: type[Noun], value: object, where: str) -> Noun:
    """Build the dataclass `kind` of a JSON object, each field checked against its annotation."""
    values = dict(_object(value, where or "the file"))
    label = f"{where}." if where else ""
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise BundleError(f"{MANIFEST_NAME}: the field {label}{shortened(name)} is unknown")
    for name, f in known.items():
        if name not in values:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise BundleError(f"{MANIFEST_NAME}: the field {label}{name} is missing")
            continue
        if isinstance(values[name], list):
            values[name] = tuple(values[name])
        check = _CHECKS.get(str(f.type))
        if check is not None and not check(values[name]):
            raise BundleError(
                f"{MANIFEST_NAME}: {label}{name} is {shown(values[name])}, {f.type} is needed"
            )
    return kind(**values)


def _check(manifest: Manifest) -> None:
    """What the fields must be to each other."""
    if manifest.task not in TASKS:
        raise BundleError(f"{MANIFEST_NAME}: the task {shown(manifest.task)} is none of {TASKS}")
    if manifest.factor_dtype not in ("float32", "float16"):
        raise BundleError(f"{MANIFEST_NAME}: factor_dtype is {shown(manifest.factor_dtype)}")
    if manifest.layout not in LAYOUTS:
        raise BundleError(f"{MANIFEST_NAME}: layout is {shown(manifest.layout)}, not of {LAYOUTS}")
    if manifest.padding not in (LEFT, RIGHT, NO_PADDING):
        raise BundleError(
            f"{MANIFEST_NAME}: padding is {shown(manifest.padding)}, not left, right or none"
        )
    for saved in manifest.saved:
        if saved.transposed and len(saved.shape) < 2:
            raise BundleError(
                f"{MANIFEST_NAME}: {shortened(saved.parameter)} has no axes to transpose"
            )
    _check_specs("inputs", manifest.inputs)
    _check_specs("outputs", manifest.outputs)
    for target in manifest.targets:
        for size in (target.in_features, target.out_features):
            if not 0 < size <= _LARGEST:
                raise BundleError(
                    f"{MANIFEST_NAME}: a size of {shortened(target.module)} is {shown(size)}, not"
                    " positive or too large"
                )
        if target.stored is not None:
            _check_stored(target, target.stored)
    _check_slices(manifest.targets)
    side_inputs = [*manifest.factors]
    side_inputs += [s.input for s in manifest.saved]
    side_inputs += [name for o in manifest.changed for name in (o.scale, o.offset) if name]
    for output in manifest.changed:
        if not 0 < output.size <= _LARGEST:
            raise BundleError(
                f"{MANIFEST_NAME}: the size of {shortened(output.module)} is {shown(output.size)},"
                " not positive or too large"
            )
    if len(set(side_inputs)) != len(side_inputs):
        raise BundleError(
            f"{MANIFEST_NAME}: two targets share the name of a side input: export again"
        )
    if manifest.mode == "merged" and (side_inputs or manifest.adapters):
        raise BundleError(f"{MANIFEST_NAME}: a merged graph has no side inputs and no adapters")


def _check_specs(where: str, specs: Iterable[TensorSpec]) -> None:
    """There are some, none has another's name, and none is larger than anything."""
    names = [spec.name for spec in specs]
    if not names or len(set(names)) != len(names):
        raise BundleError(f"{MANIFEST_NAME}: {where} is empty, or names one twice")
    for spec in specs:
        if math.prod(d for d in spec.shape if isinstance(d, int) and d) > _LARGEST_SHAPE:
            raise BundleError(
                f"{MANIFEST_NAME}: {shortened(spec.name)} has the shape {shown(list(spec.shape))}"
            )


def _check_slices(targets: Iterable[LoraTarget]) -> None:
    """Each slice is one of its module's size, and no two of one weight overlap."""
    sliced = [(t.weight, *t.slice, t) for t in targets if t.slice is not None]
    ends: dict[str, int] = {}
    for weight, begin, end, target in sorted(sliced, key=lambda entry: entry[:3]):
        if begin < ends.get(weight, 0) or end - begin != target.out_features:
            raise BundleError(
                f"{MANIFEST_NAME}: the slice of {target.module} is not one of its size, or"
                " another's too"
            )
        ends[weight] = end


def _check_stored(target: LoraTarget, stored: StoredWeight) -> None:
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    length = target.in_features * target.out_features * sizes.get(stored.dtype, 0)
    if stored.offset < 0 or not length or stored.length != length:
        raise BundleError(
            f"{MANIFEST_NAME}: the stored weight of {target.module} is not one of its size"
        )
