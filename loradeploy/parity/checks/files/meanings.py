"""Whether a bundle's images, sounds and outputs mean what the model's mean.

pooling            how an embedder's states become a vector
scores of pairs    the activation and the prompts of a cross-encoder
labels             the names of a classifier's outputs
problem type       how a classifier's outputs become scores
image processor    the size and the normalization of images
audio features     the window and the bands of a sound's spectrum
config             what config.json says about an image's tokens, sizes and kinds of positions
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.heads import (
    SINGLE_LABEL,
    config_labels,
    placeholders,
    problem_of,
    stated_problem,
    usual_problem,
)
from loradeploy.adapter.tasks import (
    CLASSIFICATIONS,
    FEATURE_EXTRACTION,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.bundle.audio.features import feature_settings
from loradeploy.bundle.fitting.labels import output_count
from loradeploy.bundle.image.pixels import processor_values
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME, INPUT_FEATURES
from loradeploy.bundle.text.scoring import read_scoring
from loradeploy.bundle.text.vectors.recipe import read_recipe
from loradeploy.errors import BundleError, shown
from loradeploy.parity.checks.files.pair import Pair, differ

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

# Fields of config.json that the runtime reads, and that no other aspect compares.
_CONFIG: Final = (
    *("model_type", "alibi", "max_target_positions"),
    *("image_token_id", "image_token_index", "boi_token_index", "eoi_token_index"),
    *("video_token_id", "image_size", "num_channels", "max_source_positions", "num_mel_bins"),
)


def _pooling(pair: Pair) -> str | None:
    if pair.manifest.task != FEATURE_EXTRACTION or pair.manifest.tower is not None:
        return None
    ours, theirs = pair.both(read_recipe)
    if ours is None and theirs is None:
        return None
    same = ours is not None and theirs is not None and ours.same(theirs)
    return None if same else "the files of an embedding's pooling are not the model's"


def _scores_of_pairs(pair: Pair) -> str | None:
    if pair.manifest.task != SEQUENCE_CLASSIFICATION:
        return None
    ours, theirs = pair.both(read_scoring)
    return None if ours == theirs else "the files of a cross-encoder's scores are not the model's"


def _labels(pair: Pair) -> str | None:
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
    return differ("the labels are", ours, known[-1] if known else usual)


def _names(manifest: Manifest, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names as classifiers read them; empty if there are none."""
    count = output_count(manifest, config)
    return config_labels(config, CONFIG_NAME, error=BundleError, outputs=count) or ()


def _problem_type(pair: Pair) -> str | None:
    """Whether the scores are a softmax, sigmoids or the outputs themselves."""
    shown_by_graph = pair.manifest.probabilities is not None
    if shown_by_graph and pair.traced:
        return f"the graph ends in {shown(pair.manifest.probabilities)}, which are no probabilities"
    ours = pair.manifest.problem_type
    if pair.manifest.task == TOKEN_CLASSIFICATION and ours is not None and pair.traced:
        return None if ours == SINGLE_LABEL else differ("the problem_type is", ours, SINGLE_LABEL)
    if pair.manifest.task != SEQUENCE_CLASSIFICATION:
        return None
    config = model_config(pair.expected)
    count = output_count(pair.manifest, config)
    stated = stated_problem(config, CONFIG_NAME, error=BundleError)
    if shown_by_graph and stated is None:
        return None  # what the operator shows, see the export
    expected = stated or usual_problem(count)
    if pair.context.merged:
        (tested,) = pair.context.adapters
        expected = problem_of(tested.adapter, stated, count)
    return None if ours == expected else differ("the problem_type is", ours, expected)


def _image_processor(pair: Pair) -> str | None:
    if _hears(pair):  # the file has the settings of a sound's features
        return None
    ours, theirs = ({} if found is None else found[0] for found in pair.both(processor_values))
    if not theirs:
        return None
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if ours.get(key) != theirs.get(key)]
    if not keys:
        return None
    return differ(f"the image processor's {keys[0]} is", ours.get(keys[0]), theirs.get(keys[0]))


def _audio_features(pair: Pair) -> str | None:
    if not _hears(pair):
        return None
    ours, theirs = feature_settings(pair.bundle), feature_settings(pair.context.model)
    return None if ours == theirs else differ("the features of audio are", ours, theirs)


def _config(pair: Pair) -> str | None:
    """The fields that the runtime reads; others describe the PyTorch model, which is traced."""
    if not pair.traced or pair.manifest.tower is not None:  # a tower has a config of its own
        return None
    ours, theirs = pair.both(model_config)
    for name in _CONFIG:
        if ours.get(name) != theirs.get(name):
            return differ(f"{CONFIG_NAME}: {name} is", ours.get(name), theirs.get(name))
    return None


def _hears(pair: Pair) -> bool:
    return any(spec.name == INPUT_FEATURES for spec in pair.manifest.inputs)


MEANINGS: Final[Mapping[str, Callable[[Pair], str | None]]] = {
    "pooling": _pooling,
    "scores of pairs": _scores_of_pairs,
    "labels": _labels,
    "problem type": _problem_type,
    "image processor": _image_processor,
    "audio features": _audio_features,
    "config": _config,
}
