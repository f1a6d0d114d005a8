"""An adapter as a bundle's graph takes it, and whether that takes it at all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Final

from loradeploy.adapter import fit
from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.fit import AdaptableBase, Layer
from loradeploy.adapter.names import named_as
from loradeploy.adapter.renamings import renamings
from loradeploy.adapter.settle import values_digest, without_copies, without_idle
from loradeploy.bundle.labels import with_all_labels
from loradeploy.bundle.manifest import Manifest
from loradeploy.errors import AdapterMismatchError

THIS_BUNDLE: Final = "this bundle"


def fit_to(adapter: Adapter, manifest: Manifest, name: str = THIS_BUNDLE) -> Adapter:
    """`adapter` as the graph of `manifest` takes it: `fitted`, and checked.

    `name` is what a message calls the base, where it is no bundle yet.

    Raises:
        AdapterMismatchError: it does not fit; the first misfits are in the one message, with the
            count of the others.
        AdapterError: the factors are for a base that an initialization changed.
    """
    if manifest.mode == "merged":
        raise AdapterMismatchError(
            "this bundle is merged and takes no adapters: export the base without `merge`"
        )
    adapter.check_plain()
    adapter = fitted(adapter, manifest)
    fit.check_fit(with_all_labels(adapter, manifest.saved_shapes()), adaptable(manifest, name))
    return adapter


def fitted(adapter: Adapter, manifest: Manifest) -> Adapter:
    """`adapter` as the bundle can take it, for `adapter.fit` to judge.

    Modules have the names that they have in the graph; copies of the base's own weights, and
    factors that are zero at modules that the graph lacks, are left out. A weight of the base that
    came with the file and is a side input here is one of those that are trained whole, unless
    another module may share it, which would not see it. A merged bundle takes none, and the adapter
    is as it was.

    Raises:
        AdapterMismatchError: it cannot be told which modules of the graph some of its own are.
    """
    if manifest.mode == "merged":
        return adapter
    adapter = named_as(
        adapter, _modules(manifest), lambda: renamings(manifest.submodels, manifest.base_prefix)
    )
    own = manifest.own_weights
    adapter = without_copies(
        adapter, lambda name, values: name in own and own[name] == values_digest(values)
    )
    digests = Counter(own.values())
    replaceable = {t.parameter for t in manifest.saved if digests[own.get(t.parameter, "")] < 2}
    if brought := {n: v for n, v in adapter.carried.items() if n in replaceable}:
        adapter = dataclasses.replace(
            adapter,
            saved={**brought, **adapter.saved},
            carried={n: v for n, v in adapter.carried.items() if n not in replaceable},
        )
    return without_idle(adapter, {target.module for target in manifest.targets})


def adaptable(manifest: Manifest, name: str = THIS_BUNDLE) -> AdaptableBase:
    """What adapters can change of the graph of `manifest`, which a message calls `name`."""
    scaled = {output.module for output in manifest.changed if output.scale is not None}
    replaced = {saved.parameter: saved.shape for saved in manifest.saved}
    biases = {f"{o.module}.bias": o.size for o in manifest.changed if o.offset is not None}
    return AdaptableBase(
        name,
        layers={
            target.module: Layer(
                target.kind,
                (target.in_features,),
                target.out_features,
                scaled=target.module in scaled,
            )
            for target in manifest.targets
        },
        parameters=replaced,
        biases={name: size for name, size in biases.items() if name not in replaced},
        side_inputs=True,
        own_weights=manifest.own_weights,
        lacking=[saved.parameter for saved in manifest.saved if saved.lacking],
        digest=manifest.base.digest if manifest.base.kind == "checkpoint" else None,
    )


def _modules(manifest: Manifest) -> set[str]:
    """The modules that the manifest knows of."""
    parameters = (*(saved.parameter for saved in manifest.saved), *manifest.own_weights)
    layers = {t.module for t in manifest.targets} | {o.module for o in manifest.changed}
    return layers | {p.rpartition(".")[0] for p in parameters}
