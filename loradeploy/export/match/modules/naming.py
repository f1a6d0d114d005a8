"""Identify the modules of the checkpoint that a product of a graph computes.

A product may compute several modules with concatenated outputs (fused q, k and v). Evidence, from
the strongest to the weakest: a map that the user gives, module paths in the nodes' metadata, node
names that spell a path. If the checkpoint is given, its weights prove the modules (identity.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loradeploy.export.graph.edit import constant_of
from loradeploy.export.graph.scopes import NAME_SCOPES, module_path
from loradeploy.export.match.products import Product, users_of

if TYPE_CHECKING:
    import onnx_ir as ir

# Metadata of loradeploy: the modules of a fused product, [[module, outputs], …] as JSON.
FUSED_MODULES: Final = "loradeploy.modules"

_ATTENTION: Final = ("GroupQueryAttention", "MultiHeadAttention", "PagedAttention")
# Names of the onnxruntime-genai builder, and those of transformers' modules.
_BUILDER: Final = (
    (re.compile(r"(.*\.layers\.\d+)\.attn\.([a-z_]+_proj|[qk]_norm)"), r"\1.self_attn.\2"),
    (re.compile(r"(.*)\.layers\.\d+\.final_norm_layernorm"), r"\1.norm"),
)
_FUSED_QKV: Final = re.compile(r"(.*)\.qkv_proj")
# Changes of node names by onnxruntime's optimizer: "fused /fc1/Gemm",
# "/fc1/MatMul/MatMulAddFusion_quant".
_FUSED: Final = "fused "
_FUSION: Final = re.compile(r"(?:Gemm|Mat[Mm]ul)[A-Za-z]*Fusion(?:_[^/]*)?")
# torch's older exporter numbers the later calls of a module: /query/MatMul, /query_1/MatMul.
_LATER_CALL: Final = re.compile(r"(.+)_\d+")
_LONGEST: Final = 1024  # of a node's name that may spell a path


@dataclass(frozen=True)
class Named:
    """The modules of a product, each with its outputs, in the order of the product's outputs.

    `unseen_biases`: the modules whose bias was not found after the product.
    """

    modules: tuple[tuple[str, int], ...]
    found_by: str
    unseen_biases: frozenset[str] = frozenset()


Namer = Callable[[Product], Named | None]


def first_of(namers: Sequence[Namer]) -> Namer:
    """A namer that returns the first result of `namers`."""

    def name(product: Product) -> Named | None:
        return next((named for namer in namers if (named := namer(product)) is not None), None)

    return name


def by_graph(product: Product) -> Named | None:
    """Name a product by the graph only: by its metadata, else by its node names."""
    node = product.node
    fused = node.metadata_props.get(FUSED_MODULES)
    if fused:
        modules = tuple((str(name), int(size)) for name, size in json.loads(fused))
        return Named(modules, f"metadata {FUSED_MODULES}")
    found = module_of(node)
    if found is None:
        return None
    module, found_by = found
    module = _as_first_called(product, module)
    return Named(_unfused(product, module, found_by), found_by)


def keeping_fused(modules: Iterable[str]) -> Namer:
    """As `by_graph`, but the fused projections in `modules` are modules of the checkpoint."""
    modules_of_checkpoint = frozenset(modules)

    def name(product: Product) -> Named | None:
        found = module_of(product.node)
        if found is None or found[0] not in modules_of_checkpoint:
            return None
        return Named(((found[0], product.out_features),), found[1])

    return name


def module_of(node: ir.Node) -> tuple[str, str] | None:
    """The path of the module of a node, and the evidence for it."""
    path = module_path(node)
    if path is not None:
        return path, f"metadata {NAME_SCOPES}"
    name = _as_exported(node.name or "")
    if not name.startswith("/") or name.count("/") < 2:
        return None
    module = name.strip("/").rsplit("/", 1)[0].replace("/", ".")
    if not is_built(node):
        return module, "node name"
    for pattern, ours in _BUILDER:
        if (found := pattern.fullmatch(module)) is not None:
            return found.expand(ours), "node name of onnxruntime-genai's builder"
    return module, "node name"


def at_first_call(module: str) -> str | None:
    """The name that `module` has in its first call, if it may be the name of a later call."""
    later = _LATER_CALL.fullmatch(module)
    return None if later is None else later[1]


def _as_first_called(product: Product, module: str) -> str:
    """The name of a module in its first call, if this product is a later call with its weight."""
    first = at_first_call(module)
    if first is None:
        return module
    same = (module_of(node) for node in users_of(product.weight) if node is not product.node)
    return first if any(found is not None and found[0] == first for found in same) else module


def _as_exported(name: str) -> str:
    """The name of a node before onnxruntime's optimizer; "" if it is too long to be a path."""
    if len(name) > _LONGEST:
        return ""
    while name.startswith(_FUSED):
        name = name.removeprefix(_FUSED)
    parts = name.rstrip("/").split("/")
    while _FUSION.fullmatch(parts[-1]) and len(parts) > 1:
        parts.pop()
    return "/".join(parts)


def is_built(node: ir.Node) -> bool:
    """Whether onnxruntime-genai's builder wrote the node's graph, by the name of its attention."""
    graph = node.graph
    if graph is None:
        return False
    built: bool | None = graph.meta.get("loradeploy.built")
    if built is None:
        built = any(
            each.op_type in _ATTENTION and str(each.name).endswith(f"/attn/{each.op_type}")
            for each in graph
        )
        graph.meta["loradeploy.built"] = built
    return built


def _unfused(product: Product, module: str, found_by: str) -> tuple[tuple[str, int], ...]:
    """The modules of a fused projection, by the attention that uses it; else the one module."""
    found = _FUSED_QKV.fullmatch(module)
    sizes = None if found is None or "builder" not in found_by else _parts_of(product.node)
    if found is None or sizes is None or sum(sizes) != product.out_features:
        return ((module, product.out_features),)
    return tuple((f"{found[1]}.{part}_proj", size) for part, size in zip("qkv", sizes, strict=True))


def _parts_of(node: ir.Node) -> tuple[int, int, int] | None:
    """The numbers of outputs of q, k and v, from the node after `node` that splits them."""
    for user in _users_after_bias(node):
        if user.op_type in _ATTENTION:
            heads = _attribute(user, "num_heads")
            shared = _attribute(user, "kv_num_heads", heads)
            size = node.outputs[0].shape
            width = None if size is None else size[-1]
            if not isinstance(width, int) or not heads or width % (heads + 2 * shared):
                return None
            each = width // (heads + 2 * shared)
            return heads * each, shared * each, shared * each
        if user.op_type == "Split" and len(user.outputs) == 3:
            split = user.inputs[1] if len(user.inputs) > 1 else None
            if split is None or split.const_value is None:
                return None
            q, k, v = (int(part) for part in constant_of(split))
            return q, k, v
    return None


def _users_after_bias(node: ir.Node) -> list[ir.Node]:
    """The users of a product after its bias."""
    users: list[ir.Node] = []
    for use in node.outputs[0].uses():
        users += _users_after_bias(use.node) if use.node.op_type == "Add" else [use.node]
    return users


def _attribute(node: ir.Node, name: str, default: Any = 0) -> int:
    attribute = node.attributes.get(name)
    return int(default if attribute is None else attribute.as_int())
