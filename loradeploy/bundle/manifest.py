"""The manifest of a bundle: inputs, outputs and adaptable layers of its graph."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.modules.renamings import Submodel
from loradeploy.bundle.consistency import check_consistency
from loradeploy.bundle.fields import BaseKind, Mode, record
from loradeploy.bundle.names import (
    ADAPTER_IDS,
    ADAPTER_MODE,
    ADAPTER_RANKS,
    CERTIFICATE_NAME,
    KEPT,
    LEFT,
    LOGITS_TO_KEEP,
    LORA_ADD_OPERATOR,
    LORA_OPERATORS,
    MANIFEST_NAME,
    MROPE_POSITION_IDS,
    ROWS,
    SIGNATURE_NAME,
    SLOTS,
    is_cross,
)
from loradeploy.bundle.targets import AddedTokens as AddedTokens
from loradeploy.bundle.targets import LoraTarget as LoraTarget
from loradeploy.bundle.targets import OutputTarget as OutputTarget
from loradeploy.bundle.targets import SavedTarget as SavedTarget
from loradeploy.bundle.targets import StoredWeight as StoredWeight
from loradeploy.bundle.targets import TensorSpec as TensorSpec
from loradeploy.errors import BundleError, shown
from loradeploy.files import json_values, read_json
from loradeploy.names import ADAPTER_CONFIG_NAME

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT: Final = "loradeploy-bundle"
FORMAT_VERSION: Final = 2
# Symbols of the dynamic dimensions of side inputs.
ADAPTERS: Final = "adapters"
RANK: Final = "rank"
# A symbol of its own: without ranks the dimension is 0.
RANKED: Final = "ranked"


@dataclass(frozen=True)
class BaseIdentity:
    """The base model: a name for messages, and the digest of its weights.

    `kind`: what the digest is of, a checkpoint's tensors or an ONNX file's initializers. Only
    digests of the same kind can be compared.
    """

    name: str
    digest: str | None
    kind: BaseKind


@dataclass(frozen=True)
class AdapterText:
    """Text settings of an adapter that differ from the base's.

    `files`: digests of the files in its directory with these settings, by name.
    `chat_template`: source of its template. `eos_token_ids`: tokens that end its texts.
    `generation`: settings of its generation_config.json that affect generated texts.
    """

    files: Mapping[str, str]
    chat_template: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter of the export; `path` is relative to the bundle, None if it is merged.

    `native_digest`: digest of its .onnx_adapter file, if only that file has values computed from
    weights that are quantized in the bundle.
    `text`: its text settings; None if they are the base's.
    `labels`: the label names of its head in the order of the outputs, if it has a head and names.
    `problem_type`: the problem type of a sequence classifier (`adapter.heads`).
    `whole_digest`: for a model that is exported as several bundles, the digest of the complete
    adapter; None for other models, and in bundles of earlier versions.
    `split`: whether the complete adapter also changes another bundle.
    """

    digest: str
    path: str | None = None
    native_digest: str | None = None
    text: AdapterText | None = None
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    whole_digest: str | None = None
    split: bool = False


@dataclass(frozen=True)
class MergeError:
    """Rounding error of a merged update: the share that is `kept`, and the added `noise`.

    Both are relative to the size of the update; 1 and 0 mean no error (see export/merge_error.py).
    """

    kept: float
    noise: float


@dataclass(frozen=True)
class EncoderGraph:
    """The encoder of an encoder-decoder, in encoder.onnx; model.onnx is its decoder.

    `inputs`, `outputs`: the names of the manifest's inputs and outputs that are the encoder's; all
    others are the decoder's. The decoder takes the encoder's outputs `present.{i}.encoder.key` and
    `.value` as `past_key_values.{i}.encoder.key` and `.value` at every step. An encoder of audio
    has the output `encoder_hidden_states` too, for onnxruntime-genai.
    `graph_digest`: digest of encoder.onnx.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graph_digest: str | None = None

    @property
    def caches(self) -> tuple[str, ...]:
        """The outputs that the decoder takes: the keys and values of the source."""
        return tuple(name for name in self.outputs if is_cross(name))


@dataclass(frozen=True)
class Manifest:
    """The description of a bundle's graph, in loradeploy.json.

    `adapters`: the adapters in a bundle with side inputs, by name.
    `merged_adapter`: the adapter in the weights of a merged bundle.
    `factor_dtype`: numpy's name of the dtype of side inputs.
    `graph_digest`: digest of model.onnx. `data_digest`, `data_fingerprint`: digest of
    model.onnx.data, and a fingerprint of it that is fast to check (fingerprint.py).
    `changed`: the layers whose outputs can get a scale or an offset.
    `layout`: layout of the side inputs: "slots", selected by `adapter_ids` for each row, or "rows",
    where slot i belongs to row i and the graph has no `adapter_ids`.
    `branches`: whether the graph has a separate branch for the base, selected by `adapter_mode`.
    `operators`: the functions of the domain loradeploy that the graph calls, which the operators'
    library can replace (export/passes/operators/).
    `merge_error`: the rounding error of a merge in the precision of the graph.
    `requantized`: whether the merge dequantized and quantized weights of the source again.
    `padding`: the side on which rows of a batch are padded, as measured by the export: "left",
    "right", or "none" if all rows of a batch must have the same length. For an encoder, any other
    value than "none" means right.
    `cache_in_place`: whether one buffer can be both past and present of the KV cache.
    `target`: the device that the bundle is for, if the export was given one (run_target.py).
    `files`: all files that the export wrote, except the manifest; only these may be replaced.
    `sentence`: digests of sentence-transformers' files by name (modules.json and the files it
    names), which define how hidden states become an embedding, or how a cross-encoder scores pairs
    of texts; empty if the base has none.
    `own_weights`: digests of the base's embeddings and output head, by parameter, to recognize
    copies of them in an adapter's file (`adapter.fitting.settle.values_digest`).
    `submodels`: the transformers models in the base, if module paths in some of them were renamed;
    `base_prefix`: the prefix of the base model's paths.
    `problem_type`: the problem type of a sequence classifier's base, or of the merged adapter
    (`adapter.heads`). Bundles of earlier versions do not have it.
    `encoder`: for an encoder-decoder with a cache, the part in encoder.onnx; None for a single
    graph.
    `tower`: for a model with a text and an image tower, the tower in this bundle: "text" or
    "image"; None for other models (`adapter.fitting.towers`).
    `logits_to_keep`: whether a decoder's graph has the optional input of that name, the positions
    to compute logits for (export/passes/tokens/kept_logits.py); if it is not fed, all of them.
    `embeds`: the optional inputs with which the decoder of a vision-language model takes embeddings
    instead of tokens (export/passes/tokens/embeds.py), and positions in three dimensions
    (export/passes/tokens/mrope.py).
    `image_blocks`: whether the positions of an image attend to each other in both directions
    (export/passes/tokens/image_blocks.py), so that an image has to be read in one run.
    `other_part`: the modules of the base that are in another bundle, to which an adapter's factors
    for them belong.
    `added_tokens`: the rows of the graph for tokens that adapters add to the base's; None if it has
    the base's vocabulary.
    `traced`: whether loradeploy traced the graph from a checkpoint. It is false if an ONNX file was
    exported, even with a `checkpoint` to identify its modules, and in bundles of earlier versions.
    `whole_prompts`: whether prompts must be read in one run: in a trial run of the export, the
    graph of an ONNX file gave other results if it read a prompt in parts. `Engine`, which reads
    long prompts in parts, refuses such a bundle.
    `probabilities`: the output that is a Softmax or Sigmoid of the main output, if the graph of an
    ONNX file has one; the main output itself, if the graph of a regression ends in a Sigmoid; None
    for other bundles.
    `quantized_embedding`: the module of the token embedding, if it is stored in 8 bits
    (export/passes/precision/embedding.py).
    `fixed_ranges`: the number of activations that the graph clips to ranges that were measured on
    the base (export/read/static_ranges.py). The export measures the effect of this on the adapters
    that are given; loading another one prints a warning.
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
    operators: tuple[str, ...] = ()
    padding: str = LEFT
    cache_in_place: bool = False
    merge_error: MergeError | None = None
    requantized: bool = False
    files: tuple[str, ...] = ()
    sentence: Mapping[str, str] = field(default_factory=dict)
    own_weights: Mapping[str, str] = field(default_factory=dict)
    submodels: tuple[Submodel, ...] = ()
    base_prefix: str = ""
    problem_type: str | None = None
    target: str | None = None
    encoder: EncoderGraph | None = None
    logits_to_keep: bool = False
    embeds: tuple[TensorSpec, ...] = ()
    image_blocks: bool = False
    other_part: tuple[str, ...] = ()
    tower: str | None = None
    added_tokens: AddedTokens | None = None
    traced: bool = False
    whole_prompts: bool = False
    probabilities: str | None = None
    quantized_embedding: str | None = None
    fixed_ranges: int = 0

    @property
    def factors(self) -> tuple[str, ...]:
        """The names of the low-rank side inputs, in the order of the targets."""
        return tuple(name for target in self.targets for name in target.factors)

    @property
    def takes_ranks(self) -> bool:
        """Whether the graph has the input `adapter_ranks`."""
        return any(name in self.operators for name in LORA_OPERATORS)

    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that adapters can replace, by name."""
        return {saved.parameter: saved.shape for saved in self.saved}

    def side_inputs(self) -> tuple[TensorSpec, ...]:
        """The side inputs of the graph, all optional.

        One slot of the dimension `adapters` is one adapter: `M.lora_A` [adapters, in, rank],
        `M.lora_B` [adapters, rank, out], saved parameters [adapters, …], and `M.scale` and
        `M.offset` [adapters, out]; then `adapter_ids`, `adapter_ranks` [adapters, targets] and
        `adapter_mode`, if the graph has them.
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
        if self.takes_ranks:
            specs.append(TensorSpec(ADAPTER_RANKS, "int64", (RANKED, len(self.targets))))
        if self.branches:
            specs.append(TensorSpec(ADAPTER_MODE, "int64", (1,)))
        return tuple(specs)

    def optional_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs with a default that are not part of an adapter."""
        if not self.logits_to_keep:
            return self.embeds
        return (TensorSpec(LOGITS_TO_KEEP, "int64", ("rows", KEPT)), *self.embeds)

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return {**head, **json_values(self)}

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
                f"{MANIFEST_NAME}: format version {shown(version)}, this version of loradeploy"
                f" reads {FORMAT_VERSION}: export the bundle again or upgrade loradeploy"
            )
        if "operators" not in rest and isinstance(rest.get("operator"), bool):
            # Earlier versions had one operator.
            rest["operators"] = [LORA_ADD_OPERATOR] if rest.pop("operator") else []
        manifest = record(cls, rest)
        check_consistency(manifest)
        return manifest


def default_of(spec: TensorSpec) -> NDArray[Any]:
    """The default of an optional input, with one position, or none for `logits_to_keep`.

    Zeros, except for `mrope_position_ids`: -1, which means that they are not given.
    """
    sizes = [s if isinstance(s, int) else int(s != KEPT) for s in spec.shape]
    return np.full(sizes, -1 if spec.name == MROPE_POSITION_IDS else 0, spec.dtype)


def check_is_bundle(directory: Path) -> None:
    """Raise BundleError unless `directory` has a manifest, which may be invalid.

    Used before all files of the directory are listed: it may be the root of a disk.
    """
    if directory.suffix == ".onnx" and directory.is_file():
        raise BundleError(
            f"{directory} is an ONNX file, not a bundle: make one of it with `loradeploy export"
            f" --model {directory.name} --output BUNDLE`"
        )
    if not directory.is_dir():
        kind = "is a file" if directory.exists() else "does not exist"
    elif (directory / MANIFEST_NAME).exists():
        return
    elif (directory / ADAPTER_CONFIG_NAME).exists():
        kind = "is an adapter, not a bundle"
    else:
        kind = f"is not a bundle, it has no {MANIFEST_NAME}"
    raise BundleError(f"{directory} {kind}: give a directory that loradeploy export wrote")


def read_manifest(bundle: str | os.PathLike[str]) -> Manifest:
    """The manifest of the bundle in the directory `bundle`.

    Raises:
        BundleError: the directory is missing or not a bundle, or its manifest is invalid.
    """
    directory = Path(bundle)
    check_is_bundle(directory)
    try:
        return Manifest.from_json(read_json(directory / MANIFEST_NAME, error=BundleError))
    except BundleError as problem:
        raise BundleError(f"{directory}: {problem}") from None


def own_files(bundle: Path) -> frozenset[str]:
    """The files in the directory `bundle` that loradeploy wrote, which an export may replace.

    They are listed in the manifest; if that cannot be read, only the certificate counts.
    """
    try:
        named = read_json(bundle / MANIFEST_NAME, error=BundleError).get("files")
    except BundleError:
        named = None
    files = named if isinstance(named, list) else []
    return frozenset(
        [*(name for name in files if isinstance(name, str)), CERTIFICATE_NAME, SIGNATURE_NAME]
    )
