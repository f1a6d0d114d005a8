"""Undo the last passes of an export, before the graph of a bundle is changed again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.export.passes.forms.branches import remove_branches
from loradeploy.export.passes.operators.calls import remove_operators
from loradeploy.export.passes.tokens.kept_logits import remove_logits_to_keep

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.manifest import Manifest


def remove_choices(model: ir.Model, manifest: Manifest) -> None:
    """Remove the operators' calls, the branches and `logits_to_keep`, if the manifest lists them.

    Raises:
        ExportError: the graph lacks what its manifest lists.
    """
    if manifest.operators:
        remove_operators(model, manifest.operators)
    if manifest.branches:
        remove_branches(model.graph)
    if manifest.logits_to_keep:
        remove_logits_to_keep(model.graph, manifest)
