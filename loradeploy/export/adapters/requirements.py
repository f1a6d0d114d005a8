"""Choose which layers get which kinds of side inputs.

Linear layers always get low-rank factors. The other kinds take time even if no adapter uses them:
they are added only for adapters that need them, or to every layer on request.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loradeploy.bundle.graph_form import BIAS, DORA, EMBEDDING, EXPERTS, TOKENS
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.targets import sharing
from loradeploy.errors import ExportError
from loradeploy.export.match.experts import Experts
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.products import adds_unclear
from loradeploy.export.match.whole.biases import has_unclear_bias
from loradeploy.export.match.whole.parts import Part
from loradeploy.export.passes.side_inputs.embeddings import has_token_rows
from loradeploy.export.passes.side_inputs.output_scale import Change
from loradeploy.export.passes.side_inputs.rows import rows_problem

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.adapter.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Needs:
    """Modules by the side inputs that they need. `everywhere`: the kinds that every layer gets.

    `scaled`, `shifted`: modules whose outputs get a scale, an offset. `embeddings`: those that get
    factors. `tokens`: embeddings and heads that get factors for trained rows. `experts`: parameters
    of experts that get factors.
    """

    scaled: frozenset[str]
    shifted: frozenset[str]
    embeddings: frozenset[str]
    tokens: frozenset[str]
    experts: frozenset[str]
    everywhere: frozenset[str]

    @property
    def changed(self) -> frozenset[str]:
        """The modules whose outputs are scaled or shifted."""
        return self.scaled | self.shifted


def needs_of(
    adapters: Iterable[Adapter],
    requested: Collection[str],
    before: Manifest | None,
    *,
    embeddings_of: Collection[str],
    own_weights: Mapping[str, str],
) -> Needs:
    """The needs of `adapters`, with the kinds in `requested` and those of the bundle `before`.

    `embeddings_of`: the embeddings of the graph. `own_weights`: as in the manifest.
    """
    scaled, shifted, embeddings, tokens, experts = set(), set(), set(), set(), set()
    saved: set[str] = set()
    users = sharing(own_weights)
    if TOKENS in requested:
        inputs = [name for name in users if name.removesuffix(".weight") in embeddings_of]
        tokens |= {module for name in inputs for module in users[name]}
    for adapter in adapters:
        saved |= {name.removesuffix(".weight") for name in adapter.saved}
        tokens |= {m for name in adapter.rows for m in users.get(name, ())} - saved
        for module, pair in adapter.factors.items():
            if pair.magnitude is not None:
                scaled.add(module)
            if pair.bias is not None:
                shifted.add(module)
            if pair.kind == "embedding":
                embeddings.add(module)
            if pair.kind == "experts":
                experts.add(module)
        shifted |= {name.removesuffix(".bias") for name in adapter.saved if name.endswith(".bias")}
    if before is not None:
        scaled |= {output.module for output in before.changed if output.scale is not None}
        shifted |= {output.module for output in before.changed if output.offset is not None}
        embeddings |= {t.module for t in before.targets if t.kind == "embedding"}
        tokens |= {t.module for t in before.targets if f"{t.module}.weight" in users} - saved
        experts |= {t.module for t in before.targets if t.kind == "experts"}
    return Needs(*map(frozenset, (scaled, shifted, embeddings, tokens, experts, requested)))


def choose_embeddings(graph: ir.Graph, parts: Mapping[str, Part], needs: Needs) -> list[Part]:
    """The embeddings that get factors."""
    return [
        part
        for module, part in parts.items()
        if part.kind == "embedding"
        and (
            module in needs.embeddings | needs.tokens
            or (EMBEDDING in needs.everywhere and has_token_rows(graph, part))
        )
    ]


def choose_experts(found: Mapping[str, Experts], needs: Needs) -> list[Experts]:
    """The parameters of experts that get factors."""
    every = EXPERTS in needs.everywhere
    return [each for name, each in found.items() if every or name in needs.experts]


def choose_changes(
    graph: ir.Graph,
    targets: Sequence[Linear],
    embeddings: Sequence[Part],
    parts: Mapping[str, Part],
    needs: Needs,
    parameters: Collection[str],
) -> list[Change]:
    """The layers whose outputs get scales and offsets.

    `parameters`: names in the checkpoint, because a graph does not show biases of zeros.

    Raises:
        ExportError: the graph adds a layer's bias in an unknown way, or the layer is fused.
    """
    changes = []
    norms = [part for part in parts.values() if part.kind == "norm" and part.bias_input is not None]
    layers: list[Linear | Part] = [*targets, *embeddings, *norms]
    for layer in layers:
        module, norm = layer.module, layer in norms
        biased = layer.bias is not None or f"{module}.bias" in parameters
        scale = not norm and (module in needs.scaled or DORA in needs.everywhere)
        requested = BIAS in needs.everywhere and biased
        if norm and requested:
            requested = rows_problem(graph, layer.nodes, module) is None
        shift = module in needs.shifted or requested
        if not scale and not shift:
            continue
        if isinstance(layer, Linear) and layer.slice is not None:
            if module not in needs.scaled and module not in needs.shifted:
                continue
            raise ExportError(
                f"{module} is packed together with others and cannot take a scale or an offset:"
                " merge the adapter instead"
            )
        unclear = isinstance(layer, Linear) and (
            any(adds_unclear(node, layer.out_features) for node in layer.nodes)
            or (shift and has_unclear_bias(layer))
        )
        if unclear or (layer.bias is None and f"{module}.bias" in graph.initializers):
            raise ExportError(
                f"the graph adds the bias of {module} in a way that is not understood, so that it"
                " cannot take a scale or an offset: merge the adapter instead"
            )
        changes.append(Change(layer, scale=scale, offset=shift or (scale and biased)))
    return changes
