"""Whether the files beside the graph mean what the model's files mean: numbers do not show those.

The files of the base are written again as an export writes them, and compared by their meaning:

tokenizer          the words, the tokens of texts, and the side on which long texts are cut
chat template      its source
start token        the one that an encoder-decoder's text begins with
end tokens         those that end a generated text
positions          the maximum number of tokens of a text
pooling            how an embedder's states become a vector
scores of pairs    the activation and the prompts of a cross-encoder
labels             the names of a classifier's outputs
problem type       how a classifier's outputs become scores
image processor    the size and the normalization of images
required inputs    the second graph, and the values for clients that feed all inputs
precision          that of the graph's weights, which decides the limits of the numbers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.adapter.heads import (
    config_labels,
    placeholders,
    problem_of,
    stated_problem,
    usual_problem,
)
from loradeploy.adapter.tasks import (
    CLASSIFICATIONS,
    FEATURE_EXTRACTION,
    GENERATING,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
)
from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter
from loradeploy.bundle.fitting.labels import output_count
from loradeploy.bundle.model_config import context_length, model_config
from loradeploy.bundle.names import (
    ADAPTERS_DIRECTORY,
    CONFIG_NAME,
    ENCODER_NAME,
    GRAPH_NAME,
    INPUT_FEATURES,
    INPUT_IDS,
    NATIVE_SUFFIX,
    PREPROCESSOR_NAME,
    REQUIRED_NAME,
)
from loradeploy.bundle.text.beside import vocabulary_of
from loradeploy.bundle.text.scoring import read_scoring
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.bundle.text.tokenizer_files import TOKENIZER_NAME
from loradeploy.bundle.text.vectors.recipe import read_recipe
from loradeploy.disk import scratch_directory
from loradeploy.errors import BundleError, LoraDeployError, ModelError, first_line, shown
from loradeploy.export.assets import AssetSources, write_assets
from loradeploy.export.match.products import precision_of
from loradeploy.export.passes.forms.required import BASE_INPUTS_NAME, required_graph
from loradeploy.export.tokenizers import first_difference
from loradeploy.files import read_json, write_json
from loradeploy.lora.quiet import quiet_loradeploy
from loradeploy.parity.inputs.prompts import PROMPTS
from loradeploy.parity.report.results import Result
from loradeploy.runtime.decoding.caches.source import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.parity.context import CheckContext

BACKEND: Final = "files"
_TITLE: Final = "files of the bundle"


def differing_files(context: CheckContext) -> list[Result]:
    """Return a failed result for each meaning in which the bundle's files differ from the model's.

    Only bundles that were exported from a checkpoint are compared with it: an ONNX file comes with
    files of its own.
    """
    found = [*_precision(context), *_required(context)]
    if context.manifest.traced:
        with scratch_directory() as expected:
            try:
                with quiet_loradeploy():
                    write_expected(context, expected)
            except LoraDeployError as problem:
                message = f"they cannot be compared with those of {context.model}: {problem}"
                found.append(("all", message))
            else:
                found += _differences(context, expected)
    return [
        Result(BACKEND, _TITLE, None, None, "failed", message, aspect=aspect)
        for aspect, message in found
    ]


def write_expected(context: CheckContext, directory: Path) -> None:
    """Write the files of the base, or of the merged adapter, as an export writes them."""
    config = model_config(context.model, error=ModelError)
    merged = {a.name: a.path for a in context.adapters} if context.merged else {}
    own = model_config(context.bundle)
    size = own.get("vocab_size")
    changed = merged and type(size) is int and size != config.get("vocab_size")
    if changed:
        config["vocab_size"] = size
    sources = AssetSources(context.model, (context.model,), merged, size if changed else None)
    _, config = write_assets(directory, context.manifest, config, sources)
    write_json(directory / CONFIG_NAME, config)


@dataclass(frozen=True)
class _Pair:
    """The directories of the two sides, and what the check knows about them."""

    bundle: Path
    expected: Path
    context: CheckContext

    @property
    def manifest(self) -> Manifest:
        return self.context.manifest

    @cached_property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """Those of the bundle and of the expected files, which several aspects compare."""
        return Tokenizer(self.bundle), Tokenizer(self.expected)

    def both(self, read: Callable[[Path], Any]) -> tuple[Any, Any]:
        """What `read` returns for the bundle and for the expected files."""
        return read(self.bundle), read(self.expected)


def _differences(context: CheckContext, expected: Path) -> Iterator[tuple[str, str]]:
    pair = _Pair(context.bundle, expected, context)
    for aspect, compare in _ASPECTS.items():
        try:
            message = compare(pair)
        except LoraDeployError as problem:
            message = first_line(problem)
        if message is not None:
            yield aspect, f"{message}: export again, or check with the model that it was made from"


def _tokenizer(pair: _Pair) -> str | None:
    if not (pair.expected / TOKENIZER_NAME).is_file():
        return None
    if not (pair.bundle / TOKENIZER_NAME).is_file():
        return f"the bundle has no {TOKENIZER_NAME}, and the model has a tokenizer"
    ours, theirs = pair.tokenizers
    with ours.library() as own, theirs.library() as other:
        words = _first_word(own.get_vocab(), other.get_vocab())
        if words is not None:
            return f"the tokenizer has another vocabulary than the model's: {words}"
        size = vocabulary_of(pair.manifest, model_config(pair.bundle))
        text = first_difference(own, other, size, PROMPTS)
    if text is not None:
        return f"the tokenizer makes other tokens of {shown(text)} than the model's"
    if ours.special_tokens != theirs.special_tokens:
        return _values("the special tokens are", ours.special_tokens, theirs.special_tokens)
    if ours.truncation_side != theirs.truncation_side:
        return _values("texts are cut on the", ours.truncation_side, theirs.truncation_side)
    if ours.token_types != theirs.token_types:
        return _values("token types of pairs:", ours.token_types, theirs.token_types)
    return None


def _first_word(own: Mapping[str, int], other: Mapping[str, int]) -> str | None:
    for word in sorted({*own, *other}):
        if own.get(word) != other.get(word):
            return f"{shown(word)} is {own.get(word)}, expected {other.get(word)}"
    return None


def _chat_template(pair: _Pair) -> str | None:
    if not _has_tokenizers(pair):
        return None
    ours, theirs = pair.tokenizers
    return None if ours.template == theirs.template else "the chat template is not the model's"


def _start_token(pair: _Pair) -> str | None:
    if pair.manifest.task != SEQ2SEQ_LM or not _has_tokenizers(pair):
        return None
    ours, theirs = pair.both(lambda place: Target.of(place).first(Tokenizer(place).settings))
    return None if ours == theirs else _values("the token that begins a text is", ours, theirs)


def _end_tokens(pair: _Pair) -> str | None:
    if pair.manifest.task not in GENERATING or not _has_tokenizers(pair):
        return None
    ours, theirs = (sorted(tokenizer.eos_ids) for tokenizer in pair.tokenizers)
    return None if ours == theirs else _values("the tokens that end a text are", ours, theirs)


def _has_tokenizers(pair: _Pair) -> bool:
    return all(pair.both(lambda place: (place / TOKENIZER_NAME).is_file()))


def _positions(pair: _Pair) -> str | None:
    """An image has none, but the config of a model with two towers has those of its texts."""
    if all(spec.name != INPUT_IDS for spec in pair.manifest.inputs):
        return None
    ours, theirs = pair.both(lambda place: context_length(model_config(place)))
    if ours != theirs:
        return _values("the number of positions is", ours, theirs)
    if not _has_tokenizers(pair):
        return None
    ours, theirs = (tokenizer.max_length for tokenizer in pair.tokenizers)
    return None if ours == theirs else _values("the tokens of a text are at most", ours, theirs)


def _pooling(pair: _Pair) -> str | None:
    if pair.manifest.task != FEATURE_EXTRACTION or pair.manifest.tower is not None:
        return None
    ours, theirs = pair.both(read_recipe)
    if ours is None and theirs is None:
        return None
    same = ours is not None and theirs is not None and ours.same(theirs)
    return None if same else "the files of an embedding's pooling are not the model's"


def _scores_of_pairs(pair: _Pair) -> str | None:
    if pair.manifest.task != SEQUENCE_CLASSIFICATION:
        return None
    ours, theirs = pair.both(read_scoring)
    return None if ours == theirs else "the files of a cross-encoder's scores are not the model's"


def _labels(pair: _Pair) -> str | None:
    """The names may be those of the model or of an adapter's head."""
    if pair.manifest.task not in CLASSIFICATIONS:
        return None
    ours, theirs = pair.both(lambda place: _names(pair.manifest, model_config(place)))
    usual = placeholders(len(ours or theirs))
    if not ours and (not theirs or theirs == usual):
        return None
    known = [a.adapter.labels for a in pair.context.adapters if a.adapter.labels is not None]
    if len(theirs) == len(ours):
        known.append(theirs)
    if ours in map(tuple, known) or (ours == usual and len(theirs) != len(ours)):
        return None
    return _values("the labels are", ours, known[-1] if known else usual)


def _names(manifest: Manifest, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names as classifiers read them; empty if there are none."""
    count = output_count(manifest, config)
    return config_labels(config, CONFIG_NAME, error=BundleError, outputs=count) or ()


def _problem_type(pair: _Pair) -> str | None:
    """Whether the scores are a softmax, sigmoids or the outputs themselves."""
    if pair.manifest.task != SEQUENCE_CLASSIFICATION:
        return None
    config = model_config(pair.expected)
    count = output_count(pair.manifest, config)
    stated = stated_problem(config, CONFIG_NAME, error=BundleError)
    expected = stated or usual_problem(count)
    if pair.context.merged:
        (tested,) = pair.context.adapters
        expected = problem_of(tested.adapter, stated, count)
    ours = pair.manifest.problem_type
    return None if ours == expected else _values("the problem_type is", ours, expected)


def _image_processor(pair: _Pair) -> str | None:
    """For audio, an export writes other settings into this file."""
    audio = any(spec.name == INPUT_FEATURES for spec in pair.manifest.inputs)
    if audio or not (pair.expected / PREPROCESSOR_NAME).is_file():
        return None
    ours, theirs = pair.both(lambda place: _read(place / PREPROCESSOR_NAME))
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if ours.get(key) != theirs.get(key)]
    if not keys:
        return None
    return _values(f"{PREPROCESSOR_NAME}: {keys[0]} is", ours.get(keys[0]), theirs.get(keys[0]))


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, error=BundleError) if file.is_file() else {}


def _values(what: str, own: object, expected: object) -> str:
    return f"{what} {shown(own)}, expected {shown(expected)}"


_ASPECTS: Final[Mapping[str, Callable[[_Pair], str | None]]] = {
    "tokenizer": _tokenizer,
    "chat template": _chat_template,
    "start token": _start_token,
    "end tokens": _end_tokens,
    "positions": _positions,
    "pooling": _pooling,
    "scores of pairs": _scores_of_pairs,
    "labels": _labels,
    "problem type": _problem_type,
    "image processor": _image_processor,
}


def _precision(context: CheckContext) -> Iterator[tuple[str, str]]:
    """Compare the manifest's precision with the graph's: another one has other limits.

    The two graphs of an encoder-decoder may differ: it is that of one of them.
    """
    import onnx_ir as ir

    stated = context.manifest.precision
    names = [GRAPH_NAME] if context.manifest.encoder is None else [GRAPH_NAME, ENCODER_NAME]
    found = []
    for name in names:
        try:
            found.append(precision_of(ir.load(context.bundle / name)))
        except Exception as problem:  # onnx_ir raises anything for a damaged file
            yield "precision", f"{name} cannot be read: {first_line(problem)}"
            return
    if stated not in found:
        message = (
            f"the manifest's precision is {stated}, and {GRAPH_NAME} has weights in {found[0]}"
        )
        yield "precision", f"{message}: export again"


def _required(context: CheckContext) -> Iterator[tuple[str, str]]:
    """Compare required.onnx with what is made of model.onnx, which the backends run."""
    import onnx_ir as ir

    bundle = context.bundle
    if not (bundle / REQUIRED_NAME).is_file():
        return
    try:
        made, base = required_graph(ir.load(bundle / GRAPH_NAME), context.manifest)
        own = ir.load(bundle / REQUIRED_NAME)
        values, _ = read_arrays(bundle / BASE_INPUTS_NAME, error=BundleError)
    except Exception as problem:  # onnx_ir raises anything for a damaged file
        yield "required inputs", f"{REQUIRED_NAME} cannot be read: {first_line(problem)}"
        return
    if _serialized(made) != _serialized(own):
        yield "required inputs", f"{REQUIRED_NAME} is not made of {GRAPH_NAME}: export again"
    if not _equal(values, base):
        yield (
            "required inputs",
            f"{BASE_INPUTS_NAME} does not have the defaults of {GRAPH_NAME}: export again",
        )
    for name in context.manifest.adapters:
        place = bundle / ADAPTERS_DIRECTORY / name
        given = place.with_name(f"{name}.safetensors")
        native = place.with_name(f"{name}{NATIVE_SUFFIX}")
        if not (given.is_file() and native.is_file()):
            continue
        try:
            values, _ = read_arrays(given, error=BundleError)
            same = _equal(values, {**base, **read_onnx_adapter(native)})
        except LoraDeployError as problem:
            yield "required inputs", first_line(problem)
            continue
        if not same:
            yield "required inputs", f"{given.name} and {native.name} differ: export again"


def _equal(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(values, other[name]) for name, values in one.items()
    )


def _serialized(model: Any) -> bytes:
    import onnx_ir as ir

    return bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))
