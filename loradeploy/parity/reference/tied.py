"""Trained embedding rows whose output head is tied to the embedding, and quantized in the graph.

The graph adds the trained difference v − W[i] to the head's quantized row, so the rounding error of
W[i] stays in it, as in all other rows. The reference does the same, with a separate head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loradeploy.adapter.adapter import Rows
from loradeploy.bundle.fitting.fit import row_users
from loradeploy.parity.reference.quantized import QUANTIZED

if TYPE_CHECKING:
    import torch

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.manifest import Manifest


def rows_of_tied(adapter: Adapter, manifest: Manifest) -> Mapping[str, tuple[str, ...]]:
    """Return, for each parameter with trained rows, the quantized weights that are tied to it."""
    if manifest.mode == "merged" or manifest.precision not in QUANTIZED:
        return {}
    found = {}
    for parameter, modules in row_users(manifest).items():
        others = tuple(w for w in (f"{m}.weight" for m in modules) if w != parameter)
        if parameter in adapter.rows and others and not {*others} & {*adapter.saved, *adapter.rows}:
            found[parameter] = others
    return found


@contextmanager
def with_rows_of_tied(
    model: torch.nn.Module, adapter: Adapter, manifest: Manifest
) -> Iterator[Adapter]:
    """Write such rows into `model` while the block lasts; yield the adapter without them."""
    from loradeploy.lora.parameters import overwrite

    shared = rows_of_tied(adapter, manifest)
    if not shared:
        yield adapter
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = {}
    for parameter, others in shared.items():
        trained = rows[parameter] = adapter.rows[parameter]
        at = list(trained.indices)
        for other in others:
            theirs, own = (parameters[name].detach()[at] for name in (other, parameter))
            rows[other] = Rows(trained.indices, trained.values + (theirs - own).numpy())
    done = overwrite(model, dataclasses.replace(adapter, carried={}, rows=rows))
    try:
        left = {name: own for name, own in adapter.rows.items() if name not in shared}
        yield dataclasses.replace(adapter, rows=left)
    finally:
        for one in done:
            one.undo()
