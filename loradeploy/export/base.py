"""The base that a bundle is made from, and what the user asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.modules.renamings import Submodel
from loradeploy.bundle.manifest import BaseIdentity, Manifest, TensorSpec
from loradeploy.export.read.third_party import Evidence
from loradeploy.export.trial.bundle import Source as TrialSource

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Options:
    """What the user asked for: see `loradeploy.export`."""

    adapters: Mapping[str, Adapter]
    merge: bool
    precision: str | None
    task: str | None
    side_inputs: frozenset[str] = frozenset()
    layout: str | None = None
    branches: bool | None = None
    required_inputs: bool | None = None
    requantize: bool = False
    evidence: Evidence = field(default_factory=Evidence)
    fixed: Mapping[str, int] = field(default_factory=dict)
    attention: str | None = None
    logits_to_keep: bool | None = None
    target: str | None = None
    directories: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Base:
    """A base graph and what is known of it.

    `adapters`: those of the options, without what the base has of them already.
    `quantized`: the weights already are in the precision that is asked for.
    `parameters`: names in the checkpoint, where there is one; `lacking`: those without values.
    `replaced`: modules that are to be replaced whole, because the checkpoint lacks them or the
    bundle has them so.
    `before`: the manifest of a bundle.
    `pad`: the padding token, where the graph depends on it.
    `weights`: modules' weights [out, in] in fp32, where the graph's own are coarser.
    `source`: what the bundle is to be compared with.
    `own_weights`, `submodels`, `base_prefix`: as in the manifest.
    `tower`: of a two-tower model, which; `config`: the tower's own configuration.
    `called`: what a message about an adapter that does not fit calls it.
    `embeds`, `image_blocks`, `other_part`: as in the manifest.
    `vocabulary`: how many tokens there are, where an adapter that is merged changed that.
    `problem_type`: of a graph, what its own probabilities show; the model's config has precedence.
    `ties_head`: of a graph, whether its config ties the output head to the embedding; None where no
    config tells.
    `traced`, `probabilities`: as in the manifest.
    """

    graph: ir.Model
    task: str
    identity: BaseIdentity
    precision: str
    adapters: Mapping[str, Adapter]
    quantized: bool = False
    parameters: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()
    lacking: frozenset[str] = frozenset()
    before: Manifest | None = None
    pad: int | None = None
    weights: Mapping[str, NDArray[Any]] | None = None
    source: TrialSource = field(default_factory=TrialSource)
    own_weights: Mapping[str, str] = field(default_factory=dict)
    submodels: tuple[Submodel, ...] = ()
    base_prefix: str = ""
    tower: str | None = None
    config: Mapping[str, Any] | None = None
    called: str = "this base model"
    vocabulary: int | None = None
    embeds: tuple[TensorSpec, ...] = ()
    image_blocks: bool = False
    other_part: tuple[str, ...] = ()
    problem_type: str | None = None
    ties_head: bool | None = None
    traced: bool = False
    probabilities: str | None = None


def modules_of(parameters: Iterable[str]) -> frozenset[str]:
    """The modules that have these parameters."""
    return frozenset(name.rpartition(".")[0] for name in parameters)
