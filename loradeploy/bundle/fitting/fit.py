"""Convert an adapter to the form that a bundle's graph takes, and check that it fits."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from typing import Final

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.fitting import fit
from loradeploy.adapter.fitting.fit import AdaptableBase, Layer
from loradeploy.adapter.fitting.parts import own_part, without_masked_lm_head
from loradeploy.adapter.fitting.settle import values_digest, without_copies, without_idle
from loradeploy.adapter.fitting.towers import tower_part
from loradeploy.adapter.modules.names import named_as
from loradeploy.adapter.modules.renamings import renamings
from loradeploy.adapter.tasks import GENERATING, SEQ2SEQ_LM
from loradeploy.bundle.fitting.added_tokens import check_tokens, with_all_tokens, with_trained_rows
from loradeploy.bundle.fitting.labels import with_all_labels
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.targets import sharing
from loradeploy.errors import AdapterMismatchError

THIS_BUNDLE: Final = "this bundle"
_AGAIN: Final = "export the model again with this adapter, or merge it"
_WITH_TOKENS: Final = "export with `side_inputs=['tokens']`, or merge it instead"
_BY_NUMBERS: Final = (
    " (for an ONNX model: export it with `checkpoint`, which identifies modules by weights too)"
)


def fit_to(adapter: Adapter, manifest: Manifest, name: str = THIS_BUNDLE) -> Adapter:
    """Convert `adapter` with `fitted`, and check that the graph of `manifest` takes it.

    `name`: the name of the base in messages, during an export.

    Raises:
        AdapterMismatchError: it does not fit; the message lists the first mismatches and counts the
            others.
        AdapterError: the factors apply to a base that the initialization changed.
    """
    if manifest.mode == "merged":
        raise AdapterMismatchError(
            "this bundle is merged and takes no adapters: export the base without `merge`"
        )
    adapter.check_plain()
    adapter = fitted(adapter, manifest)
    check_tokens(adapter, manifest)
    whole = with_all_tokens(with_all_labels(adapter, manifest.saved_shapes()), manifest)
    fit.check_fit(whole, adaptable(manifest, name))
    return adapter


def fitted(adapter: Adapter, manifest: Manifest) -> Adapter:
    """`adapter` in the form of the bundle, before the check of `adapter.fitting.fit`.

    Modules are renamed to those of the graph. Copies of the base's weights, and zero factors of
    modules that the graph lacks, are removed. A base weight in the adapter's file that is a side
    input here becomes a fully trained parameter, unless another module may share the weight: that
    module would not get the side input. If the graph has added tokens, tables that only add rows to
    the base's are replaced by trained rows. Only the part for the bundle's tower is kept. For a
    merged bundle, nothing else is changed.

    Raises:
        AdapterMismatchError: the modules of the adapter match those of the graph in several ways.
    """
    adapter = tower_part(adapter, manifest.tower)
    if manifest.mode == "merged":
        return adapter
    rules = partial(renamings, manifest.submodels, manifest.base_prefix)
    adapter = own_part(adapter, manifest.other_part, rules)
    modules = _modules(manifest)
    if manifest.task not in GENERATING:
        adapter = without_masked_lm_head(adapter, modules)
    adapter = named_as(adapter, modules, rules)
    adapter = with_trained_rows(adapter, manifest)
    known = manifest.own_weights
    adapter = without_copies(
        adapter, lambda name, values: name in known and known[name] == values_digest(values)
    )
    digests = Counter(known.values())
    replaceable = {t.parameter for t in manifest.saved if digests[known.get(t.parameter, "")] < 2}
    if carried := {n: v for n, v in adapter.carried.items() if n in replaceable}:
        adapter = dataclasses.replace(
            adapter,
            saved={**carried, **adapter.saved},
            carried={n: v for n, v in adapter.carried.items() if n not in replaceable},
        )
    return without_idle(adapter, {target.module for target in manifest.targets})


def adaptable(manifest: Manifest, name: str = THIS_BUNDLE) -> AdaptableBase:
    """The layers and parameters of the graph of `manifest` that adapters can change.

    `name`: the name of the base in messages.
    """
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
                experts=target.experts,
                scaled=target.module in scaled,
                shifted=f"{target.module}.bias" in biases,
            )
            for target in manifest.targets
        },
        parameters=replaced,
        biases={name: size for name, size in biases.items() if name not in replaced},
        side_inputs=True,
        own_weights=manifest.own_weights,
        row_users=row_users(manifest),
        lacking=[saved.parameter for saved in manifest.saved if saved.lacking],
        digest=manifest.base.digest if manifest.base.kind == "checkpoint" else None,
        model=manifest.base.name,
        remedy_for_rows=_WITH_TOKENS if manifest.task != SEQ2SEQ_LM else "merge it instead",
        remedy_for_others=_AGAIN if name == THIS_BUNDLE else "merge it instead",
        remedy=_BY_NUMBERS if manifest.base.kind == "onnx" and name == THIS_BUNDLE else "",
    )


def row_users(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """The modules that use each embedding or head of the base, by parameter.

    Without a checkpoint, weights whose values occur in two constants of the graph are left out: it
    is unknown whether they are tied.
    """
    constants = {target.module: target.weight for target in manifest.targets}
    found = {}
    for parameter, users in sharing(manifest.own_weights).items():
        if manifest.base.kind == "checkpoint" or len({constants.get(m) for m in users}) == 1:
            found[parameter] = users
    return found


def _modules(manifest: Manifest) -> set[str]:
    """The modules that the manifest names."""
    parameters = (*(saved.parameter for saved in manifest.saved), *manifest.own_weights)
    layers = {t.module for t in manifest.targets} | {o.module for o in manifest.changed}
    return layers | {p.rpartition(".")[0] for p in parameters}
