"""The base graph that a bundle is made from, and the options of an export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.modules.renamings import Submodel
from loradeploy.bundle.manifest import BaseIdentity, Manifest, TensorSpec
from loradeploy.export.read.modules.find import Evidence
from loradeploy.export.trial.bundle import TrialSource

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Options:
    """The options of an export: see `loradeploy.export`.

    `operator_kept`: `operator` was not asked for, but is that of the bundle that is exported again.
    `scratch`: the directory for a temporary file with the weights of a large checkpoint; None keeps
    them in memory.
    """

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
    quantize_embedding: bool = False
    target: str | None = None
    operator: bool | None = None
    operator_kept: bool = False
    directories: Mapping[str, Path] = field(default_factory=dict)
    scratch: Path | None = None


@dataclass(frozen=True, eq=False)
class Base:
    """A base graph and its properties.

    `adapters`: those of the options, without their copies of base weights.
    `quantized`: the weights already have the requested precision.
    `parameters`: names of the checkpoint's parameters, or of those that a bundle's adapters can
    replace; `lacking`: those without values in the checkpoint.
    `replaced`: modules whose weights adapters replace, because the checkpoint lacks them or because
    the bundle already has side inputs for them.
    `before`: the manifest of the bundle that is exported again.
    `pad`: the padding token, if the graph depends on it.
    `weights`: modules' weights [out, in] in fp32, if the graph's own are in fp16.
    `source`: the outputs or the graph that the bundle is compared with.
    `own_weights`, `submodels`, `base_prefix`: as in the manifest.
    `tower`: the tower of a two-tower model; `config`: the tower's own configuration.
    `display_name`: the base's name in messages about adapters that do not fit.
    `embeds`, `image_blocks`, `other_part`: as in the manifest.
    `vocabulary`: the number of tokens, if merging the adapter changed it.
    `problem_type`: what the probabilities of an ONNX graph show; the model's config has precedence.
    `ties_head`: whether the config of an ONNX graph ties the output head to the embedding; None if
    no config says so.
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
    display_name: str = "this base model"
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
