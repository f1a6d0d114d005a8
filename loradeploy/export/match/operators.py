"""The treatment of every input and attribute of the operators that an export reads or rewrites.

A node is rewritten, or its weight read, only if all of its inputs and attributes are in this table.
Others, such as those of a later version of the operator, are refused by name.

CARRIED    stays at the node, or moves to the node that replaces it
HONORED    is taken into account, and may change
REFUSED    the node is refused by name if it has this, unless with the value in `refused`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import ExportError, listed_names

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT: Final = "com.microsoft"
GROUP_QUERY_ATTENTION: Final = "GroupQueryAttention"


class Treatment(Enum):
    """The treatment of an input or attribute."""

    CARRIED = "carried over"
    HONORED = "honored"
    REFUSED = "refused"


CARRIED, HONORED, REFUSED = Treatment


@dataclass(frozen=True)
class Operator:
    """The inputs of an operator, in order, and its attributes.

    `refused`: accepted values of refused attributes, which mean the same as leaving them out.
    """

    inputs: Mapping[str, Treatment]
    attributes: Mapping[str, Treatment] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)


def _norm(*inputs: str, **attributes: Treatment) -> Operator:
    return Operator(dict.fromkeys(inputs, CARRIED), {"epsilon": CARRIED, **attributes})


_CONV: Final = Operator(
    {"X": CARRIED, "W": HONORED, "B": HONORED},
    {
        **dict.fromkeys(("auto_pad", "dilations", "kernel_shape", "pads", "strides"), CARRIED),
        "group": HONORED,
    },
)
_DEQUANTIZE: Final = Operator(
    {"x": HONORED, "x_scale": HONORED, "x_zero_point": HONORED},
    {"axis": HONORED, "block_size": HONORED, "output_dtype": HONORED},
)
_MATMUL: Final = Operator({"A": CARRIED, "B": HONORED})
_AXIS_AND_TYPE: Final = {"axis": CARRIED, "stash_type": CARRIED}

OPERATORS: Final[Mapping[tuple[str, str], Operator]] = MappingProxyType(
    {
        # -- products (products.py, merge.py, quantize.py, fuse.py, heads.py) ------------------
        ("", "MatMul"): _MATMUL,
        # scaled and transposed ones are rewritten first (normalize.py)
        ("", "Gemm"): Operator(
            {"A": CARRIED, "B": HONORED, "C": HONORED},
            dict.fromkeys(("alpha", "beta", "transA", "transB"), HONORED),
        ),
        (MICROSOFT, "FusedGemm"): Operator(
            {"A": CARRIED, "B": HONORED, "C": HONORED},
            {
                **dict.fromkeys(("activation", "alpha", "beta", "transA", "transB"), HONORED),
                **dict.fromkeys(
                    ("activation_alpha", "activation_beta", "activation_gamma"), REFUSED
                ),
            },
        ),
        (MICROSOFT, "FusedMatMul"): Operator(
            {"A": HONORED, "B": HONORED},
            {
                **dict.fromkeys(("alpha", "transA", "transB"), HONORED),
                **dict.fromkeys(("transBatchA", "transBatchB"), REFUSED),
            },
            {"transBatchA": 0, "transBatchB": 0},
        ),
        # g_idx is read; a weight that is packed again has none
        (MICROSOFT, "MatMulNBits"): Operator(
            {
                "A": CARRIED,
                "B": HONORED,
                "scales": HONORED,
                "zero_points": HONORED,
                "g_idx": HONORED,
                "bias": HONORED,
            },
            {
                **dict.fromkeys(("K", "N", "bits", "block_size"), HONORED),
                "accuracy_level": CARRIED,
                "weight_prepacked": REFUSED,
            },
            {"weight_prepacked": 0},
        ),
        (MICROSOFT, "MatMulBnb4"): Operator(
            {"A": CARRIED, "B": HONORED, "absmax": HONORED},
            {
                **dict.fromkeys(("K", "N", "block_size", "quant_type"), HONORED),
                **dict.fromkeys(("training_mode", "transB"), REFUSED),
            },
            {"training_mode": 0, "transB": 1},
        ),
        ("", "MatMulInteger"): Operator(
            {"A": CARRIED, "B": HONORED, "a_zero_point": CARRIED, "b_zero_point": HONORED}
        ),
        (MICROSOFT, "DynamicQuantizeMatMul"): Operator(
            {
                "A": CARRIED,
                "B": HONORED,
                "b_scale": HONORED,
                "b_zero_point": HONORED,
                "bias": HONORED,
            }
        ),
        (MICROSOFT, "MatMulIntegerToFloat"): Operator(
            {
                "A": CARRIED,
                "B": HONORED,
                "a_scale": CARRIED,
                "b_scale": HONORED,
                "a_zero_point": CARRIED,
                "b_zero_point": HONORED,
                "bias": HONORED,
            }
        ),
        # -- between a weight and its product --------------------------------------------------
        ("", "DequantizeLinear"): _DEQUANTIZE,
        (MICROSOFT, "DequantizeLinear"): _DEQUANTIZE,
        ("", "Cast"): Operator(
            {"input": HONORED}, {"to": HONORED, "saturate": CARRIED, "round_mode": CARRIED}
        ),
        ("", "Identity"): Operator({"input": HONORED}),
        ("", "Transpose"): Operator({"data": HONORED}, {"perm": HONORED}),
        # -- layers that are not products (parts.py) -------------------------------------------
        ("", "Gather"): Operator({"data": HONORED, "indices": HONORED}, {"axis": HONORED}),
        ("", "Conv"): _CONV,
        ("", "LayerNormalization"): _norm("X", "Scale", "B", **_AXIS_AND_TYPE),
        ("", "RMSNormalization"): _norm("X", "scale", **_AXIS_AND_TYPE),
        ("", "SimplifiedLayerNormalization"): _norm("X", "scale", **_AXIS_AND_TYPE),
        ("", "GroupNormalization"): _norm(
            "X", "scale", "bias", num_groups=CARRIED, stash_type=CARRIED
        ),
        ("", "BatchNormalization"): Operator(
            dict.fromkeys(("X", "scale", "B", "input_mean", "input_var"), CARRIED),
            {"epsilon": CARRIED, "momentum": CARRIED, "training_mode": REFUSED},
            {"training_mode": 0},
        ),
        (MICROSOFT, "SkipLayerNormalization"): _norm("input", "skip", "gamma", "beta", "bias"),
        (MICROSOFT, "SkipSimplifiedLayerNormalization"): _norm("input", "skip", "gamma", "bias"),
        # -- attention that GroupQueryAttention replaces (gqa.py) ------------------------------
        ("", "Attention"): Operator(
            {
                **dict.fromkeys(("Q", "K", "V", "attn_mask"), HONORED),
                **dict.fromkeys(("past_key", "past_value", "nonpad_kv_seqlen"), REFUSED),
            },
            {
                **dict.fromkeys(("scale", "softcap"), CARRIED),
                # sizes are read from the values, which have an axis of heads
                **dict.fromkeys(("q_num_heads", "kv_num_heads"), HONORED),
                **dict.fromkeys(
                    ("is_causal", "qk_matmul_output_mode", "softmax_precision"), REFUSED
                ),
            },
            # 1 is float32, in which GroupQueryAttention computes its softmax
            {"is_causal": 0, "qk_matmul_output_mode": 0, "softmax_precision": 1},
        ),
        ("", "RotaryEmbedding"): Operator(
            dict.fromkeys(("X", "cos_cache", "sin_cache", "position_ids"), CARRIED),
            {"interleaved": CARRIED, "rotary_embedding_dim": CARRIED, "num_heads": HONORED},
        ),
        (MICROSOFT, "RotaryEmbedding"): Operator(
            dict.fromkeys(("input", "position_ids", "cos_cache", "sin_cache"), CARRIED),
            {
                **dict.fromkeys(
                    ("interleaved", "is_packed_batching", "rotary_embedding_dim", "scale"), CARRIED
                ),
                "num_heads": HONORED,
            },
        ),
    }
)

# Those of UNREACHED that compute a mixture's experts.
_EXPERTS: Final = frozenset({"MoE", "QMoE"})
# Operators that have the weights of layers, but take no adapters.
UNREACHED: Final = frozenset(
    {
        ("", "ConvInteger"),
        ("", "QLinearConv"),
        ("", "QLinearMatMul"),
        *((MICROSOFT, "Attention"), (MICROSOFT, "QAttention"), (MICROSOFT, "DecoderAttention")),
        *((MICROSOFT, "PackedAttention"), (MICROSOFT, "LongformerAttention")),
        *((MICROSOFT, "DecoderMaskedSelfAttention"), (MICROSOFT, "QOrderedAttention")),
        *((MICROSOFT, "QOrderedLongformerAttention"), (MICROSOFT, "QOrderedMatMul")),
        *((MICROSOFT, "MatMulNBitsMlp"), (MICROSOFT, "MatMulNBitsQkv")),
        *((MICROSOFT, "EmbedLayerNormalization"), (MICROSOFT, "QEmbedLayerNormalization")),
        *((MICROSOFT, "FusedConv"), (MICROSOFT, "NhwcConv"), (MICROSOFT, "QLinearConv")),
        *((MICROSOFT, "FusedGemm"), (MICROSOFT, "QGemm"), (MICROSOFT, "GemmFloat8")),
        *((MICROSOFT, "GemmFastGelu"), (MICROSOFT, "TransposeMatMul")),
        *((MICROSOFT, "GatherBlockQuantized"), (MICROSOFT, "MatMulFpQ4")),
        *((MICROSOFT, "MoE"), (MICROSOFT, "QMoE")),
        ("com.microsoft.nchwc", "Conv"),
        ("com.ms.internal.nhwc", "Conv"),
    }
)


def operator_of(node: ir.Node) -> Operator | None:
    """The row of the table for `node`, or None."""
    return OPERATORS.get((_domain(node), node.op_type))


def problem_of(node: ir.Node) -> str | None:
    """The first unknown or refused input or attribute of `node`; None if there is none."""
    operator = operator_of(node)
    if operator is None:
        return f"{node.op_type} is no operator that can be rewritten"
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if index >= len(operator.inputs):
            return f"{node.op_type} has an input number {index}, which is not known"
        name, treatment = list(operator.inputs.items())[index]
        if treatment is REFUSED:
            return f"{node.op_type} has the input {name}"
    for name, attribute in node.attributes.items():
        if name not in operator.attributes:
            return f"{node.op_type} has the attribute {name}, which is not known"
        given = attribute.value
        if operator.attributes[name] is REFUSED and given != operator.refused.get(name):
            return f"{node.op_type} has {name} = {given}"
    return None


def check_operators(module: str, nodes: Iterable[ir.Node]) -> None:
    """Raise ExportError if one of `nodes`, which compute `module`, has a `problem_of`."""
    for node in nodes:
        problem = problem_of(node)
        if problem is not None:
            raise ExportError(
                f"{module}: {problem}: with it, its weight cannot be read or changed; give the"
                " graph without it"
            )


def is_unreached(node: ir.Node) -> bool:
    """Whether `node` has layers' weights but takes no adapters."""
    return (_domain(node), node.op_type) in UNREACHED


def unreached(graph: ir.Graph) -> dict[str, int]:
    """The number of nodes of each operator that has layers' weights but takes no adapters."""
    found: dict[str, int] = {}
    for node in graph:
        if is_unreached(node):
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def unreached_layers(graph: ir.Graph) -> str | None:
    """The hint about such operators if a module was not found; None if there are none."""
    counts = unreached(graph)
    if not counts:
        return None
    found = [f"{op} ({count})" for op, count in counts.items()]
    advice = "give the graph as it was before its operators were fused or quantized"
    if counts.keys() <= _EXPERTS:
        advice = "export the checkpoint, whose experts take them"  # no graph has them unfused
    return f"layers in {listed_names(found, 2)} take no adapters: {advice}"


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain
