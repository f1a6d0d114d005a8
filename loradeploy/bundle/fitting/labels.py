"""Classifier adapters with different numbers of labels in one graph.

The graph has outputs for the highest number of labels. Heads of adapters with fewer labels are
padded with zeros, and with a bias that makes the probability of the other labels zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.heads import (
    UNDECLARED,
    Head,
    label_count,
    label_parameters,
    placeholders,
    problem_of,
    stated_problem,
)
from loradeploy.adapter.tasks import CLASSIFICATIONS, SEQUENCE_CLASSIFICATION
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import AdapterMismatchError, BundleError, listed_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

# e^-10000 is 0 in every float type, and -10000 fits into float16.
_IMPOSSIBLE: Final = -1e4


def with_all_labels(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """`adapter` with outputs for all labels of the base's head; unchanged if it has all.

    `shapes`: shapes of the base's parameters that can be replaced, by name.

    A head without a bias is not padded, because a missing label would have a logit of zero. If the
    adapter has no label names, it gets LABEL_0 and so on, so that their number is known.
    """
    saved = dict(adapter.saved)
    fewest = None
    for weight in label_parameters(adapter):
        bias = weight.removesuffix("weight") + "bias"
        shape, actual = shapes.get(weight), saved[weight].shape
        fits = shape is not None and shape[1:] == actual[1:] and actual[0] < shape[0]
        if shape is None or not fits or bias not in saved or saved[bias].shape != actual[:1]:
            continue
        lacking = shape[0] - actual[0]
        saved[weight] = np.pad(saved[weight], ((0, lacking), (0, 0)))
        saved[bias] = np.pad(saved[bias], (0, lacking), constant_values=_IMPOSSIBLE)
        fewest = actual[0]
    if fewest is None:
        return adapter
    labels = adapter.labels or placeholders(fewest)
    return dataclasses.replace(adapter, saved=saved, labels=labels)


def without_padding(adapter: Adapter) -> Adapter:
    """`adapter` without the outputs that `with_all_labels` added to its heads."""
    saved = dict(adapter.saved)
    for weight in label_parameters(adapter):
        W, b = saved[weight], saved.get(weight.removesuffix("weight") + "bias")
        if b is None or b.shape != W.shape[:1]:
            continue
        own = (b != b.dtype.type(_IMPOSSIBLE)) | W.any(axis=tuple(range(1, W.ndim)))
        count = int(own.nonzero()[0].max(initial=-1)) + 1
        saved[weight], saved[weight.removesuffix("weight") + "bias"] = W[:count], b[:count]
    return dataclasses.replace(adapter, saved=saved)


def may_replace_head(arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> bool:
    """Whether side inputs may replace the head of a classifier.

    The names of heads depend on the architecture, so any replaced parameter counts as a head.
    """
    whole = {saved.input for saved in manifest.saved}
    return manifest.task in CLASSIFICATIONS and not whole.isdisjoint(arrays)


def head_of(adapter: Adapter, manifest: Manifest, config: Mapping[str, Any]) -> Head:
    """The meaning of the outputs of `adapter` in a bundle with the config.json `config`.

    Raises:
        AdapterMismatchError: the adapter does not have one label name per output.
        BundleError: the config is invalid.
    """
    wide = with_all_labels(adapter, manifest.saved_shapes())
    labels = wide.labels
    own = None if labels is None else len(labels)
    if wide is adapter:
        check_label_names(adapter, manifest, config)
    if adapter.problem_type == UNDECLARED:
        return Head(labels, UNDECLARED, own)
    if manifest.task != SEQUENCE_CLASSIFICATION:
        return Head(labels, None, own)
    stated = stated_problem(config, CONFIG_NAME, error=BundleError)
    return Head(labels, problem_of(adapter, stated, output_count(manifest, config)), own)


def check_label_names(adapter: Adapter, manifest: Manifest, config: Mapping[str, Any]) -> None:
    """Check that `adapter` has a label name for each output of a classifier's graph, or none.

    Only padded heads (`with_all_labels`) have fewer names. Without this check, outputs without a
    name would be ignored. A head of another size than the graph's is not for this check: it does
    not fit, whatever its labels.

    Raises:
        AdapterMismatchError: it names another number of labels.
    """
    if manifest.task not in CLASSIFICATIONS or adapter.labels is None:
        return
    outputs = output_count(manifest, config)
    if label_count(adapter) not in (None, outputs):
        return
    if outputs not in (0, len(adapter.labels)):
        raise AdapterMismatchError(
            f"it names {len(adapter.labels)} labels ({listed_names(adapter.labels, 3)}), and the"
            f" graph has {outputs} outputs: correct the labels in the adapter's files"
        )


def output_count(manifest: Manifest, config: Mapping[str, Any]) -> int:
    """The number of outputs of the head in a bundle's graph; 0 if it is unknown."""
    sizes = [spec.shape[-1:] for spec in manifest.outputs if spec.name == output_of(manifest)]
    if sizes and sizes[0] and isinstance(sizes[0][0], int):
        return sizes[0][0]
    names = config.get("id2label")
    return len(names) if isinstance(names, Mapping) else 0
