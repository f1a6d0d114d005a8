"""Classifiers whose adapters tell apart different numbers of labels, in one graph.

The graph has outputs for the most labels. The head of an adapter with fewer has zeros for the rest,
and a bias that makes them as good as impossible.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from loradeploy.adapter.adapter import Adapter

# The parameter of a head whose first dimension is the number of labels, at the end of its name.
LABELED: Final = re.compile(r"(.*\.)?(classifier|score|classifier\.out_proj)\.weight")
# e^-10000 is 0 in every float, and the number itself fits into float16.
_IMPOSSIBLE: Final = -1e4


def label_parameters(adapter: Adapter) -> tuple[str, ...]:
    """The weights of the adapter's heads by label."""
    return tuple(name for name in sorted(adapter.saved) if LABELED.fullmatch(name))


def with_all_labels(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """`adapter` with outputs for all labels of the base's head; itself where it has them.

    `shapes`: of the base's parameters that can be replaced, by name.

    A head without a bias is left as it is: a label that it lacks could not be told from a logit of
    zero. Labels that have no names get LABEL_0 and so on, so that their number is known.
    """
    saved = dict(adapter.saved)
    fewest = None
    for weight in label_parameters(adapter):
        bias = weight.removesuffix("weight") + "bias"
        shape, own = shapes.get(weight), saved[weight].shape
        fits = shape is not None and shape[1:] == own[1:] and own[0] < shape[0]
        if shape is None or not fits or bias not in saved or saved[bias].shape != own[:1]:
            continue
        lacking = shape[0] - own[0]
        saved[weight] = np.pad(saved[weight], ((0, lacking), (0, 0)))
        saved[bias] = np.pad(saved[bias], (0, lacking), constant_values=_IMPOSSIBLE)
        fewest = own[0]
    if fewest is None:
        return adapter
    labels = adapter.labels or tuple(f"LABEL_{number}" for number in range(fewest))
    return dataclasses.replace(adapter, saved=saved, labels=labels)
