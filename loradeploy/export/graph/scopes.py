"""The module of the checkpoint that a node was traced from, in torch.onnx's metadata."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import onnx_ir as ir

NAME_SCOPES: Final = "pkg.torch.onnx.name_scopes"


def module_path(node: ir.Node) -> str | None:
    """The path of the module that computes `node`, from torch.onnx's metadata."""
    scopes = node.metadata_props.get(NAME_SCOPES)
    if not scopes:
        return None
    try:
        path = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return None
    if not isinstance(path, list) or len(path) < 2 or not isinstance(path[-2], str):
        return None
    return path[-2] or None


def linear_scopes(module: str) -> dict[str, str]:
    """Metadata that identifies a node that surgery adds as part of the linear `module`."""
    return {NAME_SCOPES: str(["", module, "linear"])}
