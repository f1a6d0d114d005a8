"""Write a bundle: graph, manifest, the base's files that the runtime needs, and the adapters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.files.digest import file_digest
from loradeploy.adapter.files.peft import copy_adapter, load_adapter, names_targets, save_adapter
from loradeploy.adapter.files.tensors import write_arrays
from loradeploy.adapter.tasks import CAUSAL_LM, GENERATING, SEQ2SEQ_LM
from loradeploy.bundle.adapter_inputs.native import write_side_inputs
from loradeploy.bundle.audio.features import feature_settings, feature_values
from loradeploy.bundle.fingerprint import file_fingerprint
from loradeploy.bundle.fitting.added_tokens import tokens_of
from loradeploy.bundle.fitting.labels import head_of
from loradeploy.bundle.manifest import AdapterEntry, AdapterText, Manifest, own_files
from loradeploy.bundle.names import (
    ADAPTERS_DIRECTORY,
    BASE_NAME,
    CONFIG_NAME,
    DEFAULTS_NAME,
    ENCODER_NAME,
    GENAI_AUDIO_NAME,
    GENAI_CONFIG_NAME,
    GRAPH_DATA_NAME,
    GRAPH_NAME,
    INPUT_FEATURES,
    MANIFEST_NAME,
    NATIVE_SUFFIX,
    PREPROCESSOR_NAME,
)
from loradeploy.bundle.text.beside import vocabulary_of
from loradeploy.bundle.text.settings import read_settings
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.bundle.text.tokenizer_files import GENERATION_NAME, SETTINGS_NAME, TOKENIZER_NAME
from loradeploy.bundle.trained_config import warn_of_trained_config
from loradeploy.errors import ExportError, ModelError, UsageError
from loradeploy.export.files.assets import AssetSources, write_assets
from loradeploy.export.files.genai import audio_processor, genai_config, whisper_config
from loradeploy.export.files.texts import (
    base_tokenizer,
    warn_of_ignored,
    write_texts,
)
from loradeploy.export.graph.halves import with_digests, write_halves
from loradeploy.export.graph.streamed import save_graph
from loradeploy.export.passes.forms.required import write_required
from loradeploy.export.passes.side_inputs.base_weights import store_weights
from loradeploy.export.trial.bundle import TrialSource, try_bundle
from loradeploy.files import atomic_directory, check_writable, optional_json, read_json, write_json
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Content:
    """The content of a bundle besides its manifest.

    `side_inputs`: those of the adapters, by adapter and input name.
    `defaults`: of the side inputs that replace parameters, by input name.
    `biases`: the base's biases that offsets are computed from, by parameter name in the base.
    `required`: whether a graph for clients that feed required inputs only is written too.
    `config`: the object for config.json, empty if the base has none.
    `assets`: where the base's other files come from.
    `source`: what the bundle is compared with before it is put in place.
    `directories`: the directories of the adapters that get side inputs, by name.
    `whole_digests`: for a model in parts, the digests of the whole adapters, by name.
    """

    graph: ir.Model
    assets: AssetSources
    config: Mapping[str, Any]
    adapters: Mapping[str, Adapter]
    side_inputs: Mapping[str, Mapping[str, NDArray[Any]]]
    defaults: Mapping[str, NDArray[Any]]
    biases: Mapping[str, NDArray[Any]]
    required: bool
    source: TrialSource
    directories: Mapping[str, Path]
    whole_digests: Mapping[str, str]


def write_bundle(output: Path, manifest: Manifest, content: Content) -> Manifest:
    """Write the bundle to the directory `output`, completely or not at all; return its manifest.

    The digests of the graph's files, the entries of the adapters and the padding are filled in.

    Raises:
        ExportError: the files cannot be written, such as on a full disk; or the bundle does not
            open in onnxruntime, or gives wrong results.
    """
    try:
        with atomic_directory(output, marker=MANIFEST_NAME, own_files=own_files) as directory:
            return _write_into(directory, manifest, content)
    except OSError as problem:
        raise ExportError(
            f"{output} cannot be written: {problem.strerror or problem}; nothing was changed there"
        ) from problem


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError if `output` exists and may not be replaced, or cannot be written."""
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists: choose another directory or allow it to be replaced")
    check_writable(output)


def _write_into(directory: Path, manifest: Manifest, content: Content) -> Manifest:
    save_graph(content.graph, directory)
    data = directory / GRAPH_DATA_NAME
    with ThreadPoolExecutor(1) as beside:  # hashes the weights while the other files are written
        digest = beside.submit(file_digest, data) if data.is_file() else None
        manifest = _write_beside(directory, manifest, content)
    if digest is not None:
        fingerprint = file_fingerprint(data)
        manifest = dataclasses.replace(
            manifest, data_digest=digest.result(), data_fingerprint=fingerprint
        )
    written = (path for path in directory.rglob("*") if path.is_file())
    files = sorted(path.relative_to(directory).as_posix() for path in written)
    manifest = dataclasses.replace(manifest, files=tuple(files))
    write_json(directory / MANIFEST_NAME, manifest.to_json())
    return manifest


def _write_beside(directory: Path, manifest: Manifest, content: Content) -> Manifest:
    """Write the files beside the graph, and try the bundle."""
    manifest, weights = store_weights(directory, manifest)
    if manifest.encoder is not None:
        write_halves(directory, manifest)
        manifest = with_digests(manifest, file_digest(directory / ENCODER_NAME))
    known = {target.module for target in manifest.targets if target.stored is not None}
    known.update(name.removesuffix(".weight") for name in weights)
    manifest = _write_assets(directory, manifest, content)
    base = base_tokenizer(directory) if content.directories else None
    entries = {}
    for name, adapter in content.adapters.items():
        path = f"{ADAPTERS_DIRECTORY}/{name}"
        native = directory / f"{path}{NATIVE_SUFFIX}"
        _write_adapter(adapter, content.directories.get(name), directory / path)
        write_side_inputs(content.side_inputs[name], manifest, native)
        head = head_of(adapter, manifest, content.config)
        computed = {m for m, pair in adapter.factors.items() if pair.magnitude is not None}
        computed |= {name.removesuffix(".weight") for name in adapter.rows}
        entries[name] = AdapterEntry(
            adapter.digest,
            path,
            None if computed <= known else file_digest(native),
            _text(name, directory, manifest, content, base),
            head.labels,
            head.problem_type,
            whole_digest=content.whole_digests.get(name),
            split=name in content.whole_digests and adapter.part_of is not None,
        )
    manifest = dataclasses.replace(
        manifest,
        adapters=entries,
        graph_digest=file_digest(directory / GRAPH_NAME),
    )
    if numbers := {**content.biases, **weights}:
        write_arrays(directory / BASE_NAME, numbers, {})
    if content.defaults:
        write_arrays(directory / DEFAULTS_NAME, content.defaults, {})
    if content.required:
        write_required(directory, manifest, content.side_inputs)
    pad = padding_token(directory, vocabulary_of(manifest, content.config))
    return try_bundle(directory, manifest, content.source, content.config, pad, content.side_inputs)


def _write_adapter(adapter: Adapter, source: Path | None, directory: Path) -> None:
    """Copy the adapter's files, or write `adapter` if it differs from them.

    It differs if it was fitted to the base, if its labels are named in another file, or if its
    config leaves its targets to PEFT, which chooses others.
    """
    if source is not None:
        copy_adapter(source, directory)
        copied = load_adapter(directory)
        same = (copied.digest, copied.labels) == (adapter.digest, adapter.labels)
        if same and (names_targets(directory) or not adapter.factors):
            return
    save_adapter(adapter, directory)


def _text(
    name: str, directory: Path, manifest: Manifest, content: Content, base: Tokenizer | None
) -> AdapterText | None:
    """Copy the text files of the adapter `name` beside its weights."""
    if name not in content.directories:
        return None
    warn_of_trained_config(name, content.directories[name], content.config)
    output = directory / ADAPTERS_DIRECTORY / name
    own = tokens_of(content.adapters[name], manifest)
    vocabulary = vocabulary_of(manifest, content.config) if own is None else own
    return write_texts(name, content.directories[name], output, base, manifest, vocabulary)


def _write_assets(directory: Path, manifest: Manifest, content: Content) -> Manifest:
    """Write the base's files for the runtime: config, tokenizer, generation settings, pooling.

    Those of a merged adapter replace them.
    """
    manifest, config = write_assets(directory, manifest, content.config, content.assets)
    if not content.config:
        return manifest
    write_json(directory / CONFIG_NAME, config)
    if any(spec.name == INPUT_FEATURES for spec in manifest.inputs):
        _write_feature_settings(directory, content.assets)
    if manifest.task in GENERATING:
        generation = optional_json(directory / GENERATION_NAME, error=ModelError)
        if not content.assets.merged:
            warn_of_ignored(manifest.base.name, read_settings(generation, GENERATION_NAME))
        _write_genai(directory, manifest, config, generation)
    return manifest


def _write_genai(
    directory: Path, manifest: Manifest, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> None:
    """Write the files with which onnxruntime-genai opens the bundle, if it can."""
    make = genai_config if manifest.task == CAUSAL_LM else whisper_config
    genai = make(manifest, config, generation)
    if genai is None:
        return
    audio = None
    if manifest.task == SEQ2SEQ_LM:
        features = feature_settings(directory)
        audio = None if features is None else audio_processor(features)
    for name, values in ((GENAI_CONFIG_NAME, genai), (GENAI_AUDIO_NAME, audio)):
        if values is not None:
            # onnxruntime-genai's parser is certain to read ASCII.
            text = json.dumps(values, indent=4) + "\n"
            (directory / name).write_text(text, encoding="ascii")


def _write_feature_settings(directory: Path, assets: AssetSources) -> None:
    """Write how the base's processor computes features from audio, in a separate file."""
    for source in (assets.directory, *assets.recipes[:1]):
        values = feature_values(source, error=ModelError)
        if values is not None:
            write_json(directory / PREPROCESSOR_NAME, values)
            return
    logger.warning(
        "%s has no %s, which specifies how to compute features from audio: the bundle only takes"
        " features",
        assets.directory,
        PREPROCESSOR_NAME,
    )


def padding_token(directory: Path, vocabulary: int) -> int:
    """The id with which the runtime pads rows, by the files of a bundle: see its tokenizer.

    As there, one that the graph's vocabulary lacks is skipped.
    """
    settings = _settings(directory, CONFIG_NAME)
    own = settings.get("pad_token_id")
    if isinstance(own, int) and 0 <= own < vocabulary:
        return own  # without reading the tokenizer, which takes long
    tokens = _settings(directory, SETTINGS_NAME)
    ends = _settings(directory, GENERATION_NAME)
    pad = tokens.get("pad_token")
    text = pad.get("content") if isinstance(pad, Mapping) else pad
    added = _settings(directory, TOKENIZER_NAME).get("added_tokens")
    ids = [
        token.get("id")
        for token in (added if isinstance(added, list) else ())
        if isinstance(token, Mapping) and text is not None and token.get("content") == text
    ]
    eos = [ends.get("eos_token_id"), settings.get("eos_token_id")]
    first = [value[0] if isinstance(value, list) and value else value for value in eos]
    return next((i for i in (*ids, *first) if isinstance(i, int) and 0 <= i < vocabulary), 0)


def _settings(directory: Path, name: str) -> dict[str, Any]:
    file = directory / name
    if not file.is_file():
        return {}
    try:
        return read_json(file, error=ModelError)
    except ModelError:  # reported where the file is needed
        return {}
